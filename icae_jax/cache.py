"""The cache folder: where it is, who uses what in it, and how its size is kept below a limit.

It holds only what can be made again. `icae cache` lists and prunes it.

| folder   | content                                                | last used                 |
|----------|--------------------------------------------------------|---------------------------|
| tokens   | a folder for each tokenised source, with `about.json`  | mtime of about.json       |
| compiled | JAX's compiled programs, a folder for each CPU type    | JAX keeps it in X-atime   |
| hashes   | the hashes of large data files                         | mtime of the file         |
| gguf     | configuration and tokenizer of each GGUF file          | newest mtime of its files |
| plans    | what plans compiled and counted, a file an answer      | mtime of the file         |
| bases    | base models copied from buckets: listed, never removed | newest mtime of its files |

A process that uses a token folder holds a shared lock on its `about.json`, so that no other one
removes it. Files whose names do not have the cache's form, such as a user's own, are ignored.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import io
import itertools
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator

from icae_jax import errors, lock
from icae_jax.errors import UserError

VARIABLE, DEFAULT_GIB = "ICAE_CACHE_GIB", 20.0
COMPILED_PART = 4  # JAX keeps compiled programs within 1/4 of the limit
RECENT = 3600  # seconds; entries used since then stay, whatever the limit
LEFT_OVER = 86400  # seconds after which an unfinished or half-removed folder is garbage
ABOUT = "about.json"
_KEY = "[0-9a-f]{32}"  # the names of token folders, hashes and plans
_UNFINISHED = r"\.(new|gone|lock)\..+"
GIB = 1 << 30


# ------------------------------------------------------------------------------- where it is


def named_folder(configured: str | os.PathLike = "") -> pathlib.Path | None:
    """The configured folder, else $ICAE_CACHE, else ~/.cache/icae_jax; None without a home."""
    named = configured or os.environ.get("ICAE_CACHE")
    if named:
        return pathlib.Path(os.path.expanduser(named))
    home = os.environ.get("HOME", os.path.expanduser("~"))
    return pathlib.Path(home) / ".cache" / "icae_jax" if os.path.isabs(home) else None


@functools.cache
def can_write(folder: pathlib.Path) -> bool:
    """Whether this user can write in a folder, or create it. Tries it: modes do not tell all."""
    try:
        with tempfile.TemporaryFile(
            dir=next(path for path in (folder, *folder.absolute().parents) if path.exists())
        ):
            return True
    except OSError:
        return False


def folder(configured: str | os.PathLike = "", holding: str | os.PathLike = "") -> pathlib.Path:
    """The cache folder: `named_folder`, or a folder in the temporary directory if not writable.

    Args:
        configured: a folder from a configuration, returned as it is; its user reports errors.
        holding: a relative path. A cache that has it is taken even if it is read-only.

    Raises:
        UserError: no folder can be written.
    """
    named = named_folder(configured)
    if configured:
        return named
    if named is not None and ((holding and (named / holding).exists()) or can_write(named)):
        return named
    return _temporary_folder(named)


@functools.cache
def _temporary_folder(instead_of: pathlib.Path | None) -> pathlib.Path:
    """This user's cache in the temporary directory; says so once."""
    what = (
        "cache: there is no home folder"
        if instead_of is None
        else f"cache {instead_of}: cannot be written"
    )
    remedy = "set $ICAE_CACHE to a writable folder"
    try:
        own = pathlib.Path(tempfile.gettempdir()) / f"icae_jax-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            own.mkdir(mode=0o700)
        there = own.lstat()
        trusted = (
            stat.S_ISDIR(there.st_mode)
            and there.st_uid == os.getuid()
            and not there.st_mode & 0o022
        )
        if not trusted or not can_write(own):  # another user may have put something there
            own = pathlib.Path(tempfile.mkdtemp(prefix="icae_jax-"))
    except OSError as error:
        raise UserError(
            f"{what}, nor can a temporary folder ({error}); {remedy}, or $TMPDIR"
        ) from error
    print(f"{what}; {own} is used instead. To keep it, {remedy}", file=sys.stderr, flush=True)
    return own


# ---------------------------------------------------------------------------------- its limit


def limit() -> int:
    """The limit in bytes, from $ICAE_CACHE_GIB. UserError where that is not a number."""
    return parse_gib(os.environ.get(VARIABLE) or DEFAULT_GIB, VARIABLE)


def parse_gib(gib: str | int | float, name: str) -> int:
    """A number of GiB in bytes. UserError, which names the flag or variable, if it is not one."""
    try:
        size = float(gib)
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise UserError(
            f"{name} is {gib!r}; give a number of GiB from 0 on, such as {DEFAULT_GIB:g}"
        )
    return int(size * GIB)


# -------------------------------------------------------------------------------------- locks

_REMEDY = "set data.cache_dir or $ICAE_CACHE to a writable folder"


@contextlib.contextmanager
def alone(folder: pathlib.Path, what: str) -> Iterator[None]:
    """Lets one process at a time work on a folder of the cache, while the others wait.

    The lock ends with its process, however that ends. On a filesystem without locks nobody waits.

    Args:
        folder: need not exist.
        what: the work, for the note to those who wait.
    """
    path = folder.with_name(f".lock.{folder.name}")
    with errors.naming(f"cache {folder.parent}: cannot be written", _REMEDY):
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115
    with file:
        if lock.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is False:
            print(f"{what}: another process is at it; waiting", file=sys.stderr, flush=True)
            lock.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # waiting processes have it open, and find the work done


def hold(folder: pathlib.Path) -> io.BufferedReader | None:
    """Marks a token folder as used now, and keeps it from removal while the result stays open.

    Returns None if the folder is gone. UserError where the cache cannot be read.
    """
    path = folder / ABOUT
    with errors.naming(f"cache {folder.parent}: cannot be read", _REMEDY):
        try:
            file = open(path, "rb")  # noqa: SIM115 - it stays open
        except FileNotFoundError:
            return None
    lock.flock(file, fcntl.LOCK_SH)
    if not path.exists():  # removed before it was locked
        file.close()
        return None
    with contextlib.suppress(OSError):  # a read-only cache
        os.utime(path)
    return file


# ------------------------------------------------------------------------------------ entries


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of the cache. used: seconds since 1970; outdated: its format is no longer read."""

    kind: str
    name: str
    paths: tuple[pathlib.Path, ...]
    size: int
    used: float
    outdated: bool = False

    def in_use(self) -> bool:
        """Whether a live process holds it, or that cannot be determined."""
        if self.kind == "bases":
            return True
        about = self.paths[0] / ABOUT
        if self.kind != "tokens" or not about.exists():
            return False
        try:
            with open(about, "r+b") as file:
                return not lock.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True

    def remove(self) -> None:
        """Removes it. A folder is renamed first, so that nobody reads half of it."""
        for path in self.paths:
            if path.is_dir():
                gone = path.with_name(f".gone.{secrets.token_hex(8)}")
                os.rename(path, gone)
                shutil.rmtree(gone, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _size(path):
    paths = path.rglob("*") if path.is_dir() else [path]
    return sum(p.lstat().st_size for p in paths if not p.is_dir())


def _newest(path):
    return max((p.lstat().st_mtime for p in itertools.chain([path], path.rglob("*"))), default=0.0)


def _matching(folder, pattern):
    """The paths in a folder whose names match a pattern, sorted."""
    return sorted(path for path in folder.glob("*") if re.fullmatch(pattern, path.name))


def _token_entry(path, version):
    about, content = path / ABOUT, {}
    with contextlib.suppress(FileNotFoundError, ValueError):  # the first version wrote none
        content = json.loads(about.read_text(encoding="utf-8"))
    content = content if isinstance(content, dict) else {}
    used = about.stat().st_mtime if content else _newest(path)
    outdated = content.get("version") != version
    return Entry("tokens", content.get("source", path.name), (path,), _size(path), used, outdated)


def _compiled_entry(path):
    stamp = _stamp(path)
    used = path.stat().st_mtime
    if stamp.exists():
        used = int.from_bytes(stamp.read_bytes(), "little") / 1e9
    return Entry("compiled", path.parent.name, (path, stamp), path.stat().st_size, used)


def entries(root: pathlib.Path, version: int) -> list[Entry]:
    """The entries of a cache folder. Those that vanish meanwhile are left out.

    Args:
        root: the cache folder.
        version: the version of token folders that is read today.
    """
    result = []
    for path in _matching(root / "tokens", _KEY):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            result.append(_token_entry(path, version))
    for path in sorted((root / "compiled").glob("*/*-cache")):
        with contextlib.suppress(FileNotFoundError):
            result.append(_compiled_entry(path))
    json_file = rf"{_KEY}\.json"
    patterns = {"hashes": json_file, "plans": json_file, "gguf": _KEY, "bases": r"[^.].*"}
    for kind, pattern in patterns.items():
        for path in _matching(root / kind, pattern):
            with contextlib.suppress(FileNotFoundError):
                result.append(Entry(kind, path.name, (path,), _size(path), _newest(path)))
    return result


def _stamp(program):
    """The file beside a compiled program into which JAX writes when it was last used."""
    return program.with_name(f"{program.name.removesuffix('-cache')}-atime")


def prune(root: pathlib.Path, most: int, version: int, everything: bool = False) -> list[Entry]:
    """Removes the least recently used entries until at most `most` bytes are left.

    Outdated entries go first. Entries that a live process uses stay, and so do those used within
    `RECENT` seconds, the latter unless everything is to go. Returns the removed entries.
    """
    now, removed = time.time(), []
    for path in _matching(root / "tokens", _UNFINISHED):  # of processes that were killed
        with contextlib.suppress(FileNotFoundError):
            if now - _newest(path) > (RECENT if everything else LEFT_OVER):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    candidates = [entry for entry in entries(root, version) if entry.kind != "bases"]
    total = sum(entry.size for entry in candidates)
    for entry in sorted(candidates, key=lambda e: (not e.outdated, e.used)):
        if total <= most:
            break
        if (now - entry.used < RECENT and not everything) or entry.in_use():
            continue
        with contextlib.suppress(FileNotFoundError):
            entry.remove()
            removed.append(entry)
        total -= entry.size
    return removed


def bound_compiled(folder: pathlib.Path) -> None:
    """Has JAX evict its least recently used programs beyond their part of the limit.

    JAX cannot evict where a program lacks a time of last use, as those written without a limit do:
    they are given one.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(limit() // COMPILED_PART))
    with contextlib.suppress(OSError):
        for program in folder.glob("*-cache"):
            with contextlib.suppress(OSError):
                if not _stamp(program).exists():
                    _stamp(program).write_bytes(program.stat().st_mtime_ns.to_bytes(8, "little"))


def summary(entries: list[Entry]) -> list[dict]:
    """The rows of `icae cache list`: small files are summed by folder, others listed one by one."""
    summed = {"hashes": "of data files", "plans": "of programs", "gguf": "of GGUF files"}
    rows = {}
    for entry in entries:
        name = summed.get(entry.kind, entry.name)
        path = entry.paths[0] if entry.kind == "tokens" else None
        row = rows.setdefault(
            (entry.kind, name, path),
            {
                "what": entry.kind,
                "name": name,
                "count": 0,
                "bytes": 0,
                "used": 0.0,
                "in_use": False,
                "outdated": False,
            },
        )
        row["count"] += 1
        row["bytes"] += entry.size
        row["used"] = max(row["used"], entry.used)
        row["in_use"] |= entry.kind == "tokens" and entry.in_use()
        row["outdated"] |= entry.outdated
    for row in rows.values():
        row["used"] = datetime.datetime.fromtimestamp(row["used"]).isoformat(" ", "minutes")
    return list(rows.values())
