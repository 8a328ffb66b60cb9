"""The rows of tables, as dictionaries: csv and tsv with a line of column names, Parquet, Arrow files and streams; a batch at a time."""

import contextlib
import csv
import io
import json
import sys
from collections.abc import Iterator

from icae_jax import errors
from icae_jax.data import reading, rows
from icae_jax.errors import UserError

BATCH = 1000  # rows of a Parquet or Arrow file made Python's at once, at most
BATCH_BYTES = 32 << 20  # and about so many bytes of them
DELIMITERS = (
    ",",
    ";",
    "\t",
    "|",
)  # of a csv; where several fit its first line alike, the first of them
LISTS = ("answers", "messages", "conversations")  # columns whose cells may be JSON in a csv


# ------------------------------------------------------------------------------------------------------------------ csv


def read_csv(
    file: io.BufferedReader,
    path: str,
    most: int,
    fields: frozenset[str] = rows.FIELDS,
    delimiter: str = "",
) -> Iterator[tuple[dict, str, int]]:
    """Yields (row, where it begins, its number). Every cell is a text. delimiter: "" to tell it by the first line.

    UserError names the line of a row with another number of cells than columns, of one longer than `most`, of wrong quotes.
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
                f"{path}:{began}: {len(cells)} {what}, but the first line names {len(names)} columns: {rows.listed(names)}"
            )
        with rows.placed(f"{path}:{began}"):
            raw = {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)}
        yield raw, f"{path}:{began}", number
        number += 1


class _Lines:
    """Decoded lines, counted, no more of which make one row than it may hold."""

    def __init__(self, file, path, most):
        self._lines, self._path, self._most = reading.numbered_lines(file, path, most), path, most
        self._number, self._began, self._size, self._kept = 0, 1, 0, None

    def begin(self):
        """The number of the next row's first line."""
        self._began, self._size = self._number + (self._kept is None), 0
        return self._began

    def unread(self, line):
        self._kept = line

    def __iter__(self):
        return self

    def __next__(self):
        if self._kept is not None:
            line, self._kept = self._kept, None
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
    """That of a csv by its first line: the one at which it holds most columns that are read, then most columns."""

    def fit(delimiter):
        try:
            names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
        except csv.Error:  # which is said where the line is read
            return 0, 0
        return len(fields & set(names)), len(names)

    return max(DELIMITERS, key=fit)


def _columns(cells, fields, where):
    names = [" ".join(cell.split()) for cell in cells]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: two columns are named {twice!r}; rename one")
    if not fields & set(names):
        raise UserError(f"{where}: columns {rows.listed(names)}; {rows.EXPECTED}")
    return names


def _cell(name, cell):
    """A cell's text; a list or an object where a column of them holds JSON."""
    if name not in LISTS or not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is {cell[:80]!r}, neither a text nor JSON ({error})") from error


# --------------------------------------------------------------------------------------------------- Parquet and Arrow


@contextlib.contextmanager
def _naming(path):
    """Arrow's errors in one line. What a file system says passes as it is."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or errors.transient(error)):
            raise
        raise UserError(
            f"data file {path}: cannot be read ({' '.join(str(error).split())[:300]}); is it whole?"
        ) from error


def read_parquet(
    path: str, most: int, fields: frozenset[str] = rows.FIELDS
) -> Iterator[tuple[dict, str, int]]:
    """Yields (row, where, its number) of a Parquet file, those columns alone that `fields` names."""
    import pyarrow.parquet

    with (
        _naming(path),
        _open_table(path, (b"PAR1",)) as source,
        pyarrow.parquet.ParquetFile(source, pre_buffer=False) as file,
    ):
        names = wanted(file.schema_arrow.names, fields, f"data file {path}")
        size = max(
            (
                file.metadata.row_group(i).total_byte_size
                for i in range(file.metadata.num_row_groups)
            ),
            default=0,
        )
        count = max(
            (file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)),
            default=0,
        )
        batches = file.iter_batches(batch_size=_batch(size, count), columns=names)
        yield from _rows(batches, path, most)


def read_arrow(
    path: str, most: int, fields: frozenset[str] = rows.FIELDS
) -> Iterator[tuple[dict, str, int]]:
    """The same of an Arrow (Feather) file, or of a stream as the `datasets` library writes it."""
    import pyarrow as pa

    with _naming(path), _open_table(path, (b"ARROW1", b"\xff\xff\xff\xff")) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source)
        names = wanted(reader.schema.names, fields, f"data file {path}")
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield from _rows((_checked(batch.select(names)) for batch in batches), path, most)


def _checked(batch):
    """A batch of whose lengths and texts none lead outside it: Arrow takes what a file says of them as it is, and would crash."""
    batch.validate(full=True)
    return batch


@contextlib.contextmanager
def _open_table(path, beginnings):
    """A file that Arrow can seek in. UserError where it is packed, or something else."""
    import pyarrow as pa

    if reading.packing(path):
        raise UserError(
            f"data file {path}: such a table is packed by itself, and cannot be read through another packing; unpack it"
        )
    with reading.open_file(path) as file:
        start = file.read(reading.CHUNK)
        reading.check_start(start, path)
        if not start.startswith(beginnings):
            raise UserError(
                f"data file {path}: {reading.binary_kind(start) or 'text'}, not what its name says"
            )
        file.seek(0)
        with (
            pa.PythonFile(file, mode="r")
            if reading.is_remote(path)
            else pa.OSFile(str(path)) as source
        ):
            yield source


def wanted(names: list[str], fields: frozenset[str], what: str) -> list[str]:
    """Those columns of a table that `fields` names. UserError where there is none, or one comes twice. what: the table."""
    found = [name for name in names if name in fields]
    if not found:
        raise UserError(f"{what}: columns {rows.listed(names)}; {rows.EXPECTED}")
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice:
        raise UserError(f"{what}: two columns are named {twice!r}; rename one")
    return found


def _batch(size, count):
    """How many rows to take at once, of a group of so many bytes and rows."""
    return max(1, min(BATCH, BATCH_BYTES * count // max(1, size))) if count else BATCH


def _rows(batches, path, most):
    number = 0
    for batch in batches:
        step = _batch(batch.nbytes, batch.num_rows)
        for start in range(0, batch.num_rows, step):
            try:
                raw_rows = _times_as_text(batch.slice(start, step)).to_pylist()
            except (
                ValueError,
                ArithmeticError,
            ) as error:  # of values that Arrow has and Python has not
                if isinstance(error, UnicodeDecodeError):
                    raise
                raise UserError(
                    f"{path} row {number} or one of the next {step}: cannot be read ({error})"
                ) from error
            for raw in raw_rows:
                where = f"{path} row {number}"
                with rows.placed(where):
                    raw = plain(raw)
                reading.check_size(
                    sum(len(value) for value in raw.values() if isinstance(value, str)), where, most
                )
                yield raw, where, number
                number += 1


def _times_as_text(batch):
    """A batch whose columns of times, such as ids, are texts: Python's times are coarser, and reach less far."""
    import pyarrow as pa

    for i, column in enumerate(batch.schema):
        if pa.types.is_temporal(column.type):
            batch = batch.set_column(i, column.name, batch.column(i).cast(pa.string()))
    return batch


def plain(value: object) -> object:
    """A value of a table or set as JSON has it: bytes as text, arrays as lists. UserError for bytes that are no text."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 ({error}); save it as UTF-8") from error
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value
