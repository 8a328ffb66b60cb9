"""Memories as a filled cache for transformers' `generate`.

`generate` numbers the tokens behind a filled cache by its m real entries (those with attention
mask 1), whereas our decoder starts at a position of the layout's. Rotary attention only sees
differences of positions, so every key is rotated by m - start further positions; then an unpatched
`generate` is right for every layout.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Bool, Float, Int, Shaped

import icae_jax
from icae_jax import files
from icae_jax.compression.memory import Memory
from icae_jax.compression.method import HF_CACHE
from icae_jax.compression.trained import SPECIAL_ROWS
from icae_jax.errors import UserError
from icae_jax.interop.export.reader import OBJECTIVES, NamedMemory, Reader
from icae_jax.models import rope
from icae_jax.models.families.architectures import input_multiplier
from icae_jax.models.llama import ModelConfig

DTYPES = ("float32", "bfloat16")  # the default first
FORMAT_VERSION = 1
SCRIPT = pathlib.Path(__file__).parent / "scripts" / "use_cache.py"

_read = jax.jit(Memory.read, static_argnames="head")


def rotate_further(
    config: ModelConfig,
    k_LBPKH: Float[np.ndarray, "L B P K H"],
    offsets_B: Int[np.ndarray, " B"],
) -> Float[np.ndarray, "L B P K H"]:
    """Rotated keys, rotated by further whole positions, one offset per text; 0 changes no bit.

    Uses the plain cos and sin of the frequencies of each layer's RoPE. What else it does (YaRN
    scales them) was done to the keys before.
    """
    kinds = [rope.frequencies(config, kind) for kind in rope.kinds(config)]
    # Rounded to the precision that both sides use.
    frequencies = np.stack(kinds).astype(np.float32).astype(np.float64)[rope.layer_kinds(config)]
    angles = np.einsum("b,lh->lbh", np.asarray(offsets_B, np.float64), frequencies)
    cos, sin = (f(angles).astype(np.float32)[:, :, None, None] for f in (np.cos, np.sin))
    half = cos.shape[-1]
    k1, k2, others = np.split(np.asarray(k_LBPKH, np.float32), (half, 2 * half), axis=-1)
    rotated = np.concatenate([k1 * cos - k2 * sin, k2 * cos + k1 * sin, others], -1)
    rotated = rotated.astype(k_LBPKH.dtype)
    return np.where((np.asarray(offsets_B) == 0)[:, None, None, None], k_LBPKH, rotated)


class FilledCache(NamedTuple):
    """Head and memory of several texts.

    key is rotated such that the next token's position is the number of real entries, those where
    mask is true. room: how many tokens of prompt and answer fit behind the longest memory.
    """

    key: Float[np.ndarray, "L B P K H"]
    value: Float[np.ndarray, "L B P K H"]
    mask: Bool[np.ndarray, "B P"]
    room: int


def filled_cache(memory: Memory, reader: Reader, objective: str = "ask") -> FilledCache:
    """Runs the decoder, with its LoRA if it has one, over head and memory.

    objective: a key of `OBJECTIVES`. UserError if nothing fits behind the memory.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"--for is {objective}; choose from {', '.join(OBJECTIVES)}")
    compression = reader.adapter.compression
    reader.check_export(HF_CACHE)
    head = reader.head(objective)
    keys, values, masks, starts = [], [], [], []
    # One at a time, so that many texts take no more memory on the device than one.
    for row in range(len(memory)):
        prefix = jax.device_get(_read(memory[[row]], reader.decoder, head=head))
        layout = compression.position_layout
        start = np.asarray(layout.target_starts(OBJECTIVES[objective], prefix.end))
        keys.append(rotate_further(reader.base.config, prefix.k, prefix.mask.sum(1) - start))
        values.append(prefix.v)
        masks.append(prefix.mask)
        starts.append(start)
    mask = np.concatenate(masks)
    used = mask.any(0)
    key, value = (np.concatenate(x, 1)[:, :, used] for x in (keys, values))
    room = room_behind(reader, int(np.max(starts)), int(used.sum()))
    return FilledCache(key, value, mask[:, used], room)


def room_behind(reader: Reader, start: int, entries: int) -> int:
    """Tokens that fit behind a memory that ends at `start` and takes `entries` of the cache.

    transformers and vLLM count a window's positions by entries of the cache: right until one is cut
    off. UserError if nothing fits.
    """
    windows = [window for window in reader.base.config.windows if window]
    room = min([reader.positions - start, *[w - max(start, entries) for w in windows]])
    if room < 2:
        limit = f"has {reader.positions} positions"
        if windows:
            limit = f"attends to windows of {min(windows)}"
        raise UserError(
            f"the memory ends at position {start} and the base {limit}; nothing fits behind it, so "
            "export shorter texts"
        )
    return room


def save_cache(
    folder: str | os.PathLike,
    named: NamedMemory,
    reader: Reader,
    objective: str = "ask",
    dtype: str = DTYPES[0],
) -> None:
    """Writes memories of any kind as cache.safetensors, with use_cache.py, which reads it.

    folder: new or empty. objective: "ask" or "restore", which differ in head and positions.

    cache.safetensors holds `key` and `value` `[L, B, K, P, H]` (K after RoPE), `attention_mask
    [B, P]`, `special [3, D]` (embeddings of the negative ids in `before` and `after`). Its
    metadata, each value JSON: format_version, icae_jax_version, ids, objective, method, layout,
    before and after (ids around a prompt), stop (ids that end an answer), room (most tokens behind
    the memory), base, base_fingerprint, base_identity, base_quantize (if the base is quantised),
    adapter_fingerprint, decoder_lora (whether the base must be loaded with decoder_lora/, the PEFT
    folder beside), dtype.
    """
    files.check_new_folder(folder)
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype}; choose from {', '.join(DTYPES)}")
    cache = filled_cache(named.memory, reader, objective)
    # Some models multiply input embeddings, which these rows are to transformers.
    multiplier = input_multiplier(reader.base.config)
    special = np.asarray(reader.adapter.trained["memory_table"][-SPECIAL_ROWS:]) / multiplier
    tensors = {
        "key": stored(np.moveaxis(cache.key, 2, 3), dtype),
        "value": stored(np.moveaxis(cache.value, 2, 3), dtype),
        "attention_mask": stored(cache.mask, "int32"),
        "special": stored(special, dtype),
    }
    info = _info(named, reader, objective) | {"room": cache.room, "dtype": dtype}
    metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in info.items()}
    with files.replacing_folder(folder) as tmp:
        safetensors.numpy.save_file(tensors, tmp / "cache.safetensors", metadata)
        shutil.copyfile(SCRIPT, tmp / "use_cache.py")
        reader.save_decoder_lora(tmp)


def is_cache(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata of a file of tensors are those of a cache."""
    return {"objective", "room", "method", "ids"} <= set(metadata)


def stored(x: Shaped[np.ndarray, "..."], dtype: str) -> Shaped[np.ndarray, "..."]:
    """An array as it is written: of a dtype, and contiguous."""
    # safetensors writes the bytes of an array that is not contiguous in its own order.
    return np.ascontiguousarray(np.asarray(x).astype(jnp.dtype(dtype)))


def _info(named: NamedMemory, reader: Reader, objective: str) -> dict:
    template = reader.adapter.template
    asks = objective == "ask"
    return {
        "format_version": FORMAT_VERSION,
        "icae_jax_version": icae_jax.__version__,
        "ids": list(named.ids),
        "objective": objective,
        "method": reader.adapter.compression.method,
        "layout": reader.adapter.compression.layout,
        "before": list(template.before) if asks else [reader.framing.trigger],
        "after": list(template.after) if asks else [],
        "stop": reader.stop_ids(objective),
        "base": reader.base_path,
        "base_fingerprint": reader.base.fingerprint,
        "base_identity": reader.base.identity,
        "adapter_fingerprint": reader.adapter.fingerprint,
        "decoder_lora": reader.adapter.has_decoder_lora,
        **({"base_quantize": reader.base.quantize} if reader.base.quantize else {}),
    }
