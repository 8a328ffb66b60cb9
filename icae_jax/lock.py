"""One writer of a folder at a time: a lock that ends with its process, and a heartbeat that other hosts watch.

`FOLDER/.lock` is flocked, and holds a record of who writes there. The kernel drops the flock however a process ends, but some shared disks
have none, or one for each host (NFS without locks, Cloud Storage FUSE, Lustre without `-o flock`). There the record decides, whose count
its writer raises every `BEAT_SECONDS`: others watch whether it changes, and never compare clocks. Whoever frees the lock removes the file;
a process that opened it before that must not take what it has for the lock.
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

from icae_jax import errors
from icae_jax.errors import UserError

NAME = ".lock"
BEAT_SECONDS = 5.0
# A record that has not changed for so long is a dead process's. Shared disks may show a minute-old file, and a process may be held up.
STALE_SECONDS = 120.0
LEAVING_SECONDS = 900.0  # whoever has been told to leave, and saves, is waited for so long
ENDING_SECONDS = 1.0  # a process that has been killed may take a moment to end
SETTLING_SECONDS = 2.0  # on a shared disk two may take the same free or stale lock: whose record is there afterwards has it
POLL_SECONDS = 0.2
_RECORD_BYTES = (
    4096  # padded, so that nobody reads a record half, and a shorter one leaves nothing of a longer
)
_LOCAL = {
    "ext2",
    "ext3",
    "ext4",
    "xfs",
    "btrfs",
    "zfs",
    "f2fs",
    "jfs",
    "bcachefs",
    "overlay",
    "tmpfs",
    "ramfs",
}
_live: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        return file.read().strip()
    return ""


def _is_local(folder: pathlib.Path) -> bool:
    """Whether a folder is on a disk of this machine alone, by the type of its filesystem; what is not known counts as shared."""
    best, kind = -1, ""
    for line in _read("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode().decode("unicode_escape")  # spaces are written \040
        if folder.is_relative_to(mount) and len(mount) >= best:
            best, kind = len(mount), after.split()[0]
    return kind in _LOCAL


def _boot() -> str:
    """What tells this start of this machine from any other; empty where there is no such thing."""
    return _read("/proc/sys/kernel/random/boot_id")


def flock(file, operation: int) -> bool | None:
    """`fcntl.flock`: whether the lock was got; None on a filesystem that has none."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _parsed(text: str) -> dict:
    """The record in a text; empty where it is none, as half of one."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


class Lock:
    """The lock of one folder, which must exist when it is first attempted. flag: what gives the folder, for what is said.

    `attempt` until it is true; then the lock is held until `close`, or until the process ends.
    """

    def __init__(self, folder: str | os.PathLike, flag: str):
        self.folder, self.flag, self.path = folder, flag, pathlib.Path(folder).resolve() / NAME
        self.held, self._lost, self._leaving, self._descriptor = False, "", False, None
        self._seen: tuple[str, float] | None = (
            None  # the record of another, and since when it has been the same
        )
        self._since: dict[str, float] = {}  # when each kind of waiting began
        self._stop, self._beating, self._thread = threading.Event(), threading.Lock(), None

    # ---------------------------------------------------------------------------------------------------------- taking

    def attempt(self) -> bool:
        """Whether the lock is now held; to be asked again while it is not. UserError where a live process has it, or nothing can be
        written there.
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
        self._forget()  # who else waits is not to take this process for the one that it watches
        if alive:
            self._wait_or_refuse(holder)
        return False

    def _is_the_file(self):
        """Whether the file that is open is still the one of its name. Shared disks may number files anew: there `_take` looks again."""
        with contextlib.suppress(FileNotFoundError):
            return not self._local or os.path.samestat(
                os.stat(self.path), os.fstat(self._descriptor)
            )
        return False

    def _is_mine(self):
        return _parsed(self._text()).get("token") == self._record["token"]

    def _text(self):
        """The record at the lock's path, as text; empty where there is none."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace").rstrip(" \n\0")
        except FileNotFoundError:  # freed at this moment
            return ""

    def _flock_tells(self, holder):
        """Whether the flock alone tells if the holder lives: it is on this host, or nobody else sees this disk."""
        on_this_host = holder.get("flock") and holder.get("boot") and holder["boot"] == _boot()
        return bool(on_this_host or (self._local and holder.get("local", True)))

    def _watch(self, text, holder):
        """Whether the holder lives: True once its record has changed, False once it has not for `STALE_SECONDS`, None until then."""
        now = time.monotonic()
        before, since = self._seen or (None, now)
        if text != before:
            self._seen = (text, now)
            if before is None:
                self._say(
                    f"{_who(holder)} may still be writing there; waiting up to {STALE_SECONDS:g} s to see whether it is alive"
                )
            return (
                True
                if holder and _parsed(before or "").get("token") == holder.get("token")
                else None
            )
        if now - since < STALE_SECONDS:
            return None
        self._say(
            f"{_who(holder)} is dead: nothing was heard of it for {STALE_SECONDS:g} s; going on without it"
        )
        return False

    def _wait_or_refuse(self, holder):
        """Notes that a live process has the lock. UserError once that is no longer to be waited for."""
        leaving = bool(holder.get("leaving"))
        if leaving and "leaving" not in self._since:
            self._say(
                f"{_who(holder)} has been told to end, and saves; waiting for it, {LEAVING_SECONDS / 60:g} minutes at most"
            )
        waited = time.monotonic() - self._since.setdefault(
            "leaving" if leaving else "alive", time.monotonic()
        )
        if waited >= (LEAVING_SECONDS if leaving else ENDING_SECONDS):
            where = (
                f"stop it (kill {holder['pid']} on {holder['host']})"
                if {"pid", "host"} <= holder.keys()
                else "stop it"
            )
            raise UserError(
                f"{self.flag} {self.folder} is in use: {_who(holder)} is writing there; wait until it has ended, {where}, "
                f"or give another {self.flag}"
            )

    def _say(self, text):
        print(f"{self.folder}: {text}", file=sys.stderr, flush=True)

    def _take(self, flocked):
        """Writes this process's record. Returns whether the lock is held: on a shared disk another may have taken it at the same time."""
        command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
        self._record = {
            "host": socket.gethostname(), "pid": os.getpid(), "since": datetime.datetime.now().isoformat(" ", "seconds"),
            "command": command if len(command) <= 160 else f"{command[:159]}…", "token": secrets.token_hex(8), "beat": 0,
            "boot": _boot(), "flock": flocked, "local": self._local, "leaving": False,
        }  # fmt: skip
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

    # --------------------------------------------------------------------------------------------------------- holding

    def _beat(self):
        last = time.monotonic()
        while not self._stop.wait(POLL_SECONDS):
            told = self._leaving != self._record["leaving"]
            if not told and time.monotonic() - last < BEAT_SECONDS:
                continue
            last = time.monotonic()
            with (
                contextlib.suppress(OSError),
                self._beating,
            ):  # a disk that fails for a while: the next beat may come through
                there = _parsed(self._text())
                if there.get("token") not in (None, self._record["token"]):
                    self._lost = _who(there)
                    return
                if self._stop.is_set():
                    return
                self._record |= {"beat": self._record["beat"] + 1, "leaving": self._leaving}
                self._write()

    def leave(self) -> None:
        """Notes that this process has been told to end: whoever comes for the lock waits until it has saved. Safe in a signal handler."""
        self._leaving = True

    def check(self) -> None:
        """UserError where another process has taken the lock meanwhile, since this one was not heard of for too long."""
        if self._lost:
            raise UserError(
                f"{self.flag} {self.folder} is in use: {self._lost} has taken it over while nothing was heard of this one, as when a "
                f"machine is suspended; this one ends"
            )

    def close(self) -> None:
        """Frees the lock, if it is held."""
        if self._descriptor is None:
            return
        self._stop.set()
        with contextlib.suppress(OSError), self._beating:
            if self.held and self._is_mine():  # what is another's by now stays
                self.path.unlink(missing_ok=True)
        self._forget()

    def _forget(self):
        self.held, descriptor, self._descriptor = False, self._descriptor, None
        _live.discard(self)
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _who(holder):
    """The process of a record, in words."""
    if not {"pid", "host", "since", "command"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']} ({holder['command']}),"


def _forget_all():
    """A forked child shares its parent's flock, which would outlive the parent in it."""
    for lock in list(_live):
        lock._forget()  # and nothing else: what a thread held is held for ever in the child


os.register_at_fork(after_in_child=_forget_all)


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike, flag: str) -> Iterator[Lock]:
    """Holds the lock of a folder, which is made where it is not there. flag: what gives the folder. UserError where another has it."""
    with errors.naming(f"{flag} {folder}", "give a folder that can be written"):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    lock = Lock(folder, flag)
    try:
        while not lock.attempt():
            time.sleep(POLL_SECONDS)
        yield lock
    finally:
        lock.close()
