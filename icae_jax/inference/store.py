"""Memory files: compressed texts on disk, with all that is needed to read them back, or to refuse.

A safetensors file with `slots [B, M, D]` (ICAE) or `k` and `v`, each `[L, B, M, K, H]`, k before RoPE (500xCompressor), and
`lengths [B, S]` (context tokens of each segment, 0 where a text has fewer), and as metadata: format_version, icae_jax_version, method,
layout, k, base_fingerprint, adapter_fingerprint, adapter (its folder, or hub id with the commit, or URL), ids (JSON).
"""

import json
import os
import pathlib
import re

import jax
import numpy as np
import safetensors
import safetensors.numpy

import icae_jax
from icae_jax.compression import memory as memories
from icae_jax.compression import methods
from icae_jax.errors import UserError
from icae_jax.interop import files, sources
from icae_jax.interop.text import check_encodable

FORMAT_VERSION = "1"
_METADATA = ("method", "layout", "k", "base_fingerprint", "adapter_fingerprint", "adapter", "ids")
_AGAIN = "compress the texts again"


def check_output(path):
    """UserError where a memory file could not be written, before any work is done."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; give a file name such as memory.safetensors")
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output {path}: folder {parent} is absent or cannot be written")


def save(path, memory, compression, ids, base_fingerprint, adapter_fingerprint, adapter_path):
    """Writes a memory file; one that is there is replaced only when the new one is complete."""
    if len(ids) != len(memory):
        raise UserError(f"{len(ids)} ids for {len(memory)} memories; give one id a text")
    ids = list(ids)
    for one in ids:
        check_encodable(str(one), f"the id {one!r}")
    repeated = next((one for i, one in enumerate(ids) if one in ids[:i]), None) if len(set(ids)) < len(ids) else None
    if repeated is not None:
        raise UserError(f"two memories have the id {repeated!r}; give each text an id of its own")
    metadata = {
        "format_version": FORMAT_VERSION,
        "icae_jax_version": icae_jax.__version__,
        "method": compression.method,
        "layout": compression.layout,
        "k": str(memory.tokens_per_segment),
        "base_fingerprint": base_fingerprint,
        "adapter_fingerprint": adapter_fingerprint,
        "adapter": str(adapter_path if sources.is_remote(str(adapter_path)) else pathlib.Path(adapter_path).resolve()),
        "ids": json.dumps(ids, ensure_ascii=False),
    }
    tensors = {name: np.ascontiguousarray(x) for name, x in memory.contents.items()}
    tensors["lengths"] = np.asarray(memory.segment_lengths, np.int32)
    with files.replacing_file(path) as tmp:
        safetensors.numpy.save_file(tensors, tmp, metadata)


def read_metadata(path):
    """A memory file's metadata. UserError where it is not one, or not all is there, or k is no number or ids no list."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"--memory {path}: no such file; `icae compress` writes memory files")

    def read(path):
        with safetensors.safe_open(path, framework="numpy") as f:
            return f.metadata() or {}

    metadata = files.read_safetensors(path, read, "memory")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise UserError(f"--memory {path}: format_version {metadata.get('format_version')}; this version reads {FORMAT_VERSION}")
    missing = [name for name in _METADATA if name not in metadata]
    if missing:
        raise UserError(f"--memory {path}: {', '.join(missing)} missing in its metadata; {_AGAIN}")
    if not re.fullmatch("[1-9][0-9]*", metadata["k"], re.ASCII):
        raise UserError(f"--memory {path}: k is {metadata['k']!r} in its metadata; {_AGAIN}")
    read_ids(path, metadata)
    return metadata


def read_ids(path, metadata):
    """The ids that a memory file's metadata lists. UserError where they are no list."""
    try:
        ids = json.loads(metadata["ids"])
    except (ValueError, RecursionError):
        ids = None
    if not isinstance(ids, list):
        raise UserError(f"--memory {path}: ids in its metadata are {metadata['ids'][:50]!r}, which is not a list in JSON; {_AGAIN}")
    return ids


def _check_shapes(path, kind, tensors, k, texts):
    """UserError where tensors do not hold so many texts, or not k memory tokens for each segment that `lengths` has."""
    lengths = tensors["lengths"]
    wrong = ["lengths"] if lengths.ndim != 2 or len(lengths) != texts or not lengths.shape[1] or lengths.dtype.kind not in "iu" else []
    if not wrong:
        tokens, axis = k * lengths.shape[1], kind.TEXT_AXIS
        wrong = [n for n in kind.CONTENTS if tensors[n].ndim != kind.AXES or tensors[n].shape[axis : axis + 2] != (texts, tokens)]
        wrong = wrong or [n for n in kind.CONTENTS if tensors[n].shape != tensors[kind.CONTENTS[0]].shape]
    if wrong:
        shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in (*kind.CONTENTS, "lengths"))
        raise UserError(f"--memory {path}: {wrong[0]} does not hold {texts} texts of segments of k {k} ({shapes}); {_AGAIN}")


def load(path, compression, base_fingerprint, adapter_fingerprint):
    """(`Slots` or `KV`, ids) of a memory file. UserError where another base or adapter wrote it, or one that is read in another way."""
    metadata = read_metadata(path)
    for kind, have in (("base", base_fingerprint), ("adapter", adapter_fingerprint)):
        wrote = metadata[f"{kind}_fingerprint"]
        if wrote != have:
            raise UserError(f"--memory {path} was written with {kind} {wrote[:12]}, but {have[:12]} is loaded; give that {kind}")
    for field in ("method", "layout"):
        if metadata[field] != getattr(compression, field):
            have = getattr(compression, field)
            raise UserError(f"--memory {path} has {field} {metadata[field]}, the adapter {have}; give the adapter that it names")
    tensors = files.read_safetensors(path, safetensors.numpy.load_file, "memory")
    kind = methods.KINDS[compression.method]
    absent = [name for name in (*kind.CONTENTS, "lengths") if name not in tensors]
    if absent:
        raise UserError(f"--memory {path}: tensors {', '.join(absent)} missing; {_AGAIN}")
    ids = read_ids(path, metadata)
    _check_shapes(path, kind, tensors, int(metadata["k"]), len(ids))
    memory = memories.place(kind, {name: tensors[name] for name in kind.CONTENTS}, tensors["lengths"], compression)
    return jax.device_get(memory), ids
