"""Shards: safetensors files that hold the numbers of many entries, and are never changed.

A shard's name is a hash of what it holds, so that the same entries written twice give one file. It
is written under another name, flushed and renamed, so that a shard of a name is whole. A look-up
has offsets from the index and reads these bytes alone; nobody parses a header to read.
"""

import collections
import hashlib
import json
import mmap
import pathlib
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.inference.store.entries import NAMING, Encoded
from icae_jax.inference.store.index import flush_folder, make_folder
from icae_jax.inference.store.info import FORMAT_VERSION, Info

SUFFIX = ".safetensors"
FOLDER = "shards"
MARKER = "icae_store"
_OPEN = 256  # shards that are kept mapped
_NAME = re.compile("[0-9a-f]{32}")
_COMMON = ("created_by", "shards", "base", "adapter")  # of a store's info, that change no bytes


def name_of(entries: Sequence[Encoded], info: Info) -> str:
    """The name of the shard of these entries: a hash of their ids, hashes and bytes."""
    about = {key: value for key, value in info.rows().items() if key not in _COMMON}
    held = [[entry.values[key] for key in NAMING] for entry in entries]
    text = json.dumps([sorted(about.items()), held])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def is_name(name: str) -> bool:
    """Whether a file's name, without its suffix, is one that `name_of` gives."""
    return bool(_NAME.fullmatch(name))


def save(path: pathlib.Path, entries: Sequence[Encoded], info: Info) -> list[dict[str, int]]:
    """Writes a shard's file; returns for each entry where its parts lie, as columns of the index.

    One tensor a part, `<number>.memory` and `<number>.kv`. safetensors sorts them by name, so an
    entry's bytes are contiguous.
    """
    width = len(str(len(entries)))
    tensors = {
        f"{number:0{width}}.{part}": x
        for number, entry in enumerate(entries)
        for part, x in entry.parts.items()
    }
    # One text: several would stand in an order that differs from run to run.
    about = {"format_version": FORMAT_VERSION, "method": info.method, "dtype": info.dtype}
    safetensors.numpy.save_file(tensors, path, {"icae_jax_store": json.dumps(about)})
    header, start = _header(path)
    places = []
    for number, entry in enumerate(entries):
        place = {}
        for part, prefix in (("memory", ""), ("kv", "kv_")):
            if part in entry.parts:
                begin, end = header[f"{number:0{width}}.{part}"]["data_offsets"]
                place |= {f"{prefix}offset": start + begin, f"{prefix}nbytes": end - begin}
        places.append(place)
    return places


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its tensors begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


class Shards:
    """The place of a store's shards.

    Args:
        store: the store's folder.
        place: `Info.shards`: a URL or a folder; "" for the folder in the store.
    """

    def __init__(self, store: pathlib.Path, place: str = ""):
        self.store, self.remote = store, "://" in place
        self.folder = pathlib.Path(place) if place and not self.remote else store / FOLDER
        self.url = place.rstrip("/")
        self._mapped: collections.OrderedDict[str, mmap.mmap] = collections.OrderedDict()
        self._mutex = threading.Lock()

    # --- Writing ---

    def claim(self, store: str) -> None:
        """Marks a place outside of the store's folder as this store's.

        Compacting removes the shards there that the index does not have, so a place must not be
        shared. UserError if another store has it. store: what the index calls itself.
        """
        if not self.url:
            return
        marker = self._marker()

        def claim():
            marker.parent.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                marker.write_text(store)
            return marker.read_text()

        with errors.naming(f"--shards {self.url}", "give a place that can be written"):
            owner = errors.retrying(claim, f"writing {marker}")
        if owner != store:
            raise self._taken()

    def check_free(self) -> None:
        """UserError if a place outside of the store's folder is another store's."""
        if self.url and errors.retrying(self._marker().exists, f"looking for {self._marker()}"):
            raise self._taken()

    def _marker(self) -> Any:
        return (self._folder_url() if self.remote else self.folder) / MARKER

    def _taken(self) -> UserError:
        return UserError(
            f"--shards {self.url} has the shards of another store; give a place of its own"
        )

    def write(self, entries: Sequence[Encoded], info: Info) -> tuple[str, list[dict[str, int]]]:
        """Writes a shard of entries; it is on disk when this returns.

        Returns its name, and for each entry where its parts lie, as columns of the index.
        """
        name = name_of(entries, info)
        path = self.folder / (name + SUFFIX)
        with errors.naming(f"shard {path}: cannot be written", "give a place that can be"):
            make_folder(self.folder)
            if self.remote:
                # On this machine first: a remote object is there once all of it has been sent.
                with tempfile.NamedTemporaryFile(
                    dir=self.folder, prefix=".", suffix=f"{SUFFIX}.sent"
                ) as tmp:
                    places = save(pathlib.Path(tmp.name), entries, info)
                    errors.retrying(
                        lambda: self._send(tmp.name, name), f"writing {self.shown(name)}"
                    )
            else:
                with files.replacing_file(path) as tmp:
                    places = save(tmp, entries, info)
                flush_folder(self.folder)
        return name, places

    def _send(self, path: str, name: str) -> None:
        remote = self._remote(name)
        remote.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb") as source, remote.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)

    def remove(self, name: str) -> None:
        """Removes a shard, if it is there. Who has it mapped reads on."""
        with self._mutex:
            self._mapped.pop(name, None)
        path = self._remote(name) if self.remote else self.folder / (name + SUFFIX)
        errors.retrying(lambda: path.unlink(missing_ok=True), f"removing {self.shown(name)}")

    # --- Reading ---

    def read(self, name: str, offset: int, nbytes: int) -> np.ndarray:
        """A copy of some bytes of a shard, `[nbytes]` of uint8.

        Raises FileNotFoundError if the shard is not there, EOFError if it is shorter.
        """
        if self.remote:
            data = errors.retrying(
                lambda: self._fetch(name, offset, nbytes), f"reading {self.shown(name)}"
            )
        else:
            mapped = self._map(name)
            # A page that is mapped and no longer in the file would end the process.
            if mapped.size() < offset + nbytes:
                raise EOFError
            # A copy: what is checked is what is used, also if the file changes.
            data = mapped[offset : offset + nbytes]
        if len(data) != nbytes:
            raise EOFError
        return np.frombuffer(data, np.uint8)

    def _map(self, name: str) -> mmap.mmap:
        with self._mutex:
            if name in self._mapped:
                self._mapped.move_to_end(name)
                return self._mapped[name]
        with open(self.folder / (name + SUFFIX), "rb") as file:
            try:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:  # an empty file
                raise EOFError from error
        with self._mutex:
            self._mapped[name] = mapped
            while len(self._mapped) > _OPEN:
                self._mapped.popitem(last=False)
        return mapped

    def _fetch(self, name: str, offset: int, nbytes: int) -> bytes:
        with self._remote(name).open("rb") as file:
            file.seek(offset)
            return file.read(nbytes)

    def size(self, name: str) -> int | None:
        """A shard's bytes; None if it is not there."""
        path = self._remote(name) if self.remote else self.folder / (name + SUFFIX)

        def size():
            try:
                status = path.stat()
            except FileNotFoundError:
                return None
            return status.length if self.remote else status.st_size

        return errors.retrying(size, f"looking for {self.shown(name)}")

    def names(self) -> Iterator[str]:
        """The names of the shards that are there, in the index or not."""
        folder = self._folder_url() if self.remote else self.folder
        if folder.exists():
            for path in folder.iterdir():
                name = path.name.removesuffix(SUFFIX)
                if path.name.endswith(SUFFIX) and is_name(name):
                    yield name

    def left_behind(self) -> Iterator[pathlib.Path]:
        """Files on this machine that a killed process was writing."""
        yield from self.folder.glob(f".*{SUFFIX}.*")

    def close(self) -> None:
        """Forgets what is mapped."""
        with self._mutex:
            self._mapped.clear()

    # --- Names ---

    def shown(self, name: str) -> str:
        """A shard as messages show it."""
        return f"{self.url if self.remote else self.folder}/{name}{SUFFIX}"

    def _folder_url(self) -> Any:
        from etils import epath

        try:
            return epath.Path(self.url)
        except KeyError as error:
            scheme = self.url.partition("://")[0]
            raise UserError(
                f"shards {self.url!r}: {scheme}:// is not written; give a folder, gs://… or s3://…"
            ) from error

    def _remote(self, name: str) -> Any:
        return self._folder_url() / (name + SUFFIX)
