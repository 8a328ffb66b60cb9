"""Where bases and adapters are: a local folder, the model hub, or object storage.

The latter two are fetched into a cache on this machine (`fetching`).
"""

import fnmatch
import json
import os
import pathlib
import re
import stat
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from icae_jax import errors
from icae_jax.errors import UserError
from icae_jax.interop.hub import fetching, gguf_file, gguf_folder
from icae_jax.interop.hub.fetching import ADAPTER, BASE

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
# A GGUF file of a repository: its hub id, a colon, and the file's path in it.
_HUB_FILE = re.compile(rf"({_HUB_ID.pattern}):([\w. /-]+\.gguf)", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub id, `org/name` or `org/name@revision`."""
    return bool(_HUB_ID.fullmatch(text))


def is_remote(text: str) -> bool:
    """Whether a text names something remote: a URL, or a hub id that is not a local folder.

    A GGUF file of a repository, `org/name:FILE.gguf`, is remote too.
    """
    if "://" in text:
        return True
    if is_gguf(text):
        return bool(_HUB_FILE.fullmatch(text)) and not errors.is_there(text, stat.S_ISREG)
    return is_hub_id(text) and not errors.is_there(text, stat.S_ISDIR)


def is_gguf(text: str) -> bool:
    """Whether a text names a GGUF file, here or elsewhere, and not a folder."""
    return text.endswith(gguf_file.SUFFIX) and not errors.is_there(text, stat.S_ISDIR)


def hub_repository(text: str) -> str:
    """The repository's id in a hub id with a revision or a file."""
    return re.split("[@:]", text, maxsplit=1)[0]


# --------------------------------------------------------------------------------------- bases


def local_folder(
    base: str | os.PathLike, progress: bool = True, with_weights: bool = True
) -> pathlib.Path:
    """The folder on this machine that holds a base.

    Args:
        base: one of
            a folder, which is returned as it is;
            a hub id `org/name` or `org/name@revision`, which is downloaded into the hub's cache if
            it is not there (if offline, it must be);
            the URL of a folder that `etils.epath` reads (gs://, s3://, …), which is copied into
            `bases/` of the cache folder, where files of the same size and time are kept. The
            weights of an Orbax copy are not copied (`orbax_copy.ORBAX_URL`);
            a GGUF file: its path, `org/name:FILE.gguf` or `org/name@revision:FILE.gguf` on the
            hub, or its URL. It is fetched as a whole, and what is returned is the folder that
            stands for it (`gguf_folder`). Of a split file the first part is named.
        progress: whether to show bars on stderr if fetching takes over a second.
        with_weights: whether to fetch safetensors files too.

    Raises:
        UserError: the base does not exist, or this user may not read it.
        ConnectionError: the hub or store could not be reached in several attempts.
    """
    text = str(base)
    if is_gguf(text):
        return gguf_folder.folder_of(_local_gguf(text, progress))
    if errors.is_there(text, stat.S_ISDIR):  # "" is not the current folder, as it is to pathlib
        folder = pathlib.Path(text)
    elif errors.is_there(text, stat.S_ISREG):
        raise UserError(
            f"base {text!r} is a file; give the folder, in the model hub's format, that "
            "holds config.json and weights, or a GGUF file, whose name ends in .gguf"
        )
    elif "://" in text:
        folder = fetching.copy_url(BASE, text, progress, with_weights, refusal=_not_a_base)
    elif is_hub_id(text):
        folder = fetching.download(BASE, text, progress, with_weights)
    else:
        raise UserError(
            f"base {text!r} is not a folder; give a model-hub folder with config.json, weights and "
            "tokenizer, a GGUF file, a hub id such as meta-llama/Llama-3.2-1B, or gs://…"
        )
    if not errors.is_there(folder / "config.json", stat.S_ISREG):
        raise UserError(_not_a_base(text, folder))
    return folder


def _local_gguf(text, progress):
    """The path on this machine of a GGUF file, which is fetched if it is on the hub or a URL."""
    if errors.is_there(text, stat.S_ISREG):
        return pathlib.Path(text)
    if "://" in text:
        return fetching.copy_gguf(text, progress)
    match = _HUB_FILE.fullmatch(text)
    if match is None:
        raise UserError(
            f"base {text!r}: no such file; give a GGUF file that is here, one of the hub as "
            "org/name:FILE.gguf, or its URL, gs://…/FILE.gguf"
        )
    return fetching.download_gguf(match[1], match[3], progress)


def _not_a_base(base, folder):
    """The message for a folder without config.json: what it is instead, and what to do.

    Args:
        base: as the user gave it.
        folder: a local path, or an `etils.epath` of a store.
    """
    names = sorted(path.name for path in folder.iterdir())
    start = f"base {base!r} has no config.json"
    if "icae.json" in names:
        return (
            f"{start}: it is an adapter of this package; give it as the adapter, and as base the "
            "one that it was trained on"
        )
    if "adapter_config.json" in names:
        try:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            trained_on = config["base_model_name_or_path"]
        except (ValueError, LookupError, TypeError, OSError):
            trained_on = None
        merge = "not a base; merge it first (peft: merge_and_unload)"
        if isinstance(trained_on, str) and trained_on:
            return f"{start}: it is a LoRA adapter of {trained_on}, {merge}, or give {trained_on}"
        return f"{start}: it is a LoRA adapter, {merge}"
    if fnmatch.filter(names, "consolidated*") or "params.json" in names:
        return (
            f"{start}: it holds the model's original files (params.json, consolidated…); "
            "give the model in the hub's format"
        )
    ggufs = fnmatch.filter(names, f"*{gguf_file.SUFFIX}")
    if ggufs:
        first = fnmatch.filter(ggufs, "*-00001-of-*") or ggufs
        named = f"{str(base).rstrip('/')}{':' if is_hub_id(str(base)) else '/'}{first[0]}"
        which = first[0] if len(first) == 1 else f"{len(first)} GGUF files, such as {first[0]}"
        return f"{start}: it holds {which}; give the file, {named}"
    within = _bases_in(folder)
    if not within and (folder / "snapshots").is_dir():  # of the hub's cache
        within = [f"snapshots/{name}" for name in _bases_in(folder / "snapshots")]
    if within:
        have = "have" if within[1:] else "has"
        return f"{start}, {' and '.join(within[:3])} in it {have} one; give that folder"
    empty = "" if names else " (the folder is empty)"
    return f"{start}; give one in the model hub's format{empty}"


def _bases_in(folder):
    """The names of the subfolders that have a config.json."""
    return sorted(
        path.name for path in folder.iterdir() if path.is_dir() and (path / "config.json").exists()
    )


def remote_opener(
    base: str | os.PathLike, folder: pathlib.Path
) -> Callable[[str], BinaryIO] | None:
    """A function that opens a remote base's file by its name; None for a local folder.

    With it, a part of a file is read without the rest.

    Args:
        base: as for `local_folder`.
        folder: what `local_folder` returned; of the hub, a snapshot of one commit.
    """
    text = str(base)
    if errors.is_there(text, stat.S_ISDIR):
        return None
    if "://" in text:
        return lambda name: fetching.asking_for(
            BASE, text, lambda: (fetching.url_path(BASE, text) / name).open("rb")
        )
    import huggingface_hub

    repository, revision = text.partition("@")[0], folder.name
    hub = huggingface_hub.HfFileSystem()
    # Without read-ahead, since the rows that are read lie far apart.
    return lambda name: fetching.asking_for(
        BASE,
        text,
        lambda: hub.open(f"{repository}/{name}", "rb", revision=revision, cache_type="none"),
    )


# ------------------------------------------------------------------------------------ adapters


class LocalAdapter(NamedTuple):
    """An adapter on this machine.

    folder: a folder or file. name: finds it again from anywhere, with the commit if it is from the
    hub.
    """

    folder: pathlib.Path
    name: str


def local_adapter(adapter: str | os.PathLike, progress: bool = True) -> LocalAdapter:
    """Finds an adapter, or fetches it as `local_folder` does, into `adapters/` of the cache.

    The caller checks whether it is an adapter. Raises as `local_folder` does.

    Args:
        adapter: a file or folder, a hub id, or a URL, which may be that of a training workdir.
        progress: whether to show bars on stderr.
    """
    text = str(adapter)
    if errors.is_there(text, lambda mode: True):
        return LocalAdapter(pathlib.Path(text), os.path.abspath(text))
    if not is_remote(text):
        raise UserError(
            f"adapter {text or repr(text)}: no such file or folder; give the folder that training "
            "wrote (it holds icae.json), a hub id such as org/name, or gs://…"
        )
    if "://" in text:
        in_workdir = fetching.asking_for(
            ADAPTER,
            text,
            lambda: (fetching.url_path(ADAPTER, text) / "adapter" / "icae.json").exists(),
        )
        url = f"{text.rstrip('/')}/adapter" if in_workdir else text
        return LocalAdapter(fetching.copy_url(ADAPTER, url, progress), url)
    folder = fetching.download(ADAPTER, text, progress)
    if not (folder / "icae.json").exists() and fetching.is_offline():
        raise UserError(
            f"adapter {text!r}: what the hub's cache holds of it has no icae.json, and "
            "HF_HUB_OFFLINE is set; take that away to download the rest, if it is an adapter of "
            "this package"
        )
    commit = folder.name if _COMMIT.fullmatch(folder.name) else ""
    return LocalAdapter(folder, f"{text.partition('@')[0]}@{commit}" if commit else text)
