"""Texts and questions of a source: files of rows or text, folders and globs of them, prepared sets.

`places` finds the files, `formats` reads their raw rows, `forms` makes `Row`s of these.
"""

import itertools
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from icae_jax import errors
from icae_jax.data import formats, forms, hub_sets, places, reading, tfds_sets
from icae_jax.data.rows import Row, Sieve
from icae_jax.data.unpacking import packing
from icae_jax.errors import UserError


def _parts(source, report=False):
    """The sets and files of a source, in order."""
    parts = []
    for path in places.split_source(source):
        parts += [path] if places.is_set(path) else places.files_of(path, report)
    return parts


def check_present(source: str, tfds_dir: str | None = None) -> None:
    """UserError if a file is absent or of no known format, or a set cannot be opened."""
    for part in _parts(source):
        if part.startswith(tfds_sets.PREFIX):
            tfds_sets.open_set(part, tfds_dir)
        elif places.is_set(part):
            hub_sets.open_set(part)
        else:
            places.check_file(part)


def identity(
    source: str,
    tfds_dir: str | None = None,
    content_hash: Callable[[str], str] = reading.content_hash,
    no_answer: str = "",
) -> list:
    """The identity of a source as JSON: formats and contents of files, wherever they are.

    Prepared sets give their own description. `content_hash` may remember hashes of large files;
    `no_answer` is that of `Sieve`.
    """
    result = []
    for part in _parts(source):
        if part.startswith(tfds_sets.PREFIX):
            result.append(tfds_sets.identity(part, tfds_dir))
        elif places.is_set(part):
            result.append(hub_sets.identity(part))
        else:
            places.check_file(part)
            kind = formats.kind(part)
            if kind == formats.TEXT and reading.has_mark(part):
                kind = "text without its mark"  # earlier versions read the mark as text
            with reading.naming(part):
                result.append([kind, packing(part), content_hash(part)])
    return result + ([["no_answer", no_answer]] if no_answer else [])


def earlier_identity(source: str, tfds_dir: str | None = None) -> list:
    """The identity of a source in the first version of token caches.

    Files are known by name, size, modification time, and a hash of both ends.
    """
    result = []
    for path in map(pathlib.Path, places.split_source(source)):
        if str(path).startswith(tfds_sets.PREFIX):
            result.append(tfds_sets.identity(str(path), tfds_dir))
        elif path.is_file():  # that version knew no folders and no remote files
            status = path.stat()
            ends = reading.ends_hash(path, status.st_size)
            result.append([path.name, status.st_size, status.st_mtime_ns, ends])
    return result


def _raw_rows(part, name, prefix, tfds_dir, max_row_bytes, fields):
    """Yields (raw row, its place, its default id) of a set or file."""
    if part.startswith(tfds_sets.PREFIX):
        raw_rows = tfds_sets.raw_rows(part, tfds_dir)
    elif places.is_set(part):
        raw_rows = hub_sets.raw_rows(part, fields)
    else:
        raw_rows = formats.raw_rows(part, max_row_bytes, fields)
        if formats.kind(part) == formats.TEXT:
            for raw, where, _ in raw_rows:
                yield raw, where, name
            return
    for raw, where, number in raw_rows:
        yield raw, where, f"{prefix}{number}"


def read_rows(
    source: str,
    tfds_dir: str | None = None,
    max_row_bytes: int = reading.MAX_ROW_BYTES,
    sieve: Sieve | None = None,
    unanswered: bool = False,
) -> Iterator[Row]:
    """Yields the usable `Row`s of a source in order; the sieve decides which, counts the others.

    unanswered: see `forms.parse`.

    UserError if something is malformed or longer than `max_row_bytes`; names file and line.
    """
    sieve = Sieve() if sieve is None else sieve
    for row, _ in read_with_raw(source, tfds_dir, max_row_bytes, sieve, unanswered):
        yield row


def read_with_raw(
    source: str,
    tfds_dir: str | None = None,
    max_row_bytes: int = reading.MAX_ROW_BYTES,
    sieve: Sieve | None = None,
    unanswered: bool = False,
    fields: Iterable[str] = (),
) -> Iterator[tuple[Row, object]]:
    """As `read_rows`, each `Row` with the raw row that it was made of.

    fields: of raw rows that are wanted beside those that rows are made of; other columns of a table
    are not read.
    """
    sieve = Sieve() if sieve is None else sieve
    parts, columns = _parts(source, report=True), forms.FIELDS.union(fields)
    for part, name in zip(parts, _short_names(parts), strict=True):
        prefix = f"{name}:" if len(parts) > 1 else ""
        raw_rows = _raw_rows(part, name, prefix, tfds_dir, max_row_bytes, columns)
        for raw, where, default_id in raw_rows:
            for row in map(sieve.take, forms.parse(raw, where, default_id, unanswered)):
                if row is not None:
                    yield row, raw


def read_all(
    source: str,
    tfds_dir: str | None = None,
    sieve: Sieve | None = None,
    unanswered: bool = False,
) -> list[Row]:
    """`read_rows` as a list; transient faults, such as of a network file system, are retried."""
    sieve = Sieve() if sieve is None else sieve

    def attempt():
        fresh = sieve.fresh()
        return list(read_rows(source, tfds_dir, sieve=fresh, unanswered=unanswered)), fresh.left_out

    rows, left_out = errors.retrying(attempt, f"reading {source}")
    sieve.add(left_out)
    return rows


def read_texts(source: str, flag: str, strict: str = "") -> list[Row]:
    """All texts of a source, without questions; says on stderr what was left out.

    UserError as for `read_rows`, or if no text is left. flag: the flag that names the source.
    """
    check_present(source)
    sieve = Sieve(strict, questions=False)
    rows = read_all(source, sieve=sieve)
    sieve.check_some(rows, f"{flag} {source}")
    if sieve.left_out:
        print(f"{flag} {source}: left out {sieve}", file=sys.stderr, flush=True)
    return rows


def with_ids(rows: Sequence[Row]) -> dict[str, Row]:
    """`{id: row}` of the rows that become one memory each, in order.

    All ids of the rows' own are kept. A text whose rows have none, such as a context with many
    questions, becomes one memory. UserError if two texts have one id.
    """
    own, named = {}, set()
    for row in rows:
        if row.own_id:
            first = own.setdefault(row.id, row)
            if first.text != row.text:
                raise UserError(
                    f"{row.where}: id {row.id!r} is that of another text too ({first.where}); give "
                    "each text an id of its own"
                )
            named.add(row.text)
    result = {}
    for row in rows:
        if row.own_id:
            result.setdefault(row.id, row)
        elif row.text not in named:
            named.add(row.text)
            names = itertools.chain([row.id], (f"{row.id}#{i}" for i in itertools.count(2)))
            name = next(name for name in names if name not in own and name not in result)
            result[name] = row
    return result


def _short_names(paths):
    """The shortest ends of the paths, in whole parts, that tell them apart."""
    split = [(path,) if places.is_set(path) else pathlib.PurePath(path).parts for path in paths]
    for count in range(1, max(map(len, split)) + 1):
        names = ["/".join(parts[-count:]) for parts in split]
        if len(set(names)) == len(set(paths)):
            break
    return names
