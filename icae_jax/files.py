"""Reads files with clear errors, and replaces them without losing what was there."""

import codecs
import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from typing import TypeVar

import safetensors

from icae_jax import errors
from icae_jax.errors import UserError

T = TypeVar("T")

# ------------------------------------------------------------------------------------- reading

_JSON_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def is_kind(value: object, kind: type) -> bool:
    """Whether a value from JSON has a type; an int is a float too, and a bool is not a number."""
    kinds = (int, float) if kind is float else kind
    return isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)


def check_fields(raw: dict, kinds: dict[str, type], source: object) -> None:
    """Checks that an object from JSON has these fields, each of its type.

    Args:
        raw: the object.
        kinds: the type of each field.
        source: the file, for messages.

    Raises:
        UserError: a field is missing or has another type.
    """
    missing = [name for name in kinds if name not in raw]
    if missing:
        names = ", ".join(map(errors.field, missing))
        raise UserError(f"{source}: {names} missing; is the file complete?")
    for name, kind in kinds.items():
        if not is_kind(raw[name], kind):
            raise UserError(
                f"{source}: {errors.field(name)} is {errors.shown(raw[name])}, "
                f"which is not {_JSON_KINDS[kind]}"
            )


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ANNEX_POINTER = b"/annex/objects/"
_HTML = re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE)
# What GitHub, the hub, and object storage answer for a missing file.
_REFUSAL = re.compile(
    rb"\s*(404: Not Found|Entry not found|Invalid username or password\.)\s*"
    rb"|\s*<\?xml[^>]*>\s*<Error>.*",
    re.DOTALL,
)


def placeholder(start: bytes) -> str:
    """What a file holds instead of its content, with the remedy; "" if it looks real.

    Recognises an empty file, pointers of Git LFS and git-annex, and a server's error page.

    Args:
        start: the first bytes of the file; 64 are enough.
    """
    if not start:
        return "the file is empty; download or copy it again"
    if start.startswith(_LFS_POINTER):
        return (
            "a Git LFS pointer, not the file; run git lfs pull where it was cloned, "
            "or download it again"
        )
    if start.startswith(_ANNEX_POINTER):
        return (
            "a pointer of git-annex, not the file; run git annex get where it was cloned, "
            "or download it again"
        )
    if _REFUSAL.fullmatch(start):
        return (
            "what a server said instead of the file; download it again, from another address "
            "or with permission to read it"
        )
    if _HTML.match(start.removeprefix(codecs.BOM_UTF8)):
        return (
            "a page of HTML, not the file (perhaps what a server said instead of it); "
            "download it again"
        )
    return ""


def check_real(path: str | os.PathLike) -> None:
    """UserError where a file cannot be read or is only a `placeholder`."""

    def first_bytes():
        with open(path, "rb") as f:
            return f.read(64)

    with errors.naming(f"{path}: cannot be read"):
        problem = placeholder(errors.retrying(first_bytes, f"reading {path}"))
    if problem:
        raise UserError(f"{path}: {problem}")


def read_json(path: str | os.PathLike, what: str, kind: type[T] = dict) -> T:
    """Reads a JSON file; transient failures are retried.

    Args:
        path: the file.
        what: what the file should hold, for messages.
        kind: the type of its content.

    Raises:
        UserError: the file is missing, malformed or of another type.
    """
    path = pathlib.Path(path)
    try:
        with errors.naming(f"{path}: cannot be read"):
            data = errors.retrying(path.read_bytes, f"reading {path}")
        if problem := placeholder(data[:64]):
            raise UserError(f"{path}: {problem}; it should hold {what}")
        content = json.loads(data.decode("utf-8-sig"))
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise UserError(f"{path}: no such file; it should hold {what}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not is_kind(content, kind):
        raise UserError(f"{path}: not {_JSON_KINDS[kind]}; it should hold {what}")
    return content


def read_safetensors(
    path: str | os.PathLike, read: Callable[[str | os.PathLike], T], kind: str = "safetensors"
) -> T:
    """Returns `read(path)` of a safetensors file; transient failures are retried.

    Args:
        path: the file.
        read: opens or loads it with the safetensors library.
        kind: what the file is, for messages.

    Raises:
        UserError: the file is damaged or unreadable, or has a dtype that numpy lacks.
    """
    check_real(path)
    try:
        with errors.naming(f"{path}: cannot be read"):
            return errors.retrying(lambda: read(path), f"reading {path}")
    except safetensors.SafetensorError as error:
        if errors.transient(error):
            raise
        raise UserError(
            f"{path}: not a readable {kind} file ({error}); it may be cut short: "
            "download or make it again"
        ) from error
    except AttributeError as error:  # safetensors raises this for a dtype that numpy lacks
        if "'numpy'" not in str(error):
            raise
        raise UserError(
            f"{path}: it holds tensors of a type that is not read ({error}); "
            "store them as float32 or bfloat16"
        ) from error


# ------------------------------------------------------------------------------------- writing


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text through a temporary file, so that a full disk keeps the old content."""
    with replacing_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes indented JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _temporary(
    path: str | os.PathLike, make: Callable[[pathlib.Path, int], None]
) -> tuple[pathlib.Path, pathlib.Path, os.stat_result | None]:
    """Makes a temporary sibling of `path`; returns (resolved path, sibling, old stat or None).

    A symbolic link stays a link: its target is replaced. The process's umask applies, and the
    sibling is never more readable than the file it will replace. UserError where this user
    cannot write there.

    Args:
        path: the file or folder to replace.
        make: `make(sibling, mode)` creates the sibling with at most that mode.
    """
    path = pathlib.Path(path)
    with errors.naming(f"{path}: cannot be written", "give a place that can be"):
        path = path.resolve() if path.is_symlink() else path
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat() if path.exists() else None
        tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        make(tmp, 0o777 if before is None else 0o700 | stat.S_IMODE(before.st_mode) & 0o777)
    return path, tmp, before


def _set_mode(path: pathlib.Path, mode: int, before: os.stat_result | None = None) -> None:
    """Sets a mode, and as far as permitted the owner and group of the file that was there."""
    now = path.stat()
    if before is not None and (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
        with contextlib.suppress(OSError):
            os.chown(path, before.st_uid, before.st_gid)
    if stat.S_IMODE(path.stat().st_mode) != mode:  # only if needed: some filesystems have no modes
        os.chmod(path, mode)


def flush(path: str | os.PathLike) -> None:
    """Fsyncs a file, or all files of a folder.

    A file that is renamed before it is on disk may be empty after a power loss.
    """
    path = pathlib.Path(path)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())


@contextlib.contextmanager
def replacing_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path that is flushed and replaces `path` if the block succeeds.

    A new file gets the mode that the umask gives; a replaced file keeps its mode.
    """

    def make(tmp, mode):
        os.close(os.open(tmp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode & 0o666))

    path, tmp, before = _temporary(path, make)
    try:
        mode = stat.S_IMODE((before or tmp.stat()).st_mode)
        yield tmp
        flush(tmp)
        # Only now: safetensors puts a file of its own in the place of `tmp`.
        _set_mode(tmp, mode, before)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary folder that replaces `path` if the block succeeds.

    The old folder is removed last. Modes of all files within are kept as by `replacing_file`.
    """
    if os.path.isfile(path):
        raise UserError(
            f"{path} is a file, and a folder is to be written there; give another name or remove it"
        )
    path, tmp, before = _temporary(path, os.mkdir)
    old = tmp.with_name(tmp.name + ".old")
    try:
        readable = stat.S_IMODE(tmp.stat().st_mode) & 0o666
        yield tmp
        flush(tmp)
        # Children before their folder, whose mode may make them inaccessible.
        for within in sorted(tmp.rglob("*"), reverse=True):
            replaced, is_file = path / within.relative_to(tmp), within.is_file()
            if replaced.is_file() if is_file else replaced.is_dir():
                there = replaced.stat()
                _set_mode(within, stat.S_IMODE(there.st_mode), there)
            elif is_file:  # safetensors makes its files readable by their owner only
                _set_mode(within, stat.S_IMODE(within.stat().st_mode | readable))
        if before is not None:
            _set_mode(tmp, stat.S_IMODE(before.st_mode), before)
            os.rename(path, old)
        os.rename(tmp, path)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_new_folder(path: str | os.PathLike, flag: str = "--to") -> None:
    """UserError, before any work is done, unless `path` is a new or an empty writable folder."""
    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{flag} {path} exists and is not an empty folder; give a new one")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path}: folder {parent} cannot be written")
