"""Prepared TFDS sets as sources: `tfds:NAME:SPLIT`, and months of a set that has a split for each, `tfds:NAME:2024-01..2024-04`."""

import hashlib
import re

from icae_jax import errors
from icae_jax.data import rows, tables
from icae_jax.errors import UserError

PREFIX = "tfds:"
BATCH = 1000  # rows read at once, which takes a third of the time of single ones
MONTHS = re.compile(r"(\d{4}-\d\d)?(\.\.)?(\d{4}-\d\d)?")
SPLIT_OF_MONTH = re.compile(r"\d{4}_\d\d")


def open_set(spec, tfds_dir=None):
    """(the set's builder, the names of its splits that a source asks for). UserError names what cannot be read, or is not there."""
    import tensorflow_datasets as tfds  # imported late: only these sources need it

    name, _, split = spec.removeprefix(PREFIX).partition(":")
    try:
        builder = tfds.builder(name, data_dir=tfds_dir or None)
        present = list(builder.info.splits)
    except Exception as error:  # tfds raises many kinds; all but what passes mean that this set cannot be read here
        if errors.transient(error):
            raise
        raise UserError(_unreadable(spec, tfds_dir, error)) from error
    if not present:
        raise UserError(_unreadable(spec, tfds_dir, "it is not prepared"))
    return builder, _splits(spec, split, present)


def _unreadable(spec, tfds_dir, error):
    why = next(
        (line for line in str(error).splitlines() if line.strip()), type(error).__name__
    )  # TFDS goes on to list all sets there are
    return f"{spec}: cannot be read as a prepared TFDS set in data.tfds_dir {tfds_dir!r} ({why}); icae prepare makes some"


def _splits(spec, split, present):
    """The splits that `split` stands for: itself, or every month of a range, both ends included."""
    match = MONTHS.fullmatch(split)
    if not split or not match:
        return [split or "train"]
    first, dots, last = match.groups()
    if not dots and last:
        raise UserError(
            f"{spec}: two months without .. between them; write FIRST..LAST, such as 2024-01..2024-04"
        )
    first, last = (first or "0000-00"), (last or "9999-99") if dots else first
    months = sorted(s.replace("_", "-") for s in present if SPLIT_OF_MONTH.fullmatch(s))
    if not months:
        raise UserError(f"{spec}: the set has no months; its splits are {', '.join(present)}")
    chosen = [m.replace("-", "_") for m in months if first <= m <= last]
    if not chosen:
        raise UserError(
            f"{spec}: no month of the set is in this range; it has {len(months)}, from {months[0]} to {months[-1]}"
        )
    return chosen


def identity(spec, tfds_dir=None):
    """What tells a source's content from another's: its name, its splits, and what the set's own description says of its data."""
    builder, splits = open_set(spec, tfds_dir)
    told = [(builder.data_path / name) for name in ("dataset_info.json", "metadata.json")]
    return [
        builder.info.full_name,
        splits,
        *(hashlib.sha256(p.read_bytes()).hexdigest() for p in told if p.exists()),
    ]


def read(spec, tfds_dir=None):
    """Yields (row as JSON would have it, where it stands, its number). UserError as for `open_set`."""
    builder, splits = open_set(spec, tfds_dir)
    number = 0
    for split in splits:
        try:
            source = builder.as_data_source(split=split)
        except Exception as error:  # as above
            if errors.transient(error):
                raise
            raise UserError(_unreadable(spec, tfds_dir, error)) from error
        where = f"{PREFIX}{spec.removeprefix(PREFIX).partition(':')[0]}:{split}"
        for start in range(0, len(source), BATCH):
            for at, raw in enumerate(
                source.__getitems__(list(range(start, min(start + BATCH, len(source))))), start
            ):
                with rows.placed(f"{where} row {at}"):
                    plain = tables.plain(raw)
                yield plain, f"{where} row {at}", str(number)
                number += 1
