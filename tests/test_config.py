"""Configurations: conversion from nested dicts, and errors that name the field."""

import dataclasses

import pytest

from icae_jax.training import config as configs
from icae_jax.training.config import LoopConfig, ObjectivesConfig, OptimizerConfig, TrainConfig
from icae_jax.training.config_file import from_dict

RAW = {"base": "base", "data": {"train": "a.jsonl", "context_lengths": [16, 32]}, "steps": 100}
CONFIG = from_dict(TrainConfig, RAW)


def test_conversion():
    """Breaks when nested fields, lists or whole numbers for floats are not converted."""
    config = from_dict(
        TrainConfig,
        RAW | {"lora": {"rank": 4, "scale": 2, "targets": ["k_proj"]}, "optimizer": {"clip": 1}},
    )
    assert config.data.context_lengths == (16, 32) and config.lora.targets == ("k_proj",)
    assert isinstance(config.lora.scale, float) and isinstance(config.optimizer.clip, float)
    assert dataclasses.replace(config, lora=CONFIG.lora, optimizer=CONFIG.optimizer) == CONFIG
    assert config.jnp_dtype == "float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 1}, r"config\.stepz is not a field; the fields of config are .*steps"),
        ({"lora": {"r": 1}}, r"config\.lora\.r is not a field"),
        ({"steps": "9"}, r"config\.steps is '9'; expected int"),
        ({"steps": 9.0}, r"config\.steps is 9\.0; expected int"),
        ({"steps": True}, r"config\.steps is True; expected int"),
        ({"lora": {"scale": None}}, r"config\.lora\.scale is None; expected float"),
        (
            {"data": {"context_lengths": 16}},
            r"config\.data\.context_lengths is 16; expected a tuple of int",
        ),
        (
            {"data": {"context_lengths": [16, "32"]}},
            r"config\.data\.context_lengths is '32'; expected int",
        ),
        (
            {"data": {"train": "a,b", "train_weights": [1, "2"]}},
            r"config\.data\.train_weights is '2'; expected float",
        ),
        (
            {"data": {"train": "a,b", "train_weights": [1]}},
            r"data\.train_weights \(1\.0,\) must hold a weight >= 0 for each source",
        ),
        (
            {"lora": {"targets": "q_proj"}},
            r"config\.lora\.targets is 'q_proj'; expected a tuple of str",
        ),
    ],
)
def test_wrong_fields_and_types_are_named(change, message):
    """Breaks when a misspelt field is ignored, or a value of another type is accepted or cast."""
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, RAW | change)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (OptimizerConfig, {"learning_rate": 0.0}, "optimizer.learning_rate is 0.0"),
        (OptimizerConfig, {"learning_rate": float("nan")}, "optimizer.learning_rate is nan"),
        (OptimizerConfig, {"schedule": "linear"}, "optimizer.schedule is 'linear'"),
        (OptimizerConfig, {"clip": 0.0}, "clip > 0"),
        (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps"),
        (OptimizerConfig, {"decay_steps": -1}, "decay_steps"),
        (LoopConfig, {"steps": 0}, "steps is 0"),
        (LoopConfig, {"loss_chunk": -1}, "loss_chunk is -1"),
        (LoopConfig, {"eval_examples": -1}, "eval_examples is -1"),
        (
            LoopConfig,
            {"batch_size": 6, "accumulate": 4},
            "batch_size 6 is not a multiple of accumulate 4",
        ),
        (LoopConfig, {"dtype": "float16"}, "dtype is 'float16'"),
        (LoopConfig, {"remat": "some"}, "remat is 'some'"),
        (
            LoopConfig,
            {"attention": "flash"},
            "attention is 'flash'; choose from auto, xla, cudnn, splash",
        ),
    ],
)
def test_bad_values_are_named(kind, fields, message):
    """Breaks when a bad value gets through, or the error does not name it."""
    with pytest.raises(ValueError, match=message):
        kind(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": ""}, "base is not set"),
        ({"phase": "both"}, "phase is 'both'"),
        (
            {"phase": "finetune", "objectives": ObjectivesConfig(0.0, 0.0, 1.0)},
            "init_from is not set",
        ),
        ({"phase": "finetune", "init_from": "x"}, "objectives.lm is 0.5 in phase finetune"),
        ({"objectives": ObjectivesConfig(0.5, 0.5, 0.1)}, "objectives.qa is 0.1 in phase pretrain"),
        ({"objectives": ObjectivesConfig(0.0, 0.0, 0.0)}, "at least one of them positive"),
        ({"objectives": ObjectivesConfig(1.0, -1.0, 0.0)}, "give weights >= 0"),
        ({"data": configs.DataConfig()}, "data.train is not set"),
    ],
)
def test_impossible_phases_are_named(fields, message):
    """Breaks when a run starts that has nothing to train on, or nothing to start from."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)
