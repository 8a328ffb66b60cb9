"""What plan and bench look at: a configuration and its base's sizes, without data."""

import pathlib
from collections.abc import Mapping
from typing import Any

from icae_jax.errors import UserError
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations
from icae_jax.models.families import sizes
from icae_jax.models.llama import ModelConfig
from icae_jax.performance import programs
from icae_jax.training import config_file
from icae_jax.training.config import SCRATCH, TrainConfig

GIB = 2**30
UNSET = "-"  # stands for a base or data that nobody named


def base_sizes(base: str) -> ModelConfig:
    """The sizes of a base: a folder or GGUF file, or a known hub id. UserError otherwise."""
    if base == UNSET:
        raise UserError(
            "base is not set; name it, --config.base=NAME, or a configuration that does; "
            f"known are {', '.join(sizes.NAMED)}"
        )
    is_here = pathlib.Path(base).is_dir() or locations.is_gguf(base)
    return bases.sizes(base) if is_here else sizes.find(base)


def load_config(config: str | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """The configuration that `--config` and its overrides name, for which no data need be named.

    UserError also if its base is unknown.
    """
    unset = {"base": UNSET, "data.train": UNSET, "init_from": SCRATCH}
    loaded = config_file.load(
        TrainConfig, config, {**overrides, "data.train_weights": ()}, fallbacks=unset
    )
    base_sizes(loaded.base)
    return loaded


def context_length(asked: int | None, config: TrainConfig) -> int:
    """Tokens of a context: as asked, by default the longest of data.context_lengths."""
    if asked is not None and asked < 2:
        raise UserError(f"--context_length is {asked}; give at least 2 tokens")
    return asked or max(config.data.context_lengths)


def check_positions(spec: programs.Spec) -> None:
    """UserError if a program needs more positions or layers than its base has."""
    spec.compression.encoder_config(spec.model)
    needed, most = programs.positions_needed(spec), spec.model.max_position_embeddings
    if needed > most:
        raise UserError(
            f"contexts of {spec.length} tokens need {needed} positions, the base has {most}; "
            "give a smaller --context_length, or a base with more"
        )
