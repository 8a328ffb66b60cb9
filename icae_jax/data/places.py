"""From the name of a source to its files: a file, a folder, a glob, here or in object storage; several joined by commas."""

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

SETS = (
    "tfds:",
    "hf:",
)  # how the names of prepared sets, and of the hub's, begin; the slashes of hf:// make a URL of it
SCHEMES = ("gs", "s3", "az", "hf")  # of URLs that `etils.epath` reads
MOST_COMMAS = 8  # in the name of one file
_MAGIC = re.compile(r"[*?[]")
# Files beside data: what stands in repositories of the hub, and what libraries write of their sets.
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
    """Whether a source is a set by its name, no file."""
    return path.startswith(SETS) and not path.startswith("hf://")


def split_source(source: str, bare: Callable[[str], str] = str) -> list[str]:
    """The paths of a source: several are joined by commas, which the name of a file that is there may hold too.

    bare: the path in a part, where something stands before it.
    """
    parts, paths = source.split(","), []
    while parts:
        counts = (
            []
            if is_set(parts[0].strip()) or reading.is_remote(parts[0])
            else range(min(len(parts), MOST_COMMAS + 1), 1, -1)
        )
        count = next((n for n in counts if os.path.exists(bare(",".join(parts[:n]).strip()))), 1)
        paths.append(",".join(parts[:count]).strip())
        parts = parts[count:]
    paths = [path for path in paths if path]
    if not paths:
        raise UserError(
            "the data source is empty; give a file of rows or text, a folder or glob of them, or a set such as tfds:NAME:SPLIT"
        )
    return paths


def files_of(path: str, told: bool = False) -> list[str]:
    """The data files that a path stands for, those of a folder or glob in the order of their names.

    A folder, at any depth, or a glob stands for its files of rows (JSON, tables), or where there are none for its texts. told: whether
    what of them is not read is said on stderr. UserError where there are none; a single file need not be there.
    """
    if reading.is_remote(path):
        return _remote(path, told)
    if errors.is_there(path, stat.S_ISDIR):
        return _data_files(path, _walk(path), told)
    if not _MAGIC.search(path) or errors.is_there(path, lambda mode: True):
        return [path]
    with reading.naming(path):
        matches = glob.glob(path, recursive=True)
        found = [
            f for match in matches for f in (_walk(match) if os.path.isdir(match) else [match])
        ]
    return _data_files(path, found, told)


def _walk(folder):
    """The files in a folder at any depth, but hidden ones."""

    def closed(error):
        raise error

    found, entered = [], {os.path.realpath(folder)}
    with reading.naming(folder):
        for at, folders, names in os.walk(folder, onerror=closed, followlinks=True):
            real = {
                name: os.path.realpath(os.path.join(at, name))
                for name in folders
                if not name.startswith(".")
            }
            folders[:] = [
                name for name in real if real[name] not in entered
            ]  # a link may lead back
            entered.update(real.values())
            found += [os.path.join(at, name) for name in names if not name.startswith(".")]
    return found


def _data_files(path, found, told):
    found = sorted(set(found), key=lambda f: pathlib.PurePath(f).parts)
    named = {f: _kind_in_folder(f) for f in found}
    data = {f: kind for f, kind in named.items() if kind and not _is_about(f)}
    chosen = [f for f, kind in data.items() if kind != formats.TEXT] or list(data)
    if not chosen:
        what = f"none of its {len(found)} files is data" if found else "no files"
        raise UserError(f"data {path}: {what}; expected files of {formats.LISTED}")
    left = [f for f in found if f not in set(chosen)]
    if left and told:
        print(
            f"data {path}: {len(chosen)} files are read; {len(left)} others are not, such as {left[0]}",
            file=sys.stderr,
            flush=True,
        )
    return chosen


def _kind_in_folder(path):
    """A file's kind by its last suffix alone, "" for none's: beside a.jsonl, a.jsonl.bak is a copy."""
    return formats.KINDS.get((formats.suffixes(path) or [""])[-1], "")


def _is_about(path):
    name = pathlib.PurePath(path).name
    return bool(_ABOUT.fullmatch(name)) or name in _ABOUT_JSON


def _remote(url, told):
    from etils import epath

    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise UserError(
            f"data file {url}: {scheme}:// is not read; expected {', '.join(f'{s}://' for s in SCHEMES)}, or a file that is here"
        )

    def walk(folder):
        files = []
        for entry in folder.iterdir():
            if not entry.name.startswith("."):
                # A name that is a data file's need not be asked for: a folder may hold thousands.
                is_file = bool(_kind_in_folder(entry.name)) or not entry.is_dir()
                files += [os.fspath(entry)] if is_file else walk(entry)
        return files

    def look():
        with reading.naming(url):
            magic = _MAGIC.search(url)
            if magic:
                base, pattern = (
                    url[: magic.start()].rpartition("/")[0],
                    url[url.rindex("/", 0, magic.start()) + 1 :],
                )
                if "**" in pattern:
                    raise UserError(
                        f"data {url}: ** is not read there; give the folder, of which all files are read at any depth"
                    )
                return [os.fspath(match) for match in epath.Path(base).glob(pattern)]
            if _kind_in_folder(url) or not epath.Path(url).is_dir():
                return None
            return walk(epath.Path(url))

    found = errors.retrying(look, f"looking for {url}")
    return [url] if found is None else _data_files(url, found, told)


def check_file(path: str) -> None:
    """UserError where a data file is absent, or none by its name; nothing of it is read."""

    def there():
        if reading.is_remote(path):
            from etils import epath

            return epath.Path(path).exists()
        return errors.is_there(path, stat.S_ISREG)

    with reading.naming(path):
        if not errors.retrying(there, f"looking for {path}"):
            pipe = not reading.is_remote(path) and os.path.exists(path)
            raise UserError(
                f"data file {path}: {'no plain file, which is read twice; save it as one' if pipe else 'no such file'}"
            )
    formats.kind(path)
