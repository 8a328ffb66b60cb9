"""Stores and memory files: entries written as memory files, and files taken into a store.

A file that was exported says what the store knew of its texts, so that it comes back with content
hashes and metadata. Stored K/V of the decoder does not go along.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from icae_jax.errors import UserError
from icae_jax.inference import memory_file
from icae_jax.inference.store.entries import Entry, NewEntry, checksum
from icae_jax.inference.store.reader import Store, memory_of
from icae_jax.inference.store.writer import Writer

FILE_ENTRIES = 1024  # of a memory file, where all entries are exported
_KNOWN = "store_entries"  # the metadata of a memory file: [content hash, metadata] of each text


def export_file(store: Store, entries: Sequence[Entry], path: str | os.PathLike) -> None:
    """Writes entries of one k into a memory file; int8 as float32, other dtypes as they are."""
    memory_file.check_output(path)
    memory = memory_of(entries, store.info.compression)
    known = json.dumps([[entry.content_hash, entry.metadata] for entry in entries])
    ids = [entry.id for entry in entries]
    memory_file.save(path, memory, ids, store.info.origin, {_KNOWN: known})


def export_folder(
    store: Store, entries: Iterable[Entry], folder: str | os.PathLike, a_file: int = FILE_ENTRIES
) -> Iterator[pathlib.Path]:
    """Writes entries into memory files of a folder, `00000.safetensors` and so on; yields each.

    entries: of any k; a file holds entries of one, which stand behind each other.
    """
    if a_file < 1:
        raise UserError(f"--a_file is {a_file}; a memory file holds at least one text")
    number = itertools.count()
    for _, of_k in itertools.groupby(entries, lambda entry: entry.k):
        while some := list(itertools.islice(of_k, a_file)):
            path = pathlib.Path(folder) / f"{next(number):05}.safetensors"
            export_file(store, some, path)
            yield path


def import_file(writer: Writer, path: str | os.PathLike) -> dict[str, int]:
    """Stores the texts of a memory file; returns how many were "stored" and "unchanged".

    UserError if another compressor wrote the file.
    """
    memory, ids = memory_file.load(path, writer.info.origin)
    texts = [str(text_id) for text_id in ids]
    known_to_file = _known_entries(path, len(texts))
    known = writer.known(texts)
    entries, unchanged = [], 0
    for row, text in enumerate(texts):
        one = memory[row]
        content_hash, metadata = known_to_file[row] or (_hash(one), {})
        if text in known and known[text].content_hash == content_hash:
            unchanged += 1
            continue
        entries.append(NewEntry(text, content_hash, one, None, metadata))
    if entries:
        writer.add_shard(entries)
    return {"stored": len(entries), "unchanged": unchanged}


def _hash(memory) -> str:
    """What stands for the content hash of a text that is not known: its memory's."""
    arrays = [memory.segment_lengths, memory.mask, *memory.contents.values()]
    return "memory " + checksum(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays))


def _known_entries(path, count) -> list[tuple[str, dict[str, Any]] | None]:
    """What an exported file says of its texts; None for each of another file."""
    text = memory_file.read_metadata(path).get(_KNOWN, "null")
    try:
        known = json.loads(text)
    except (ValueError, RecursionError):
        known = None
    if not isinstance(known, list) or len(known) != count:
        return [None] * count
    return [
        tuple(pair) if isinstance(pair, list) and [type(x) for x in pair] == [str, dict] else None
        for pair in known
    ]
