"""Filling a store: shards first, then the rows of the index that name them.

Process 0 of a job writes the index. The others write shards too, and leave what process 0 is to
index as a pending file, which is on disk as soon as it has its name. What is reported done survives
a kill and a power loss; what was not is written again under the same name.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import sqlite3
import time
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from icae_jax import errors, files, lock
from icae_jax.errors import UserError
from icae_jax.inference.store import index
from icae_jax.inference.store.entries import COLUMNS, PREFIXES, Encoded, Known, NewEntry, encoded
from icae_jax.inference.store.entries import metadata_text as checked_metadata
from icae_jax.inference.store.info import Info
from icae_jax.inference.store.shards import FOLDER, Shards

PENDING = "pending"
AT_ONCE = 900  # ids of one statement: SQLite's variables are limited
_INSERT = f"""
INSERT INTO entries (shard, {", ".join(COLUMNS)}) VALUES ({", ".join("?" * (len(COLUMNS) + 1))})
ON CONFLICT (id) DO UPDATE SET
{", ".join(f"{name} = excluded.{name}" for name in ("shard", *COLUMNS[1:]))}
"""
_KNOWN = "SELECT id, content_hash, kv_offset IS NOT NULL, metadata FROM entries WHERE id IN "


class Writer:
    """One process that fills a store; a context manager.

    Args:
        path: the store's folder; made if it is not there.
        info: what it is filled with, compared with what is there; None to take what is there.
        process: of this process, from 0.
        processes: how many fill it together.
        shards: a URL or a folder for shards, given when the store is made.

    Raises:
        UserError: another process writes there as this one, another compressor filled the store, or
            the folder is none.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        info: Info | None = None,
        process: int = 0,
        processes: int = 1,
        shards: str | None = None,
    ):
        if not 0 <= process < processes:
            raise UserError(f"process is {process} of {processes}; give one from 0 on")
        index.check_local(path)
        self.path, self.process, self.processes = pathlib.Path(path), process, processes
        self._pending = self.path / PENDING
        self._connection: sqlite3.Connection | None = None
        with contextlib.ExitStack() as stack:
            self._open(stack, info, shards)
            self._stack = stack.pop_all()

    def _open(self, stack, info, shards):
        self._check_folder(info)
        if not index.exists(self.path):
            with errors.naming(f"--store {self.path}", "give a folder that can be written"):
                index.make_folder(self._pending)
        # Process 0 has the folder's lock; others have one of their own number.
        own = self.path if self.process == 0 else self._pending / f"process{self.process}"
        self._lock = stack.enter_context(lock.only_writer(own, "--store"))
        if shards and "://" not in shards:
            shards = str(pathlib.Path(shards).resolve())
        if self.process == 0:
            rows = None
            if info is not None and not index.exists(self.path):
                Shards(self.path, shards or "").check_free()
            if info is not None:
                rows = _with_shards(info, shards or "").rows() | {"store": secrets.token_hex(8)}
            self._connection = index.open_writer(self.path, rows)
            stack.callback(self._close_index)
            stated = self._stated()
        else:
            stated = self._stated_to_readers()
        if stated is None:
            stated = _with_shards(info, shards or "")
        elif info is not None:
            stated.check(self.path, info)
            if shards and shards != stated.shards:
                raise UserError(
                    f"--shards {shards}: store {self.path} keeps its shards in "
                    f"{stated.shards or self.path / FOLDER}; leave --shards out, or fill a new "
                    "store"
                )
        self.info = stated
        self.shards = Shards(self.path, stated.shards)
        stack.callback(self.shards.close)
        if self.process == 0:
            with index.translated(self.path):
                rows = index.info_rows(self.connection)
            self.shards.claim(rows.get("store", ""))
            self.merge()

    def _check_folder(self, info):
        """UserError, before anything is made, where a store cannot be."""
        with errors.naming(f"--store {self.path}", "give a folder that can be written"):
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"--store {self.path} is a file; give a folder")
            there = {p.name for p in self.path.iterdir()} if self.path.exists() else set()
        if index.NAME in there:
            return
        if info is None:
            index.check_is_store(self.path)
        if others := there - {lock.NAME, PENDING, FOLDER}:
            raise UserError(
                f"--store {self.path} is a folder with other files, such as {min(others)}; give "
                "a new one, or a store"
            )

    def _stated(self):
        """What the index says of the store."""
        with index.translated(self.path):
            index.check_made(self.path, self.connection)
            rows = index.info_rows(self.connection)
        return Info.from_rows(rows, self.path)

    def _stated_to_readers(self):
        """The same, of a process that does not write the index; None if it is not made yet."""
        if not index.exists(self.path):
            return None
        with index.translated(self.path), contextlib.closing(self._reader()) as connection:
            if not index.has_tables(connection):
                return None
            return Info.from_rows(index.info_rows(connection), self.path)

    def _reader(self):
        return index.open_reader(self.path)[0]

    def _close_index(self):
        with index.translated(self.path):
            self._connection.close()

    def close(self) -> None:
        """Ends writing and releases the lock."""
        self._stack.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()

    # --- What is there ---

    def known(self, ids: Iterable[str]) -> dict[str, Known]:
        """What is stored or pending of these ids; ids that are not are left out."""
        asked = dict.fromkeys(ids)
        ids = [text for text in asked if is_text(text)]
        found: dict[str, Known] = {}
        with index.translated(self.path), contextlib.ExitStack() as stack:
            connection = self._connection
            if connection is None and index.exists(self.path):
                connection = stack.enter_context(contextlib.closing(self._reader()))
            if connection is not None and index.has_tables(connection):
                for start in range(0, len(ids), AT_ONCE):
                    some = ids[start : start + AT_ONCE]
                    rows = connection.execute(f"{_KNOWN} ({', '.join('?' * len(some))})", some)
                    for text, content_hash, kv, metadata in rows:
                        found[text] = Known(content_hash, bool(kv), _metadata(metadata))
        for _, content in self._pending_contents():
            for values in content["entries"]:
                if values["id"] in asked:
                    kv = values["kv_offset"] is not None
                    metadata = _metadata(values["metadata"])
                    found[values["id"]] = Known(values["content_hash"], kv, metadata)
            for text, metadata in content["metadata"].items():
                if text in found:
                    found[text] = found[text]._replace(metadata=_metadata(metadata))
        return found

    # --- Adding ---

    def add_shard(self, entries: Sequence[NewEntry]) -> str:
        """Stores entries in one shard; when this returns they are on disk. Returns its name.

        An entry of the same id is replaced. UserError, before anything is written, if one cannot
        be kept (`entries.encoded`) or two have one id.
        """
        if not entries:
            raise UserError("there are no entries to store; give at least one")
        ids = [entry.id for entry in entries]
        if len(set(ids)) < len(ids):
            repeated = next(text for text in ids if ids.count(text) > 1)
            raise UserError(f"two entries have the id {repeated!r}; give each an id of its own")
        return self.add_encoded([encoded(entry, self.info) for entry in entries])

    def add_encoded(self, entries: Sequence[Encoded]) -> str:
        """As `add_shard`, of entries that have been encoded."""
        self._lock.check()
        if self.process == 0 < self.processes - 1:
            self.merge()  # so that few are pending, which `known` of other processes reads
        name, places = self.shards.write(entries, self.info)
        empty = dict.fromkeys(COLUMNS)
        rows = [empty | entry.values | place for entry, place in zip(entries, places, strict=True)]
        self._lock.check()
        if self._connection is None:
            self._leave({"shard": name, "entries": rows, "metadata": {}})
        else:
            with index.translated(self.path), index.transaction(self._connection):
                self._insert(name, rows)
        return name

    def set_metadata(self, metadata: Mapping[str, Mapping[str, Any]]) -> None:
        """Gives entries other metadata. UserError, before any is changed, on an unknown id."""
        texts = {
            text: checked_metadata(value, f"entry {errors.shown(text)}")
            for text, value in metadata.items()
        }
        known = self.known(texts)
        check_known(self.path, [text for text in texts if text not in known])
        if not texts:
            return
        self._lock.check()
        if self._connection is None:
            self._leave({"shard": None, "entries": [], "metadata": texts})
            return
        with index.translated(self.path), index.transaction(self._connection):
            self._update(texts)

    def remove(self, ids: Iterable[str]) -> int:
        """Removes entries; their bytes stay until the store is compacted. Returns how many.

        UserError, before any is removed, on an unknown id. Only in process 0.
        """
        ids = list(dict.fromkeys(ids))
        query = "SELECT 1 FROM entries WHERE id = ?"
        with index.translated(self.path):
            unknown = [
                text
                for text in ids
                if not (is_text(text) and self.connection.execute(query, (text,)).fetchone())
            ]
        check_known(self.path, unknown)
        self._lock.check()
        with index.translated(self.path), index.transaction(self.connection):
            self.connection.executemany(
                "DELETE FROM entries WHERE id = ?", [(text,) for text in ids]
            )
        return len(ids)

    @property
    def connection(self) -> sqlite3.Connection:
        """That of the index. ValueError in another process than 0, which does not write it."""
        if self._connection is None:
            raise ValueError(f"process {self.process} does not write the index; process 0 does")
        return self._connection

    def _insert(self, name, rows):
        number = self.shard_number(name, rows)
        self.connection.executemany(
            _INSERT, ([number, *(row[column] for column in COLUMNS)] for row in rows)
        )

    def shard_number(self, name: str, rows: Sequence[Mapping[str, Any]]) -> int:
        """The number of a shard in the index, which has it afterwards. rows: its entries'."""
        spans = [(row[f"{part}offset"], row[f"{part}nbytes"]) for row in rows for part in PREFIXES]
        spans = [span for span in spans if None not in span]
        ends, sizes = [sum(span) for span in spans], [size for _, size in spans]
        self.connection.execute(
            "INSERT OR IGNORE INTO shards (name, nbytes, data_nbytes) VALUES (?, ?, ?)",
            (name, max(ends), sum(sizes)),
        )
        query = "SELECT number FROM shards WHERE name = ?"
        return self.connection.execute(query, (name,)).fetchone()[0]

    def _update(self, texts):
        query = "UPDATE entries SET metadata = ? WHERE id = ?"
        self.connection.executemany(query, [(value, text) for text, value in texts.items()])

    # --- Pending ---

    def _leave(self, content):
        """Writes a pending file, whose name begins with the time: later ones are merged later."""
        text = json.dumps({"info": self.info.rows()} | content, ensure_ascii=False)
        name = f"{time.time_ns():020}-{self.process}-{content['shard'] or 'metadata'}"
        index.make_folder(self._pending)
        with files.replacing_file(self._pending / f"{name}.json") as tmp:
            tmp.write_text(text, encoding="utf-8")
        index.flush_folder(self._pending)

    def _pending_contents(self) -> Iterator[tuple[pathlib.Path, dict[str, Any]]]:
        """What other processes left, in the order of writing; UserError if one is damaged."""
        for path in pending_files(self.path):
            try:
                content = files.read_json(path, "what a process has stored")
            except UserError as error:
                if isinstance(error.__cause__, FileNotFoundError) or not path.exists():
                    continue  # merged meanwhile
                raise
            files.check_fields(content, {"info": dict, "entries": list, "metadata": dict}, path)
            for row in content["entries"]:
                if not isinstance(row, dict) or not row.keys() >= set(COLUMNS):
                    raise UserError(f"{path}: {errors.shown(row)} is no entry; remove the file")
            yield path, content

    def merge(self) -> int:
        """Indexes what other processes left. Returns how many pending files there were.

        Killed at any moment, it merges the rest when it is called again. Only in process 0.
        UserError if one is damaged, or of another store.
        """
        merged = []
        for path, content in self._pending_contents():
            self._lock.check()
            rows, own = content["info"], self.info.rows()
            different = sorted(
                key
                for key in own.keys() | rows.keys()
                if key not in ("base", "adapter", "created_by") and own.get(key) != rows.get(key)
            )
            if different:
                raise UserError(
                    f"{path} is of another store: its {', '.join(different)} differ; "
                    "remove it, or move it to the store that it is of"
                )
            with index.translated(self.path), index.transaction(self.connection):
                if content["entries"]:
                    self._insert(content["shard"], content["entries"])
                self._update(content["metadata"])
            merged.append(path)
        for path in merged:
            path.unlink(missing_ok=True)
        if merged:
            # Before anything newer is written: one that came back would undo it.
            index.flush_folder(self._pending)
        return len(merged)


def pending_files(store: pathlib.Path) -> list[pathlib.Path]:
    """What processes that do not write the index have left, in the order of writing."""
    return sorted((store / PENDING).glob("[!.]*.json"))


def check_known(path: str | os.PathLike, unknown: Sequence[str]) -> None:
    """UserError that names ids which a store does not have; nothing if there are none."""
    if unknown:
        some = ", ".join(errors.shown(text) for text in unknown[:5])
        more = f", … ({len(unknown):,} in all)" if len(unknown) > 5 else ""
        raise UserError(f"store {path} has no entry {some}{more}; icae store ls lists them")


def is_text(text: object) -> bool:
    """Whether a value can be an id: SQLite holds no half of a surrogate pair."""
    try:
        return isinstance(text, str) and text.encode() is not None
    except UnicodeError:
        return False


def _metadata(text: object) -> dict[str, Any]:
    """The metadata in a row; none where the row is damaged, which `verify` tells."""
    try:
        metadata = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _with_shards(info, shards):
    return dataclasses.replace(info, shards=shards)
