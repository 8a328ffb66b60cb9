"""Where texts and questions come from: files of rows or texts, folders and globs of them, prepared TFDS sets, sets of the hub.

What a file is `formats` knows, what a row is `rows`, where files are `places`.
"""

import itertools
import pathlib
import sys
from collections.abc import Iterator

from icae_jax import errors
from icae_jax.data import formats, hub_sets, places, reading, tfds_sets
from icae_jax.data.places import split_source
from icae_jax.data.rows import Row, Sieve, parse
from icae_jax.errors import UserError

__all__ = [
    "Row",
    "Sieve",
    "check_present",
    "earlier_identity",
    "identity",
    "read_all",
    "read_rows",
    "read_texts",
    "split_source",
    "with_ids",
]


def _parts(source, told=False):
    """The sets and files of a source, in order."""
    return [
        p
        for path in split_source(source)
        for p in ([path] if places.is_set(path) else places.files_of(path, told))
    ]


def check_present(source: str, tfds_dir: str | None = None) -> None:
    """UserError where a file of a source is absent or none that is read, or a set cannot be opened; little is read for it."""
    for part in _parts(source):
        if part.startswith(tfds_sets.PREFIX):
            tfds_sets.open_set(part, tfds_dir)
        elif places.is_set(part):
            hub_sets.open_set(part)
        else:
            places.check_file(part)


def identity(
    source: str, tfds_dir: str | None = None, content_hash=reading.content_hash, no_answer: str = ""
) -> list:
    """What a source is known by: how its files are read and what is in them, wherever they lie; what a set says of itself.

    content_hash: of a file; one that remembers, where large files are asked for again and again. no_answer: as for `read_rows`.
    """
    result = []
    for part in _parts(source):
        if part.startswith(tfds_sets.PREFIX):
            result.append(tfds_sets.identity(part, tfds_dir))
        elif places.is_set(part):
            result.append(hub_sets.identity(part))
        else:
            places.check_file(part)
            how = formats.kind(part)
            if how == formats.TEXT and reading.has_mark(part):
                how = "text without its mark"  # which was once read as a part of it
            with reading.naming(part):
                result.append([how, reading.packing(part), content_hash(part)])
    return result + ([["no_answer", no_answer]] if no_answer else [])


def earlier_identity(source: str, tfds_dir: str | None = None) -> list:
    """What the first version of token caches knew a source by: files by name, size, time of change, and ends."""
    result = []
    for path in map(pathlib.Path, split_source(source)):
        if str(path).startswith(tfds_sets.PREFIX):
            result.append(tfds_sets.identity(str(path), tfds_dir))
        elif path.is_file():  # it knew no folders, nor what is elsewhere
            stat = path.stat()
            result.append(
                [path.name, stat.st_size, stat.st_mtime_ns, reading.ends(path, stat.st_size)]
            )
    return result


def _raw_rows(part, name, prefix, tfds_dir, max_row_bytes):
    """Yields (raw row, where, its id by default) of a set or file."""
    if part.startswith(tfds_sets.PREFIX):
        found = tfds_sets.read(part, tfds_dir)
    elif places.is_set(part):
        found = hub_sets.read(part)
    elif formats.kind(part) == formats.TEXT:
        found, prefix = (
            ((raw, where, name) for raw, where, _ in formats.raw_rows(part, max_row_bytes)),
            "",
        )
    else:
        found = formats.raw_rows(part, max_row_bytes)
    for raw, where, number in found:
        yield raw, where, f"{prefix}{number}"


def read_rows(
    source: str,
    tfds_dir: str | None = None,
    max_row_bytes: int = reading.MAX_ROW_BYTES,
    sieve: Sieve | None = None,
) -> Iterator[Row]:
    """Yields the `Row`s of a source in order that can be used, as the sieve says, which counts the others.

    UserError names file and line of what is malformed, or longer than max_row_bytes.
    """
    sieve = Sieve() if sieve is None else sieve
    parts = _parts(source, told=True)
    for part, name in zip(parts, _short_names(parts), strict=True):
        prefix = f"{name}:" if len(parts) > 1 else ""
        for raw, where, default_id in _raw_rows(part, name, prefix, tfds_dir, max_row_bytes):
            for row in map(sieve.take, parse(raw, where, default_id)):
                if row is not None:
                    yield row


def read_all(source: str, tfds_dir: str | None = None, sieve: Sieve | None = None) -> list[Row]:
    """All `Row`s of a source at once; what passes, such as a network file system's fault, is tried again. sieve: as for `read_rows`."""
    sieve = Sieve() if sieve is None else sieve

    def read():
        tried = sieve.fresh()
        return list(read_rows(source, tfds_dir, sieve=tried)), tried.left_out

    rows, left_out = errors.retrying(read, f"reading {source}")
    sieve.add(left_out)
    return rows


def read_texts(source: str, flag: str, strict: str = "") -> list[Row]:
    """All texts of a source, whatever is asked of them; says on stderr what was left out. flag: what named the source.

    strict: as for `Sieve`. UserError as for `read_rows`, and where no text is left.
    """
    check_present(source)
    sieve = Sieve(strict, questions=False)
    rows = read_all(source, sieve=sieve)
    sieve.check_some(rows, f"{flag} {source}")
    if sieve.left_out:
        print(f"{flag} {source}: left out {sieve}", file=sys.stderr, flush=True)
    return rows


def with_ids(rows: list[Row]) -> dict[str, Row]:
    """`{id: row}` of the rows that make a memory each, in the order of the rows; no id is lost, none stands for two texts.

    A text whose rows have no ids of their own, such as a context with many questions, is one memory. Each id of a row's own is one.
    UserError where two texts have one id.
    """
    own, named = {}, set()
    for row in rows:
        if row.own_id:
            first = own.setdefault(row.id, row)
            if first.text != row.text:
                raise UserError(
                    f"{row.where}: id {row.id!r} is that of another text too ({first.where}); give each text an id of its own"
                )
            named.add(row.text)
    found = {}
    for row in rows:
        if row.own_id:
            found.setdefault(row.id, row)
        elif row.text not in named:
            named.add(row.text)
            names = itertools.chain([row.id], (f"{row.id}#{i}" for i in itertools.count(2)))
            name = next(name for name in names if name not in own and name not in found)
            found[name] = row
    return found


def _short_names(paths):
    """The paths' last parts, as few of them as tell the paths apart."""
    split = [(path,) if places.is_set(path) else pathlib.PurePath(path).parts for path in paths]
    for count in range(1, max(map(len, split)) + 1):
        names = ["/".join(parts[-count:]) for parts in split]
        if len(set(names)) == len(set(paths)):
            break
    return names
