"""Memory files: compressed texts on disk, with all that is needed to read them back, or to refuse.

A safetensors file with `slots [B, M, D]` (ICAE) or `k` and `v`, each `[L, B, M, K, H]`, k before RoPE (500xCompressor), and
`lengths [B, S]` (context tokens of each segment, 0 where a text has fewer), and as metadata: format_version, icae_jax_version, method,
layout, k, base_fingerprint, adapter_fingerprint, adapter (its folder, or hub id with the commit, or URL), ids (JSON); and, not in earlier
files, base_identity (JSON, `Base.identity`), lora_scale and segment_tokens.
"""

import collections
import json
import os
import pathlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

import icae_jax
from icae_jax import errors, files
from icae_jax.compression import memory as memories
from icae_jax.compression import methods
from icae_jax.errors import UserError
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations
from icae_jax.interop.hub.text import check_encodable

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


def check_finite(memory: memories.Memory, name_of: Callable[[int], str]) -> None:
    """UserError where a memory holds a number that is not finite: whoever reads it gets nothing but such numbers. name_of: names a text."""
    for contents in memory.contents.values():
        texts = np.moveaxis(np.asarray(contents), memory.TEXT_AXIS, 0)
        whole = np.isfinite(texts.astype(np.float32)).reshape(len(texts), -1).all(1)
        if not whole.all():
            raise UserError(
                f"{name_of(int(whole.argmin()))} is not finite: the base or the adapter is damaged, or overflows in its dtype; load them "
                "in float32, or download them again"
            )


def save(
    path,
    memory,
    compression,
    ids,
    base_fingerprint,
    adapter_fingerprint,
    adapter_path,
    base_identity=None,
    lora_scale=None,
):
    """Writes a memory file; one that is there is replaced only when the new one is complete."""
    if len(ids) != len(memory):
        raise UserError(f"{len(ids)} ids for {len(memory)} memories; give one id a text")
    ids = list(ids)
    for one in ids:
        if not _is_id(one):
            raise UserError(
                f"the id {errors.shown(one)} is neither a text nor a number; give each text one that is"
            )
        check_encodable(str(one), f"the id {one!r}")
    names = collections.Counter(map(str, ids))  # by which `--id` finds them
    repeated = next((one for one in ids if names[str(one)] > 1), None)
    if repeated is not None:
        raise UserError(f"two memories have the id {repeated!r}; give each text an id of its own")
    check_finite(memory, lambda i: f"--output {path}: the memory of text {ids[i]!r}")
    metadata = {
        "format_version": FORMAT_VERSION,
        "icae_jax_version": icae_jax.__version__,
        "method": compression.method,
        "layout": compression.layout,
        "k": str(memory.tokens_per_segment),
        "base_fingerprint": base_fingerprint,
        "adapter_fingerprint": adapter_fingerprint,
        **({"base_identity": json.dumps(base_identity)} if base_identity else {}),
        **({} if lora_scale is None else {"lora_scale": repr(lora_scale)}),
        "segment_tokens": str(compression.segment_tokens),
        "adapter": str(
            adapter_path
            if locations.is_remote(str(adapter_path))
            else pathlib.Path(adapter_path).resolve()
        ),
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
        raise UserError(
            f"--memory {path}: format_version {metadata.get('format_version')}; this version reads {FORMAT_VERSION}"
        )
    missing = [name for name in _METADATA if name not in metadata]
    if missing:
        raise UserError(f"--memory {path}: {', '.join(missing)} missing in its metadata; {_AGAIN}")
    if not re.fullmatch("[1-9][0-9]*", metadata["k"], re.ASCII):
        raise UserError(f"--memory {path}: k is {metadata['k']!r} in its metadata; {_AGAIN}")
    read_ids(path, metadata)
    return metadata


def _is_id(value):
    return files.is_kind(value, str) or files.is_kind(value, float)


def read_ids(path, metadata):
    """The ids that a memory file's metadata lists. UserError where they are no list of texts or numbers."""
    try:
        ids = json.loads(metadata["ids"])
    except (ValueError, RecursionError):
        ids = None
    if not isinstance(ids, list) or not all(map(_is_id, ids)):
        raise UserError(
            f"--memory {path}: ids in its metadata are {metadata['ids'][:40]!r}, which is not a list of texts or numbers; {_AGAIN}"
        )
    return ids


def rows_named(ids, wanted):
    """The rows of the texts that `--id` names, in the memory's order; all where it names none. UserError on an id that is not there.

    ids: of the memory's texts, texts or numbers. wanted: as a command line has them, as texts.
    """
    names = [str(one) for one in ids]
    for name in wanted or ():
        if name not in names:
            raise UserError(
                f"--id {name}: the memory holds {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
            )
    return [row for row, name in enumerate(names) if not wanted or name in wanted]


def _check_tensors(path, kind, tensors, k, texts, most):
    """UserError where tensors do not hold so many texts, or not k memory tokens for each segment that `lengths` has, each of up to `most`
    tokens of text.
    """
    lengths = tensors["lengths"]
    wrong = (
        ["lengths"]
        if lengths.ndim != 2
        or len(lengths) != texts
        or not lengths.shape[1]
        or lengths.dtype.kind not in "iu"
        else []
    )
    if not wrong:
        tokens, axis = k * lengths.shape[1], kind.TEXT_AXIS
        wrong = [
            n
            for n in kind.CONTENTS
            if tensors[n].ndim != kind.AXES or tensors[n].shape[axis : axis + 2] != (texts, tokens)
        ]
        wrong = wrong or [
            n for n in kind.CONTENTS if tensors[n].shape != tensors[kind.CONTENTS[0]].shape
        ]
        wrong = wrong or [
            n for n in kind.CONTENTS if not jnp.issubdtype(tensors[n].dtype, jnp.floating)
        ]
    if not wrong:
        absent = lengths == 0  # segments that a text has not stand behind those that it has
        if (
            (lengths < 0).any()
            or (lengths > most).any()
            or absent[:, 0].any()
            or (absent[:, :-1] & ~absent[:, 1:]).any()
        ):
            raise UserError(
                f"--memory {path}: lengths are not those of segments of 1 to {most} tokens; {_AGAIN}"
            )
    if wrong:
        shapes = ", ".join(
            f"{name} {list(tensors[name].shape)}" for name in (*kind.CONTENTS, "lengths")
        )
        raise UserError(
            f"--memory {path}: {wrong[0]} does not hold {texts} texts of segments of k {k} ({shapes}); {_AGAIN}"
        )


def _object(path, metadata, name):
    """An object of texts in a memory file's metadata; empty where an earlier version wrote none. UserError where it is something else."""
    try:
        value = json.loads(metadata.get(name, "{}"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise UserError(
            f"--memory {path}: {name} in its metadata is {metadata[name][:50]!r}, which is not an object of texts; {_AGAIN}"
        )
    return value


def load(
    path, compression, base_fingerprint, adapter_fingerprint, base_identity=None, lora_scale=None
):
    """(`Slots` or `KV`, ids) of a memory file. base_identity: `Base.identity`. lora_scale: the adapter's.

    UserError where another base, tokenizer or adapter wrote it, or one that is read in another way, or a number in it is not finite.
    """
    metadata = read_metadata(path)
    for kind, have in (("base", base_fingerprint), ("adapter", adapter_fingerprint)):
        wrote = metadata[f"{kind}_fingerprint"]
        if wrote != have:
            raise UserError(
                f"--memory {path} was written with {kind} {wrote[:12]}, but {have[:12]} is loaded; give that {kind}"
            )
    for field in ("method", "layout"):
        if metadata[field] != getattr(compression, field):
            have = getattr(compression, field)
            raise UserError(
                f"--memory {path} has {field} {metadata[field]}, the adapter {have}; give the adapter that it names"
            )
    bases.check_identity(
        f"--memory {path}", _object(path, metadata, "base_identity"), base_identity or {}
    )
    for field, have in (
        ("lora_scale", repr(lora_scale)),
        ("segment_tokens", str(compression.segment_tokens)),
    ):
        if (
            have != "None" and metadata.get(field, have) != have
        ):  # which earlier versions did not write
            raise UserError(
                f"--memory {path} has {field} {metadata[field]}, the adapter {have}; give the adapter as it was, or {_AGAIN}"
            )
    tensors = files.read_safetensors(path, safetensors.numpy.load_file, "memory")
    kind = methods.KINDS[compression.method]
    absent = [name for name in (*kind.CONTENTS, "lengths") if name not in tensors]
    if absent:
        raise UserError(f"--memory {path}: tensors {', '.join(absent)} missing; {_AGAIN}")
    ids = read_ids(path, metadata)
    _check_tensors(path, kind, tensors, int(metadata["k"]), len(ids), compression.segment_tokens)
    memory = memories.place(
        kind, {name: tensors[name] for name in kind.CONTENTS}, tensors["lengths"], compression
    )
    memory = jax.device_get(memory)
    check_finite(memory, lambda i: f"--memory {path}: the memory of text {ids[i]!r}")
    return memory, ids
