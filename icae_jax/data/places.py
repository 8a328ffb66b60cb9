"""From the name of a source to its files: a file, a folder or a glob, local or in object storage.

Several are joined by commas.
"""

import glob
import os
import pathlib
import re
import stat
import sys
from collections.abc import Callable

from icae_jax import errors
from icae_jax.data import formats, reading
from icae_jax.errors import UserError

SETS = ("tfds:", "hf:")  # prefixes of prepared sets and of the hub's; hf:// is a URL instead
SCHEMES = ("gs", "s3", "az", "hf")  # of URLs that `etils.epath` reads
MOST_COMMAS = 8  # of one file's name
_MAGIC = re.compile(r"[*?[]")
# Files beside data: those of the hub's repositories, and those libraries write about their sets.
_ABOUT = re.compile(
    r"(readme|license|licence|notice|changelog|citation|contributing|authors)(\..*)?", re.IGNORECASE
)
_ABOUT_JSON = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "features.json",
}


def is_set(path: str) -> bool:
    """Whether a source is a set by its name, and not a file."""
    return path.startswith(SETS) and not path.startswith("hf://")


def split_source(source: str, bare: Callable[[str], str] = str) -> list[str]:
    """The paths of a source, joined by commas, which the name of an existing file may hold too.

    bare: gives the path of an item in which something precedes it.
    """
    items, paths = source.split(","), []
    while items:
        counts = range(min(len(items), MOST_COMMAS + 1), 1, -1)
        if is_set(items[0].strip()) or reading.is_remote(items[0]):
            counts = []
        count = next((n for n in counts if os.path.exists(bare(",".join(items[:n]).strip()))), 1)
        paths.append(",".join(items[:count]).strip())
        items = items[count:]
    paths = [path for path in paths if path]
    if not paths:
        raise UserError(
            "the data source is empty; give a file of rows or text, a folder or glob of them, or a "
            "set such as tfds:NAME:SPLIT"
        )
    return paths


def files_of(path: str, report: bool = False) -> list[str]:
    """The data files of a path, those of a folder or glob in the order of their names.

    A folder, at any depth, or a glob means its files of rows (JSON, tables), or if it has none its
    texts. A single file need not exist. UserError if a folder or glob has no data files.

    report: whether to say on stderr which files are not read.
    """
    if reading.is_remote(path):
        return _remote_files(path, report)
    if errors.is_there(path, stat.S_ISDIR):
        return _data_files(path, _walk(path), report)
    if not _MAGIC.search(path) or errors.is_there(path, lambda mode: True):
        return [path]
    with reading.naming(path):
        paths = []
        for match in glob.glob(path, recursive=True):
            paths += _walk(match) if os.path.isdir(match) else [match]
    return _data_files(path, paths, report)


def _walk(folder):
    """The files in a folder at any depth, without hidden ones."""

    def fail(error):
        raise error

    paths, entered = [], {os.path.realpath(folder)}
    with reading.naming(folder):
        for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
            real = {
                name: os.path.realpath(os.path.join(parent, name))
                for name in folders
                if not name.startswith(".")
            }
            # A link may lead back to a folder that was entered.
            folders[:] = [name for name in real if real[name] not in entered]
            entered.update(real.values())
            paths += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return paths


def _data_files(path, paths, report):
    """The sorted files of rows among `paths`, else the texts. path: what the user named."""
    paths = sorted(set(paths), key=lambda p: pathlib.PurePath(p).parts)
    kinds = {p: _kind_in_folder(p) for p in paths if not _is_about(p)}
    chosen = [p for p, kind in kinds.items() if kind and kind != formats.TEXT]
    chosen = chosen or [p for p, kind in kinds.items() if kind]
    if not chosen:
        what = f"none of its {len(paths)} files is data" if paths else "no files"
        raise UserError(f"data {path}: {what}; expected files of {formats.LISTED}")
    read = set(chosen)
    others = [p for p in paths if p not in read]
    if others and report:
        print(
            f"data {path}: {len(chosen)} files are read; {len(others)} others are not, such as "
            f"{others[0]}",
            file=sys.stderr,
            flush=True,
        )
    return chosen


def _kind_in_folder(path):
    """A file's kind by its last suffix alone, "" if unknown: a.jsonl.bak is a copy of a.jsonl."""
    return formats.KINDS.get((formats.suffixes(path) or [""])[-1], "")


def _is_about(path):
    name = pathlib.PurePath(path).name
    return bool(_ABOUT.fullmatch(name)) or name in _ABOUT_JSON


def _remote_files(url, report):
    from etils import epath

    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        expected = ", ".join(f"{known}://" for known in SCHEMES)
        raise UserError(
            f"data file {url}: {scheme}:// is not read; expected {expected}, or a local file"
        )

    def walk(folder):
        paths = []
        for entry in folder.iterdir():
            if not entry.name.startswith("."):
                # Names of data files need no request each: a folder may hold thousands.
                is_file = bool(_kind_in_folder(entry.name)) or not entry.is_dir()
                paths += [os.fspath(entry)] if is_file else walk(entry)
        return paths

    def look():
        """The files of a folder or glob; None for a single file."""
        with reading.naming(url):
            magic = _MAGIC.search(url)
            if magic:
                base_end = url.rindex("/", 0, magic.start())
                base, pattern = url[:base_end], url[base_end + 1 :]
                if "**" in pattern:
                    raise UserError(
                        f"data {url}: ** is not read there; give the folder, of which all files "
                        "are read at any depth"
                    )
                return [os.fspath(match) for match in epath.Path(base).glob(pattern)]
            if _kind_in_folder(url) or not epath.Path(url).is_dir():
                return None
            return walk(epath.Path(url))

    paths = errors.retrying(look, f"looking for {url}")
    return [url] if paths is None else _data_files(url, paths, report)


def check_file(path: str) -> None:
    """UserError if a data file is absent or of no known format by its name; it is not read."""

    def exists():
        if reading.is_remote(path):
            from etils import epath

            return epath.Path(path).exists()
        return errors.is_there(path, stat.S_ISREG)

    with reading.naming(path):
        if not errors.retrying(exists, f"looking for {path}"):
            pipe = not reading.is_remote(path) and os.path.exists(path)
            what = "no such file"
            if pipe:
                what = "no plain file, which is read twice; save it as one"
            raise UserError(f"data file {path}: {what}")
    formats.kind(path)
