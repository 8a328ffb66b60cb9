"""A PEFT folder of an adapter, for use without this package: LoRA, memory table, README.

adapter_config.json, adapter_model.safetensors    LoRA, at the top, as PEFT reads it
memory.safetensors                                memory_token_embed.weight [k + 3, D]
icae.json                                         as in an adapter folder of this package
README.md                                         twenty lines of code that compress a text
                                                  with peft and transformers
"""

import dataclasses
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from icae_jax import files
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.method import PEFT
from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import lora_tensors
from icae_jax.interop.templates import fill_in
from icae_jax.models.families.architectures import input_multiplier
from icae_jax.models.families.tensor_names import FUSED
from icae_jax.models.llama import ModelConfig

DTYPES = ("float32", "bfloat16", "float16")
README = pathlib.Path(__file__).with_name("peft_readme.md")


@dataclasses.dataclass(frozen=True)
class _Kept:
    """The parts of README.md that depend on what is kept of the encoder's pass."""

    keep: str
    result: str
    memory: str


_KEPT = {  # by `Method.keeps`
    "hidden": _Kept(
        "        parts.append(out.last_hidden_state[0, -@K@:])",
        "torch.cat(parts)",
        "`compress(text)` is the memory `[M, D]`: embeddings for the decoder to read in the text's "
        "place.",
    ),
    "kv": _Kept(
        "        layers = out.past_key_values.layers\n"
        "        kv = ([getattr(x, name)[0, :, -@K@:] for x in layers] for name in "
        '("keys", "values"))\n'
        "        parts.append([torch.stack(x) for x in kv])",
        "[torch.cat(x, 2) for x in zip(*parts)]",
        "`compress(text)` is the memory, K and V `[L, heads, M, H]` for the decoder's cache, K "
        "rotated to where the encoder wrote it (icae_jax keeps K before rotation).",
    ),
}
_BOS = """    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        ids = [tokenizer.bos_token_id, *ids]
"""
_PAD = "        piece = piece + [tokenizer.eos_token_id] * (@N@ - len(piece))\n"


def save(
    folder: str | os.PathLike,
    adapter: adapters.Adapter,
    base_config: ModelConfig,
    dtype: str = "float32",
) -> None:
    """Writes an adapter as a PEFT folder, new or empty.

    dtype: of LoRA and memory table. UserError if PEFT and transformers would compute another
    memory, see `readme`.
    """
    files.check_new_folder(folder)
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype}; choose {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    text = readme(adapter, base_config)

    def cast(tensors):
        return {
            name: np.ascontiguousarray(np.asarray(x).astype(jnp.dtype(dtype)))
            for name, x in tensors.items()
        }

    lora = cast(lora_tensors.lora_to_hub(adapter.trained["lora"]))
    table = cast({adapters.MEMORY_TABLE: adapter.trained["memory_table"]})
    with files.replacing_folder(folder) as tmp:
        safetensors.numpy.save_file(lora, tmp / adapters.LORA_TENSORS, {"format": "pt"})
        files.write_json(tmp / adapters.LORA_CONFIG, adapters.peft_json(adapter))
        safetensors.numpy.save_file(table, tmp / "memory.safetensors", {"format": "pt"})
        files.write_json(tmp / adapters.INFO, adapters.icae_json(adapter))
        (tmp / "README.md").write_text(text, encoding="utf-8")


def _check_windows(compression: CompressionConfig, windows: tuple[int, ...]) -> None:
    """Raises UserError if transformers would place a window elsewhere than the layout does."""
    segment = compression.segment_tokens + compression.k
    spread = compression.position_layout.spread_encoder
    if spread and any(0 < window < segment for window in windows):
        raise UserError(
            f"compression.layout is {compression.layout}, whose memory tokens sit among the text's "
            f"positions, and the base attends to windows of {min(w for w in windows if w)}, which "
            "transformers counts by the order of tokens; train with rate and k such that a segment "
            f"and its memory ({segment} tokens) fit in a window"
        )


def _check_base(config: ModelConfig) -> None:
    """Raises UserError if PEFT cannot adapt the base's modules as ours are adapted."""
    if config.fused:
        parts = ", ".join(f"{whole} ({', '.join(parts)})" for whole, parts in FUSED.items())
        raise UserError(
            f"the base computes projections in one module each in transformers: {parts}; PEFT "
            "would adapt them as one, and the adapter has its own for each part; use --format "
            "native"
        )
    if input_multiplier(config) != 1:
        raise UserError(
            f"the base multiplies input embeddings by {config.embedding_multiplier:g} in "
            "transformers, and memory tokens are not multiplied; use --format native"
        )


def readme(adapter: adapters.Adapter, base_config: ModelConfig, folder: str = ".") -> str:
    """README.md of an adapter, with code for its method, layout and sizes.

    folder: where PEFT's two files lie. UserError if transformers would compute another memory.
    """
    adapters.refuse_decoder_lora(adapter, "a PEFT folder")
    compression = adapter.compression
    compression.spec.check_export(PEFT)
    _check_base(base_config)
    layout, k, N = compression.position_layout, compression.k, compression.segment_tokens
    _check_windows(compression, base_config.windows)
    text, after = "len(piece)", "len(piece) + j"
    if layout.spread_encoder:
        text, after = "1, len(piece) + 1", f"1 + len(piece) * (2 * j + 1) // {2 * k}"
    kept, stated = _KEPT[compression.spec.keeps], adapters.peft_json(adapter)
    sizes = {"K": str(k), "N": str(N)}
    values = sizes | {
        "METHOD": compression.spec.title,
        "LORA": "" if folder == "." else f"{folder}/",
        "FOLDER": folder,
        "BASE": stated["base_model_name_or_path"],
        "REVISION": f', revision="{stated["revision"]}"' if "revision" in stated else "",
        "BOS": _BOS if compression.bos_before_text else "",
        "PAD": fill_in(_PAD, sizes) if layout.fixed_length else "",
        "TEXT": text,
        "AFTER": after,
        "KEEP": fill_in(kept.keep, sizes),
        "RESULT": kept.result,
        "MEMORY": kept.memory,
        "LAYOUT": compression.layout,
    }
    return fill_in(README.read_text(encoding="utf-8"), values)
