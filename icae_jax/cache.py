"""What is kept on disk since it can be made again, under one bound: tokenised data and compiled programs; `icae cache`.

In `files.cache_folder`, which may be one in the temporary folder:

| folder   | what                                                     | last used                        |
|----------|----------------------------------------------------------|----------------------------------|
| tokens   | a folder for each tokenised source, with `about.json`     | about.json's time of change      |
| compiled | a folder for each kind of processor, JAX's files in it    | what JAX writes into NAME-atime  |
| hashes   | the hashes of large data files                            | the file's time of change        |
| bases    | base models copied from buckets: listed, never removed    | the newest time of its files     |

Whoever uses a folder of tokens holds a shared lock on its `about.json`, so that nobody removes it. What has another name than the cache
gives, such as a user's own folder beside them, is not looked at.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator

from icae_jax import errors, files, lock
from icae_jax.errors import UserError

VARIABLE, DEFAULT_GIB = "ICAE_CACHE_GIB", 20.0
COMPILED_PART = (
    4  # compiled programs take this part of the bound at most, which JAX sees to when it writes one
)
RECENT = 3600  # seconds; what was used within them stays, whatever the bound
LEFT_OVER = 86400  # seconds after which what nobody finished, or wholly removed, is waste
ABOUT = "about.json"
_KEY = "[0-9a-f]{32}"  # what token folders and hashes are called
_UNFINISHED = r"\.(new|gone|lock)\..+"
GIB = 1 << 30


def bound() -> int:
    """The bytes that the cache may take: $ICAE_CACHE_GIB GiB. UserError where that is not a number."""
    return _bytes(os.environ.get(VARIABLE) or DEFAULT_GIB, VARIABLE)


def _bytes(gib, name):
    try:
        size = float(gib)
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise UserError(
            f"{name} is {gib!r}; give a number of GiB from 0 on, such as {DEFAULT_GIB:g}"
        )
    return int(size * GIB)


# --------------------------------------------------------------------------------------------------------------- locks

_REMEDY = "set data.cache_dir or $ICAE_CACHE to a folder that can be"


@contextlib.contextmanager
def alone(folder: pathlib.Path, what: str) -> Iterator[None]:
    """Makes one process at a time work on a folder of the cache; the others wait. The lock ends with its process, however that ends.

    what: said to those who wait. On a filesystem without locks nobody waits.
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
            path.unlink(missing_ok=True)  # who waits has it open, and finds the work done


def hold(folder: pathlib.Path):
    """Notes that a folder is used now, and keeps it from being removed as long as the result, an open file, lives. None: it is gone.

    UserError where the cache is closed to this user, or is no folder.
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
    with contextlib.suppress(OSError):  # of a cache that may only be read
        os.utime(path)
    return file


# ------------------------------------------------------------------------------------------------------------- entries


@dataclasses.dataclass(frozen=True)
class Entry:
    """Something in the cache. used: when last, in seconds since 1970. outdated: an earlier version's, which nobody reads any more."""

    kind: str
    name: str
    paths: tuple[pathlib.Path, ...]
    size: int
    used: float
    outdated: bool = False

    def in_use(self) -> bool:
        """Whether a live process holds it, or it cannot be told."""
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
        """Removes it: a folder is first renamed, so that nobody sees half of it."""
        for path in self.paths:
            if path.is_dir():
                gone = path.with_name(f".gone.{secrets.token_hex(8)}")
                os.rename(path, gone)
                shutil.rmtree(gone, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _size(path):
    return sum(
        p.lstat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if not p.is_dir()
    )


def _newest(path):
    return max((p.lstat().st_mtime for p in itertools.chain([path], path.rglob("*"))), default=0.0)


def _named(folder, pattern):
    """The paths in a folder whose names have the cache's form."""
    return sorted(path for path in folder.glob("*") if re.fullmatch(pattern, path.name))


def entries(root: pathlib.Path, version: int) -> list[Entry]:
    """What a cache folder holds. version: that of token folders which are read today. What vanishes meanwhile is left out."""
    found = []
    for path in _named(root / "tokens", _KEY):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            about, told = path / ABOUT, {}
            with contextlib.suppress(FileNotFoundError, ValueError):  # the first version wrote none
                told = json.loads(about.read_text(encoding="utf-8"))
            told = told if isinstance(told, dict) else {}
            used = about.stat().st_mtime if told else _newest(path)
            found.append(
                Entry(
                    "tokens",
                    told.get("source", path.name),
                    (path,),
                    _size(path),
                    used,
                    told.get("version") != version,
                )
            )
    for path in sorted((root / "compiled").glob("*/*-cache")):
        with contextlib.suppress(FileNotFoundError):
            stamp = _stamp(path)
            used = (
                int.from_bytes(stamp.read_bytes(), "little") / 1e9
                if stamp.exists()
                else path.stat().st_mtime
            )
            found.append(
                Entry("compiled", path.parent.name, (path, stamp), path.stat().st_size, used)
            )
    for kind, name in (("hashes", rf"{_KEY}\.json"), ("bases", r"[^.].*")):
        for path in _named(root / kind, name):
            with contextlib.suppress(FileNotFoundError):
                found.append(Entry(kind, path.name, (path,), _size(path), _newest(path)))
    return found


def _stamp(program):
    """The file beside a compiled program into which JAX writes when it was last used."""
    return program.with_name(f"{program.name.removesuffix('-cache')}-atime")


def prune(root: pathlib.Path, most: int, version: int, everything: bool = False) -> list[Entry]:
    """Removes what was used least recently, that of earlier versions first, until the rest takes at most `most` bytes; returns it.

    What a live process uses stays, and what was used within `RECENT` seconds; the latter goes where everything is to go.
    """
    now, removed = time.time(), []
    for path in _named(root / "tokens", _UNFINISHED):  # of processes that were killed
        with contextlib.suppress(FileNotFoundError):
            if now - _newest(path) > (RECENT if everything else LEFT_OVER):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    here = [entry for entry in entries(root, version) if entry.kind != "bases"]
    total = sum(entry.size for entry in here)
    for entry in sorted(here, key=lambda e: (not e.outdated, e.used)):
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
    """Lets JAX remove the programs in its folder that were used least recently, beyond this part of the bound.

    JAX cannot do so where a program has no time of last use, as those that were kept without a bound have none: they get one.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(bound() // COMPILED_PART))
    with contextlib.suppress(OSError):
        for program in folder.glob("*-cache"):
            with contextlib.suppress(OSError):
                if not _stamp(program).exists():
                    _stamp(program).write_bytes(program.stat().st_mtime_ns.to_bytes(8, "little"))


# ---------------------------------------------------------------------------------------------------------------- verb


def _rows(found):
    """What `icae cache list` shows: compiled programs and hashes as one row a folder, all else for itself."""
    rows = {}
    for entry in found:
        name = "of data files" if entry.kind == "hashes" else entry.name
        new = {
            "what": entry.kind,
            "name": name,
            "count": 0,
            "bytes": 0,
            "used": 0.0,
            "in_use": False,
            "outdated": False,
        }
        row = rows.setdefault(
            (entry.kind, name, entry.paths[0] if entry.kind == "tokens" else None), new
        )
        row["count"] += 1
        row["bytes"] += entry.size
        row["used"] = max(row["used"], entry.used)
        row["in_use"] |= entry.kind == "tokens" and entry.in_use()
        row["outdated"] |= entry.outdated
    for row in rows.values():
        row["used"] = datetime.datetime.fromtimestamp(row["used"]).isoformat(" ", "minutes")
    return list(rows.values())


def _shown(size):
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):,.1f} MiB"


def main(parser, argv, version: int) -> int:
    """Lists or prunes the cache. Returns the exit code 0. version: of token folders."""
    add = parser.add_argument
    add(
        "action",
        choices=("list", "prune"),
        help="list what there is, its size and when it was last used; or prune it to the bound",
    )
    add(
        "--cache_dir",
        default="",
        help="another cache than $ICAE_CACHE, or ~/.cache/icae_jax: the data.cache_dir of a configuration",
    )
    add("--max_gib", help=f"prune: how much may stay, by default ${VARIABLE} or {DEFAULT_GIB:g}")
    add(
        "--all",
        action="store_true",
        help="prune: remove all that no process uses (but bases copied from buckets)",
    )
    add("--json", action="store_true", help="print one JSON object a line")
    args = parser.parse_args(argv)
    if args.action == "list" and (args.all or args.max_gib is not None):
        parser.error("--all and --max_gib are for prune")
    root = files.named_cache(args.cache_dir)
    if not args.cache_dir and (root is None or not root.exists()):
        root = files.cache_folder()  # which may be one in the temporary folder
    elif not root.is_dir():
        raise UserError(f"{'--cache_dir' if args.cache_dir else 'cache'} {root}: no such folder")
    if args.action == "list":
        rows = _rows(entries(root, version))
        for row in rows:
            notes = [
                note
                for note, holds in (
                    ("in use", row["in_use"]),
                    ("of an earlier version", row["outdated"]),
                )
                if holds
            ]
            notes += [f"{row['count']:,} of them"] if row["count"] > 1 else []
            line = f"{row['what']:9}{_shown(row['bytes']):>12}  {row['used']}  {row['name']}" + (
                f" ({', '.join(notes)})" if notes else ""
            )
            print(json.dumps(row, ensure_ascii=False) if args.json else line)
        if not args.json:
            total = sum(row["bytes"] for row in rows if row["what"] != "bases")
            print(f"{root}: {_shown(total)} of {_shown(bound())} (${VARIABLE}), bases not counted")
        return 0
    most = 0 if args.all else bound() if args.max_gib is None else _bytes(args.max_gib, "--max_gib")
    with errors.naming(f"cache {root}: cannot be pruned"):
        removed = prune(root, most, version, args.all)
    left = sum(entry.size for entry in entries(root, version) if entry.kind != "bases")
    freed = sum(entry.size for entry in removed)
    if args.json:
        print(json.dumps({"removed": len(removed), "freed_bytes": freed, "left_bytes": left}))
    else:
        why = ", in use or used just now" if left > most else ""
        print(f"{root}: freed {_shown(freed)} ({len(removed)} removed), {_shown(left)} left{why}")
    return 0
