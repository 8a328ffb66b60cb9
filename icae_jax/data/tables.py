"""The rows of tables as dictionaries: csv and tsv, Parquet, Arrow files and streams.

A bounded number of rows is in memory at a time.
"""

import contextlib
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence

from icae_jax import errors
from icae_jax.data import reading
from icae_jax.data.forms import EXPECTED, FIELDS, listed
from icae_jax.data.rows import placed
from icae_jax.data.unpacking import CHUNK, packing
from icae_jax.errors import UserError

BATCH = 1000  # most rows of a Parquet or Arrow file converted to Python objects at once
BATCH_BYTES = 32 << 20  # and about the most bytes of them
DELIMITERS = (",", ";", "\t", "|")  # of a csv, the preferred one first
LISTS = ("answers", "messages", "conversations")  # columns whose cells may be JSON in a csv


# ---------------------------------------------------------------------------------------------- csv


def read_csv(
    file: io.BufferedReader,
    path: str,
    most: int,
    fields: frozenset[str] = FIELDS,
    delimiter: str = "",
) -> Iterator[tuple[dict, str, int]]:
    """Yields (row, its place, its number) of a csv whose first line names the columns.

    The file is as from `reading.open_text`. `fields` are the columns that are read, by which a
    delimiter of "" is recognised from the first line. UserError if a row has too many or too few
    cells, is wrongly quoted or longer than `most` bytes; the message names its line.
    """
    lines = _Lines(file, path, most)
    csv.field_size_limit(min(sys.maxsize, most + 1))
    first = next(lines, None)
    if first is None:
        return
    lines.unread(first)
    delimiter = delimiter or _delimiter(first, fields)
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    names, number = None, 0
    while True:
        began = lines.begin()
        try:
            cells = next(table, None)
        except csv.Error as error:
            remedy = "quote a cell that holds quotes, and double them within"
            if "new-line" in str(error):
                error, remedy = "a line ends with \\r alone", "save it with lines that end with \\n"
            raise UserError(f"{path}:{began}: not valid csv ({error}); {remedy}") from None
        if cells is None:
            return
        if not cells:
            continue
        if names is None:
            names = _columns(cells, fields, f"{path}:{began}")
            continue
        if len(cells) != len(names):
            what = "cell" if len(cells) == 1 else "cells"
            raise UserError(
                f"{path}:{began}: {len(cells)} {what}, but the first line names {len(names)} "
                f"columns: {listed(names)}"
            )
        with placed(f"{path}:{began}"):
            raw = {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)}
        yield raw, f"{path}:{began}", number
        number += 1


class _Lines:
    """Decoded, numbered lines. UserError if those of one row hold more than `most` bytes."""

    def __init__(self, file, path, most):
        self._lines, self._path, self._most = reading.numbered_lines(file, path, most), path, most
        self._number, self._began, self._size, self._unread = 0, 1, 0, None

    def begin(self):
        """Starts a row; returns the number of its first line."""
        self._began, self._size = self._number + (self._unread is None), 0
        return self._began

    def unread(self, line):
        self._unread = line

    def __iter__(self):
        return self

    def __next__(self):
        if self._unread is not None:
            line, self._unread = self._unread, None
            return line
        self._number, line = next(self._lines)
        self._size += len(line)
        reading.check_size(self._size, f"{self._path}:{self._began}", self._most)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._path}:{self._number}: not UTF-8 ({error}); save it as UTF-8"
            ) from error


def _delimiter(line, fields):
    """The delimiter that splits the first line into most known columns, then most columns."""

    def fit(delimiter):
        try:
            names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
        except csv.Error:  # reported when the line is read
            return 0, 0
        return len(fields & set(names)), len(names)

    return max(DELIMITERS, key=fit)


def _columns(cells, fields, where):
    names = [" ".join(cell.split()) for cell in cells]
    _check_unique([name for name in names if name], where)
    if not fields & set(names):
        raise UserError(f"{where}: columns {listed(names)}; {EXPECTED}")
    return names


def _check_unique(names, where):
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise UserError(f"{where}: two columns are named {duplicate!r}; rename one")


def _cell(name, cell):
    """A cell's text, or the list or object that a cell of `LISTS` holds as JSON."""
    if name not in LISTS or not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is {cell[:80]!r}, neither a text nor JSON ({error})") from error


# -------------------------------------------------------------------------------- Parquet and Arrow


@contextlib.contextmanager
def _naming(path):
    """Turns Arrow's errors into a `UserError` of one line; file system errors pass unchanged."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or errors.transient(error)):
            raise
        raise UserError(
            f"data file {path}: cannot be read ({' '.join(str(error).split())[:300]}); "
            "is it complete?"
        ) from error


def read_parquet(
    path: str, most: int, fields: frozenset[str] = FIELDS
) -> Iterator[tuple[dict, str, int]]:
    """Yields (row, its place, its number) of a Parquet file, with the columns in `fields` only."""
    import pyarrow.parquet

    with (
        _naming(path),
        _open_table(path, (b"PAR1",)) as source,
        pyarrow.parquet.ParquetFile(source, pre_buffer=False) as file,
    ):
        names = wanted(file.schema_arrow.names, fields, f"data file {path}")
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        size = max((group.total_byte_size for group in groups), default=0)
        count = max((group.num_rows for group in groups), default=0)
        batches = file.iter_batches(batch_size=_batch_rows(size, count), columns=names)
        yield from _rows(batches, path, most)


def read_arrow(
    path: str, most: int, fields: frozenset[str] = FIELDS
) -> Iterator[tuple[dict, str, int]]:
    """`read_parquet` for Arrow (Feather) files and streams, which the `datasets` library writes."""
    import pyarrow as pa

    with _naming(path), _open_table(path, (b"ARROW1", b"\xff\xff\xff\xff")) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source)
        names = wanted(reader.schema.names, fields, f"data file {path}")
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield from _rows((_checked(batch.select(names)) for batch in batches), path, most)


def _checked(batch):
    """The batch, validated: Arrow trusts the offsets in a file and would crash on damaged ones."""
    batch.validate(full=True)
    return batch


@contextlib.contextmanager
def _open_table(path, beginnings):
    """A file that Arrow can seek in. UserError if it is packed or begins otherwise."""
    import pyarrow as pa

    if packing(path):
        raise UserError(
            f"data file {path}: such a table is packed by itself, and cannot be read through "
            "another packing; unpack it"
        )
    with reading.open_file(path) as file:
        start = file.read(CHUNK)
        reading.check_start(start, path)
        if not start.startswith(beginnings):
            raise UserError(
                f"data file {path}: {reading.binary_kind(start) or 'text'}, not what its name says"
            )
        file.seek(0)
        remote = reading.is_remote(path)
        with pa.PythonFile(file, mode="r") if remote else pa.OSFile(str(path)) as source:
            yield source


def wanted(names: Sequence[str], fields: frozenset[str], what: str) -> list[str]:
    """The columns of a table that are in `fields`. UserError if there is none or one comes twice.

    what: the table, for messages.
    """
    columns = [name for name in names if name in fields]
    if not columns:
        raise UserError(f"{what}: columns {listed(names)}; {EXPECTED}")
    _check_unique(columns, what)
    return columns


def _batch_rows(size, count):
    """How many rows to convert at once, of a group of `size` bytes and `count` rows."""
    return max(1, min(BATCH, BATCH_BYTES * count // max(1, size))) if count else BATCH


def _rows(batches, path, most):
    number = 0
    for batch in batches:
        step = _batch_rows(batch.nbytes, batch.num_rows)
        for start in range(0, batch.num_rows, step):
            try:
                raw_rows = _times_as_text(batch.slice(start, step)).to_pylist()
            except UnicodeDecodeError:
                raise
            except (ValueError, ArithmeticError) as error:  # Arrow values that Python lacks
                raise UserError(
                    f"{path} row {number} or one of the next {step}: cannot be read ({error})"
                ) from error
            for raw in raw_rows:
                where = f"{path} row {number}"
                with placed(where):
                    raw = plain(raw)
                size = sum(len(value) for value in raw.values() if isinstance(value, str))
                reading.check_size(size, where, most)
                yield raw, where, number
                number += 1


def _times_as_text(batch):
    """The batch with times, such as some ids, as texts: Python's are coarser and reach less far."""
    import pyarrow as pa

    for i, column in enumerate(batch.schema):
        if pa.types.is_temporal(column.type):
            batch = batch.set_column(i, column.name, batch.column(i).cast(pa.string()))
    return batch


def plain(value: object) -> object:
    """A value of a table or set as JSON has it: bytes as text, arrays as lists.

    UserError for bytes that are not UTF-8.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 ({error}); save it as UTF-8") from error
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value
