"""Downloads from the model hub and copies from object storage, with failures told apart."""

import dataclasses
import fnmatch
import glob
import os
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tqdm

from icae_jax import cache, errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub import gguf_file, orbax_copy, stored

T = TypeVar("T")
WEIGHTS = "*.safetensors"
HUB = "the hub"
_BLOCK_BYTES = 16 << 20
# A repository's page, with the revision that it shows.
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/([\w.-]+))?(?:[/?#].*)?"
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of folder, and which of its files are fetched.

    Attributes:
        name: as messages call it.
        needed: the file without which a folder is not of this kind.
        form: as messages describe such a folder.
        files: patterns of relative paths to fetch.
        not_files: patterns of relative paths not to fetch.
        folders: subfolders that hold files to fetch.
    """

    name: str
    needed: str
    form: str
    files: tuple[str, ...]
    not_files: tuple[str, ...]
    folders: tuple[str, ...] = ()

    def wants(self, path: str) -> bool:
        """Whether the file of this relative path is fetched."""
        wanted, unwanted = (
            any(fnmatch.fnmatch(path, pattern) for pattern in patterns)
            for patterns in (self.files, self.not_files)
        )
        return wanted and not unwanted


# Configuration, tokenizer, safetensors and licence; not the copies of the weights in other formats
# that some folders hold, and never code.
BASE = Kind(
    "base",
    "config.json",
    "a folder in the model hub's format",
    ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer.model*", WEIGHTS, "LICENSE*", "NOTICE*"),
    ("*/*", "consolidated*", "*.py", "*.py?", "*.so"),
)
# An adapter folder of this package or of PEFT; never a pickle.
_LORA = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER = Kind(
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


# ------------------------------------------------------------------------ failures told apart


def is_offline() -> bool:
    """Whether the hub's client may not use the network."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def asking(function: Callable[[], T], called: str, doing: str, whom: str, remedy: str = "") -> T:
    """Returns `function()`, which asks a hub or a store; retried while that cannot be reached.

    Args:
        function: must be safe to call again.
        called: describes the work in notes.
        doing: how messages begin.
        whom: the hub or the store.
        remedy: how the message of a refusal ends.

    Raises:
        UserError: it does not exist, or this user may not read it.
        ConnectionError: there was no answer.
    """
    at_hub = whom == HUB

    def attempt():
        try:
            return function()
        except Exception as error:
            if _not_in_cache(error) and is_offline():
                raise UserError(
                    f"{doing}{'' if at_hub else ':'} no copy is in the local cache, and "
                    f"HF_HUB_OFFLINE is set ({_one_line(error)})"
                ) from error
            if not errors.answered_no(error):
                raise
            if isinstance(error, ImportError):
                raise UserError(
                    f"{doing}: a package is not installed: {_one_line(error)} "
                    "(for gs://, pip install gcsfs)"
                ) from error
            raise UserError(
                f"{doing}{' the hub says' if at_hub else ''}: {_one_line(error)}{remedy}"
            ) from error

    try:
        return errors.retrying(attempt, called)
    except UserError:
        raise
    except Exception as error:
        if not errors.transient(error):
            raise
        raise ConnectionError(f"{doing}: {whom} cannot be reached: {_one_line(error)}") from error


def asking_for(kind: Kind, name: str, function: Callable[[], T]) -> T:
    """Returns `function()`, which asks a hub or a store for a folder; raises as `asking` does.

    Args:
        kind: of the folder.
        name: its hub id or URL.
        function: must be safe to call again.
    """
    called = f"{kind.name} {name!r}"
    if "://" in name:
        return asking(function, called, f"{called} cannot be read", "the store")
    hub_id = name.partition("@")[0]
    doing = f"{called}: there is no folder {name} in {os.getcwd()}, and of the hub id {hub_id}"
    remedy = (
        "; give a folder that is here, or a repository that you may read "
        "(a gated one after `hf auth login`)"
    )
    return asking(function, called, doing, HUB, remedy)


def _one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _not_in_cache(error):
    """Whether the hub's client is offline and has no cached copy."""
    names = {type(link).__name__ for link in errors.causes(error)}
    return bool(names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"})


# ----------------------------------------------------------------------------------- fetching


class NoBar(tqdm.tqdm):
    """A bar of the hub's client that is not shown."""

    def __init__(self, *args, name=None, **kw):
        super().__init__(*args, **kw | {"disable": True})


def download(kind: Kind, hub_id: str, progress: bool, with_weights: bool = True) -> pathlib.Path:
    """The snapshot of a hub repository, in the hub's own cache."""
    import huggingface_hub

    repository, _, revision = hub_id.partition("@")
    folder = asking_for(
        kind,
        hub_id,
        lambda: huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(kind.files),
            ignore_patterns=[*kind.not_files, *([] if with_weights else [WEIGHTS])],
            tqdm_class=None if progress else NoBar,
        ),
    )
    return pathlib.Path(folder)


def _named_parts(name):
    """The names of all parts of a GGUF file of this name, which may be in subfolders."""
    return [str(part) for part in gguf_file.parts(pathlib.Path(name))]


def download_gguf(hub_id: str, name: str, progress: bool) -> pathlib.Path:
    """A GGUF file of a hub repository, in the hub's own cache; of a split file all parts.

    Args:
        hub_id: may name a revision.
        name: the file's path in the repository, or the first part's.
        progress: whether to show bars on stderr.
    """
    import huggingface_hub

    repository, _, revision = hub_id.partition("@")
    called = f"base '{hub_id}:{name}'"
    remedy = "; see its files on the hub, or log in (`hf auth login`) if it is gated"
    paths = [
        asking(
            lambda part=part: huggingface_hub.hf_hub_download(
                repository,
                part,
                revision=revision or None,
                tqdm_class=None if progress else NoBar,
            ),
            called,
            f"{called}: of the hub id {repository}",
            HUB,
            remedy,
        )
        for part in _named_parts(name)
    ]
    return pathlib.Path(paths[0])


def copy_gguf(url: str, progress: bool) -> pathlib.Path:
    """A copy of a GGUF file in the cache, with all parts of a split one; as of `copy_url`."""
    parent, _, name = url.rpartition("/")
    wanted = tuple(glob.escape(part) for part in _named_parts(name))
    kind = Kind("base", name, f"a folder that holds {name}", wanted, ())
    return copy_url(kind, parent, progress, copy_of=url) / name


def url_path(kind: Kind, url: str) -> Any:
    """The `etils.epath` of a URL. UserError if it reads no such URLs."""
    from etils import epath

    try:
        return epath.Path(url.rstrip("/"))
    except KeyError as error:
        scheme, _, rest = url.partition("://")
        page = _HUB_PAGE.fullmatch(url)
        hub_id = "@".join(filter(None, page.groups())) if page else "org/name"
        remedy = f"a folder, the hub id {hub_id}, or gs://…"
        if scheme == "file":
            remedy = f"the path alone, /{rest.lstrip('/')}"
        raise UserError(f"{kind.name} {url!r}: {scheme}:// is not read; give {remedy}") from error


def copy_url(
    kind: Kind,
    url: str,
    progress: bool,
    with_weights: bool = True,
    refusal: Callable[[str, Any], str] | None = None,
    copy_of: str = "",
) -> pathlib.Path:
    """A copy of a remote folder in the cache, file by file.

    Args:
        kind: of the folder.
        url: of the folder.
        progress: whether to show a bar on stderr.
        with_weights: whether to copy the safetensors files too.
        refusal: the message, from the URL and its path, if the folder is not of this kind.
        copy_of: the URL by which the copy is found again, by default the folder's.
    """
    named = copy_of or url.rstrip("/")
    relative = pathlib.Path(f"{kind.name}s") / urllib.parse.quote(named, safe="")
    folder = cache.folder(holding=relative / kind.needed) / relative

    def look():
        remote = url_path(kind, url)
        listing = {name: (path, path.stat()) for name, path in _remote_files(remote, kind)}
        if refusal is not None and kind.needed not in listing:
            raise UserError(refusal(url, remote))
        orbax = (
            kind is BASE
            and not {stored.WHOLE, stored.INDEX} & listing.keys()
            and (remote / orbax_copy.ORBAX).is_dir()
        )
        return listing, remote / orbax_copy.ORBAX if orbax else None

    listing, orbax = asking_for(kind, url, look)
    if kind.needed not in listing:
        raise UserError(f"{kind.name} {url!r} has no {kind.needed}; give the URL of {kind.form}")
    changed = {
        name: source for name, source in listing.items() if not _same(folder / name, source[1])
    }
    if changed:
        folder = cache.folder() / relative  # a read-only cache no longer suffices
        changed = {
            name: source for name, source in listing.items() if not _same(folder / name, source[1])
        }
    wanted = {
        name: source
        for name, source in changed.items()
        if with_weights or not fnmatch.fnmatch(name, WEIGHTS)
    }
    total = sum(status.length for _, status in wanted.values())
    with tqdm.tqdm(
        total=total, unit="B", unit_scale=True, desc=f"copying {url}", delay=1, disable=not progress
    ) as bar:
        for name, (path, status) in wanted.items():
            with files.replacing_file(folder / name) as tmp:
                asking_for(
                    kind,
                    url,
                    lambda path=path, length=status.length, tmp=tmp, before=bar.n: _copy(
                        path, tmp, length, bar, before
                    ),
                )
                if status.mtime:
                    os.utime(tmp, (status.mtime, status.mtime))
    note = folder / orbax_copy.ORBAX_URL
    if orbax and not (note.exists() and note.read_text(encoding="utf-8") == f"{orbax}\n"):
        files.write_text(note, f"{orbax}\n")
    current = {*listing, orbax_copy.ORBAX_URL} if orbax else {*listing}
    current -= changed.keys() - wanted.keys()
    # Files that the remote folder no longer has, or has changed, must not be loaded with the rest.
    for path in list(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in current and not path.name.startswith("."):
            path.unlink()
    return folder


def _remote_files(folder: Any, kind: Kind) -> Iterator[tuple[str, Any]]:
    """(relative path, path) of the files of a remote folder that are fetched."""
    for path in folder.iterdir():
        if path.name in kind.folders:
            for inner in path.iterdir():
                if kind.wants(f"{path.name}/{inner.name}"):
                    yield f"{path.name}/{inner.name}", inner
        elif kind.wants(path.name):
            yield path.name, path


def _same(path, status):
    """Whether a local file has a remote file's size, and its mtime if the store tells it."""
    if not path.is_file():
        return False
    return path.stat().st_size == status.length and (
        not status.mtime or int(path.stat().st_mtime) == int(status.mtime)
    )


def _copy(source, target, length, bar, before):
    """Copies a file of this length.

    Args:
        source: a path of a store.
        target: a local path.
        length: in bytes.
        bar: the progress bar.
        before: the bar's position at the start, to which another attempt returns.
    """
    bar.update(before - bar.n)
    copied = 0
    with source.open("rb") as reading, open(target, "wb") as writing:
        while block := reading.read(_BLOCK_BYTES):
            writing.write(block)
            copied += len(block)
            bar.update(len(block))
    if copied != length:
        raise ConnectionError(f"{source} ended after {copied} bytes, {length} expected")
