"""The format of a data file, and its raw rows."""

import os
import pathlib
import re
import sys
from collections.abc import Iterator

from icae_jax.data import forms, json_rows, reading, tables
from icae_jax.data.unpacking import COMPRESSED, packing
from icae_jax.errors import UserError

# Part of a file's identity (`sources.identity`), so that token caches depend on these words.
JSON, CSV, TSV, PARQUET, ARROW, TEXT = "json lines", "csv", "tsv", "parquet", "arrow", "text"
KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), JSON),
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": PARQUET,
    **dict.fromkeys((".arrow", ".feather"), ARROW),
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tex"), TEXT),
}
_SUFFIX = re.compile(r"\.[a-z][a-z0-9_+-]*")  # other dots of a name begin no suffix


def _suffixes_of(kind):
    return ", ".join(suffix for suffix, its_kind in KINDS.items() if its_kind == kind)


LISTED = (
    f"JSON ({_suffixes_of(JSON)}), tables (.csv, .tsv, .parquet, .arrow, .feather), "
    f"text ({_suffixes_of(TEXT)}, or no suffix), perhaps packed ({', '.join(COMPRESSED)})"
)


def suffixes(path: str | os.PathLike) -> list[str]:
    """The suffixes of a file's name in lower case, without that of its packing."""
    name = pathlib.PurePath(path).name
    name = name[: len(name) - len(packing(path))]
    return [s for s in (s.lower() for s in pathlib.PurePath(name).suffixes) if _SUFFIX.fullmatch(s)]


def kind_by_name(path: str | os.PathLike) -> str:
    """The kind of a file by its name, "" if unknown.

    A name with a suffix of JSON anywhere is JSON; a name without a suffix is text.
    """
    named = suffixes(path)
    if any(KINDS.get(suffix) == JSON for suffix in named):
        return JSON
    return KINDS.get(named[-1], "") if named else TEXT


def kind(path: str | os.PathLike) -> str:
    """The kind of a file by its name. UserError if unknown."""
    known = kind_by_name(path)
    if not known:
        raise UserError(
            f"data file {path}: {suffixes(path)[-1]} is no format that is read; expected {LISTED}. "
            "A plain text of another name can be renamed to .txt"
        )
    return known


def raw_rows(
    path: str, most: int = reading.MAX_ROW_BYTES, fields: frozenset[str] = forms.FIELDS
) -> Iterator[tuple[object, str, str | int]]:
    """Yields (raw row, its place, its number) of a file; of a text one row `{"text": …}`.

    `most` is the most bytes of a row, `fields` are the columns that are wanted of a table.
    UserError if anything in the file is wrong; the message names the file and the place.
    """
    file_kind = kind(path)
    with reading.naming(path):
        if file_kind == TEXT:
            text = reading.read_text(path, most)
            if json_rows.seems_lines(text):
                note = "read as one text, though its lines are JSON; name it .jsonl to read rows"
                print(f"data file {path}: {note}", file=sys.stderr, flush=True)
            yield {"text": text}, path, 0
        elif file_kind == PARQUET:
            yield from tables.read_parquet(path, most, fields)
        elif file_kind == ARROW:
            yield from tables.read_arrow(path, most, fields)
        else:
            with reading.open_text(path) as file:
                if file_kind == JSON:
                    for value, line, number in json_rows.values(file, path, most):
                        yield from forms.unwrapped(value, f"{path}:{line}", str(number))
                else:
                    delimiter = "\t" if file_kind == TSV else ""
                    yield from tables.read_csv(file, path, most, fields, delimiter)


def is_json_lines(path: str) -> bool:
    """Whether a file can be read from the beginning of any line.

    That is a file of JSON lines, not packed, without a byte order mark.
    """
    if kind(path) != JSON or packing(path):
        return False
    with reading.naming(path):
        if reading.has_mark(path):
            return False
        with reading.open_bytes(path) as file:
            first = json_rows.first_line(file, reading.MAX_ROW_BYTES)
            return isinstance(first, dict) and not forms.is_wrapper(first)
