"""The compressor's task: what it refuses, what its losses may depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WORDS, write_jsonl

from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import TrainConfig, from_dict


@pytest.fixture(scope="module")
def raw(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)

    def words(n):
        return " ".join(rng.choice(WORDS[8:], size=n))

    source = write_jsonl(folder / "text.jsonl", [{"text": words(30)} for _ in range(9)])
    qa = [{"context": words(12), "question": words(4), "answers": [words(2)]} for _ in range(3)]
    return {
        "base": str(tiny_base),
        "batch_size": 4,
        "eval_examples": 9,
        "compression": {"k": 4, "rate": 4},
        "lora": {"rank": 4},
        "data": {"train": source, "eval": source, "context_lengths": [32], "cache_dir": str(folder / "cache")},
        "qa": write_jsonl(folder / "qa.jsonl", qa),
    }


def task(raw, **changes):
    return CompressorTask(from_dict(TrainConfig, {k: v for k, v in raw.items() if k != "qa"} | changes))


def test_eval_batches_read_their_own_and_another_memory(raw):
    """Breaks when the control reads the right memory somewhere, or examples are left out."""
    seen = 0
    for kinds in task(raw).eval_batches():
        real = kinds["memory"]["lengths"].sum(1) > 0
        seen += int(real.sum())
        assert kinds["memory"]["reads"].tolist() == [0, 1, 2, 3]
        other = kinds["wrong_memory"]["reads"]
        assert all(other[i] != i for i in np.flatnonzero(real)) and real.any()
        if real.sum() > 1:
            assert set(other[real]) == set(np.flatnonzero(real))
    assert seen == 9


def test_the_decoder_sees_the_context_through_the_memory_alone(raw):
    """Breaks when the context reaches the loss past the memory: gradients with respect to it must vanish when the memory is cut."""
    made = task(raw, objectives={"ae": 0.5, "lm": 0.5})
    batch = next(iter(made.eval_batches()))["memory"]
    trained = jax.tree.map(lambda x: x + 0.1, made.init())
    blank = batch | {"context": np.roll(batch["context"], 1, axis=0)}

    def loss(embeddings, batch, cut=False):
        # The encoder alone reads `embeddings`; the decoder's copy of the base is held apart.
        from icae_jax.compression import methods
        from icae_jax.objectives import loss as losses

        base = made.frozen | {"embed": embeddings}
        memory = methods.compress(made.model, base, trained, batch["context"], batch["lengths"], made.compression)
        if cut:
            memory = memory.replace(slots=jax.lax.stop_gradient(memory.slots))
        sums = losses.objective_sums(
            losses.label_losses(made.model, made.frozen, trained, memory, batch["targets"], made.heads, "servable", 64), batch["targets"]
        )
        return sum(s for s, _ in sums.values())

    run = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    value, gradient = run(made.frozen["embed"], batch, False)
    assert float(jnp.abs(gradient).max()) > 0
    assert not np.any(run(made.frozen["embed"], batch, True)[1])
    assert abs(float(value) - float(run(made.frozen["embed"], blank, False)[0])) > 1e-3


def test_fine_tuning_starts_from_the_adapter_and_checks_it(raw, tmp_path):
    """Breaks when the second phase starts anew, or with another shape than the first."""
    first = task(raw)
    trained = jax.tree.map(lambda x: x + 0.5, first.init())
    first.export(tmp_path, trained)
    qa = {"phase": "finetune", "init_from": str(tmp_path), "objectives": {"ae": 0.0, "lm": 0.0, "qa": 1.0}}
    qa["data"] = raw["data"] | {"train": raw["qa"], "eval": raw["qa"]}
    second = task(raw, **qa)
    for a, b in zip(jax.tree.leaves(second.init()), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"compression\.k is 8, but init_from .* was trained with 4; give --config\.compression\.k=4"):
        task(raw, **qa | {"compression": {"k": 8, "rate": 4}})
    with pytest.raises(ValueError, match=r"lora\.targets is \('k_proj',\)"):
        task(raw, **qa | {"lora": {"rank": 4, "targets": ["k_proj"]}})
    with pytest.raises(ValueError, match="init_from is not set"):
        task(raw, **qa | {"init_from": ""})


def test_trigger_token(raw):
    made = task(raw, compression={"k": 4, "rate": 4, "trigger_token": "cat"})
    row = made.init()["memory_table"][4]
    np.testing.assert_array_equal(row, made.frozen["embed"][WORDS.index("cat")])
    with pytest.raises(ValueError, match="trigger_token 'nonsense' is not a token"):
        task(raw, compression={"k": 4, "rate": 4, "trigger_token": "nonsense"}).init()
