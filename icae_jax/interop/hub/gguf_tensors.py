"""The tensors of a GGUF file as the hub has them, dequantised a block of rows at a time.

A file stands in for an open safetensors file: `keys` and `get_slice`. What llama.cpp's converter
changed is undone: the names, the order of a Llama's rows of q and k (it stores the pairs that RoPE
rotates side by side), and the 1 that it adds to Gemma's norms.
"""

import functools
import re

import numpy as np
from jaxtyping import Float16, Float32, Int8

from icae_jax.errors import UserError
from icae_jax.interop.hub.gguf_file import GGUF, Tensor

FACTORS = "rope_freqs.weight"  # of llama3's RoPE; read with the configuration
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_GEMMAS_LAYER = _IN_LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)", re.ASCII)


def hub_name(name: str, architecture: str) -> str | None:
    """The hub's name of a tensor; None if the architecture has no tensor of this name."""
    if name in _WHOLE:
        return _WHOLE[name]
    match = _LAYER.fullmatch(name)
    names = _IN_GEMMAS_LAYER if architecture.startswith("gemma") else _IN_LAYER
    if match is None or match[2] not in names:
        return None
    return f"model.layers.{match[1]}.{names[match[2]]}.{match[3]}"


class Tensors:
    """The tensors of a GGUF file with the hub's names, as an open safetensors file has them."""

    def __init__(self, file: GGUF, architecture: str, heads: int, kv_heads: int):
        """UserError if the architecture does not have one of the tensors.

        Args:
            file: its header.
            architecture: by its name in GGUF, such as "llama".
            heads: query heads.
            kv_heads: key and value heads.
        """
        self._slices = {}
        for name, tensor in file.tensors.items():
            if name == FACTORS:
                continue
            named = hub_name(name, architecture)
            if named is None:
                raise UserError(
                    f"{tensor.path}: tensor {name} is not one of a model of architecture "
                    f"{architecture} as it is computed here"
                )
            permuted = 0
            if architecture == "llama" and (match := re.search(r"\.attn_([qk])\.", name)):
                permuted = heads if match[1] == "q" else kv_heads
            is_norm = architecture.startswith("gemma") and name.endswith("norm.weight")
            has_codes = tensor.kind == "Q8_0" and len(tensor.shape) == 2 and not is_norm
            kind = Q8Slice if has_codes else TensorSlice
            self._slices[named] = kind(tensor, permuted, -1.0 if is_norm else 0.0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def keys(self) -> list[str]:
        """The names of all tensors."""
        return list(self._slices)

    def get_slice(self, name: str) -> "TensorSlice":
        """The tensor of a name, not read yet."""
        return self._slices[name]


class TensorSlice:
    """A tensor that is read where it is indexed, by slices and in float32, as of safetensors."""

    def __init__(self, tensor: Tensor, permuted_heads: int = 0, shift: float = 0.0):
        """A tensor of the hub from one of a file.

        Args:
            tensor: of the file.
            permuted_heads: the heads within which rows are permuted; 0 if they are not.
            shift: is added to each number.
        """
        self._tensor, self._heads, self._shift = tensor, permuted_heads, shift

    def get_shape(self) -> tuple[int, ...]:
        """The shape that the hub's tensor has."""
        return self._tensor.shape

    def get_dtype(self) -> str:
        """By safetensors' names, of what is read; stored are blocks."""
        return "F32"

    @functools.cached_property
    def _stored(self):
        tensor = self._tensor
        shape = (*tensor.shape[:-1], tensor.row_bytes)
        return np.memmap(tensor.path, np.uint8, "r", tensor.start, shape)

    def _rows(self, rows):
        """What selects rows of the hub's tensor in the file."""
        count = self._tensor.shape[0]
        half = self._heads and count // self._heads // 2
        if not half or count != 2 * half * self._heads:  # other shapes are refused elsewhere
            return rows
        head, row = np.divmod(np.arange(count)[rows], 2 * half)
        return head * 2 * half + row % half * 2 + row // half

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Float32[np.ndarray, "..."]:
        import gguf

        *outer, last = (*(index if isinstance(index, tuple) else (index,)),)
        tensor, axes = self._tensor, len(self._tensor.shape)
        if len(outer) + 1 < axes:
            outer, last = [*outer, last, *[slice(None)] * (axes - len(outer) - 2)], slice(None)
        numbers, size = tensor.block
        start, stop, _ = last.indices(tensor.shape[-1])
        if axes == 1 and self._heads:  # a bias; its rows are its numbers, which are not in blocks
            outer, (start, stop), picked = [], (0, tensor.shape[-1]), self._rows(last)
        else:
            outer, picked = [self._rows(outer[0]), *outer[1:]] if outer else [], None
        first = start // numbers
        blocks = slice(first * size, -(-stop // numbers) * size)
        data = np.ascontiguousarray(self._stored[(*outer, blocks)])
        with np.errstate(all="ignore"):  # damaged scales are found by the weights' fingerprint
            values = gguf.dequantize(data, gguf.GGMLQuantizationType[tensor.kind])
            values = values.astype(np.float32, copy=False) + np.float32(self._shift)
        values = values[..., start - first * numbers : stop - first * numbers]
        return values if picked is None else values[picked]


class Q8Slice(TensorSlice):
    """A matrix in blocks of Q8_0, whose codes and scales can be read as they are."""

    def read_q8_0(
        self, rows: slice
    ) -> tuple[Int8[np.ndarray, "rows in"], Float16[np.ndarray, "rows blocks"]]:
        """(codes, scales) of rows; blocks are of 32 along a row, a number is its code times its
        block's scale.
        """
        data = np.ascontiguousarray(self._stored[self._rows(rows)])
        blocks = data.reshape(len(data), -1, self._tensor.block[1])
        codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(len(data), -1)
        return codes, np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]


def read_whole(tensor: Tensor) -> Float32[np.ndarray, "..."]:
    """A small tensor."""
    return TensorSlice(tensor)[(slice(None),) * len(tensor.shape)]
