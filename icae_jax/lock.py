"""One writer of a folder at a time: a lock that ends with its process, and a heartbeat.

`FOLDER/.lock` is flocked, and holds a record of its writer. The kernel releases the flock however a
process ends, but some shared disks have no flock, or one for each host (NFS without locks, Cloud
Storage FUSE, Lustre without `-o flock`). There the record decides: its writer increments a counter
every `BEAT_SECONDS`, and others watch whether it changes; clocks are never compared. Releasing the
lock removes the file, so a process that opened it earlier must not take its flock for the lock.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import secrets
import shlex
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import IO

from icae_jax import errors
from icae_jax.errors import UserError

NAME = ".lock"
BEAT_SECONDS = 5.0
# A record that has not changed for so long belongs to a dead process. Shared disks may show a file
# that is a minute old, and a process may be suspended.
STALE_SECONDS = 120.0
LEAVING_SECONDS = 900.0  # how long to wait for a process that was told to end, and is saving
ENDING_SECONDS = 1.0  # a killed process may take a moment to end
# On a shared disk two processes may take the same free or stale lock: after this time, the one
# whose record is there has it.
SETTLING_SECONDS = 2.0
POLL_SECONDS = 0.2
_RECORD_BYTES = 4096  # padded, so that nobody reads half a record or the tail of a longer one
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "bcachefs"}
_LOCAL |= {"overlay", "tmpfs", "ramfs"}
_live: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        return file.read().strip()
    return ""


def _is_local(folder: pathlib.Path) -> bool:
    """Whether a folder is on a local disk, by its filesystem's type; shared if unknown."""
    best, kind = -1, ""
    for line in _read("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode().decode("unicode_escape")  # spaces are written \040
        if folder.is_relative_to(mount) and len(mount) >= best:
            best, kind = len(mount), after.split()[0]
    return kind in _LOCAL


def is_local(folder: pathlib.Path) -> bool:
    """Whether a folder, an absolute path, is on a disk of this host alone; shared if unknown."""
    return _is_local(folder)


def _boot() -> str:
    """The id of this boot of this host; empty on systems without one."""
    return _read("/proc/sys/kernel/random/boot_id")


def flock(file: IO | int, operation: int) -> bool | None:
    """Calls `fcntl.flock`; returns whether it succeeded, or None on a filesystem without flock."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _parsed(text: str) -> dict:
    """The record in a text; empty if it is not one."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


class Lock:
    """The lock of one folder.

    Call `attempt` until it returns True. The lock is then held until `close`, or until the process
    ends.

    Args:
        folder: must exist when the lock is first attempted.
        flag: the flag that gives the folder, for messages.
    """

    def __init__(self, folder: str | os.PathLike, flag: str):
        self.folder, self.flag, self.path = folder, flag, pathlib.Path(folder).resolve() / NAME
        self.held, self._lost, self._leaving, self._descriptor = False, "", False, None
        # Another process's record, and since when it has been the same.
        self._seen: tuple[str, float] | None = None
        self._since: dict[str, float] = {}  # when each kind of wait began
        self._stop, self._beating, self._thread = threading.Event(), threading.Lock(), None

    # ---------------------------------------------------------------------------------- taking

    def attempt(self) -> bool:
        """Tries once to take the lock; returns whether it is held.

        UserError where a live process has it, or the folder cannot be written.
        """
        with errors.naming(f"{self.flag} {self.folder}", "give a folder that can be written"):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._local = _is_local(self.path.parent)
        free = flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        text = errors.retrying(self._text, f"reading {self.path}")
        holder = _parsed(text)
        if free is not None and self._flock_tells(holder):
            alive = not free
        else:
            alive = False if free is not False and not text else self._watch(text, holder)
        if alive is False and self._is_the_file() and self._take(bool(free)):
            return True
        self._forget()  # other waiting processes must not mistake this one for the holder
        if alive:
            self._wait_or_refuse(holder)
        return False

    def _is_the_file(self):
        """Whether the open file is still the one at the path.

        Inode numbers may change on shared disks; there `_take` checks again.
        """
        with contextlib.suppress(FileNotFoundError):
            return not self._local or os.path.samestat(
                os.stat(self.path), os.fstat(self._descriptor)
            )
        return False

    def _is_mine(self):
        return _parsed(self._text()).get("token") == self._record["token"]

    def _text(self):
        """The text of the record at the lock's path; empty if there is none."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace").rstrip(" \n\0")
        except FileNotFoundError:  # released just now
            return ""

    def _flock_tells(self, holder):
        """Whether the flock decides: the holder is on this host, or only this host has the disk."""
        on_this_host = holder.get("flock") and holder.get("boot") and holder["boot"] == _boot()
        return bool(on_this_host or (self._local and holder.get("local", True)))

    def _watch(self, text, holder):
        """Whether the holder is alive, or None while that is unknown.

        It is alive once its record changes, and dead once it has not for `STALE_SECONDS`.
        """
        now = time.monotonic()
        before, since = self._seen or (None, now)
        if text != before:
            self._seen = (text, now)
            if before is None:
                self._say(
                    f"{_who(holder)} may still be writing there; "
                    f"waiting up to {STALE_SECONDS:g} s to see whether it is alive"
                )
            same_writer = holder and _parsed(before or "").get("token") == holder.get("token")
            return True if same_writer else None
        if now - since < STALE_SECONDS:
            return None
        self._say(
            f"{_who(holder)} is dead: no heartbeat for {STALE_SECONDS:g} s; going on without it"
        )
        return False

    def _wait_or_refuse(self, holder):
        """Waits for a live holder; UserError once that has taken too long."""
        leaving = bool(holder.get("leaving"))
        if leaving and "leaving" not in self._since:
            self._say(
                f"{_who(holder)} has been told to end, and is saving; "
                f"waiting for it, {LEAVING_SECONDS / 60:g} minutes at most"
            )
        now = time.monotonic()
        waited = now - self._since.setdefault("leaving" if leaving else "alive", now)
        if waited >= (LEAVING_SECONDS if leaving else ENDING_SECONDS):
            stop = "stop it"
            if {"pid", "host"} <= holder.keys():
                stop = f"stop it (kill {holder['pid']} on {holder['host']})"
            raise UserError(
                f"{self.flag} {self.folder} is in use: {_who(holder)} is writing there; "
                f"wait until it has ended, {stop}, or give another {self.flag}"
            )

    def _say(self, text):
        print(f"{self.folder}: {text}", file=sys.stderr, flush=True)

    def _take(self, flocked):
        """Writes this process's record; returns whether the lock is held.

        On a shared disk another process may have taken it at the same time.
        """
        command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
        self._record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.datetime.now().isoformat(" ", "seconds"),
            "command": command if len(command) <= 160 else f"{command[:159]}…",
            "token": secrets.token_hex(8),
            "beat": 0,
            "boot": _boot(),
            "flock": flocked,
            "local": self._local,
            "leaving": False,
        }
        with errors.naming(f"{self.flag} {self.folder}", "give a folder that can be written"):
            self._write()
        if not self._local:
            time.sleep(SETTLING_SECONDS)
            if not self._is_mine():
                self._seen = None
                return False
        self.held = True
        _live.add(self)
        self._thread = threading.Thread(
            target=self._beat, name=f"lock of {self.folder}", daemon=True
        )
        self._thread.start()
        return True

    def _write(self):
        text = json.dumps(self._record)
        os.pwrite(self._descriptor, text.encode().ljust(_RECORD_BYTES), 0)
        os.ftruncate(self._descriptor, _RECORD_BYTES)
        if not self._local:
            os.fsync(self._descriptor)

    # --------------------------------------------------------------------------------- holding

    def _beat(self):
        last = time.monotonic()
        while not self._stop.wait(POLL_SECONDS):
            leaving_now = self._leaving != self._record["leaving"]
            if not leaving_now and time.monotonic() - last < BEAT_SECONDS:
                continue
            last = time.monotonic()
            # OSError: the disk fails for a while, and the next beat may come through.
            with contextlib.suppress(OSError), self._beating:
                there = _parsed(self._text())
                if there.get("token") not in (None, self._record["token"]):
                    self._lost = _who(there)
                    return
                if self._stop.is_set():
                    return
                self._record |= {"beat": self._record["beat"] + 1, "leaving": self._leaving}
                self._write()

    def leave(self) -> None:
        """Records that this process is saving and about to end, so that others wait for it.

        Safe in a signal handler.
        """
        self._leaving = True

    def check(self) -> None:
        """UserError if another process took the lock because this one's heartbeat had stopped."""
        if self._lost:
            raise UserError(
                f"{self.flag} {self.folder} is in use: {self._lost} has taken it over while this "
                "process had no heartbeat, as when a machine is suspended; this process ends"
            )

    def close(self) -> None:
        """Releases the lock, if it is held."""
        if self._descriptor is None:
            return
        self._stop.set()
        with contextlib.suppress(OSError), self._beating:
            if self.held and self._is_mine():  # do not remove another's
                self.path.unlink(missing_ok=True)
        self._forget()

    def _forget(self):
        self.held, descriptor, self._descriptor = False, self._descriptor, None
        _live.discard(self)
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _who(holder):
    """Describes the process of a record."""
    if not {"pid", "host", "since", "command"} <= holder.keys():
        return "another process"
    since = f"since {holder['since']} ({holder['command']}),"
    return f"process {holder['pid']} on {holder['host']}, {since}"


def _forget_all():
    """Drops the flocks that a forked child shares, which would outlive the parent in the child."""
    for lock in list(_live):
        lock._forget()  # no more: mutexes that a thread held stay locked in the child


os.register_at_fork(after_in_child=_forget_all)


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike, flag: str) -> Iterator[Lock]:
    """Holds the lock of a folder, created if needed; UserError where another process has it.

    Args:
        folder: the folder.
        flag: the flag that gives it, for messages.
    """
    with errors.naming(f"{flag} {folder}", "give a folder that can be written"):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    lock = Lock(folder, flag)
    try:
        while not lock.attempt():
            time.sleep(POLL_SECONDS)
        yield lock
    finally:
        lock.close()
