"""Data sets of the model hub as sources, read with the `datasets` library.

Their names are `hf:ORG/NAME:SPLIT` or `hf:ORG/NAME/CONFIG@REVISION:SPLIT`.
"""

import re
from collections.abc import Iterator
from typing import Any

from icae_jax import errors
from icae_jax.data import tables
from icae_jax.data.forms import FIELDS
from icae_jax.data.rows import placed
from icae_jax.errors import UserError

PREFIX = "hf:"
_SPEC = re.compile(
    r"hf:(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?"
    r"(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.\[\]:%+-]+))?"
)
BATCH = 1000  # rows taken at once


def open_set(spec: str) -> Any:
    """A split of a data set, downloaded if the library's cache does not hold it.

    Returns a `datasets.Dataset`. UserError if it cannot be read, says why.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise UserError(
            f"{spec}: not the name of a data set on the hub; write hf:ORG/NAME:SPLIT, or "
            "hf:ORG/NAME/CONFIG@REVISION:SPLIT"
        )
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{spec}: a data set of the hub needs the datasets library: pip install datasets"
        ) from error
    # Versions before 4 run a set's own code, or ask the terminal.
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    offline = any(
        getattr(datasets.config, name, False) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )

    def load():
        try:
            return datasets.load_dataset(
                match["name"],
                match["config"],
                split=match["split"] or "train",
                revision=match["revision"],
            )
        # The library raises many types. All but transient ones mean that the set cannot be read.
        except Exception as error:
            if errors.transient(error) and not offline:
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if offline:
                reason += "; HF_HUB_OFFLINE is set"
            raise UserError(
                f"{spec}: cannot be read as a data set of the hub ({reason})"
            ) from error

    return errors.retrying(load, f"loading {spec}")


def identity(spec: str) -> list:
    """A set's identity: the library's fingerprint of name, revision and split; its rows."""
    dataset = open_set(spec)
    return ["hf", dataset._fingerprint, len(dataset)]


def raw_rows(spec: str, fields: frozenset[str] = FIELDS) -> Iterator[tuple[dict, str, str]]:
    """Yields (row as JSON would have it, its place, its number). UserError as for `open_set`.

    fields: the columns that are read.
    """
    dataset = open_set(spec)
    dataset = dataset.select_columns(tables.wanted(dataset.column_names, fields, spec))
    for start in range(0, len(dataset), BATCH):
        columns = dataset[start : start + BATCH]
        for number, values in enumerate(zip(*columns.values(), strict=True), start):
            where = f"{spec} row {number}"
            with placed(where):
                raw = tables.plain(dict(zip(columns, values, strict=True)))
            yield raw, where, str(number)
