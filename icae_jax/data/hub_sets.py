"""Data sets of the model hub as sources: `hf:ORG/NAME:SPLIT`, `hf:ORG/NAME/CONFIG@REVISION:SPLIT`, by the `datasets` library."""

import re
from collections.abc import Iterator

from icae_jax import errors
from icae_jax.data import rows, tables
from icae_jax.errors import UserError

PREFIX = "hf:"
_SPEC = re.compile(
    r"hf:(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.\[\]:%+-]+))?"
)
BATCH = 1000  # rows taken at once


def open_set(spec: str):
    """A split of a data set, downloaded where the library's cache does not hold it. UserError says what cannot be read, and why."""
    match = _SPEC.fullmatch(spec)
    if not match:
        raise UserError(
            f"{spec}: not the name of a data set on the hub; write hf:ORG/NAME:SPLIT, or hf:ORG/NAME/CONFIG@REVISION:SPLIT"
        )
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{spec}: a data set of the hub needs the datasets library: pip install datasets"
        ) from error
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = (
        False  # versions before 4 run a set's own code, or ask the terminal
    )

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
        except (
            Exception
        ) as error:  # of many kinds; all but what passes mean that it cannot be read here
            if errors.transient(error) and not offline:
                raise
            why = (" ".join(str(error).split())[:300] or type(error).__name__) + (
                "; HF_HUB_OFFLINE is set" if offline else ""
            )
            raise UserError(f"{spec}: cannot be read as a data set of the hub ({why})") from error

    return errors.retrying(load, f"loading {spec}")


def identity(spec: str) -> list:
    """What tells a set's content from another's: the library's fingerprint of name, revision and split, and its number of rows."""
    found = open_set(spec)
    return ["hf", found._fingerprint, len(found)]


def read(spec: str) -> Iterator[tuple[dict, str, str]]:
    """Yields (row as JSON would have it, where it stands, its number). UserError as for `open_set`."""
    found = open_set(spec)
    found = found.select_columns(tables.wanted(found.column_names, rows.FIELDS, spec))
    for start in range(0, len(found), BATCH):
        columns = found[start : start + BATCH]
        for at, values in enumerate(zip(*columns.values(), strict=True), start):
            with rows.placed(f"{spec} row {at}"):
                raw = tables.plain(dict(zip(columns, values, strict=True)))
            yield raw, f"{spec} row {at}", str(at)
