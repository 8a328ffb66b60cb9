"""The store behind a server: looked up for every request, written by one thread."""

import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

from icae_jax.errors import UserError
from icae_jax.inference import store
from icae_jax.inference.compressor import Compressor
from icae_jax.inference.store import Entry, NewEntry
from icae_jax.inference.store import index as store_index
from icae_jax.server.failures import ApiError, shown


class Documents:
    """Documents of a store, which may be replaced or damaged meanwhile.

    Args:
        compressor: what reads them; UserError if another one filled the store.
        path: the store's folder; made if it is not there, unless it is only read.
        read_only: whether another process may write it.
    """

    def __init__(self, compressor: Compressor, path: str | os.PathLike, read_only: bool):
        self.path, self._compressor = pathlib.Path(path), compressor
        self._mutex = threading.RLock()
        self._writer = None if read_only else self._open_writer()
        self._written_to = None if read_only else self._version()
        self._store = store.open_store(self.path)
        self._store.check(compressor)
        self._seen = self._version()

    def _open_writer(self) -> store.Writer:
        info = store.Info.of(self._compressor)
        if store.exists(self.path):
            with store.open_store(self.path) as there:
                there.check(self._compressor)
                info = None
        return store.Writer(self.path, info)

    def close(self) -> None:
        """Closes the store, and lets others write it."""
        self._store.close()
        if self._writer is not None:
            self._writer.close()

    @property
    def writable(self) -> bool:
        """Whether documents can be added and removed."""
        return self._writer is not None

    def _version(self):
        status = os.stat(self.path / store_index.NAME)
        return status.st_dev, status.st_ino

    def current(self) -> store.Store:
        """The store as it is on disk now.

        ApiError 503 if it is gone, or another compressor's.
        """
        with self._mutex:
            try:
                version = self._version()
                if version != self._seen:  # another store stands there now
                    replaced = store.open_store(self.path)
                    try:
                        replaced.check(self._compressor)
                    except UserError:
                        replaced.close()
                        raise
                    self._store.close()
                    self._store, self._seen = replaced, version
            except (OSError, UserError) as error:
                raise _unavailable(error) from error
            return self._store

    def entry(self, document_id: str) -> Entry | None:
        """What the index says of a document; None if it is not there."""
        opened = self.current()
        try:
            if document_id not in opened:
                return None
            return opened[document_id]
        except UserError as error:
            raise damaged(error) from error

    def page(self, prefix: str, after: str | None, limit: int) -> list[Entry]:
        """Some documents behind one of them, in the store's order."""
        opened = self.current()
        if after is not None and not prefix and after not in opened:
            raise ApiError(400, f"after is {shown(after)}, which is no document", "after")
        return list(opened.find(prefix=prefix, limit=limit, after=after))

    def add(self, entries: Sequence[NewEntry]) -> None:
        """Stores documents; when this returns they are on disk. From one thread only."""
        self._written(lambda writer: writer.add_shard(entries))

    def remove(self, document_id: str) -> None:
        """Removes a document. From the same thread."""
        self._written(lambda writer: writer.remove([document_id]))

    def check_writable(self) -> None:
        """ApiError 403 if documents are only read."""
        if self._writer is None:
            raise ApiError(403, "the store is served with --read_only", code="read_only")

    @property
    def stores_kv(self) -> bool:
        """Whether the store keeps the decoder's K/V beside a memory."""
        return self._writer is not None and bool(self._writer.info.kv)

    def _written(self, write: Any) -> None:
        self.check_writable()
        self.current()
        try:
            if self._written_to != self._version():
                # Another store has taken its place: what went into the old one would be lost.
                self._writer.close()
                self._writer, self._written_to = self._open_writer(), self._version()
            write(self._writer)
        except (OSError, UserError) as error:
            raise _unavailable(error) from error


def _unavailable(error) -> ApiError:
    return ApiError(503, f"the store cannot be used: {error}", code="store_unavailable")


def damaged(error: Exception) -> ApiError:
    """What a client is told of a document whose bytes are not those that were stored."""
    return ApiError(500, str(error), code="memory_damaged")
