"""Reading a store: a look-up is one query of the index and one read of a mapped shard."""

import json
import os
import pathlib
import sqlite3
import threading
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from icae_jax import errors
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Prefix
from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError
from icae_jax.inference.batching import concatenate
from icae_jax.inference.store import codec, index
from icae_jax.inference.store.entries import Entry, checksum, entry_of_row
from icae_jax.inference.store.info import Info
from icae_jax.inference.store.shards import Shards
from icae_jax.inference.store.writer import AT_ONCE, check_known, is_text, pending_files

if TYPE_CHECKING:
    from icae_jax.inference.compressor import Compressor
else:
    Compressor = object  # imports much that a store does not need

PAGE = 512  # entries of one query where many are listed
SELECT = """
SELECT entries.number, id, content_hash, tokens, k, lengths, memory_tokens, offset, entries.nbytes,
checksum, kv_offset, kv_nbytes, kv_checksum, metadata, shards.name AS shard,
shards.number AS shard_number
FROM entries JOIN shards ON shards.number = entries.shard
"""
_HAS = "CASE WHEN json_valid(metadata) THEN json_extract(metadata, ?) = ? END"
_ABSENT = object()


class Store:
    """A store that is read, also while another process fills or compacts it.

    `store[id]` is an `Entry`; `len`, `in` and iteration over ids, in their order, work as of a
    mapping. Several threads may share it. A process that was forked opens the index again.

    Attributes:
        path: its folder.
        info: what is the same for all entries.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        index.check_is_store(path)
        self._mutex = threading.RLock()
        self._connected: tuple[sqlite3.Connection, int, Any] | None = None
        with index.translated(self.path):
            index.check_made(self.path, self._connection())
            rows = self.query("SELECT key, value FROM info")
        self.info = Info.from_rows({row["key"]: row["value"] for row in rows}, self.path)
        self.shards = Shards(self.path, self.info.shards)

    def close(self) -> None:
        """Closes index and shards."""
        with self._mutex:
            if self._connected is not None and self._connected[1] == os.getpid():
                self._connected[0].close()
            self._connected = None
        self.shards.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()

    # --- The index ---

    def _connection(self) -> sqlite3.Connection:
        """That of this process. An index taken for unchanging is opened again once it changed."""
        connected = self._connected
        if connected is not None and connected[1] == os.getpid():
            if connected[2] is None or connected[2] == self._version():
                return connected[0]
            connected[0].close()
        version = self._version()
        connection, unchanging = index.open_reader(self.path)
        self._connected = connection, os.getpid(), version if unchanging else None
        return connection

    def _version(self):
        status = os.stat(self.path / index.NAME)
        return status.st_ino, status.st_size, status.st_mtime_ns

    def query(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of one query: of one transaction, none of which outlives the call."""
        with self._mutex, index.translated(self.path):
            return self._connection().execute(query, values).fetchall()

    def index_problems(self) -> list[str]:
        """What SQLite finds wrong with the index; nothing if it is whole."""
        with self._mutex, index.translated(self.path):
            return index.checked_pages(self._connection())

    def _row(self, text: object) -> sqlite3.Row | None:
        if not is_text(text):
            return None
        rows = self.query(f"{SELECT} WHERE id = ?", (text,))
        return rows[0] if rows else None

    def __getitem__(self, text: str) -> Entry:
        """The entry of an id; UserError if there is none."""
        row = self._row(text)
        if row is None:
            check_known(self.path, [text])
        return entry_of_row(row, self)

    def __contains__(self, text: object) -> bool:
        return self._row(text) is not None

    def __len__(self) -> int:
        return self.query("SELECT count(*) FROM entries")[0][0]

    def __iter__(self) -> Iterator[str]:
        last = -1
        query = "SELECT number, id FROM entries WHERE number > ? ORDER BY number LIMIT ?"
        while rows := self.query(query, (last, PAGE)):
            yield from (row["id"] for row in rows)
            last = rows[-1]["number"]

    def get(self, ids: Iterable[str]) -> list[Entry]:
        """The entries of ids, in their order; UserError that names those that are unknown."""
        ids = list(ids)
        rows = {}
        texts = [text for text in dict.fromkeys(ids) if is_text(text)]
        for start in range(0, len(texts), AT_ONCE):
            some = texts[start : start + AT_ONCE]
            for row in self.query(f"{SELECT} WHERE id IN ({', '.join('?' * len(some))})", some):
                rows[row["id"]] = row
        check_known(self.path, [text for text in ids if text not in rows])
        return [entry_of_row(rows[text], self) for text in ids]

    def find(
        self,
        where: Mapping[str, Any] | None = None,
        prefix: str = "",
        limit: int | None = None,
        after: str | None = None,
    ) -> Iterator[Entry]:
        """Entries in their order; those of a prefix by their ids.

        One whose row is damaged is left out, with a note on stderr.

        Args:
            where: values that an entry's metadata must have, by key.
            prefix: of the id.
            limit: how many at most.
            after: the id behind which to begin, as of the last entry of an earlier call.
        """
        for row in self._rows(where or {}, prefix, limit, after):
            try:
                entry = entry_of_row(row, self)
            except UserError as error:
                errors.say(f"note: left out: {error}")
                continue
            yield entry

    def _rows(self, where, prefix, limit, after) -> Iterator[sqlite3.Row]:
        if limit is not None and limit < 0:
            raise UserError(f"limit is {limit}; give the most entries, or leave it out")
        order, last = "number", -1
        conditions, values = [], []
        if prefix:
            order, last = "id", after or ""
            if not is_text(prefix):
                return
            conditions.append("id >= ?")
            values.append(prefix)
            if (end := _behind(prefix)) is not None:
                conditions.append("id < ?")
                values.append(end)
        elif after is not None:
            last = self[after].number
        for key, value in where.items():
            # SQLite chooses, and `_matches` decides: its paths cannot spell every key, nor does it
            # tell true from 1.
            if _is_plain(key) and _is_comparable(value):
                conditions.append(_HAS)
                values += [f'$."{key}"', value]
        left = limit
        # The first id may be empty, and stands behind no other.
        compared = ">=" if prefix and after is None else ">"
        while left is None or left > 0:
            asked = " AND ".join([f"entries.{order} {compared} ?", *conditions])
            query = f"{SELECT} WHERE {asked} ORDER BY entries.{order} LIMIT ?"
            rows = self.query(query, (last, *values, PAGE if left is None else min(PAGE, left)))
            if not rows:
                return
            for row in rows:
                if where and not _matches(row["metadata"], where):
                    continue
                yield row
                if left is not None:
                    left -= 1
            last, compared = rows[-1][order], ">"

    def stats(self) -> dict[str, Any]:
        """What the store holds: counts, and bytes in use and on disk."""
        (row,) = self.query(
            "SELECT count(*) AS entries, count(kv_offset) AS with_kv, total(tokens) AS tokens, "
            "total(memory_tokens) AS memory_tokens, total(nbytes) AS memory_bytes, "
            "total(coalesce(kv_nbytes, 0)) AS kv_bytes FROM entries"
        )
        (shards,) = self.query(
            "SELECT count(*) AS shards, total(nbytes) AS bytes, total(data_nbytes) AS data "
            "FROM shards"
        )
        counts = {name: int(row[name]) for name in row.keys()}  # noqa: SIM118, a row is no dict
        live = counts["memory_bytes"] + counts["kv_bytes"]
        return {
            **counts,
            "ratio": counts["tokens"] / max(1, counts["memory_tokens"]),
            "shards": shards["shards"],
            "shard_bytes": int(shards["bytes"]),
            "unused_bytes": int(shards["data"]) - live,
            "index_bytes": (self.path / index.NAME).stat().st_size,
            "pending": self.pending(),
        }

    def pending(self) -> int:
        """Pending files: what other processes stored, and is not in the index yet."""
        return len(pending_files(self.path))

    def check(self, compressor: Compressor) -> None:
        """UserError if another compressor filled the store; all that differs is named."""
        self.info.check_compressor(self.path, compressor)

    # --- Numbers ---

    def read_memory(self, entry: Entry) -> Memory:
        """An entry's memory, of one text, on the host.

        float32 or bfloat16 as stored, float32 where int8 is. UserError, naming entry and shard, if
        its bytes are damaged or gone.
        """
        shape = self.info.memory_shape(entry.memory_tokens)
        numbers = codec.decode(self._bytes(entry, "memory"), shape, self.info.dtype)
        lengths = list(entry.lengths)
        return codec.memory_of_numbers(numbers, lengths, self.info.kind, self.info.compression)

    def read_prefix(self, entry: Entry) -> Prefix | None:
        """An entry's stored prefix, head and memory, of one text; None if there is none."""
        if not entry.has_kv:
            return None
        shape = self.info.kv_shape(entry.memory_tokens)
        numbers = codec.decode(self._bytes(entry, "kv"), shape, self.info.dtype)
        head = len(self.info.head)
        positions, end = codec.places(entry.k, list(entry.lengths), self.info.compression)
        places = np.concatenate([np.arange(head), head + positions])
        return codec.prefix_of_numbers(numbers, places, head + end)

    def read_encoded(self, entry: Entry, part: str) -> np.ndarray:
        """An entry's part, "memory" or "kv", as numbers of the store's dtype (`codec.encode`)."""
        memory = part == "memory"
        shape = (self.info.memory_shape if memory else self.info.kv_shape)(entry.memory_tokens)
        return codec.stored(self._bytes(entry, part), shape, self.info.dtype)

    def _bytes(self, entry: Entry, part: str) -> np.ndarray:
        """The bytes of an entry's part, checked."""
        span = entry.spans[part]
        try:
            data = self.shards.read(entry.shard, span.offset, span.nbytes)
        except FileNotFoundError:
            return self._moved_bytes(entry, part)
        except EOFError as error:
            raise self._damage(entry, part, "is cut short") from error
        if checksum(data) != span.checksum:
            raise self._damage(entry, part, "is damaged: its checksum differs")
        return data

    def _moved_bytes(self, entry: Entry, part: str) -> np.ndarray:
        """The same, where the shard is gone: compacting may have moved them since the look-up."""
        row = self._row(entry.id)
        if row is None:
            raise UserError(
                f"store {self.path}: entry {errors.shown(entry.id)} has been removed since it was "
                "looked up"
            )
        now = entry_of_row(row, self)
        if now.shard == entry.shard:
            raise self._damage(entry, part, "is not there")
        if part not in now.spans or now.spans[part].checksum != entry.spans[part].checksum:
            raise UserError(
                f"store {self.path}: entry {errors.shown(entry.id)} has been replaced since it was "
                "looked up; look it up again"
            )
        return self._bytes(now, part)

    def _damage(self, entry, part, problem):
        what = "memory" if part == "memory" else "K/V"
        return UserError(
            f"store {self.path}: entry {errors.shown(entry.id)} cannot be read: shard "
            f"{self.shards.shown(entry.shard)} {problem} ({what}, {entry.spans[part].nbytes:,} "
            f"bytes at {entry.spans[part].offset:,}); take the shard from a backup, or remove the "
            "entry (icae store rm) and compress its text again"
        )


def open_store(path: str | os.PathLike) -> Store:
    """Opens a store to read; UserError if there is none, or of a newer version."""
    return Store(path)


def memory_of(entries: Sequence[Entry], config: CompressionConfig) -> Memory:
    """The memory of several entries, one text each, padded to the most segments.

    config: of the compressor that reads it. UserError if their k differ.
    """
    if not entries:
        raise UserError("there are no entries to read; give at least one")
    ks = {entry.k: entry for entry in entries}
    if len(ks) > 1:
        named = ", ".join(f"{errors.shown(entry.id)} (k {k})" for k, entry in ks.items())
        raise UserError(
            f"entries of {len(ks)} numbers of memory tokens per segment cannot be one memory: "
            f"{named}; read them one by one"
        )
    return jax.device_get(concatenate([entry.memory for entry in entries], config))


def _behind(prefix: str) -> str | None:
    """The first text behind all that begin with `prefix`; None if there is none."""
    for i in range(len(prefix) - 1, -1, -1):
        code = ord(prefix[i]) + 1
        if code <= 0x10FFFF:
            return prefix[:i] + chr(0xE000 if code == 0xD800 else code)
    return None


def _is_plain(key: str) -> bool:
    """Whether a path of SQLite's JSON functions can spell a key."""
    return is_text(key) and key.isprintable() and key != "" and not {'"', "\\"} & set(key)


def _is_comparable(value: object) -> bool:
    """Whether SQLite can hold a value, and finds it in JSON."""
    if isinstance(value, str):
        return is_text(value) and "\0" not in value
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)


def _matches(metadata: str, where: Mapping[str, Any]) -> bool:
    try:
        have = json.loads(metadata)
    except (TypeError, ValueError, RecursionError):
        return False
    return all(
        have.get(key, _ABSENT) == value and isinstance(have[key], bool) == isinstance(value, bool)
        for key, value in where.items()
    )
