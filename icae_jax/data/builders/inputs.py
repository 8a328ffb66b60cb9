"""Which files a set is made of: those that the user names, or those of published names in them."""

import dataclasses
import os
import pathlib
import typing
from collections.abc import Iterable, Sequence

from icae_jax.data import formats, places
from icae_jax.data.unpacking import packing
from icae_jax.errors import UserError, counted


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asks for; a set takes only some of these.

    Attributes:
      paths: files and folders (`--from`).
      only: names of splits, subsets or `split/subset`; empty for all.
      patterns: (split, glob) pairs (`--split`).
      field: the field of the text.
    """

    paths: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    patterns: tuple[tuple[str, str], ...] = ()
    field: str = "text"


class Input(typing.NamedTuple):
    """One file of a split, and the subset of its rows."""

    path: str
    subset: str = ""


class Published(typing.NamedTuple):
    """One file of a published set.

    Attributes:
      split: the split of its rows.
      names: its names without suffixes, the published one first.
      url: where it is found.
      subset: the subset of its rows.
      folder: the folder it must be in, if its name alone is ambiguous.
    """

    split: str
    names: tuple[str, ...]
    url: str
    subset: str = ""
    folder: str = ""

    @property
    def key(self) -> str:
        """`split/subset`, or the split."""
        return f"{self.split}/{self.subset}" if self.subset else self.split

    @property
    def file(self) -> str:
        """Its published name, with the folder if it needs one."""
        return f"{self.folder}/{self.names[0]}" if self.folder else self.names[0]


def stem(path: str | os.PathLike) -> str | None:
    """A data file's name without the suffixes of its format; None if it is not a data file."""
    if not formats.kind_by_name(path):
        return None
    name = pathlib.Path(path).name
    suffix = packing(path)
    if suffixes := formats.suffixes(path):
        suffix = suffixes[-1] + suffix
    return name[: len(name) - len(suffix)]


def files_in(paths: Iterable[str | os.PathLike]) -> list[pathlib.Path]:
    """The data files among paths, and at any depth in folders, sorted within a folder.

    UserError if a path is absent or there is no data file in it.
    """
    if not paths:
        raise UserError(
            "--from is not given; give the files that you have, or a folder that holds them"
        )
    files = []
    for path in map(str, paths):
        if not os.path.exists(path):
            raise UserError(f"--from {path}: no such file or folder")
        files_of_path = places.files_of(path, report=True)
        for file in files_of_path:
            formats.kind(file)
        files += files_of_path
    # Not resolved: in the hub's cache names are links to nameless files.
    return list(dict.fromkeys(pathlib.Path(file).absolute() for file in files))


def find(published: Sequence[Published], request: Request) -> dict[str, list[Input]]:
    """`{split: [Input]}` of the published files that the request asks for.

    UserError names all that are absent, and where they are found.
    """
    known = {name for p in published for name in (p.key, p.split, p.subset) if name}
    for name in request.only:
        if name not in known:
            parts = ", ".join(p.key for p in published)
            raise UserError(f"--only {name}: not a part of this set; its parts are {parts}")
    wanted = [
        p for p in published if not request.only or {p.key, p.split, p.subset} & set(request.only)
    ]
    files, result, absent = files_in(request.paths), {}, []
    for part in wanted:
        matches = [f for f in files if stem(f) in part.names and part.folder in ("", f.parent.name)]
        if len(matches) > 1:
            raise UserError(
                f"--from: both {matches[0]} and {matches[1]} are {part.file}; give one of them"
            )
        if matches:
            result.setdefault(part.split, []).append(Input(str(matches[0]), part.subset))
        else:
            absent.append(part)
    if absent:
        present = ",".join(p.key for p in wanted if p not in absent)
        remedy = f", or make the set of what there is: --only {present}" if present else ""
        lines = "\n".join(f"  {p.file}.jsonl (or .jsonl.gz, .jsonl.zst): {p.url}" for p in absent)
        raise UserError(
            f"--from {' '.join(map(str, request.paths))}: "
            f"{counted(len(absent), 'files')} missing; get what is listed below"
            f"{remedy}\n{lines}"
        )
    return result
