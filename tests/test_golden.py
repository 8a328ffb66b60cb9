"""The reference implementation's outputs on tiny random models: slots, loss, logits, gradients,
greedy text.

Breaks when any part of the encoder, the decoder layouts, the loss or the gradients strays from the
reference.
"""

import functools
import json

import decoding_helper
import greedy_loop
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDEN, head_kernel

from icae_jax.compression import encoder
from icae_jax.compression import layout as layouts
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.segments import Contexts, segment_contexts, segment_shape
from icae_jax.compression.trained import SPECIAL_ROWS
from icae_jax.interop.adapters import lora_tensors
from icae_jax.interop.hub import weights
from icae_jax.models import llama
from icae_jax.models.families import config_json
from icae_jax.models.llama import FrozenModel
from icae_jax.objectives import loss, targets
from icae_jax.objectives.packing import pack


def cases(pattern):
    """The case folders of one method; one skipped parameter where there are none."""
    found = sorted(p.name for p in GOLDEN.glob(pattern) if (p / "meta.json").exists())
    return found or [
        pytest.param(
            "", marks=pytest.mark.skip(reason=f"no reference outputs {pattern} under {GOLDEN}")
        )
    ]


NIGHTLY = pytest.mark.nightly
PADDED = 96  # the longest target's tokens
OBJECTIVES = ("ae", "lm", "ft_v1")  # behind no head


def close(got, want, bound=1e-4):
    """Largest difference relative to the largest reference value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= bound * np.abs(want).max()


class Case:
    def __init__(self, name):
        self.folder = GOLDEN / name
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.config = config_json.read_config(self.folder / "base")
        self.base = weights.load_params(self.folder / "base", self.config)
        tensors = safetensors.numpy.load_file(self.folder / "icae.safetensors")
        table = jnp.asarray(tensors["memory_token_embed.weight"])
        self.trained = {
            "lora": lora_tensors.lora_from_hub(tensors, self.config),
            "memory_table": table,
        }
        self.model = llama.Llama(
            self.config, lora_scale=self.meta["lora_alpha"] / self.meta["lora_r"]
        )
        rate = self.meta["mean_compression_rate"]
        self.compression = CompressionConfig(
            k=self.meta["mem_size"], rate=rate, layout="sequential"
        )

    def compress(self, trained, base, input_ids):
        ids, lengths = segment_contexts([input_ids], self.compression)
        return encoder.compress(
            FrozenModel(self.model, base),
            trained,
            Contexts(ids, lengths, self.compression.k),
            self.compression,
        )

    def split(self, sequence):
        """A reference decoder sequence as (head, the rest in our ids)."""
        first_slot, k = self.meta["vocab_size_with_pad"], self.meta["mem_size"]
        slot = (sequence >= first_slot) & (sequence < first_slot + k)
        assert slot.any()
        start, stop = np.flatnonzero(slot)[[0, -1]]
        rest = sequence[stop + 1 :]
        special = rest >= first_slot + k
        return tuple(sequence[:start].tolist()), np.where(
            special, rest - (first_slot + k) - SPECIAL_ROWS, rest
        )


# --------------------------------------------------------------------------------------------- ICAE


@pytest.fixture(scope="module", params=cases("icae_*"))
def case(request):
    return Case(request.param)


@functools.partial(jax.jit, static_argnames=("model", "compression", "head"))
@functools.partial(jax.value_and_grad, has_aux=True, argnums=0)
def loss_and_logits(trained, base, segments, packed, ids, *, model, compression, head):
    """Mean loss of one objective's labels, and the logits at every one of ids, the target's."""
    batch = {"any": packed}
    memory = encoder.compress(
        FrozenModel(model, base), trained, Contexts(*segments, compression.k), compression
    )
    losses = loss.label_losses(
        Decoder.of(FrozenModel(model, base), trained),
        memory,
        batch,
        {"any": head},
        layouts.SEQUENTIAL,
        7,
    )
    total, count = loss.objective_sums(losses, batch)["any"]
    fixed, memory = jax.lax.stop_gradient(
        (trained, memory)
    )  # nothing of the logits is wanted but themselves
    prefix = memory.read(Decoder(FrozenModel(model, base), None), head)
    hidden = Decoder.of(FrozenModel(model, base), fixed).label_hidden(
        prefix, prefix.end, ids, jnp.arange(PADDED)[None, None]
    )
    return total / count, hidden @ head_kernel(base)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_logits_and_gradients(case, objective):
    assert_equal_to_reference(case, objective)


# A head is the same tokens behind the same base whatever the memory's sizes: one case a day, the
# others by night.
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=NIGHTLY) if "v2_mistral" not in c else c for c in cases("icae_*")],
    indirect=True,
)
def test_loss_logits_and_gradients_behind_a_head(case):
    assert_equal_to_reference(case, "ft")


def assert_equal_to_reference(case, objective):
    path = case.folder / f"{objective}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not part of this case")
    golden = np.load(path)
    head, rest = case.split(golden["prompt_answer_ids"][0])
    labels = golden["labels"][0]
    first_label = int(np.flatnonzero(labels >= 0)[0]) - (len(labels) - len(rest))
    # Padded to one length, so that objectives behind the same head are one program.
    packed = pack([[targets.Target(rest.tolist(), first_label)]], 1, PADDED, PADDED)
    segments = segment_contexts([golden["input_ids"][0]], case.compression)
    ids = np.pad(rest, (0, PADDED - len(rest))).astype(np.int32)[None, None]
    (value, logits), gradient = loss_and_logits(
        case.trained,
        case.base,
        segments,
        packed,
        ids,
        model=case.model,
        compression=case.compression,
        head=head,
    )
    close(value, golden["loss"])

    names = lora_tensors.lora_to_hub(
        gradient["lora"], prefix="icae.base_model.model.", infix=".default"
    )
    names["memory_token_embed.weight"] = gradient["memory_table"]
    want = {k.removeprefix("grad/"): golden[k] for k in golden if k.startswith("grad/")}
    assert len(want) > 1 and set(want) == set(names)
    for name, value in want.items():
        assert np.abs(value).max() > 0
        close(names[name], value)

    close(np.asarray(logits)[0, : len(rest)], golden["logits"][0, -len(rest) :])


def test_slots_and_greedy_restoration(case):
    golden = np.load(case.folder / "compress.npz")
    ids = golden["input_ids"][0]
    assert segment_shape(len(ids), case.compression)[0] == case.meta["num_segments"]

    @jax.jit
    def written_and_read(trained, base):
        memory = case.compress(trained, base, ids)
        return memory.slots, memory.read(Decoder(FrozenModel(case.model, base), None))

    slots, prefix = written_and_read(case.trained, case.base)
    close(np.asarray(slots)[0], golden["slots"])

    # The first version of the reference stops on id 1, the second on id 2; what follows a stop does
    # not count.
    stop = 1 if list(case.folder.glob("*zeroweight*")) else 2
    want = golden["ae_greedy"].tolist()
    want = want[: want.index(stop)] if stop in want else want
    out = decoding_helper.greedy(
        Decoder(FrozenModel(case.model, case.base), case.trained["memory_table"]),
        prefix,
        greedy_loop.Prompts(
            np.full((1, 1), targets.AE, np.int32), np.ones(1, np.int32), prefix.end
        ),
        max_new_tokens=len(golden["ae_greedy"]),
        stop_ids=(stop,),
    )
    got = np.asarray(out.ids)[0, : int(np.asarray(out.lengths)[0])]
    assert len(want) > 0 and got.tolist() == want


# ----------------------------------------------------------------------------------- 500xCompressor


class X500Case:
    """Texts padded with eos to a fixed length, memory in the decoder's future, `<s>` as trigger,
    loss on the padding too.
    """

    def __init__(self, name):
        self.folder = GOLDEN / name
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.config = config_json.read_config(self.folder / "base")
        self.base = weights.load_params(self.folder / "base", self.config)
        tensors = safetensors.numpy.load_file(self.folder / "lora_params.safetensors")
        k, length = self.meta["num_mem"], self.meta["max_length"]
        self.compression = CompressionConfig(
            method="x500", k=k, rate=length / k, layout="reference"
        )
        assert self.compression.segment_tokens == length
        table = np.zeros((k + SPECIAL_ROWS, self.config.hidden_size), np.float32)
        table[:k] = tensors["memory_embeddings"][0]
        self.trained = {
            "lora": lora_tensors.lora_from_hub(tensors, self.config),
            "memory_table": jnp.asarray(table),
        }
        self.model = llama.Llama(
            self.config, lora_scale=self.meta["lora_alpha"] / self.meta["lora_r"]
        )
        self.golden = np.load(self.folder / "ae.npz")
        # The texts as they were before padding.
        eos = self.meta["eos"]
        self.texts = [
            row[: np.flatnonzero(row != eos)[-1] + 1].tolist() for row in self.golden["input_ids"]
        ]
        self.framing = targets.Framing((), self.meta["bos"], eos)

    def compress(self, trained, base):
        ids, lengths = segment_contexts(self.texts, self.compression, pad_id=self.meta["eos"])
        assert ids[:, 0].tolist() == self.golden["input_ids"].tolist()
        return encoder.compress(
            FrozenModel(self.model, base),
            trained,
            Contexts(ids, lengths, self.compression.k),
            self.compression,
        )


@pytest.fixture(scope="module", params=cases("x500_*"))
def x500_case(request):
    return X500Case(request.param)


def test_x500_loss_logits_and_gradients(x500_case):
    """Breaks when padding is masked, memory or targets sit at other positions, or the loss leaves
    the padding out.
    """
    case, golden, length = x500_case, x500_case.golden, x500_case.meta["max_length"]
    rows = [[targets.ae_target(text, case.framing, padded_to=length)] for text in case.texts]
    packed = pack(rows, 1, length + 1, length + 1)
    assert (
        packed["labels"][:, 0].tolist() == golden["labels"].tolist() and packed["label_mask"].all()
    )
    batch = {"ae": packed}

    def loss_of(trained, base, batch):
        memory = case.compress(trained, base)
        losses = loss.label_losses(
            Decoder.of(FrozenModel(case.model, base), trained),
            memory,
            batch,
            {"ae": ()},
            layouts.REFERENCE,
            7,
        )
        total, count = loss.objective_sums(losses, batch)["ae"]
        fixed, memory = jax.lax.stop_gradient((trained, memory))
        prefix = memory.read(Decoder(FrozenModel(case.model, base), None))
        every = jnp.broadcast_to(jnp.arange(length + 1), (len(case.texts), 1, length + 1))
        hidden = Decoder.of(FrozenModel(case.model, base), fixed).label_hidden(
            prefix, prefix.end, batch["ae"]["ids"], every
        )
        return total / count, hidden @ head_kernel(base)

    (value, logits), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
        case.trained, case.base, batch
    )
    close(value, golden["loss"])
    close(logits, golden["logits"])

    names = lora_tensors.lora_to_hub(
        gradient["lora"], prefix="llama.base_model.model.", infix=".default"
    )
    names["memory_embeddings"] = gradient["memory_table"][None, : case.compression.k]
    want = {k.removeprefix("grad/"): golden[k] for k in golden if k.startswith("grad/")}
    assert sum(np.abs(value).max() > 0 for value in want.values()) > 1 and set(want) <= set(names)
    for name, value in want.items():
        close(names[name], value)
    # The reference has no gradient where nothing of the memory depends: the last layer's queries.
    assert all(not np.any(names[name]) for name in set(names) - set(want))


def test_x500_memory_and_greedy_regeneration(x500_case):
    """Breaks when K is kept or rotated for other positions, or decoding starts elsewhere than
    at m.
    """
    case, golden = x500_case, x500_case.golden
    prefix = jax.jit(
        lambda trained, base: case.compress(trained, base).read(
            Decoder(FrozenModel(case.model, base), None)
        )
    )(case.trained, case.base)
    close(np.transpose(prefix.k, (0, 1, 3, 2, 4)), golden["memory_k"])
    close(np.transpose(prefix.v, (0, 1, 3, 2, 4)), golden["memory_v"])

    want, B = golden["regenerate_greedy"], len(case.texts)
    out = decoding_helper.greedy(
        Decoder(FrozenModel(case.model, case.base), case.trained["memory_table"]),
        prefix,
        greedy_loop.Prompts(
            np.full((B, 1), case.framing.trigger, np.int32), np.ones(B, np.int32), prefix.end
        ),
        max_new_tokens=want.shape[1],
        stop_ids=(case.framing.eos,),
    )
    for row, got, length in zip(
        want.tolist(), np.asarray(out.ids), np.asarray(out.lengths), strict=True
    ):
        row = row[: row.index(case.framing.eos)] if case.framing.eos in row else row
        assert len(row) > 0 and got[:length].tolist() == row
