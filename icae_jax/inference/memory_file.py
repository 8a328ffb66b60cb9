"""Memory files: compressed texts on disk, with all that is needed to read or to refuse them.

A safetensors file with `slots [B, M, D]` or `k` and `v`, each `[L, B, M, K, H]`, k before RoPE, and
`lengths [B, S]` (context tokens of each segment, 0 where a text has fewer). Metadata:
format_version, icae_jax_version, method, layout, k, base_fingerprint, adapter_fingerprint, adapter
(its folder, hub id with the commit, or URL), ids (JSON); and, not in files of earlier versions,
base_identity (JSON, `Base.identity`), lora_scale, segment_tokens; where they are not as in earlier
versions, encoder_mask and encoder_layers; where the base was quantised, base_quantize.
"""

import collections
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

import icae_jax
from icae_jax import errors, files
from icae_jax.compression import memory as memories
from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError
from icae_jax.inference import origin as origins
from icae_jax.inference.origin import REMEDY, Origin
from icae_jax.interop.export import hf_cache
from icae_jax.interop.hub.text import check_encodable

FORMAT_VERSION = "1"
_METADATA = ("method", "layout", "k", "base_fingerprint", "adapter_fingerprint", "adapter", "ids")

TextId = str | int | float


# --- Writing ---


def check_output(path: str | os.PathLike) -> None:
    """Raises UserError if a memory file could not be written, before any work is done."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; give a file name such as memory.safetensors")
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output {path}: folder {parent} is absent or cannot be written")


def check_finite(memory: Memory, name_of: Callable[[int], str]) -> None:
    """Raises UserError if a memory holds NaN or infinity. name_of: names the text of a row."""
    for contents in memory.contents.values():
        texts = np.moveaxis(np.asarray(contents), memory.TEXT_AXIS, 0)
        finite = np.isfinite(texts.astype(np.float32)).reshape(len(texts), -1).all(1)
        if not finite.all():
            raise UserError(
                f"{name_of(int(finite.argmin()))} is not finite: the base or the adapter is "
                "damaged, or overflows in its dtype; load them in float32, or download them again"
            )


def _check_ids(ids: list, count: int) -> None:
    """Raises UserError unless there is one id per text, distinct as `--id` spells them."""
    if len(ids) != count:
        raise UserError(f"{len(ids)} ids for {count} memories; give one id per text")
    for text_id in ids:
        if not _is_id(text_id):
            raise UserError(
                f"the id {errors.shown(text_id)} is neither a text nor a number; give each text "
                "one that is"
            )
        check_encodable(str(text_id), f"the id {text_id!r}")
    counts = collections.Counter(map(str, ids))
    repeated = next((text_id for text_id in ids if counts[str(text_id)] > 1), None)
    if repeated is not None:
        raise UserError(f"two memories have the id {repeated!r}; give each text an id of its own")


def save(
    path: str | os.PathLike,
    memory: Memory,
    ids: Sequence[Any],
    origin: Origin,
    others: Mapping[str, str] | None = None,
) -> None:
    """Writes a memory file; an existing one is replaced only when the new one is complete.

    ids: of the texts, distinct texts or numbers. others: more metadata. UserError if ids are not,
    or if the memory is not finite.
    """
    ids = list(ids)
    _check_ids(ids, len(memory))
    check_finite(memory, lambda i: f"--output {path}: the memory of text {ids[i]!r}")
    metadata = {
        **(others or {}),
        "format_version": FORMAT_VERSION,
        "icae_jax_version": icae_jax.__version__,
        "k": str(memory.tokens_per_segment),
        **origins.metadata(origin),
        "ids": json.dumps(ids, ensure_ascii=False),
    }
    tensors = {name: np.ascontiguousarray(x) for name, x in memory.contents.items()}
    tensors["lengths"] = np.asarray(memory.segment_lengths, np.int32)
    with files.replacing_file(path) as tmp:
        safetensors.numpy.save_file(tensors, tmp, metadata)


# --- Reading ---


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a memory file; UserError if it is not one, or is incomplete or damaged."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"--memory {path}: no such file; `icae compress` writes memory files")

    def read(path):
        with safetensors.safe_open(path, framework="numpy") as f:
            return f.metadata() or {}

    metadata = files.read_safetensors(path, read, "memory")
    if hf_cache.is_cache(metadata):
        raise UserError(
            f"--memory {path} is an export for transformers, which use_cache.py beside it reads; "
            "give the memory file that it was made of"
        )
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"--memory {path}: format_version {version}; this version reads {FORMAT_VERSION}"
        )
    missing = [name for name in _METADATA if name not in metadata]
    if missing:
        raise UserError(f"--memory {path}: {', '.join(missing)} missing in its metadata; {REMEDY}")
    if not re.fullmatch("[1-9][0-9]*", metadata["k"], re.ASCII):
        raise UserError(f"--memory {path}: k is {metadata['k']!r} in its metadata; {REMEDY}")
    read_ids(path, metadata)
    return metadata


def _is_id(value: Any) -> bool:
    return files.is_kind(value, str) or files.is_kind(value, float)


def read_ids(path: str | os.PathLike, metadata: dict[str, str]) -> list[TextId]:
    """The ids in a memory file's metadata; UserError if they are not a list of texts or numbers."""
    try:
        ids = json.loads(metadata["ids"])
    except (ValueError, RecursionError):
        ids = None
    if not isinstance(ids, list) or not all(map(_is_id, ids)):
        raise UserError(
            f"--memory {path}: ids in its metadata are {metadata['ids'][:40]!r}, which is not a "
            f"list of texts or numbers; {REMEDY}"
        )
    return ids


def rows_of(ids: Sequence[TextId], wanted: Iterable[str] | None) -> list[int]:
    """The rows of the texts that `--id` names, in the memory's order; all rows if it names none.

    wanted: as a command line has them, so numbers are texts. UserError on an unknown id.
    """
    wanted = list(wanted or ())
    names = [str(text_id) for text_id in ids]
    for name in wanted:
        if name not in names:
            shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            raise UserError(f"--id {name}: the memory holds {shown}")
    return [row for row, name in enumerate(names) if not wanted or name in wanted]


def _check_tensors(
    path: str | os.PathLike,
    kind: type[Memory],
    tensors: dict[str, np.ndarray],
    k: int,
    texts: int,
    segment_tokens: int,
) -> None:
    """Raises UserError if tensors are not the memory of `texts` texts, k tokens per segment.

    segment_tokens: most text tokens of a segment.
    """
    wrong = _wrong_tensor(kind, tensors, k, texts)
    if wrong:
        shapes = ", ".join(
            f"{name} {list(tensors[name].shape)}" for name in (*kind.CONTENTS, "lengths")
        )
        raise UserError(
            f"--memory {path}: {wrong} does not hold {texts} texts of segments of k {k} "
            f"({shapes}); {REMEDY}"
        )
    lengths = tensors["lengths"]
    absent = lengths == 0  # missing segments of a shorter text come last
    if (
        (lengths < 0).any()
        or (lengths > segment_tokens).any()
        or absent[:, 0].any()
        or (absent[:, :-1] & ~absent[:, 1:]).any()
    ):
        raise UserError(
            f"--memory {path}: lengths are not those of segments of 1 to {segment_tokens} tokens; "
            f"{REMEDY}"
        )


def _wrong_tensor(
    kind: type[Memory], tensors: dict[str, np.ndarray], k: int, texts: int
) -> str | None:
    """The first tensor whose shape or dtype is not as expected."""
    lengths = tensors["lengths"]
    if lengths.ndim != 2 or len(lengths) != texts or not lengths.shape[1]:
        return "lengths"
    if lengths.dtype.kind not in "iu":
        return "lengths"
    axis, shape = kind.TEXT_AXIS, (texts, k * lengths.shape[1])
    for name in kind.CONTENTS:
        x = tensors[name]
        if x.ndim != kind.AXES or x.shape[axis : axis + 2] != shape:
            return name
    for name in kind.CONTENTS:
        same_shape = tensors[name].shape == tensors[kind.CONTENTS[0]].shape
        if not same_shape or not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            return name
    return None


def load(path: str | os.PathLike, origin: Origin) -> tuple[Memory, list[TextId]]:
    """The memory and the ids of a memory file.

    origin: of the compressor that is to read it. UserError if another base, tokenizer or adapter
    wrote it, if the adapter is now read otherwise, or if a number in it is not finite.
    """
    metadata = read_metadata(path)
    origins.check(f"--memory {path}", metadata, origin)
    tensors = files.read_safetensors(path, safetensors.numpy.load_file, "memory")
    kind = origin.compression.spec.memory
    absent = [name for name in (*kind.CONTENTS, "lengths") if name not in tensors]
    if absent:
        raise UserError(f"--memory {path}: tensors {', '.join(absent)} missing; {REMEDY}")
    ids = read_ids(path, metadata)
    segment_tokens = origin.compression.segment_tokens
    _check_tensors(path, kind, tensors, int(metadata["k"]), len(ids), segment_tokens)
    contents = {name: tensors[name] for name in kind.CONTENTS}
    memory = memories.place(kind, contents, tensors["lengths"], origin.compression)
    memory = jax.device_get(memory)
    check_finite(memory, lambda i: f"--memory {path}: the memory of text {ids[i]!r}")
    return memory, ids
