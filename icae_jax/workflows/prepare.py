"""Prepares data sets: downloaded files become TFDS sets to train and evaluate on."""

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from icae_jax import errors, lock
from icae_jax.data.builders.inputs import Request
from icae_jax.data.tfds_sets import PREFIX, SPLIT_OF_MONTH
from icae_jax.errors import UserError

PROCESSES = min(8, os.cpu_count() or 1)
FLAG_OF_FIELD = {"paths": "from", "only": "only", "patterns": "split", "field": "field"}


def make_request(
    builder_class: Any,
    set_name: str,
    paths: Sequence[str] = (),
    only: str | None = None,
    splits: Sequence[str] = (),
    field: str | None = None,
) -> Request:
    """The `Request` of flags as text. UserError names a flag that this set does not take.

    only: names joined by commas. splits: each NAME=GLOB.
    """
    given = {
        "paths": tuple(paths),
        "only": tuple(name.strip() for name in (only or "").split(",") if name.strip()),
        "patterns": tuple(map(_pattern, splits)),
        "field": field,
    }
    given = {name: value for name, value in given.items() if value}
    for name in given:
        flag = FLAG_OF_FIELD[name]
        if flag not in builder_class.FLAGS:
            taken = ", ".join(f"--{flag}" for flag in builder_class.FLAGS)
            raise UserError(f"--{flag}: {set_name} does not take it; it takes {taken}")
    return Request(**given)


def _pattern(text):
    split, equals, pattern = text.partition("=")
    if not (split and equals and pattern):
        raise UserError(
            f"--split {text}: give NAME=GLOB, such as --split train='corpus/train-*.jsonl.zst'"
        )
    return split, pattern


def prepare(
    builder_class: Any,
    request: Request,
    tfds_dir: str | os.PathLike,
    name: str = "",
    processes: int = PROCESSES,
    strict: str = "",
) -> tuple[Any, bool]:
    """Prepares a set; returns (its TFDS builder, whether there was anything to do).

    name: tells it from others of its kind. strict: see `builders.common.LocalBuilder`.
    UserError names what is absent or malformed; nothing then counts as prepared.
    """
    import tensorflow_datasets as tfds
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # TFDS warns about every --name
    if processes < 1:
        raise UserError(f"--processes is {processes}; it must be positive")
    if name and not re.fullmatch(r"[A-Za-z]\w*", name):
        raise UserError(f"--name is {name!r}; give letters, digits and _, a letter first")
    if "://" in str(tfds_dir):
        raise UserError(
            f"--tfds_dir {tfds_dir}: sets are prepared in a local folder; "
            "copy it there when it is done"
        )
    config = tfds.core.BuilderConfig(name=name, version=builder_class.VERSION) if name else None
    builder = builder_class(
        request=request, processes=processes, strict=strict, data_dir=tfds_dir, config=config
    )
    with errors.naming(f"--tfds_dir {tfds_dir}", "give a folder that can be written"):
        pathlib.Path(tfds_dir).mkdir(parents=True, exist_ok=True)
    if builder.data_path.exists():
        return builder, builder.prepare()
    with lock.only_writer(builder.data_path.parent, "--tfds_dir"):
        return builder, builder.prepare()


def describe(builder: Any, prepared_now: bool) -> dict[str, Any]:
    """What a prepared set holds, as plain values.

    months: the splits that are months. noted: counts of what was noticed while preparing.
    sources: `{what to give as data.train: examples}`. incomplete: folders left by preparations
    that were killed, or are running.
    """
    splits = {
        split: {"examples": info.num_examples, "shards": info.num_shards}
        for split, info in builder.info.splits.items()
    }
    return {
        "path": str(builder.data_path),
        "prepared_now": prepared_now,
        "left_out": str(builder.sieve) if builder.sieve.left_out else "",
        "splits": splits,
        "months": [split for split in splits if SPLIT_OF_MONTH.fullmatch(split)],
        "noted": dict(builder.info.metadata["noted"]),
        "incomplete": [str(folder) for folder in builder.left_overs()],
        "sources": sources_of(builder),
    }


def sources_of(builder: Any) -> dict[str, int]:
    """What to give as data.train or data.eval: `{source: examples}`; months as one range."""
    config = f"/{builder.builder_config.name}" if builder.builder_config else ""
    name = f"{PREFIX}{builder.name}{config}"
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    months = sorted(split for split in sizes if SPLIT_OF_MONTH.fullmatch(split))
    if not months:
        return {f"{name}:{split}": size for split, size in sizes.items()}
    first, last = (month.replace("_", "-") for month in (months[0], months[-1]))
    months_range = f"{first}..{last}" if len(months) > 1 else first
    return {f"{name}:{months_range}": sum(sizes[month] for month in months)}
