"""Where bases and adapters come from: a folder here, the model hub, or object storage, the latter two through a cache on this machine."""

import dataclasses
import fnmatch
import json
import os
import pathlib
import re
import stat
import urllib.parse
from collections.abc import Callable
from typing import BinaryIO, NamedTuple, TypeVar

import tqdm

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub import weights

T = TypeVar("T")
WEIGHTS = "*.safetensors"


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What is fetched, by patterns of paths. name: what messages call it. needed: the file without which a folder is none of its kind,
    form: what such a folder is called. folders: those within it that hold some of what is fetched.
    """

    name: str
    needed: str
    form: str
    files: tuple[str, ...]
    not_files: tuple[str, ...]
    folders: tuple[str, ...] = ()

    def wants(self, path):
        """Whether a file of that path within the folder is fetched."""
        wanted, unwanted = (
            any(fnmatch.fnmatch(path, pattern) for pattern in patterns)
            for patterns in (self.files, self.not_files)
        )
        return wanted and not unwanted


# Configuration, tokenizer, safetensors, licence; no other copies of the weights, which some folders hold too, and never code.
BASE = _Kind(
    "base",
    "config.json",
    "a folder in the model hub's format",
    ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer.model*", WEIGHTS, "LICENSE*", "NOTICE*"),
    ("*/*", "consolidated*", "*.py", "*.py?", "*.so"),
)
# An adapter folder, or one in PEFT's form: never a pickle.
_LORA = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER = _Kind(
    "adapter",
    "icae.json",
    "an adapter folder",
    (
        "icae.json",
        "memory.safetensors",
        *_LORA,
        *(f"encoder/{name}" for name in _LORA),
        *(f"decoder/{name}" for name in _LORA),
        "README.md",
        "LICENSE",
        "LICENSE.md",
        "LICENSE.txt",
    ),
    (),
    ("encoder", "decoder"),
)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", re.ASCII)
# A repository's page, with the revision that it shows.
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/([\w.-]+))?(?:[/?#].*)?"
)
_COMMIT = re.compile("[0-9a-f]{40}")
_BLOCK_BYTES = 16 << 20


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub id, `org/name` or `org/name@revision`."""
    return bool(_HUB_ID.fullmatch(text))


def is_remote(text: str) -> bool:
    """Whether a text means something that is not on this machine: a URL, or a hub id for which no folder is here."""
    return "://" in text or (is_hub_id(text) and not errors.is_there(text, stat.S_ISDIR))


def local_folder(
    base: str | os.PathLike, progress: bool = True, with_weights: bool = True
) -> pathlib.Path:
    """The folder on this machine that holds a base.

    base: a folder, taken as it is; a hub id `org/name` or `org/name@revision`, from the hub's cache, downloaded where it is not there
        (and offline from the cache alone); or the URL of a folder that `etils.epath` reads (gs://, s3://, …), copied into `bases/` of
        $ICAE_CACHE (else ~/.cache/icae_jax), where files of the same size and time are kept. An Orbax copy's weights are read where they
        are (`weights.ORBAX_URL`).
    progress: bars in bytes on stderr, where it takes over a second. with_weights: whether the safetensors files are fetched too.
    UserError says what does not exist or is closed to this user; ConnectionError what could not be reached, after several tries.
    """
    text = str(base)
    if errors.is_there(
        text, stat.S_ISDIR
    ):  # of "" it is not the current folder, as `pathlib` has it
        folder = pathlib.Path(text)
    elif errors.is_there(text, stat.S_ISREG):
        gguf = "GGUF files are not read; " if text.endswith(".gguf") else ""
        raise UserError(
            f"base {text!r} is a file; {gguf}give the folder, in the model hub's format, that holds config.json and weights"
        )
    elif is_remote(text):
        folder = (
            _copied(BASE, text, progress, with_weights)
            if "://" in text
            else _downloaded(BASE, text, progress, with_weights)
        )
    else:
        raise UserError(
            f"base {text!r} is not a folder; give a model-hub folder with config.json, weights and tokenizer, "
            "a hub id such as meta-llama/Llama-3.2-1B, or gs://…"
        )
    if not errors.is_there(folder / "config.json", stat.S_ISREG):
        raise UserError(_no_base(text, folder))
    return folder


def _no_base(base, folder):
    """What a folder without config.json is in a base's place, and what to do. folder: a path of this machine or of a store."""
    names = sorted(path.name for path in folder.iterdir())
    says = f"base {base!r} has no config.json"
    if "icae.json" in names:
        return f"{says}: it is an adapter of this package; give it as the adapter, and as base the one that it was trained on"
    if "adapter_config.json" in names:
        try:
            trained_on = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))[
                "base_model_name_or_path"
            ]
        except (ValueError, LookupError, TypeError, OSError):
            trained_on = None
        of, or_base = (
            (f" of {trained_on}", f", or give {trained_on}")
            if isinstance(trained_on, str) and trained_on
            else ("", "")
        )
        return f"{says}: it is a LoRA adapter{of}, not a base; merge it first (peft: merge_and_unload){or_base}"
    if fnmatch.filter(names, "consolidated*") or "params.json" in names:
        return f"{says}: it holds the model's original files (params.json, consolidated…); give the model in the hub's format"
    if fnmatch.filter(names, "*.gguf"):
        return f"{says}: GGUF files are not read; give the model in the hub's format"
    within = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and (path / "config.json").exists()
    )
    if not within and (folder / "snapshots").is_dir():  # of the hub's cache
        within = sorted(
            f"snapshots/{path.name}"
            for path in (folder / "snapshots").iterdir()
            if (path / "config.json").exists()
        )
    if within:
        return f"{says}, {' and '.join(within[:3])} in it {'have' if within[1:] else 'has'} one; give that folder"
    return f"{says}; give one in the model hub's format{'' if names else ' (the folder is empty)'}"


class LocalAdapter(NamedTuple):
    """folder: what is on this machine. name: how it is found again from anywhere, with the commit where it is of the hub."""

    folder: pathlib.Path
    name: str


def local_adapter(adapter: str | os.PathLike, progress: bool = True) -> LocalAdapter:
    """What an adapter's name stands for on this machine: fetched as bases are (`local_folder`), into `adapters/` of the cache.

    adapter: a file or folder, taken as it is; a hub id; or a URL, of a training workdir too. Whether it is an adapter is the caller's to
    check. Raises as `local_folder` does.
    """
    text = str(adapter)
    if errors.is_there(text, lambda mode: True):
        return LocalAdapter(pathlib.Path(text), os.path.abspath(text))
    if not is_remote(text):
        raise UserError(
            f"adapter {text or repr(text)}: no such file or folder; give the folder that training wrote (it holds icae.json), "
            "a hub id such as org/name, or gs://…"
        )
    if "://" in text:
        inner = f"{text.rstrip('/')}/adapter"
        inside = _asking(
            ADAPTER, text, lambda: (_url(ADAPTER, text) / "adapter" / "icae.json").exists()
        )
        url = inner if inside else text
        return LocalAdapter(_copied(ADAPTER, url, progress, True), url)
    folder = _downloaded(ADAPTER, text, progress, True)
    if not (folder / "icae.json").exists() and is_offline():
        raise UserError(
            f"adapter {text!r}: what the hub's cache holds of it has no icae.json, and HF_HUB_OFFLINE is set; take that away to "
            "download the rest, if it is an adapter of this package"
        )
    commit = folder.name if _COMMIT.fullmatch(folder.name) else ""
    return LocalAdapter(folder, f"{text.partition('@')[0]}@{commit}" if commit else text)


def remote_opener(
    base: str | os.PathLike, folder: pathlib.Path
) -> Callable[[str], BinaryIO] | None:
    """A function that opens a base's file by its name where it is, so that a part of it is read without the rest; None for a folder here.

    folder: what `local_folder` gave for the base, of the hub the snapshot of one commit.
    """
    text = str(base)
    if errors.is_there(text, stat.S_ISDIR):
        return None
    if "://" in text:
        return lambda name: _asking(BASE, text, lambda: (_url(BASE, text) / name).open("rb"))
    import huggingface_hub

    repository, revision = text.partition("@")[0], folder.name
    hub = huggingface_hub.HfFileSystem()
    # Without read-ahead: the rows that are read lie far apart.
    return lambda name: _asking(
        BASE,
        text,
        lambda: hub.open(f"{repository}/{name}", "rb", revision=revision, cache_type="none"),
    )


# ------------------------------------------------------------------------------------------------------ failures told apart


def _words(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _not_in_cache(error):
    """Whether the hub's client says that it may not ask, and has nothing kept."""
    names = {type(link).__name__ for link in errors.causes(error)}
    return bool(names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"})


def is_offline() -> bool:
    """Whether the hub's client may not use the network."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _asking(kind, what, function):
    """What `function()` returns of a hub or a store that is asked for something. kind, what: what is asked for, to name it.

    Raises as `asking` does.
    """
    called, name = f"{kind.name} {what!r}", what.partition("@")[0]
    if "://" in what:
        return asking(function, called, f"{called} cannot be read", "the store")
    reading = f"{called}: there is no folder {what} in {os.getcwd()}, and of the hub id {name}"
    remedy = "; give a folder that is here, or a repository that you may read (a gated one after `hf auth login`)"
    return asking(function, called, reading, HUB, remedy)


HUB = "the hub"


def asking(function: Callable[[], T], called: str, doing: str, whom: str, remedy: str = "") -> T:
    """What `function()` returns of a hub or a store (`whom`), which is tried again where it cannot be reached.

    called: names the work in notes. doing: how messages begin; remedy: how one ends. UserError where the answer is that there is no such
    thing, or not for this user; where there is no answer, ConnectionError.
    """
    at_hub = whom == HUB

    def attempt():
        try:
            return function()
        except Exception as error:
            if _not_in_cache(error) and is_offline():
                why = f"what is asked for is not in the hub's cache, and HF_HUB_OFFLINE is set ({_words(error)})"
                raise UserError(f"{doing}{'' if at_hub else ':'} {why}") from error
            if not errors.answered_no(error):
                raise
            if isinstance(error, ImportError):
                raise UserError(
                    f"{doing}: a package is not installed: {_words(error)} (for gs://, pip install gcsfs)"
                ) from error
            raise UserError(
                f"{doing}{' the hub says' if at_hub else ''}: {_words(error)}{remedy}"
            ) from error

    try:
        return errors.retrying(attempt, called)
    except UserError:
        raise
    except Exception as error:
        if not errors.transient(error):
            raise
        raise ConnectionError(f"{doing}: {whom} cannot be reached: {_words(error)}") from error


# ------------------------------------------------------------------------------------------------------------ fetching


class _NoBar(tqdm.tqdm):
    def __init__(self, *args, name=None, **kw):
        super().__init__(*args, **kw | {"disable": True})


def _downloaded(kind, hub_id, progress, with_weights):
    """A hub repository's snapshot in the hub's own cache."""
    import huggingface_hub

    repository, _, revision = hub_id.partition("@")
    return pathlib.Path(
        _asking(
            kind,
            hub_id,
            lambda: huggingface_hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(kind.files),
                ignore_patterns=[*kind.not_files, *([] if with_weights else [WEIGHTS])],
                tqdm_class=None if progress else _NoBar,
            ),
        )
    )


def _url(kind, url):
    """The path that etils has of a URL. UserError where it knows no URLs of that sort."""
    from etils import epath

    try:
        return epath.Path(url.rstrip("/"))
    except KeyError as error:
        scheme, _, rest = url.partition("://")
        page = _HUB_PAGE.fullmatch(url)
        hub_id = "@".join(filter(None, page.groups())) if page else "org/name"
        remedy = (
            f"the path alone, /{rest.lstrip('/')}"
            if scheme == "file"
            else f"a folder, the hub id {hub_id}, or gs://…"
        )
        raise UserError(f"{kind.name} {url!r}: {scheme}:// is not read; give {remedy}") from error


def _copied(kind, url, progress, with_weights):
    """A copy of a remote folder in the cache, file by file."""
    within = pathlib.Path(f"{kind.name}s") / urllib.parse.quote(url.rstrip("/"), safe="")
    folder = files.cache_folder(holding=within / kind.needed) / within

    def look():
        remote = _url(kind, url)
        found = {name: (path, path.stat()) for name, path in _remote_files(remote, kind)}
        if kind is BASE and kind.needed not in found:
            raise UserError(_no_base(url, remote))
        orbax = (
            kind is BASE
            and not {weights.WHOLE, weights.INDEX} & found.keys()
            and (remote / weights.ORBAX).is_dir()
        )
        return found, remote / weights.ORBAX if orbax else None

    found, orbax = _asking(kind, url, look)
    if kind.needed not in found:
        raise UserError(f"{kind.name} {url!r} has no {kind.needed}; give the URL of {kind.form}")
    if any(not _same(folder / name, stat) for name, (_, stat) in found.items()):
        folder = files.cache_folder() / within  # one that may only be read is not enough
    changed = {
        name: source for name, source in found.items() if not _same(folder / name, source[1])
    }
    wanted = {
        name: source
        for name, source in changed.items()
        if with_weights or not fnmatch.fnmatch(name, WEIGHTS)
    }
    total = sum(stat.length for _, stat in wanted.values())
    with tqdm.tqdm(
        total=total, unit="B", unit_scale=True, desc=f"copying {url}", delay=1, disable=not progress
    ) as bar:
        for name, (path, stat) in wanted.items():
            with files.replacing_file(folder / name) as tmp:
                _asking(
                    kind,
                    url,
                    lambda path=path, stat=stat, tmp=tmp, before=bar.n: _copy(
                        path, tmp, stat.length, bar, before
                    ),
                )
                if stat.mtime:
                    os.utime(tmp, (stat.mtime, stat.mtime))
    note = folder / weights.ORBAX_URL
    if orbax and not (note.exists() and note.read_text(encoding="utf-8") == f"{orbax}\n"):
        files.write_text(note, f"{orbax}\n")
    here = {*found, weights.ORBAX_URL} if orbax else {*found}
    here -= changed.keys() - wanted.keys()
    for path in list(
        folder.rglob("*")
    ):  # what is no longer there, or no longer so, must not be loaded with the rest
        if (
            path.is_file()
            and path.relative_to(folder).as_posix() not in here
            and not path.name.startswith(".")
        ):
            path.unlink()
    return folder


def _remote_files(folder, kind):
    """(path within the folder, path) of the files of a remote folder that are fetched."""
    for path in folder.iterdir():
        if path.name in kind.folders:
            for within in path.iterdir():
                if kind.wants(f"{path.name}/{within.name}"):
                    yield f"{path.name}/{within.name}", within
        elif kind.wants(path.name):
            yield path.name, path


def _same(path, stat):
    """Whether a file here has a remote file's size, and its time where the storage tells it."""
    if not path.is_file():
        return False
    return path.stat().st_size == stat.length and (
        not stat.mtime or int(path.stat().st_mtime) == int(stat.mtime)
    )


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
