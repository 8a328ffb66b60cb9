"""Which files a set is made of: asked for by the user, found by their published names."""

import dataclasses
import os
import pathlib
import typing

from icae_jax.data import formats, places, reading
from icae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asks for. paths: files and folders (`--from`). only: names of splits, subsets or `split/subset`; empty: all.

    patterns: (split, glob) pairs (`--split`). field: the text's field. Not every set takes every one of them.
    """

    paths: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    patterns: tuple[tuple[str, str], ...] = ()
    field: str = "text"


class Input(typing.NamedTuple):
    """One file of a split, and the subset that its rows belong to."""

    path: str
    subset: str = ""


class Published(typing.NamedTuple):
    """One file of a published set: its split and subset, the names it goes by (without suffixes, the published one first), and where
    it is found. folder: the one that it must stand in, where the name does not tell it from another."""

    split: str
    names: tuple[str, ...]
    url: str
    subset: str = ""
    folder: str = ""

    @property
    def key(self):
        return f"{self.split}/{self.subset}" if self.subset else self.split

    @property
    def file(self):
        return f"{self.folder}/{self.names[0]}" if self.folder else self.names[0]


def stem(path):
    """A data file's name without the suffixes of its format, None where it is no data file."""
    if not formats.kind_by_name(path):
        return None
    name = pathlib.Path(path).name
    packed, suffixes = reading.packing(path), formats.suffixes(path)
    return name[: len(name) - len(packed) - len(suffixes[-1] if suffixes else "")]


def files_in(paths):
    """The data files among paths and, at any depth, in the folders among them; sorted within a folder. UserError names what is absent, or
    none that is read.
    """
    if not paths:
        raise UserError(
            "--from is not given; give the files that you have, or a folder that holds them"
        )
    found = []
    for path in map(str, paths):
        if not os.path.exists(path):
            raise UserError(f"--from {path}: no such file or folder")
        of_path = places.files_of(path, told=True)
        for file in of_path:
            formats.kind(file)
        found += of_path
    # Not resolved: in the hub's cache names are links to nameless files.
    return list(dict.fromkeys(pathlib.Path(p).absolute() for p in found))


def find(published, request):
    """`{split: [Input]}` of the published files that the request asks for. UserError names every one that is absent, and where it is."""
    known = {name for p in published for name in (p.key, p.split, p.subset) if name}
    unknown = [name for name in request.only if name not in known]
    if unknown:
        raise UserError(
            f"--only {unknown[0]}: not a part of this set; its parts are {', '.join(p.key for p in published)}"
        )
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
        have = ",".join(p.key for p in wanted if p not in absent)
        lines = "\n".join(f"  {p.file}.jsonl (or .jsonl.gz, .jsonl.zst): {p.url}" for p in absent)
        remedy = f", or make the set of what there is: --only {have}" if have else ""
        raise UserError(
            f"--from {' '.join(map(str, request.paths))}: {len(absent)} file(s) absent; get them{remedy}\n{lines}"
        )
    return result
