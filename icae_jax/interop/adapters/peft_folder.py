"""A PEFT folder of an adapter, for use without this package: LoRA, memory table, README.

adapter_config.json, adapter_model.safetensors    LoRA, at the top, as PEFT reads it
memory.safetensors                                memory_token_embed.weight, and what else the
                                                  method trains
icae.json                                         as in an adapter folder of this package
decoder/                                          the decoder's LoRA, in adapters that have one
README.md                                         some twenty lines of code that compress a text
                                                  with peft and transformers
"""

import os
import pathlib

import jax.numpy as jnp
import safetensors.numpy

from icae_jax import files
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.method import PEFT
from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import info
from icae_jax.interop.templates import fill_in
from icae_jax.models.families.architectures import input_multiplier
from icae_jax.models.families.tensor_names import FUSED
from icae_jax.models.llama import ModelConfig

DTYPES = ("float32", "bfloat16", "float16")
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's --max-lora-rank
README = pathlib.Path(__file__).with_name("peft_readme.md")

# The parts of README.md that depend on the method: by what it does with memory tokens,
_APPENDED = "        x, kept = torch.cat([x, table[:k]]), slice(-k, None)\n"
_ANCHORS = """        kept = [n * (2 * j + 1) // (2 * k) for j in range(k)]
        for i in set(kept):
            x[i] += table[min(kept.index(i), len(table) - 1)]
"""
_MEANS = """        ends = [(j * n // k, max((j + 1) * n // k, j * n // k + 1)) for j in range(k)]
        means = torch.stack([out.last_hidden_state[0, i:j].mean(0) for i, j in ends])
        parts.append(means@MAPS@)
"""
_KEPT = {  # by `Method.keeps`,
    "hidden": "        parts.append(out.last_hidden_state[0, kept])\n",
    "kv": """        layers = out.past_key_values.layers
        kv = ([getattr(x, name)[0][:, kept] for x in layers] for name in ("keys", "values"))
        parts.append([torch.stack(x) for x in kv])
""",
}
_RESULT = {"hidden": "torch.cat(parts)", "kv": "[torch.cat(x, 2) for x in zip(*parts)]"}
_MEMORY = {
    "hidden": "`compress(text)` is the memory `[M, D]`: embeddings for the decoder to read in the "
    "text's place.",
    "kv": "`compress(text)` is the memory, K and V `[L, heads, M, H]` for the decoder's cache, K "
    "rotated to where the encoder wrote it (icae_jax keeps K before rotation).",
}
_MASKS = {  # and by what a token sees.
    "causal": """        # Without a mask, transformers takes positions that skip for several texts.
        mask = torch.ones(1, len(at))
""",
    "slots": """        sees = torch.ones(len(at), len(at)).tril()
        memory = torch.arange(len(at))[kept]
        sees[memory[:, None], memory] = 1
        mask = sees.log()[None, None]  # 0 and -inf
""",
    "all": "        mask = torch.zeros(1, 1, len(at), len(at))  # every token sees all others\n",
}
_BOS = """    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        ids = [tokenizer.bos_token_id, *ids]
"""
_PAD = "        piece = piece + [tokenizer.eos_token_id] * (@N@ - len(piece))\n"
_CUT = "encoder.layers, encoder.norm = encoder.layers[:@LAYERS@], torch.nn.Identity()\n"
_PLAIN_DECODER = "The decoder is the base without the adapter, loaded anew."
_LORA_DECODER = """The decoder reads the memory, and all behind it, with the LoRA in `decoder/`:

```python
decoder = transformers.AutoModelForCausalLM.from_pretrained(base@REVISION@, trust_remote_code=False)
decoder = peft.PeftModel.from_pretrained(decoder, "decoder", adapter_name="decoder").eval()
```

A server needs it too, such as vLLM with
`@SERVED@`, which requests
then name as their model."""


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

    tensors = {n: x.astype(jnp.dtype(dtype)) for n, x in adapters.memory_tensors(adapter).items()}
    with files.replacing_folder(folder) as tmp:
        adapters.save_lora(tmp, adapter, dtype=jnp.dtype(dtype))
        if adapter.has_decoder_lora:
            adapters.save_lora(tmp / adapters.DECODER, adapter, adapters.DECODER, jnp.dtype(dtype))
        safetensors.numpy.save_file(tensors, tmp / adapters.MEMORY_TENSORS, {"format": "pt"})
        files.write_json(tmp / info.INFO, info.icae_json(adapter))
        (tmp / "README.md").write_text(text, encoding="utf-8")


def vllm_flags(adapter: adapters.Adapter, folder: str, name: str = "") -> str:
    """Flags with which vLLM serves the decoder's LoRA in a folder, by default under its name."""
    rank = next((r for r in SERVED_RANKS if r >= adapter.lora.rank), adapter.lora.rank)
    return f"--enable-lora --max-lora-rank {rank} --lora-modules {name or folder}=./{folder}"


def check_modules(config: ModelConfig) -> None:
    """UserError if PEFT cannot adapt the base's modules as ours are adapted."""
    if config.fused:
        parts = ", ".join(f"{whole} ({', '.join(parts)})" for whole, parts in FUSED.items())
        raise UserError(
            f"the base computes projections in one module each in transformers: {parts}; PEFT "
            "would adapt them as one, and the adapter has its own for each part; use --format "
            "native"
        )


def _mask(compression: CompressionConfig) -> str:
    """The mask by its effect: where no token is a memory token, "slots" is causal."""
    is_causal = compression.encoder_mask == "slots" and compression.spec.pools
    return "causal" if is_causal else compression.encoder_mask


def _check_windows(compression: CompressionConfig, windows: tuple[int, ...]) -> None:
    """Raises UserError if windows of the base would cut off other tokens in transformers."""
    spec, narrow = compression.spec, min((w for w in windows if w), default=0)
    appended = compression.k if spec.appends_memory_tokens else 0
    segment, mask = compression.segment_tokens + appended, _mask(compression)
    why = ""
    if mask != "causal":
        why = f"compression.encoder_mask is {mask}, which takes the place of windows"
    elif compression.position_layout.spread_encoder and appended:
        why = (
            f"compression.layout is {compression.layout}, whose memory tokens sit among the text's "
            "positions, and windows are counted by the order of tokens"
        )
    needed = segment if why else 0
    if spec.keeps == "kv":
        held = appended or segment
        needed = max(needed, held + 1)
        why = why or f"the last {held} keys and values of a segment make the memory"
    if needed > narrow > 0:
        raise UserError(
            f"{why} in transformers, and the base attends to windows of {narrow}; train with rate "
            f"and k such that a segment and its memory ({segment} tokens) fit in a window of "
            f"{needed}, or use --format native"
        )


def check(adapter: adapters.Adapter, base_config: ModelConfig) -> None:
    """UserError if an adapter cannot be a PEFT folder: transformers would not write its memory."""
    compression = adapter.compression
    compression.spec.check_export(PEFT)
    check_modules(base_config)
    if compression.vectors and input_multiplier(base_config) != 1:
        raise UserError(
            f"the base multiplies input embeddings by {base_config.embedding_multiplier:g} in "
            "transformers, and memory tokens are not multiplied; use --format native"
        )
    _check_windows(compression, compression.encoder_config(base_config).windows)


def readme(adapter: adapters.Adapter, base_config: ModelConfig, folder: str = ".") -> str:
    """README.md of an adapter, with code for its method, mask, layout and sizes.

    folder: where PEFT's two files lie. UserError if transformers would compute another memory.
    """
    check(adapter, base_config)
    compression = adapter.compression
    spec, layout, layers = compression.spec, compression.position_layout, compression.encoder_layers
    text, after = "1, n + 1" if layout.spread_encoder else "n", ""
    if spec.appends_memory_tokens:
        after = ", *(n + j for j in range(k))"
        if layout.spread_encoder:
            after = ", *(1 + n * (2 * j + 1) // (2 * k) for j in range(k))"
    stated = adapters.peft_json(adapter)
    names = spec.tensors(base_config, compression) if spec.tensors else ()
    values = {
        "K": str(compression.k),
        "N": str(compression.segment_tokens),
        "LAYERS": str(layers),
        "SERVED": vllm_flags(adapter, adapters.DECODER),
        "REVISION": f', revision="{stated["revision"]}"' if "revision" in stated else "",
        "MAPS": "".join(f' @ trained["{name}"]' for name in names),
    }
    inserted = _APPENDED if spec.appends_memory_tokens else _ANCHORS if spec.anchors else ""
    values |= {
        "METHOD": spec.title,
        "LORA": "" if folder == "." else f"{folder}/",
        "FOLDER": folder,
        "BASE": stated["base_model_name_or_path"],
        "CHOICES": ", ".join(map(str, compression.choices)),
        "CUT": fill_in(_CUT, values) if layers else "",
        "BOS": _BOS if compression.bos_before_text else "",
        "PAD": fill_in(_PAD, values) if layout.fixed_length else "",
        "INPUT": inserted,
        "TEXT": text,
        "AFTER": after,
        "MASK": _MASKS[_mask(compression)],
        "KEEP": fill_in(_MEANS, values) if spec.pools else _KEPT[spec.keeps],
        "RESULT": _RESULT[spec.keeps],
        "MEMORY": _MEMORY[spec.keeps],
        "DECODER": fill_in(_LORA_DECODER, values) if adapter.has_decoder_lora else _PLAIN_DECODER,
        "LAYOUT": f"{compression.layout}, encoder mask {compression.encoder_mask}",
    }
    if compression.any_k:
        values["CHOICES"] = f"any number up to {compression.segment_tokens}"
    return fill_in(README.read_text(encoding="utf-8"), values)
