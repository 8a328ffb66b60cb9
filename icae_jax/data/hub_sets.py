"""Data sets of the model hub as sources: `hf:ORG/NAME:SPLIT`, `hf:ORG/NAME/CONFIG@REVISION:SPLIT`, by the `datasets` library."""

import re
from collections.abc import Iterator

from icae_jax import errors
from icae_jax.data import tables
from icae_jax.errors import UserError

PREFIX = "hf:"
_SPEC = re.compile(r"hf:(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.\[\]:%+-]+))?")
BATCH = 1000  # rows taken at once


def open_set(spec: str):
    """A split of a data set, downloaded where the library's cache does not hold it. UserError says what cannot be read, and why."""
    match = _SPEC.fullmatch(spec)
    if not match:
        raise UserError(f"{spec}: not the name of a data set on the hub; write hf:ORG/NAME:SPLIT, or hf:ORG/NAME/CONFIG@REVISION:SPLIT")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{spec}: a data set of the hub needs the datasets library: pip install datasets") from error
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # versions before 4 run a set's own code, or ask the terminal

    def load():
        try:
            return datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train", revision=match["revision"])
        except Exception as error:  # of many kinds; all but what passes mean that it cannot be read here
            if errors.transient(error) and not _offline(error):
                raise
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"{spec}: cannot be read as a data set of the hub ({why})") from error

    return errors.retrying(load, f"loading {spec}")


def _offline(error):
    return any(type(link).__name__ in ("OfflineModeIsEnabled", "LocalEntryNotFoundError") for link in errors.causes(error))


def identity(spec: str) -> list:
    """What tells a set's content from another's: its name, the library's own fingerprint of it, and its number of rows."""
    made = open_set(spec)
    return [spec.partition(":")[2], made._fingerprint, len(made)]


def read(spec: str) -> Iterator[tuple[dict, str, str]]:
    """Yields (row as JSON would have it, where it stands, its number). UserError as for `open_set`."""
    made = open_set(spec)
    for start in range(0, len(made), BATCH):
        columns = made[start : start + BATCH]
        for at, values in enumerate(zip(*columns.values(), strict=True), start):
            yield tables.plain(dict(zip(columns, values, strict=True))), f"{spec} row {at}", str(at)
