"""Where base models come from: a folder here, the model hub, or object storage, the latter two through a cache on this machine."""

import fnmatch
import os
import pathlib
import re
import stat
import urllib.parse
from collections.abc import Callable
from typing import BinaryIO

import tqdm

from icae_jax import errors
from icae_jax.errors import UserError
from icae_jax.interop import files, weights

# What is fetched of a base: configuration, tokenizer, safetensors, licence; no other copies of the weights, which some folders hold too,
# and never code.
WEIGHTS = "*.safetensors"
FILES = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer.model*", WEIGHTS, "LICENSE*", "NOTICE*")
NOT_FILES = ("*/*", "consolidated*", "*.py", "*.py?", "*.so")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", re.ASCII)
_BLOCK_BYTES = 16 << 20


def local_folder(base: str | os.PathLike, progress: bool = True, with_weights: bool = True) -> pathlib.Path:
    """The folder on this machine that holds a base.

    base: a folder, taken as it is; a hub id `org/name` or `org/name@revision`, from the hub's cache, downloaded where it is not there
        (and offline from the cache alone); or the URL of a folder that `etils.epath` reads (gs://, s3://, …), copied into `bases/` of
        $ICAE_CACHE (else ~/.cache/icae_jax), where files of the same size and time are kept. An Orbax copy's weights are read where they
        are (`weights.ORBAX_URL`).
    progress: bars in bytes on stderr, where it takes over a second. with_weights: whether the safetensors files are fetched too.
    UserError says what does not exist or is closed to this user; ConnectionError what could not be reached, after several tries.
    """
    text = str(base)
    if errors.is_there(text, stat.S_ISDIR):  # of "" it is not the current folder, as `pathlib` has it
        return pathlib.Path(text)
    if "://" in text:
        folder = _copied(text, progress, with_weights)
    elif _HUB_ID.fullmatch(text):
        folder = _downloaded(text, progress, with_weights)
    else:
        raise UserError(
            f"base {text!r} is not a folder; give a model-hub folder with config.json, weights and tokenizer, "
            "a hub id such as meta-llama/Llama-3.2-1B, or gs://…"
        )
    if not errors.is_there(folder / "config.json", stat.S_ISREG):
        raise UserError(f"base {text!r} has no config.json; give one in the model hub's format")
    return folder


def remote_opener(base: str | os.PathLike, folder: pathlib.Path) -> Callable[[str], BinaryIO] | None:
    """A function that opens a base's file by its name where it is, so that a part of it is read without the rest; None for a folder here.

    folder: what `local_folder` gave for the base, of the hub the snapshot of one commit.
    """
    text = str(base)
    if errors.is_there(text, stat.S_ISDIR):
        return None
    if "://" in text:
        from etils import epath

        return lambda name: _asking(text, lambda: (epath.Path(text.rstrip("/")) / name).open("rb"))
    import huggingface_hub

    repository, revision = text.partition("@")[0], folder.name
    hub = huggingface_hub.HfFileSystem()
    # Without read-ahead: the rows that are read lie far apart.
    return lambda name: _asking(text, lambda: hub.open(f"{repository}/{name}", "rb", revision=revision, cache_type="none"))


# ------------------------------------------------------------------------------------------------------ failures told apart


def _words(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _not_in_cache(error):
    """Whether the hub's client says that it may not ask, and has nothing kept."""
    names = {type(link).__name__ for link in errors.causes(error)}
    return bool(names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"})


def _asking(base, function):
    """What `function()` returns of a hub or a store, which is tried again where it cannot be reached.

    UserError where the answer is that there is no such thing, or not for this user; where there is no answer, ConnectionError.
    """
    at_hub = "://" not in base
    name = base.partition("@")[0]
    reading = (
        f"base {base!r}: there is no folder {base} in {os.getcwd()}, and of the hub id {name}"
        if at_hub
        else f"base {base!r} cannot be read"
    )
    offline = False
    if at_hub:
        from huggingface_hub import constants

        offline = constants.HF_HUB_OFFLINE

    def attempt():
        try:
            return function()
        except Exception as error:
            if offline and _not_in_cache(error):
                why = f"what is asked for is not in the hub's cache, and HF_HUB_OFFLINE is set ({_words(error)})"
                raise UserError(f"{reading} {why}") from error
            if not errors.answered_no(error):
                raise
            if isinstance(error, ImportError):
                raise UserError(f"{reading}: a package is not installed: {_words(error)} (for gs://, pip install gcsfs)") from error
            remedy = "; give a folder that is here, or a repository that you may read (a gated one after `hf auth login`)" if at_hub else ""
            raise UserError(f"{reading}{' the hub says' if at_hub else ''}: {_words(error)}{remedy}") from error

    try:
        return errors.retrying(attempt, f"base {base!r}")
    except UserError:
        raise
    except Exception as error:
        if not errors.transient(error):
            raise
        whom = "the hub" if at_hub else "the store"
        raise ConnectionError(f"{reading}: {whom} cannot be reached: {_words(error)}") from error


# ------------------------------------------------------------------------------------------------------------ fetching


class _NoBar(tqdm.tqdm):
    def __init__(self, *args, name=None, **kw):
        super().__init__(*args, **kw | {"disable": True})


def _downloaded(hub_id, progress, with_weights):
    """A hub repository's snapshot in the hub's own cache."""
    import huggingface_hub

    repository, _, revision = hub_id.partition("@")
    return pathlib.Path(
        _asking(
            hub_id,
            lambda: huggingface_hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(FILES),
                ignore_patterns=[*NOT_FILES, *([] if with_weights else [WEIGHTS])],
                tqdm_class=None if progress else _NoBar,
            ),
        )
    )


def _copied(url, progress, with_weights):
    """A copy of a remote folder in the cache, file by file."""
    from etils import epath

    folder = files.cache_folder() / "bases" / urllib.parse.quote(url.rstrip("/"), safe="")

    def look():
        remote = epath.Path(url.rstrip("/"))
        found = {path.name: (path, path.stat()) for path in _remote_files(remote)}
        orbax = not fnmatch.filter(found, WEIGHTS) and (remote / weights.ORBAX).is_dir()
        return found, remote / weights.ORBAX if orbax else None

    found, orbax = _asking(url, look)
    if "config.json" not in found:
        raise UserError(f"base {url!r} has no config.json; give the URL of a folder in the model hub's format")
    changed = {name: source for name, source in found.items() if not _same(folder / name, source[1])}
    wanted = {name: source for name, source in changed.items() if with_weights or not fnmatch.fnmatch(name, WEIGHTS)}
    total = sum(stat.length for _, stat in wanted.values())
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=f"copying {url}", delay=1, disable=not progress) as bar:
        for name, (path, stat) in wanted.items():
            with files.replacing_file(folder / name) as tmp:
                _asking(url, lambda path=path, stat=stat, tmp=tmp, before=bar.n: _copy(path, tmp, stat.length, bar, before))
                if stat.mtime:
                    os.utime(tmp, (stat.mtime, stat.mtime))
    if orbax:
        with files.replacing_file(folder / weights.ORBAX_URL) as tmp:
            tmp.write_text(f"{orbax}\n", encoding="utf-8")
    here = {*found, weights.ORBAX_URL} if orbax else {*found}
    here -= changed.keys() - wanted.keys()
    for path in list(folder.iterdir()):  # what is no longer there, or no longer so, must not be loaded with the rest
        if path.is_file() and path.name not in here and not path.name.startswith("."):
            path.unlink()
    return folder


def _remote_files(folder):
    """The files of a folder that a base needs."""
    for path in folder.iterdir():
        wanted, unwanted = (any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns) for patterns in (FILES, NOT_FILES))
        if wanted and not unwanted:
            yield path


def _same(path, stat):
    """Whether a file here has a remote file's size, and its time where the storage tells it."""
    if not path.is_file():
        return False
    return path.stat().st_size == stat.length and (not stat.mtime or int(path.stat().st_mtime) == int(stat.mtime))


def _copy(source, target, length, bar, before):
    """Copies a file of that length. before: the bar's place, to which another try goes back."""
    bar.update(before - bar.n)
    copied = 0
    with source.open("rb") as reading, open(target, "wb") as writing:
        while block := reading.read(_BLOCK_BYTES):
            writing.write(block)
            copied += len(block)
            bar.update(len(block))
    if copied != length:
        raise ConnectionError(f"{source} ended after {copied} bytes, {length} expected")
