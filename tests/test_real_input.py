"""A real pretrained base on real text, by the command line: the same path as a large run, at a size
that minutes allow.
"""

import pytest
from conftest import ROOT, shared

from icae_jax.cli import main as cli
from icae_jax.training import metrics

CONFIG = str(ROOT / "configs" / "icae.py")
SEVEN = "('q_proj','k_proj','v_proj','o_proj','gate_proj','up_proj','down_proj')"


def flags(phase, workdir, base, data, **changes):
    values = {
        "base": base,
        "dtype": "float32",
        "remat": "none",
        "batch_size": 16,
        "compression.k": 8,
        "compression.rate": 2,
        "lora.rank": 16,
        "lora.dropout": 0.0,
        "lora.targets": SEVEN,
        "data.context_weights": "()",
        "data.train": data / "train.jsonl.gz",
        "data.eval": data / "valid.jsonl.gz",
        "data.cache_dir": workdir.parent / "cache",
        "optimizer.learning_rate": 5e-3,
        "optimizer.warmup_steps": 10,
        "eval_examples": 32,
        "log_every": 50,
        "data.max_target_tokens": 64,
    } | changes
    return [
        "train",
        "--config",
        f"{CONFIG}:{phase}",
        "--workdir",
        str(workdir),
        *[f"--config.{k}={v}" for k, v in values.items()],
    ]


@pytest.mark.nightly
def test_stories_and_questions(tmp_path):
    """Breaks when nothing is learned, or when what is learned does not come from the memory."""
    base = shared("data/stories260K")
    steps = {"steps": 100, "eval_every": 100, "data.context_lengths": "(16,)"}
    assert (
        cli.main(flags("pretrain", tmp_path / "a", base, shared("data/tinystories"), **steps)) == 0
    )
    first, last = [
        line["eval"]
        for line in metrics.read_lines(tmp_path / "a" / "metrics.jsonl")
        if "eval" in line
    ]
    assert last["memory"]["ae"] < first["memory"]["ae"] - 0.5
    assert all(last["memory"][o] < last["wrong_memory"][o] - 0.03 for o in ("ae", "lm"))

    steps = {
        "steps": 4,
        "eval_every": 4,
        "data.context_lengths": "(256,)",
        "init_from": tmp_path / "a",
        "batch_size": 4,
    }
    steps |= {"eval_examples": 8, "optimizer.warmup_steps": 0}
    assert (
        cli.main(flags("finetune", tmp_path / "b", base, shared("data/fairytaleqa"), **steps)) == 0
    )
    first, last = [
        line["eval"]
        for line in metrics.read_lines(tmp_path / "b" / "metrics.jsonl")
        if "eval" in line
    ]
    assert last["memory"]["qa"] < first["memory"]["qa"]
