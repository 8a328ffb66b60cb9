"""The index of a store: an SQLite database, one row for each entry.

One process writes, under the folder's lock; others read at the same time and see whole transactions
only. A transaction is on disk when it is committed (synchronous=FULL). On local disks the journal
is a write-ahead log, which readers do not wait for; its shared memory does not work across hosts,
so that shared disks have a rollback journal.
"""

import contextlib
import errno
import os
import pathlib
import shutil
import sqlite3
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping

from icae_jax import errors, lock
from icae_jax.errors import UserError

NAME = "index.sqlite"
_WAL = NAME + "-wal"
APPLICATION = 0x49434145  # "ICAE", which `file` shows
BUSY_SECONDS = 60.0  # how long to wait for a reader or writer of the same moment
CACHE_KIB = 65536
_SCHEMA = """
CREATE TABLE info (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE shards (
  number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
  nbytes INTEGER NOT NULL, data_nbytes INTEGER NOT NULL
);
CREATE TABLE entries (
  number INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE, content_hash TEXT NOT NULL,
  tokens INTEGER NOT NULL, k INTEGER NOT NULL, lengths TEXT NOT NULL,
  memory_tokens INTEGER NOT NULL, ratio REAL NOT NULL, bytes INTEGER NOT NULL,
  shard INTEGER NOT NULL REFERENCES shards (number),
  offset INTEGER NOT NULL, nbytes INTEGER NOT NULL, checksum TEXT NOT NULL,
  kv_offset INTEGER, kv_nbytes INTEGER, kv_checksum TEXT,
  metadata TEXT NOT NULL
);
CREATE INDEX entries_of_shards ON entries (shard);
"""
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}
_ERRNO = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
}


@contextlib.contextmanager
def translated(folder: str | os.PathLike) -> Iterator[None]:
    """Turns SQLite's errors into the house's: OSErrors of disks, UserErrors of what users mend."""
    try:
        yield
    except sqlite3.Error as error:
        path = os.path.join(folder, NAME)
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extended part
        if code in _DAMAGED or str(error).startswith("no such "):
            raise UserError(
                f"store {folder}: {NAME} is not a store's index, or is damaged ({error}); take it "
                "from a backup, or fill a new store"
            ) from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise UserError(
                f"store {folder}: another process has held its index for {BUSY_SECONDS:g} s; wait "
                "until it has ended"
            ) from error
        if code in _ERRNO:
            raise OSError(_ERRNO[code], f"{os.strerror(_ERRNO[code])} ({error})", path) from error
        raise


def exists(folder: str | os.PathLike) -> bool:
    """Whether a folder holds an index, perhaps of another version."""
    return (pathlib.Path(folder) / NAME).is_file()


# --- Writing ---


def open_writer(folder: pathlib.Path, rows: Mapping[str, str] | None) -> sqlite3.Connection:
    """The connection of the one writer, in autocommit; the caller holds the folder's lock.

    rows: of the table `info`, of an index that is made if there is none, or if the process that
    made it was killed meanwhile; None to make none.
    """
    with translated(folder):
        connection = sqlite3.connect(
            folder / NAME, BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        with contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            journal = "WAL" if lock.is_local(folder.resolve()) else "DELETE"
            connection.execute(f"PRAGMA journal_mode={journal}").fetchall()
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
            connection.execute("PRAGMA foreign_keys=ON")
            if rows is not None and not has_tables(connection):
                with transaction(connection):
                    for statement in _SCHEMA.split(";"):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA application_id={APPLICATION}")
                    connection.executemany("INSERT INTO info VALUES (?, ?)", rows.items())
                flush_folder(folder)
            stack.pop_all()
        return connection


def check_made(folder: str | os.PathLike, connection: sqlite3.Connection) -> None:
    """UserError if an index is empty: whoever makes it has not ended, or was killed."""
    if not has_tables(connection):
        raise UserError(
            f"store {folder} is empty: it is being made just now, or its making was stopped; wait, "
            "or run what made it again"
        )


def has_tables(connection: sqlite3.Connection) -> bool:
    """Whether an index has been made whole."""
    return bool(connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone())


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commits what the block did, or none of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A full disk may have rolled it back already.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def flush_folder(folder: str | os.PathLike) -> None:
    """Fsyncs a folder: a file that was made, renamed or removed in it stays so after power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder, and flushes those in which it or its parents are new."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        flush_folder(path.parent)


# --- Reading ---


def open_reader(folder: pathlib.Path) -> tuple[sqlite3.Connection, bool]:
    """A connection that only reads, and whether it takes the index for unchanging.

    A write-ahead log needs a file of shared memory beside it. Where that cannot be made, on
    read-only media, an index without a log is read as it is; one with a log is copied first, since
    alone it may be half of a transaction.
    """
    path = folder / NAME
    with translated(folder):
        try:
            return _connect(path, "mode=ro"), False
        except sqlite3.OperationalError as error:
            code = error.sqlite_errorcode & 0xFF
            if code not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                raise
            if not os.access(path, os.R_OK):
                raise
        if not _has_log(folder):
            return _connect(path, "mode=ro&immutable=1"), True
        with tempfile.TemporaryDirectory(prefix="icae_store_") as copy:
            for name in (NAME, _WAL):
                shutil.copyfile(folder / name, os.path.join(copy, name))
            # The files live on without names until the connection is closed.
            return _connect(pathlib.Path(copy) / NAME, "mode=rw"), False


def _has_log(folder: pathlib.Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return (folder / _WAL).stat().st_size > 0
    return False


def _connect(path: pathlib.Path, how: str) -> sqlite3.Connection:
    uri = f"file:{urllib.parse.quote(str(path.absolute()))}?{how}"
    connection = sqlite3.connect(
        uri, BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True
    )
    connection.row_factory = sqlite3.Row
    try:
        connection.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()  # opens the files
    except BaseException:
        connection.close()
        raise
    return connection


def checked_pages(connection: sqlite3.Connection) -> list[str]:
    """What SQLite finds wrong with an index's pages; nothing of one that is whole."""
    rows = [row[0] for row in connection.execute("PRAGMA quick_check(10)")]
    return [] if rows == ["ok"] else rows


def info_rows(connection: sqlite3.Connection) -> dict[str, str]:
    """The table `info`."""
    return {key: value for key, value in connection.execute("SELECT key, value FROM info")}


def check_local(folder: str | os.PathLike) -> None:
    """UserError if a store is to be at a URL, where SQLite cannot be."""
    if "://" in str(folder):
        raise UserError(
            f"store {folder}: the index of a store is on this machine; give a folder, and the URL "
            "for its shards (--shards) when it is made"
        )


def check_is_store(folder: str | os.PathLike) -> None:
    """UserError unless a folder is there and holds an index."""
    check_local(folder)
    with errors.naming(f"store {folder}"):
        if exists(folder):
            return
        what = "holds no store" if os.path.isdir(folder) else "is not there"
    raise UserError(f"store {folder} {what}; icae compress --store makes one")
