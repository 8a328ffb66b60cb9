"""Memory files: compressed texts on disk, with all that is needed to read them back, or to refuse.

A safetensors file with `slots [B, M, D]` (ICAE) or `k` and `v`, each `[L, B, M, K, H]`, k before RoPE (500xCompressor), and
`lengths [B, S]` (context tokens of each segment, 0 where a text has fewer), and as metadata: format_version, icae_jax_version, method,
layout, k, base_fingerprint, adapter_fingerprint, adapter (its folder), ids (JSON).
"""

import json
import os
import pathlib

import jax
import numpy as np
import safetensors
import safetensors.numpy

import icae_jax
from icae_jax.compression import memory as memories
from icae_jax.compression import methods
from icae_jax.errors import UserError
from icae_jax.interop import files

FORMAT_VERSION = "1"


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
        "adapter": str(pathlib.Path(adapter_path).resolve()),
        "ids": json.dumps(ids, ensure_ascii=False),
    }
    tensors = {name: np.ascontiguousarray(x) for name, x in memory.contents.items()}
    tensors["lengths"] = np.asarray(memory.segment_lengths, np.int32)
    with files.replacing_file(path) as tmp:
        safetensors.numpy.save_file(tensors, tmp, metadata)


def read_metadata(path):
    """A memory file's metadata. UserError where it is not one."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"--memory {path}: no such file; `icae compress` writes memory files")

    def read(path):
        with safetensors.safe_open(path, framework="numpy") as f:
            return f.metadata() or {}

    metadata = files.read_safetensors(path, read, "memory")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise UserError(f"--memory {path}: format_version {metadata.get('format_version')}; this version reads {FORMAT_VERSION}")
    return metadata


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
        raise UserError(f"--memory {path}: tensors {', '.join(absent)} missing; compress the texts again")
    memory = memories.place(kind, {name: tensors[name] for name in kind.CONTENTS}, tensors["lengths"], compression)
    return jax.device_get(memory), json.loads(metadata["ids"])
