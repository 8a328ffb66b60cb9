"""Reading with clear errors, writing so that nothing earlier is lost."""

import codecs
import contextlib
import functools
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from typing import TypeVar

import safetensors

from icae_jax import errors
from icae_jax.errors import UserError

T = TypeVar("T")


def named_cache(configured: str | os.PathLike = "") -> pathlib.Path | None:
    """Where what can be made again is to be kept: the configured folder, else $ICAE_CACHE, else ~/.cache/icae_jax; None without a home."""
    named = configured or os.environ.get("ICAE_CACHE")
    if named:
        return pathlib.Path(os.path.expanduser(named))
    home = os.environ.get("HOME", os.path.expanduser("~"))
    return pathlib.Path(home) / ".cache" / "icae_jax" if os.path.isabs(home) else None


@functools.cache
def can_write(folder: pathlib.Path) -> bool:
    """Whether this user can write in a folder, or make it where it is not there. Tried out: rights allow more than some disks do."""
    try:
        with tempfile.TemporaryFile(
            dir=next(path for path in (folder, *folder.absolute().parents) if path.exists())
        ):
            return True
    except OSError:
        return False


def cache_folder(
    configured: str | os.PathLike = "", holding: str | os.PathLike = ""
) -> pathlib.Path:
    """`named_cache`, or where that cannot be written one of this user's own in the temporary folder, which is said once.

    A configured one is left as it is: whoever uses it says what is wrong with it. holding: a path within; where the named cache has it,
    that one is taken, though it may only be read. UserError where no folder can be written.
    """
    folder = named_cache(configured)
    if configured or (
        folder is not None and ((holding and (folder / holding).exists()) or can_write(folder))
    ):
        return folder
    return _temporary_cache(folder)


@functools.cache
def _temporary_cache(instead_of: pathlib.Path | None) -> pathlib.Path:
    what = (
        "cache: there is no home folder"
        if instead_of is None
        else f"cache {instead_of}: cannot be written"
    )
    remedy = "set $ICAE_CACHE to a folder that can be"
    try:
        folder = pathlib.Path(tempfile.gettempdir()) / f"icae_jax-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        there = folder.lstat()
        if (
            not stat.S_ISDIR(there.st_mode)
            or there.st_uid != os.getuid()
            or there.st_mode & 0o022
            or not can_write(folder)
        ):
            folder = pathlib.Path(
                tempfile.mkdtemp(prefix="icae_jax-")
            )  # in its place is something of another's
    except OSError as error:
        raise UserError(
            f"{what}, nor can a temporary folder ({error}); {remedy}, or $TMPDIR"
        ) from error
    print(f"{what}; {folder} is used instead. To keep it, {remedy}", file=sys.stderr, flush=True)
    return folder


def need_torch(what):
    """The torch module, for the few things that cannot be done without it; UserError saying what they are where it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{what} needs PyTorch: pip install torch") from error
    return torch


_JSON_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def is_kind(value: object, kind: type) -> bool:
    """Whether a value from JSON is of a type: a whole number is a float too, while true and false are no numbers."""
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(
        value, bool
    ) == (kind is bool)


def shown(value: object) -> str:
    """A value in a message: in one line, of a bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def field(name: str) -> str:
    """A field's name in a message, as `shown` where it is no plain word."""
    return name if name.isidentifier() else shown(name)


def check_fields(raw: dict, kinds: dict[str, type], source: object) -> None:
    """UserError where an object from JSON lacks one of these fields, or has it of another type. source: the file, to name it."""
    missing = [name for name in kinds if name not in raw]
    if missing:
        raise UserError(
            f"{source}: {', '.join(map(field, missing))} missing; is the file complete?"
        )
    for name, kind in kinds.items():
        if not is_kind(raw[name], kind):
            raise UserError(
                f"{source}: {field(name)} is {shown(raw[name])}, which is not {_JSON_KINDS[kind]}"
            )


@functools.cache
def say(text: str) -> None:
    """Prints one line on stderr, once in a process however often it is found: what is done otherwise than a user may think."""
    print(text, file=sys.stderr, flush=True)


_POINTER = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer begins
_ANNEXED = b"/annex/objects/"  # and one of git-annex
_PAGE = re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE)
# What GitHub, the hub, and object storage answer where there is no such file.
_REFUSAL = re.compile(
    rb"\s*(404: Not Found|Entry not found|Invalid username or password\.)\s*|\s*<\?xml[^>]*>\s*<Error>.*",
    re.DOTALL,
)


def placeholder(start: bytes) -> str:
    """What stands in a file's place, by its first bytes (64 suffice): nothing, a pointer to it, a server's words; "" for none."""
    if not start:
        return "the file is empty; download or copy it again"
    if start.startswith(_POINTER):
        return "a Git LFS pointer, not the file; run git lfs pull where it was cloned, or download it again"
    if start.startswith(_ANNEXED):
        return "a pointer of git-annex, not the file; run git annex get where it was cloned, or download it again"
    if _REFUSAL.fullmatch(start):
        return "what a server said instead of the file; download it again, by another address or with the right to read it"
    if _PAGE.match(start.removeprefix(codecs.BOM_UTF8)):
        return "a page of HTML, not the file (perhaps what a server said instead of it); download it again"
    return ""


def check_real(path: str | os.PathLike) -> None:
    """UserError where something else stands in a file's place (`placeholder`), or it cannot be read."""

    def first_bytes():
        with open(path, "rb") as f:
            return f.read(64)

    with errors.naming(f"{path}: cannot be read"):
        stands_there = placeholder(errors.retrying(first_bytes, f"reading {path}"))
    if stands_there:
        raise UserError(f"{path}: {stands_there}")


def read_json(path: str | os.PathLike, what: str, kind: type[T] = dict) -> T:
    """A JSON file's content, of that type; UserError naming file and purpose where it is missing or malformed. What passes is tried again.

    what: what the file should hold.
    """
    path = pathlib.Path(path)
    try:
        with errors.naming(f"{path}: cannot be read"):
            data = errors.retrying(path.read_bytes, f"reading {path}")
        if stands_there := placeholder(data[:64]):
            raise UserError(f"{path}: {stands_there}; it should hold {what}")
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
    """What `read(path)` gives of a safetensors file, of that kind; UserError where it is damaged or closed, or holds a type of numbers that
    numpy has not. What passes is tried again.
    """
    check_real(path)
    try:
        with errors.naming(f"{path}: cannot be read"):
            return errors.retrying(lambda: read(path), f"reading {path}")
    except safetensors.SafetensorError as error:
        if errors.transient(error):
            raise
        raise UserError(
            f"{path}: not a readable {kind} file ({error}); it may be cut short: download or make it again"
        ) from error
    except AttributeError as error:  # how safetensors says that numpy has no such type
        if "'numpy'" not in str(error):
            raise
        raise UserError(
            f"{path}: it holds tensors of a type that is not read ({error}); store them as float32 or bfloat16"
        ) from error


def write_text(path, text: str) -> None:
    """Writes UTF-8 text through a temporary file, so that a full disk leaves the old content."""
    with replacing_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path, value) -> None:
    """The same, of indented JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _temporary(path, make):
    """(path, its temporary twin, `os.stat_result` of what is there or None). make(twin, mode): creates it, at most as open as the mode.

    A link stays one: what it points to is replaced. The umask is the system's to apply, as for any other program's files, and nobody may
    read the twin whom what is there keeps out. UserError where this user cannot write there.
    """
    path = pathlib.Path(path)
    with errors.naming(f"{path}: cannot be written", "give a place that can be"):
        path = path.resolve() if path.is_symlink() else path
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat() if path.exists() else None
        twin = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        make(twin, 0o777 if before is None else 0o700 | stat.S_IMODE(before.st_mode) & 0o777)
    return path, twin, before


def _take_over(path, mode, before=None):
    """Gives a file or folder that mode, and owner and group of what was there before as far as this user may."""
    if before is not None and (before.st_uid, before.st_gid) != (
        path.stat().st_uid,
        path.stat().st_gid,
    ):
        with contextlib.suppress(OSError):
            os.chown(path, before.st_uid, before.st_gid)
    if stat.S_IMODE(path.stat().st_mode) != mode:  # not needlessly: some filesystems know no modes
        os.chmod(path, mode)


def flush(path: str | os.PathLike) -> None:
    """Has the disk keep a file, or all files of a folder: one that is renamed before may be empty after a power loss."""
    path = pathlib.Path(path)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())


@contextlib.contextmanager
def replacing_file(path):
    """Gives a temporary path beside `path` that takes its place, flushed to disk, once the block ends without error.

    A new file's mode follows the umask; a file that was there hands its own on.
    """

    def make(twin, mode):
        os.close(os.open(twin, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode & 0o666))

    path, tmp, before = _temporary(path, make)
    try:
        mode = stat.S_IMODE((before or tmp.stat()).st_mode)
        yield tmp
        flush(tmp)
        _take_over(
            tmp, mode, before
        )  # a writer may have put a file of its own there, as safetensors does
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path):
    """Gives a temporary folder beside `path` that takes its place once the block ends without error; the old one goes last.

    Modes are as `replacing_file` has them, of the files and folders within too.
    """
    if os.path.isfile(path):
        raise UserError(
            f"{path} is a file, and a folder is to be written there; give another name or remove it"
        )
    path, tmp, before = _temporary(path, os.mkdir)
    old = tmp.with_name(tmp.name + ".old")
    try:
        open_to = stat.S_IMODE(tmp.stat().st_mode) & 0o666
        yield tmp
        flush(tmp)
        for within in sorted(
            tmp.rglob("*"), reverse=True
        ):  # what a folder holds before the folder, which its mode may close
            twin, is_file = path / within.relative_to(tmp), within.is_file()
            if twin.is_file() if is_file else twin.is_dir():
                there = twin.stat()
                _take_over(within, stat.S_IMODE(there.st_mode), there)
            elif is_file:  # safetensors makes its files readable by their owner alone
                _take_over(within, stat.S_IMODE(within.stat().st_mode | open_to))
        if before is not None:
            _take_over(tmp, stat.S_IMODE(before.st_mode), before)
            os.rename(path, old)
        os.rename(tmp, path)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_new_folder(path, flag="--to"):
    """UserError where a folder cannot be written without touching what is there, before any work is done."""
    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{flag} {path} exists and is not an empty folder; give a new one")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path}: folder {parent} cannot be written")
