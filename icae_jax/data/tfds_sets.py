"""Prepared TFDS sets as sources: `tfds:NAME:SPLIT`.

Of a set with a split for each month, `tfds:NAME:2024-01..2024-04` is a range of months.
"""

import hashlib
import re
from collections.abc import Iterator

from icae_jax import errors
from icae_jax.data import tables
from icae_jax.data.rows import placed
from icae_jax.errors import UserError

PREFIX = "tfds:"
BATCH = 1000  # rows read at once, which takes a third of the time of single ones
MONTHS = re.compile(r"(\d{4}-\d\d)?(\.\.)?(\d{4}-\d\d)?")
SPLIT_OF_MONTH = re.compile(r"\d{4}_\d\d")


def open_set(spec: str, tfds_dir: str | None = None) -> tuple:
    """(the set's builder, names of the splits that a source asks for).

    UserError if the set cannot be read or lacks the splits.
    """
    import tensorflow_datasets as tfds  # imported late: only these sources need it

    name, _, split = spec.removeprefix(PREFIX).partition(":")
    try:
        builder = tfds.builder(name, data_dir=tfds_dir or None)
        present = list(builder.info.splits)
    # tfds raises many types. All but transient ones mean that the set cannot be read.
    except Exception as error:
        if errors.transient(error):
            raise
        raise _unreadable(spec, tfds_dir, error) from error
    if not present:
        raise _unreadable(spec, tfds_dir, "it is not prepared")
    return builder, _splits(spec, split, present)


def _unreadable(spec, tfds_dir, error):
    lines = (line for line in str(error).splitlines() if line.strip())
    reason = next(lines, type(error).__name__)  # in further lines TFDS lists all sets there are
    return UserError(
        f"{spec}: cannot be read as a prepared TFDS set in data.tfds_dir {tfds_dir!r} ({reason}); "
        "icae prepare makes some"
    )


def _splits(spec, split, present):
    """The splits that `split` means: itself, or the months of a range, both ends included."""
    match = MONTHS.fullmatch(split)
    if not split or not match:
        return [split or "train"]
    first, dots, last = match.groups()
    if not dots and last:
        raise UserError(
            f"{spec}: two months without .. between them; write FIRST..LAST, such as "
            "2024-01..2024-04"
        )
    first, last = (first or "0000-00"), (last or "9999-99") if dots else first
    months = sorted(s.replace("_", "-") for s in present if SPLIT_OF_MONTH.fullmatch(s))
    if not months:
        raise UserError(f"{spec}: the set has no months; its splits are {', '.join(present)}")
    chosen = [m.replace("-", "_") for m in months if first <= m <= last]
    if not chosen:
        raise UserError(
            f"{spec}: no month of the set is in this range; it has {len(months)}, from {months[0]} "
            f"to {months[-1]}"
        )
    return chosen


def identity(spec: str, tfds_dir: str | None = None) -> list:
    """A source's identity: the set's name, its splits, and hashes of the set's description."""
    builder, splits = open_set(spec, tfds_dir)
    paths = [builder.data_path / name for name in ("dataset_info.json", "metadata.json")]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()]
    return [builder.info.full_name, splits, *hashes]


def raw_rows(spec: str, tfds_dir: str | None = None) -> Iterator[tuple[dict, str, str]]:
    """Yields (row as JSON would have it, its place, its number). UserError as for `open_set`."""
    builder, splits = open_set(spec, tfds_dir)
    name = spec.removeprefix(PREFIX).partition(":")[0]
    number = 0
    for split in splits:
        try:
            source = builder.as_data_source(split=split)
        except Exception as error:  # as above
            if errors.transient(error):
                raise
            raise _unreadable(spec, tfds_dir, error) from error
        for start in range(0, len(source), BATCH):
            indices = range(start, min(start + BATCH, len(source)))
            for index, raw in zip(indices, source.__getitems__(list(indices)), strict=True):
                where = f"{PREFIX}{name}:{split} row {index}"
                with placed(where):
                    plain = tables.plain(raw)
                yield plain, where, str(number)
                number += 1
