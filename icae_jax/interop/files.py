"""Reading with clear errors, writing so that nothing earlier is lost."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile

from icae_jax.errors import UserError


def cache_folder(configured=""):
    """Where what can be made again is kept: the configured folder, else $ICAE_CACHE, else ~/.cache/icae_jax."""
    return pathlib.Path(configured or os.environ.get("ICAE_CACHE") or pathlib.Path.home() / ".cache" / "icae_jax")


def need_torch(what):
    """The torch module, for the few things that cannot be done without it; UserError saying what they are where it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{what} needs PyTorch: pip install torch") from error
    return torch


def read_json(path, what):
    """A JSON file's content; UserError naming file and purpose where it is missing or malformed."""
    path = pathlib.Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; it should hold {what}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def write_json(path, value):
    """Writes indented JSON through a temporary file, so that a full disk leaves the old content."""
    with replacing_file(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing_file(path):
    """Gives a temporary path beside `path` that takes its place, flushed to disk, once the block ends without error."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    tmp = pathlib.Path(name)
    try:
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(tmp, 0o644)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path):
    """Gives a temporary folder beside `path` that takes its place once the block ends without error; the old one goes last."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    old = tmp.with_name(tmp.name + ".old")
    try:
        yield tmp
        os.chmod(tmp, 0o755)
        for file in tmp.rglob("*"):  # safetensors makes its files readable by their owner alone
            os.chmod(file, 0o755 if file.is_dir() else 0o644)
        if path.exists():
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
