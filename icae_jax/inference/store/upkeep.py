"""Upkeep of a store: whether all of it is whole, and the room of what was replaced or removed."""

import contextlib
import dataclasses
import pathlib
import sqlite3
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from icae_jax import lock
from icae_jax.errors import UserError
from icae_jax.inference.store import index
from icae_jax.inference.store.entries import NAMING, PREFIXES, Encoded, entry_of_row
from icae_jax.inference.store.reader import SELECT, Store
from icae_jax.inference.store.writer import PENDING, Writer, pending_files

SHARD_ENTRIES = 10_000  # of a shard that compacting writes, at most
SHARD_BYTES = 1 << 28


class Damage(NamedTuple):
    """What is damaged. id: of the entry, None where it is a shard or the index; shard: its name."""

    id: str | None
    shard: str | None
    problem: str


@dataclasses.dataclass
class Verified:
    """What `verify` saw.

    Attributes:
        entries: that were read.
        shards: that hold some.
        orphans: shards that the index does not have, as a killed process leaves; harmless.
        pending: files of other processes that are not in the index yet.
        damage: what cannot be read.
    """

    entries: int = 0
    shards: int = 0
    orphans: int = 0
    pending: int = 0
    damage: list[Damage] = dataclasses.field(default_factory=list)


def verify(store: Store, progress: Callable[[int], None] | None = None) -> Verified:
    """Reads all of a store: every entry's bytes, checksum, shape, and whether it is finite.

    Memory is that of one shard's rows. What is damaged is listed; the others are read on.

    progress: is given the number of entries read.
    """
    seen = Verified(pending=store.pending())
    seen.damage += [Damage(None, None, f"{index.NAME}: {text}") for text in store.index_problems()]
    names = set()
    for shard in store.query("SELECT number, name, nbytes FROM shards ORDER BY number"):
        names.add(shard["name"])
        rows = store.query(f"{SELECT} WHERE shard_number = ? ORDER BY offset", (shard["number"],))
        before = len(seen.damage)
        for row in rows:
            if problem := _problem(row, store):
                seen.damage.append(Damage(row["id"], shard["name"], problem))
        seen.entries += len(rows)
        seen.shards += bool(rows)
        size = store.shards.size(shard["name"]) if rows and len(seen.damage) == before else None
        if size not in (None, shard["nbytes"]):
            problem = f"shard {store.shards.shown(shard['name'])} has {size:,} bytes, not "
            seen.damage.append(Damage(None, shard["name"], f"{problem}{shard['nbytes']:,}"))
        if progress is not None:
            progress(seen.entries)
    for row in store.query("SELECT id FROM entries WHERE shard NOT IN (SELECT number FROM shards)"):
        seen.damage.append(Damage(row["id"], None, "its shard is not in the index"))
    names |= {path.stem.rpartition("-")[2] for path in pending_files(store.path)}
    seen.orphans = sum(name not in names for name in store.shards.names())
    return seen


def _problem(row: sqlite3.Row, store: Store) -> str:
    """Why an entry cannot be read; "" if it can."""
    try:
        entry = entry_of_row(row, store)
        memory, prefix = entry.memory, entry.prefix
    except UserError as error:
        return str(error)
    arrays = [*memory.contents.values(), *([] if prefix is None else [prefix.k, prefix.v])]
    if not all(np.isfinite(x.astype(np.float32, copy=False)).all() for x in arrays):
        return "its numbers are not finite"
    return ""


# --- Compacting ---


@dataclasses.dataclass
class Compacted:
    """What `compact` did: shards removed and written, bytes on disk fewer, entries that it left
    where they are since they are damaged.
    """

    removed: int = 0
    written: int = 0
    freed_bytes: int = 0
    damaged: int = 0


def compact(writer: Writer, unused: float = 0.5) -> Compacted:
    """Gives back the room of entries that were replaced or removed, and of what kills left.

    Entries of shards of which more than `unused` is not in use go into new shards. At any moment
    the index names shards that are there, so a kill leaves at worst shards that nobody names, which
    the next call removes. Who reads finds entries where they are now.

    UserError while another process fills the store.
    """
    with contextlib.ExitStack() as stack:
        held: set[pathlib.Path] = set()
        _exclude_others(stack, held, writer)
        writer.merge()
        store = stack.enter_context(Store(writer.path))
        done, before = Compacted(), _bytes_on_disk(store)
        for entries in _groups(_to_move(store, unused), store, done):
            _move(writer, entries)
            done.written += 1
        with index.translated(writer.path), index.transaction(writer.connection):
            writer.connection.execute(
                "DELETE FROM shards WHERE number NOT IN (SELECT shard FROM entries)"
            )
        orphans = _orphans(store)
        # Of a process that has come meanwhile, the shards may be about to be named.
        _exclude_others(stack, held, writer)
        for name in orphans:
            store.shards.remove(name)
        done.removed = len(orphans)
        _remove_left_behind(store)
        _shrink(writer)
        done.freed_bytes = before - _bytes_on_disk(store)
        return done


def _exclude_others(stack: contextlib.ExitStack, held: set[pathlib.Path], writer: Writer) -> None:
    """Takes the locks of the job's other processes that are not `held` yet."""
    for folder in sorted({*(writer.path / PENDING).glob("process*")} - held):
        stack.enter_context(lock.only_writer(folder, "--store"))
        held.add(folder)


def _to_move(store: Store, unused: float) -> Iterator[sqlite3.Row]:
    """The rows of the entries in shards that are mostly unused."""
    shards = store.query(
        "SELECT shards.number, data_nbytes, total(entries.nbytes + coalesce(kv_nbytes, 0)) AS live "
        "FROM shards JOIN entries ON entries.shard = shards.number GROUP BY shards.number"
    )
    for shard in shards:
        if shard["data_nbytes"] - shard["live"] > unused * shard["data_nbytes"]:
            query = f"{SELECT} WHERE shard_number = ? ORDER BY entries.number"
            yield from store.query(query, (shard["number"],))


def _groups(
    rows: Iterator[sqlite3.Row], store: Store, done: Compacted
) -> Iterator[list[tuple[int, Encoded]]]:
    """Entries with their numbers, as they will stand together in new shards."""
    group, size = [], 0
    for row in rows:
        try:
            entry = entry_of_row(row, store)
            parts = {part: store.read_encoded(entry, part) for part in entry.spans}
        except UserError:
            done.damaged += 1
            continue
        group.append((entry.number, Encoded(parts, {name: row[name] for name in NAMING})))
        size += entry.bytes
        if len(group) == SHARD_ENTRIES or size >= SHARD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _move(writer: Writer, group: list[tuple[int, Encoded]]) -> None:
    """Writes entries into a new shard, and then has the index name it."""
    name, places = writer.shards.write([entry for _, entry in group], writer.info)
    columns = [f"{prefix}{name}" for prefix in PREFIXES for name in ("offset", "nbytes")]
    rows = [dict.fromkeys(columns) | place for place in places]
    values = [
        [*(row[column] for column in columns), number]
        for row, (number, _) in zip(rows, group, strict=True)
    ]
    with index.translated(writer.path), index.transaction(writer.connection):
        number = writer.shard_number(name, rows)
        assigned = ", ".join(f"{column} = ?" for column in columns)
        writer.connection.executemany(
            f"UPDATE entries SET shard = {number}, {assigned} WHERE number = ?", values
        )


def _orphans(store: Store) -> list[str]:
    """The shards that are there and that the index does not have."""
    named = {row["name"] for row in store.query("SELECT name FROM shards")}
    return [name for name in store.shards.names() if name not in named]


def _remove_left_behind(store: Store) -> None:
    """Removes what killed processes had half written."""
    for path in store.shards.left_behind():
        path.unlink(missing_ok=True)
    for path in (store.path / PENDING).glob(".*.json.*"):
        path.unlink(missing_ok=True)


def _shrink(writer: Writer) -> None:
    """Gives back pages of the index where a quarter of them is free."""
    connection = writer.connection
    with index.translated(writer.path):
        free, pages = (
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("freelist_count", "page_count")
        )
        if free > pages / 4:
            connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _bytes_on_disk(store: Store) -> int:
    return sum(store.shards.size(name) or 0 for name in store.shards.names())
