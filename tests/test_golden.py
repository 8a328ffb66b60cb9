"""The reference implementation's outputs on tiny random models: slots, loss, logits, gradients, greedy text.

Breaks when any part of the encoder, the decoder layouts, the loss or the gradients strays from the reference.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDEN

from icae_jax.compression import icae
from icae_jax.inference import generate
from icae_jax.interop import adapter as adapters
from icae_jax.interop import base as bases
from icae_jax.models import llama
from icae_jax.objectives import loss, targets

CASES = sorted(p.name for p in GOLDEN.glob("icae_*") if (p / "meta.json").exists())
OBJECTIVES = ("ae", "lm", "ft", "ft_v1")
pytestmark = pytest.mark.skipif(not CASES, reason=f"no reference outputs under {GOLDEN}")


def close(got, want, bound=1e-4):
    """Largest difference relative to the largest reference value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= bound * np.abs(want).max()


class Case:
    def __init__(self, name):
        self.folder = GOLDEN / name
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.config = bases.read_config(self.folder / "base")
        self.base = bases.load_params(self.folder / "base", self.config)
        tensors = safetensors.numpy.load_file(self.folder / "icae.safetensors")
        table = jnp.asarray(tensors["memory_token_embed.weight"])
        self.trained = {"lora": adapters.lora_from_hub(tensors, self.config), "memory_table": table}
        self.model = llama.Llama(self.config, lora_scale=self.meta["lora_alpha"] / self.meta["lora_r"])
        rate = self.meta["mean_compression_rate"]
        self.compression = icae.CompressionConfig(k=self.meta["mem_size"], rate=rate, layout="sequential")

    def compress(self, trained, base, input_ids):
        ids, lengths = icae.segment_contexts([input_ids], self.compression)
        return icae.compress(self.model, base, trained, jnp.asarray(ids), jnp.asarray(lengths), self.compression)

    def split(self, sequence):
        """A reference decoder sequence as (head, the rest in our ids)."""
        first_slot, k = self.meta["vocab_size_with_pad"], self.meta["mem_size"]
        slot = (sequence >= first_slot) & (sequence < first_slot + k)
        assert slot.any()
        start, stop = np.flatnonzero(slot)[[0, -1]]
        rest = sequence[stop + 1 :]
        special = rest >= first_slot + k
        return tuple(sequence[:start].tolist()), np.where(special, rest - (first_slot + k) - icae.SPECIAL_ROWS, rest)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_logits_and_gradients(case, objective):
    path = case.folder / f"{objective}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not part of this case")
    golden = np.load(path)
    head, rest = case.split(golden["prompt_answer_ids"][0])
    labels = golden["labels"][0]
    first_label = int(np.flatnonzero(labels >= 0)[0]) - (len(labels) - len(rest))
    target = targets.Target(rest.tolist(), first_label)
    batch = {objective: {k: jnp.asarray(v) for k, v in targets.pack([[target]], 1, len(rest), len(rest) - first_label).items()}}

    def loss_of(trained, base):
        memory = case.compress(trained, base, golden["input_ids"][0])
        losses = loss.label_losses(case.model, base, trained, memory, batch, {objective: head}, "sequential", 7)
        total, count = loss.objective_sums(losses, batch)[objective]
        ids, at = jnp.asarray(rest, jnp.int32)[None, None], jnp.arange(len(rest))[None, None]
        prefix = icae.read(case.model, base, memory, head)
        hidden = loss.label_hidden(case.model, base, trained, prefix, prefix.end, ids, at)
        return total / count, hidden @ llama.head_kernel(base)

    (value, logits), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(case.trained, case.base)
    close(value, golden["loss"])

    names = adapters.lora_to_hub(gradient["lora"], prefix="icae.base_model.model.", infix=".default")
    names["memory_token_embed.weight"] = gradient["memory_table"]
    want = {k.removeprefix("grad/"): golden[k] for k in golden if k.startswith("grad/")}
    assert len(want) > 1 and set(want) == set(names)
    for name, value in want.items():
        assert np.abs(value).max() > 0
        close(names[name], value)

    close(logits[0], golden["logits"][0, -len(rest) :])


def test_slots_and_greedy_restoration(case):
    golden = np.load(case.folder / "compress.npz")
    ids = golden["input_ids"][0]
    assert icae.segment_shape(len(ids), case.compression)[0] == case.meta["num_segments"]
    memory = jax.jit(lambda trained, base: case.compress(trained, base, ids))(case.trained, case.base)
    close(memory.slots[0], golden["slots"])

    # The first version of the reference stops on id 1, the second on id 2; what follows a stop does not count.
    stop = 1 if list(case.folder.glob("*zeroweight*")) else 2
    want = golden["ae_greedy"].tolist()
    want = want[: want.index(stop)] if stop in want else want
    prefix = jax.jit(lambda base, memory: icae.read(case.model, base, memory))(case.base, memory)
    out = generate.greedy(
        case.model, case.base, case.trained["memory_table"], prefix, prefix.end, jnp.full((1, 1), targets.AE), jnp.ones((1,), int),
        max_new_tokens=len(golden["ae_greedy"]), stop_ids=(stop,),
    )  # fmt: skip
    got = np.asarray(out.ids[0][: int(out.lengths[0])])
    assert len(want) > 0 and got.tolist() == want
