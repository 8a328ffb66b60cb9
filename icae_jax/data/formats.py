"""What a data file is, by its name and content, and its raw rows: the one reader of every verb."""

import pathlib
import re
import sys
from collections.abc import Iterator

from icae_jax.data import json_rows, reading, rows, tables
from icae_jax.errors import UserError

# What identities (`sources.identity`) know a file's reading by.
JSON, CSV, TSV, PARQUET, ARROW, TEXT = "json lines", "csv", "tsv", "parquet", "arrow", "text"
KINDS = {
    ".jsonl": JSON, ".ndjson": JSON, ".json": JSON, ".csv": CSV, ".tsv": TSV, ".parquet": PARQUET, ".arrow": ARROW, ".feather": ARROW,
    ".txt": TEXT, ".text": TEXT, ".md": TEXT, ".markdown": TEXT, ".rst": TEXT, ".tex": TEXT,
}  # fmt: skip
_SUFFIX = re.compile(r"\.[a-z][a-z0-9_+-]*")  # a name may hold points that begin none
LISTED = (
    f"JSON ({', '.join(s for s, k in KINDS.items() if k == JSON)}), tables (.csv, .tsv, .parquet, .arrow, .feather), text "
    f"({', '.join(s for s, k in KINDS.items() if k == TEXT)}, or no suffix), perhaps packed ({', '.join(reading.COMPRESSED)})"
)


def suffixes(path: str) -> list[str]:
    """The suffixes of a file's name but its packing, in lower case."""
    name = pathlib.PurePath(path).name
    name = name[: len(name) - len(reading.packing(path))]
    return [s for s in (s.lower() for s in pathlib.PurePath(name).suffixes) if _SUFFIX.fullmatch(s)]


def kind_by_name(path: str) -> str:
    """One of the kinds above, "" for a name that is none's. A name with a suffix of JSON anywhere is JSON's; one without suffix is text."""
    named = suffixes(path)
    if any(KINDS.get(suffix) == JSON for suffix in named):
        return JSON
    return KINDS.get(named[-1], "") if named else TEXT


def kind(path: str) -> str:
    """The same. UserError for a name that is none's."""
    found = kind_by_name(path)
    if not found:
        raise UserError(
            f"data file {path}: {suffixes(path)[-1]} is no format that is read; expected {LISTED}. A plain text of another name can be "
            "renamed to .txt"
        )
    return found


def raw_rows(
    path: str, most: int = reading.MAX_ROW_BYTES, fields: frozenset[str] = rows.FIELDS
) -> Iterator[tuple[object, str, str | int]]:
    """Yields (raw row, where it stands, its number in the file) in order, of a text file one row `{"text": …}`.

    most: bytes of a row. fields: the columns that are wanted of a table. UserError names the file, and where in it what is wrong stands.
    """
    found = kind(path)
    with reading.naming(path):
        if found == TEXT:
            text = reading.read_text(path, most)
            if json_rows.seems_lines(text):
                told = "read as one text, though its lines are JSON; name it .jsonl to read them as rows"
                print(f"data file {path}: {told}", file=sys.stderr, flush=True)
            yield {"text": text}, path, 0
        elif found == PARQUET:
            yield from tables.read_parquet(path, most, fields)
        elif found == ARROW:
            yield from tables.read_arrow(path, most, fields)
        else:
            with reading.open_text(path) as file:
                if found == JSON:
                    for value, line, number in json_rows.read(file, path, most):
                        yield from rows.unwrapped(value, f"{path}:{line}", str(number))
                else:
                    yield from tables.read_csv(
                        file, path, most, fields, "\t" if found == TSV else ""
                    )


def is_json_lines(path: str) -> bool:
    """Whether a file can be read from the beginning of any line on: not packed, UTF-8 without a mark, one row on its first line."""
    if kind(path) != JSON or reading.packing(path):
        return False
    with reading.naming(path):
        if reading.has_mark(path):
            return False
        with reading.open_bytes(path) as file:
            first = json_rows.first_line(file, reading.MAX_ROW_BYTES)
            return isinstance(first, dict) and not rows.is_wrapper(first)
