"""The files in configs/: every argument that they take gives a configuration that holds, with the papers' sizes."""

import pytest

from icae_jax.quickstart import get_config
from icae_jax.training.config import BaseConfig, TrainConfig, from_dict

ARGS = {
    "icae": ["pretrain", "finetune"],
    "x500": ["pretrain", "finetune", *[f"{phase}-{k}" for phase in ("pretrain", "finetune") for k in (16, 4, 1)]],
    "quickstart": ["pretrain", "finetune"],
}


def filled(name, arg):
    raw = get_config(name, arg) | {"base": "base", "init_from": "before"}
    raw["data"] |= {"train": "train.jsonl"}
    return from_dict(TrainConfig, raw)


@pytest.mark.parametrize(("name", "arg"), [(name, arg) for name, args in ARGS.items() for arg in args])
def test_every_argument_gives_a_configuration(name, arg):
    """Breaks when a file lacks a field, misspells one, or both phases get the same objectives."""
    config = filled(name, arg)
    phase = arg.partition("-")[0]
    assert config.phase == phase and ("qa" in config.objectives.weights) == (phase == "finetune")
    names = {field for group in get_config(name, arg).values() if isinstance(group, dict) for field in group}
    assert {"k_choices", "layout", "trigger", "targets", "template", "schedule", "context_lengths", "train_weights"} <= names


def test_papers_sizes():
    """Breaks when a configuration strays from the published sizes (arXiv 2307.06945, section 3; arXiv 2408.03094, section 4)."""
    icae = filled("icae", "pretrain")
    assert (icae.compression.k, icae.compression.segment_tokens, icae.lora.rank, icae.lora.targets) == (128, 512, 128, ("q_proj", "v_proj"))
    for k in (16, 4, 1):
        for phase, rate in (("pretrain", 1e-4), ("finetune", 5e-5)):
            x500 = filled("x500", f"{phase}-{k}")
            c = x500.compression
            assert (c.method, c.k, c.segment_tokens, c.layout, c.trigger, c.memory_init) == ("x500", k, 500, "clean", "bos", "normal")
            assert (x500.lora.rank, x500.lora.scale, x500.lora.dropout, x500.lora.targets) == (64, 0.5, 0.05, ("q_proj", "v_proj"))
            assert (x500.optimizer.learning_rate, x500.optimizer.warmup_steps, x500.optimizer.schedule) == (rate, 300, "constant")
            assert x500.objectives.template == "plain" and x500.data.context_lengths == (500,)
    assert filled("x500", "pretrain") == filled("x500", "pretrain-16")


@pytest.mark.parametrize(("name", "arg"), [("icae", "tune"), ("x500", "pretrain-2"), ("x500", "16"), ("quickstart", "")])
def test_an_unknown_argument_is_named(name, arg):
    with pytest.raises(ValueError, match=rf"configs/{name}\.py:.*choose :pretrain"):
        get_config(name, arg or "other")


def test_the_base_of_the_quickstart():
    assert from_dict(BaseConfig, get_config("tiny_base")).mixture
