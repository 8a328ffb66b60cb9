"""Where base models come from: a folder here, the model hub, or object storage, the latter two through a cache on this machine."""

import fnmatch
import os
import pathlib
import re
import urllib.parse

import tqdm

from icae_jax.errors import UserError
from icae_jax.interop import files, weights

# What is fetched of a base: configuration, tokenizer, safetensors, licence; no other copies of the weights, which some folders hold too.
FILES = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "*.safetensors", "LICENSE*", "NOTICE*")
NOT_FILES = ("*/*", "consolidated*")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", re.ASCII)
_BLOCK_BYTES = 16 << 20


def local_folder(base, progress=True):
    """The folder on this machine (`pathlib.Path`) that holds a base.

    base: a folder, taken as it is; a hub id `org/name` or `org/name@revision`, from the hub's cache, downloaded where it is not there
        (and offline from the cache alone); or the URL of a folder that `etils.epath` reads (gs://, s3://, …), copied into `bases/` of
        $ICAE_CACHE (else ~/.cache/icae_jax), where files of the same size and time are kept. An Orbax copy's weights are read where they
        are (`weights.ORBAX_URL`).
    progress: bars in bytes on stderr, where it takes over a second. UserError says what cannot be found or read.
    """
    text = str(base)
    if os.path.isdir(text):  # of "" it is not the current folder, as `pathlib` has it
        return pathlib.Path(text)
    if "://" in text:
        folder = _copied(text, progress)
    elif _HUB_ID.fullmatch(text):
        folder = _downloaded(text, progress)
    else:
        raise UserError(
            f"base {text!r} is not a folder; give a model-hub folder with config.json, weights and tokenizer, "
            "a hub id such as meta-llama/Llama-3.2-1B, or gs://…"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"base {text!r} has no config.json; give one in the model hub's format")
    return folder


def _words(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class _NoBar(tqdm.tqdm):
    def __init__(self, *args, name=None, **kw):
        super().__init__(*args, **kw | {"disable": True})


def _downloaded(hub_id, progress):
    """A hub repository's snapshot in the hub's own cache."""
    import huggingface_hub

    repository, _, revision = hub_id.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(FILES),
            ignore_patterns=list(NOT_FILES),
            tqdm_class=None if progress else _NoBar,
        )
    except Exception as error:  # the hub's, its HTTP client's or the disk's
        raise UserError(f"base {hub_id!r}: there is no such folder here, and the hub says: {_words(error)}") from error
    return pathlib.Path(folder)


def _copied(url, progress):
    """A copy of a remote folder in the cache, file by file."""
    from etils import epath

    folder = files.cache_folder() / "bases" / urllib.parse.quote(url.rstrip("/"), safe="")
    try:
        remote = epath.Path(url.rstrip("/"))
        found = {path.name: (path, path.stat()) for path in _remote_files(remote)}
        copied = any(name.endswith(".safetensors") for name in found)
        orbax = not copied and (remote / weights.ORBAX).is_dir()
    except ImportError as error:
        raise UserError(f"base {url!r} needs a package that is not installed: {_words(error)} (for gs://, pip install gcsfs)") from error
    except Exception as error:  # each storage has its own
        raise UserError(f"base {url!r} cannot be read: {_words(error)}") from error
    if "config.json" not in found:
        raise UserError(f"base {url!r} has no config.json; give the URL of a folder in the model hub's format")
    absent = {name: source for name, source in found.items() if not _same(folder / name, source[1])}
    total = sum(stat.length for _, stat in absent.values())
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=f"copying {url}", delay=1, disable=not progress) as bar:
        for name, (path, stat) in absent.items():
            with files.replacing_file(folder / name) as tmp:
                _copy(path, tmp, bar)
                if tmp.stat().st_size != stat.length:
                    raise UserError(f"base {url!r}: {name} is {tmp.stat().st_size} bytes, {stat.length} expected; run the command again")
                if stat.mtime:
                    os.utime(tmp, (stat.mtime, stat.mtime))
    if orbax:
        with files.replacing_file(folder / weights.ORBAX_URL) as tmp:
            tmp.write_text(f"{remote / weights.ORBAX}\n", encoding="utf-8")
    here = {*found, weights.ORBAX_URL} if orbax else found
    for path in list(folder.iterdir()):  # what is no longer there must not be loaded with the rest
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


def _copy(source, target, bar):
    with source.open("rb") as reading, open(target, "wb") as writing:
        while block := reading.read(_BLOCK_BYTES):
            writing.write(block)
            bar.update(len(block))
