"""Every method through the whole package: trained, saved, loaded, asked; several k in one step."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import TINY, WORDS, close, random_params, random_trained_of, write_jsonl

from icae_jax.compression.memory import KV, Slots
from icae_jax.data.drawing import StaticInt, StaticInts
from icae_jax.inference.loading import load
from icae_jax.training import train
from icae_jax.training.compressor_task import CompressorLosses, CompressorTask
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict
from icae_jax.training.metrics import read_lines

TEXTS = [" ".join(WORDS[20:40]), " ".join(WORDS[30:37])]
RUNS = {
    "pooled": {"k_choices": [2, 4], "encoder_layers": 1, "decoder_lora": True},
    "sac": {"anchor_vectors": "each", "k_choices": [2, 4], "encoder_mask": "slots"},
    "icae": {"encoder_mask": "all", "encoder_layers": 2, "layout": "uniform"},
    "x500": {"encoder_mask": "slots", "decoder_lora": True},
}


@pytest.fixture(scope="module")
def raw(tiny_base, tmp_path_factory):
    """The fields of a fine-tuning (AE and QA) of two steps."""
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)

    def words(n):
        return " ".join(rng.choice(WORDS[8:], size=n))

    rows = [{"context": words(12), "question": words(3), "answers": [words(2)]} for _ in range(6)]
    source = write_jsonl(folder / "qa.jsonl", rows)
    return {
        "base": str(tiny_base),
        "phase": "finetune",
        "init_from": "scratch",
        "steps": 2,
        "batch_size": 2,
        "log_every": 1,
        "lora": {"rank": 2},
        "objectives": {"ae": 0.5, "lm": 0.0, "qa": 0.5},
        "data": {
            "train": source,
            "eval": source,
            "context_lengths": [24],
            "cache_dir": str(folder / "cache"),
        },
    }


def configured(raw, method, **fields):
    compression = {"method": method, "k": 4, "rate": 4.0, **RUNS[method]}
    return from_dict(TrainConfig, raw | {"compression": compression} | fields)


@pytest.mark.nightly
@pytest.mark.parametrize("method", RUNS)
def test_a_run_of_every_method(raw, tmp_path, method):
    """Breaks when a method's tree is not trained as a whole, checkpointed, exported, loaded or read
    as it was written.
    """
    config = configured(raw, method)
    task = CompressorTask(config, workdir=tmp_path / "run")
    start = jax.device_get(task.init())
    assert train.train(config, task, tmp_path / "run") == 0
    compressor = load(tmp_path / "run")
    assert compressor.config == task.compression
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start, compressor.trained)
    assert {name: max(jax.tree.leaves(x)) > 0 for name, x in moved.items()} == dict.fromkeys(
        start, True
    )
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "train" in line]
    # Drawn numbers of memory tokens are logged; where all are trained, none is drawn.
    assert all(("k" in line) == (method == "sac") for line in lines)

    k = 3 if compressor.config.any_k else None
    memory = compressor.compress(TEXTS, k=k)
    assert type(memory) is {"hidden": Slots, "kv": KV}[compressor.config.spec.keeps]
    assert memory.tokens.tolist() == [2 * (k or 4), k or 4]
    alone = compressor.compress(TEXTS[1], k=k)
    axis = memory.TEXT_AXIS
    for name, x in alone.contents.items():
        got = np.take(np.take(memory.contents[name], [1], axis), range(k or 4), axis + 1)
        close(got, x)
    compressor.save(tmp_path / "m.safetensors", memory)
    loaded, _ = compressor.load_memory(tmp_path / "m.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded, memory)
    answers = compressor.ask(loaded, [["what ?", "who ?"], ["why ?"]], 4)
    assert [len(row) for row in answers] == [2, 1]
    assert len(compressor.restore(loaded, 4)) == 2
    assert all(score.log_prob < 0 for score in compressor.score(loaded, TEXTS))


@pytest.mark.nightly
def test_a_step_sums_over_all_numbers_of_memory_tokens(raw):
    """Breaks when one of them is left out or counted twice, when their labels are not counted, or
    when the gradient is not that of all together.
    """
    config = configured(
        raw, "pooled", attention="xla", objectives={"ae": 0.0, "lm": 0.0, "qa": 1.0}
    )
    task = CompressorTask(config)
    batch = next(iter(task.train_batches(0, 1)))
    assert batch["k"] == StaticInts((2, 4)) and config.ks == (2, 4)
    losses = CompressorLosses(config, TINY, config.compression)
    params, tree = random_params(TINY), random_trained_of(config.compression)

    def total(tree, k):
        sums = losses.losses(tree, params, batch | {"k": k}, None)
        return sum(value for value, _ in sums.values()), sums

    run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    (_, both), gradient = run(tree, StaticInts((2, 4)))
    singles = [run(tree, StaticInt(k)) for k in (2, 4)]
    for objective, (value, count) in both.items():
        of_each = [sums[objective] for (_, sums), _ in singles]
        close(value, sum(v for v, _ in of_each))
        assert float(count) == 2 * float(of_each[0][1]) > 0
        assert float(losses.counts(batch)[objective]) == float(count)
    gradients = [gradient, *(g for _, g in singles)]
    for g in gradients:  # these questions have no special token, and slots no vectors
        assert not np.asarray(g.pop("memory_table")).any()
    whole, *parts = gradients
    jax.tree.map(close, whole, jax.tree.map(lambda a, b: a + b, *parts))
    drawn = dataclasses.replace(config, sum_k=False)
    assert drawn.ks == () and configured(raw, "sac").ks == ()
    batches = CompressorTask(drawn).train_batches(0, 8)
    assert {int(b["k"]) for b in batches} == {2, 4}
