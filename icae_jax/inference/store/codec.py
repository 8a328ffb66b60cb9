"""Numbers of memories as a store keeps them: float32, bfloat16, or int8 with scales.

In int8 the last axis (a head, or a slot) holds its codes and then the four bytes of its scale, a
little-endian float32: `[..., H + 4]` of uint8. A number is code x scale, with codes from -127 to
127, so its error is at most half a scale: 1/254 of the largest number beside it.
"""

from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from icae_jax.compression import memory as memories
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Prefix
from icae_jax.compression.memory import Memory

_SCALE = np.dtype("<f4")


def encode(x: Float[np.ndarray, "..."], dtype: str) -> np.ndarray:
    """Numbers in a store's dtype, see `info.DTYPES`."""
    if dtype == "bfloat16":
        return np.ascontiguousarray(x.astype(ml_dtypes.bfloat16))
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "float32":
        return x
    scales = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(x / np.where(scales > 0, scales, 1)).astype(np.int8)
    scales = np.ascontiguousarray(scales, _SCALE)
    return np.concatenate([codes.view(np.uint8), scales.view(np.uint8)], -1)


def decode(
    data: UInt8[np.ndarray, " bytes"], shape: tuple[int, ...], dtype: str
) -> Float[np.ndarray, "..."]:
    """Numbers of a shape from the bytes of what `encode` gave; those of int8 in float32."""
    rows = stored(data, shape, dtype)
    if dtype != "int8":
        return rows
    scales = np.ascontiguousarray(rows[..., -4:]).view(_SCALE)
    return rows[..., :-4].view(np.int8) * scales


def stored(data: UInt8[np.ndarray, " bytes"], shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """What `encode` gave of numbers of a shape, from its bytes."""
    if dtype == "int8":
        return data.reshape(*shape[:-1], shape[-1] + 4)
    return data.view("<f4" if dtype == "float32" else ml_dtypes.bfloat16).reshape(shape)


def memory_numbers(memory: Memory) -> Float[np.ndarray, "..."]:
    """The numbers of one text's memory, without padding, as `Info.memory_shape` says."""
    real, axis = np.asarray(memory.mask)[0], memory.TEXT_AXIS
    fields = [
        np.take(np.asarray(x), 0, axis).compress(real, axis) for x in memory.contents.values()
    ]
    return np.stack(fields) if len(fields) > 1 else fields[0]


def segment_lengths(memory: Memory) -> list[int]:
    """Context tokens of each segment of one text, without those that it lacks."""
    return [int(n) for n in np.asarray(memory.segment_lengths)[0] if n > 0]


def memory_of_numbers(
    numbers: Float[np.ndarray, "..."],
    lengths: list[int],
    kind: type[Memory],
    config: CompressionConfig,
) -> Memory:
    """One text's memory from what `memory_numbers` and `segment_lengths` gave."""
    fields = numbers if len(kind.CONTENTS) > 1 else [numbers]
    contents: dict[str, Any] = {
        name: np.expand_dims(x, kind.TEXT_AXIS)
        for name, x in zip(kind.CONTENTS, fields, strict=True)
    }
    return jax.device_get(memories.place(kind, contents, np.asarray([lengths], np.int32), config))


def places(k: int, lengths: list[int], config: CompressionConfig) -> tuple[np.ndarray, int]:
    """Where the decoder reads the tokens of one text's memory, and the position behind them."""
    positions, end = config.position_layout.decoder_positions(
        k, np.asarray([lengths], np.int32), config.segment_tokens
    )
    return np.asarray(positions)[0], int(np.asarray(end)[0])


def prefix_numbers(prefix: Prefix) -> Float[np.ndarray, "2 L P K H"]:
    """The k and v of one text's prefix, without padding."""
    real = np.asarray(prefix.mask)[0]
    return np.stack([np.asarray(x)[:, 0].compress(real, 1) for x in (prefix.k, prefix.v)])


def prefix_positions(memory: Memory, head: int) -> np.ndarray:
    """Positions of the entries of one text's prefix: `head` ids, then its memory."""
    real = np.asarray(memory.mask)[0]
    return np.concatenate([np.arange(head), head + np.asarray(memory.positions)[0][real]])


def prefix_of_numbers(
    numbers: Float[np.ndarray, "2 L P K H"], positions: np.ndarray, end: int
) -> Prefix:
    """One text's prefix from what `prefix_numbers` gave; end: the position behind it."""
    k, v = numbers[:, :, None]
    count = len(positions)
    return Prefix(
        k, v, np.ones((1, count), bool), positions[None].astype(np.int32), np.asarray([end])
    )
