"""A plain PEFT folder of an adapter, for use without this package: LoRA, memory table, and a README with the code that compresses.

adapter_config.json, adapter_model.safetensors    LoRA, at the top, as PEFT reads it
memory.safetensors                                memory_token_embed.weight [k + 3, D]
icae.json                                         as in an adapter folder of this package
README.md                                         twenty lines that make our memory of a text with peft and transformers
"""

import types

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from icae_jax import files
from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.objectives import targets


def save(folder, adapter, base_config, dtype="float32"):
    """Writes an `Adapter` as a PEFT folder, new or empty. dtype: of LoRA and memory table, "float32", "bfloat16" or "float16".

    UserError where the base attends to windows that transformers would lay elsewhere than the adapter's layout does.
    """
    files.check_new_folder(folder)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {dtype}; choose float32, bfloat16 or float16")
    text = readme(adapter, base_config)

    def stored(tensors):
        return {
            name: np.ascontiguousarray(np.asarray(x).astype(jnp.dtype(dtype)))
            for name, x in tensors.items()
        }

    with files.replacing_folder(folder) as tmp:
        lora = adapters.lora_to_hub(adapter.trained["lora"])
        safetensors.numpy.save_file(
            stored(lora), tmp / "adapter_model.safetensors", {"format": "pt"}
        )
        files.write_json(tmp / "adapter_config.json", adapters.peft_config(adapter))
        table = {adapters.MEMORY_TABLE: adapter.trained["memory_table"]}
        safetensors.numpy.save_file(stored(table), tmp / "memory.safetensors", {"format": "pt"})
        files.write_json(tmp / "icae.json", adapters.icae_info(adapter))
        (tmp / "README.md").write_text(text, encoding="utf-8")


def readme(adapter, base_config, folder="."):
    """README.md: what an adapter's folder is, and code with this adapter's method, layout and sizes filled in.

    folder: where in it PEFT's two files lie. UserError where transformers would compute another memory than we do.
    """
    compression = adapter.compression
    layout, k, N = compression.position_layout, compression.k, compression.segment_tokens
    reach = N + k
    if layout.spread_encoder and any(0 < window < reach for window in base_config.windows):
        raise UserError(
            f"compression.layout is {compression.layout}, whose memory tokens sit among the text's positions, and the base attends to windows of "
            f"{min(w for w in base_config.windows if w)}, which transformers counts by the order of tokens; train with rate and k "
            f"such that a segment and its memory ({reach} tokens) fit in a window"
        )
    # Whether a tokenizer's own <s> stands before the text is the framing's rule; ids of a made-up tokenizer show it.
    framing = targets.make_framing(
        compression, types.SimpleNamespace(bos_token_id=0, eos_token_id=0), 0
    )
    bos = BOS if framing.start else ""
    pad = PAD.replace("@N@", str(N)) if layout.fixed_length else ""
    text = "1, len(piece) + 1" if layout.spread_encoder else "len(piece)"
    after = (
        f"1 + len(piece) * (2 * j + 1) // {2 * k}" if layout.spread_encoder else "len(piece) + j"
    )
    kv, stated = compression.spec.keeps == "kv", adapters.peft_config(adapter)
    values = {
        "@METHOD@": compression.spec.title,
        "@LORA@": "" if folder == "." else f"{folder}/",
        "@FOLDER@": folder,
        "@BASE@": stated["base_model_name_or_path"],
        "@REVISION@": f', revision="{stated["revision"]}"' if "revision" in stated else "",
        "@K@": str(k),
        "@N@": str(N),
        "@BOS@": bos,
        "@PAD@": pad,
        "@TEXT@": text,
        "@AFTER@": after,
        "@KEEP@": (KEEP_KV if kv else KEEP_SLOTS).replace("@K@", str(k)),
        "@RESULT@": RESULT_KV if kv else RESULT_SLOTS,
        "@MEMORY@": MEMORY_KV if kv else MEMORY_SLOTS,
        "@LAYOUT@": compression.layout,
    }
    text = README
    for name, value in values.items():
        text = text.replace(name, value)
    return text


README = """# @METHOD@ adapter in PEFT's format

Base: `@BASE@`. A text of up to @N@ tokens becomes @K@ memory tokens, a longer one @K@ for each of its near-equal segments.
`@LORA@adapter_config.json` and `@LORA@adapter_model.safetensors` are the encoder's LoRA; `memory.safetensors` holds the embeddings
of the memory tokens (the last three rows are [AE], [LM] and [FT]); `icae.json` says how icae_jax trained and reads it (layout @LAYOUT@).

With peft and transformers alone, run in this folder:

```python
import peft, safetensors.torch, torch, transformers

base = peft.PeftConfig.from_pretrained("@FOLDER@").base_model_name_or_path
tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(base@REVISION@)  # as tokenizer.json says, whatever the model's type
model = transformers.AutoModelForCausalLM.from_pretrained(base@REVISION@, trust_remote_code=False, dtype=torch.float32)
encoder = peft.PeftModel.from_pretrained(model, "@FOLDER@").eval().get_base_model().model
table = safetensors.torch.load_file("memory.safetensors")["memory_token_embed.weight"][:@K@].float()

@torch.no_grad()
def compress(text):
    ids, parts = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], []
@BOS@    segments = -(-len(ids) // @N@)
    size = -(-len(ids) // segments)
    for piece in (ids[i : i + size] for i in range(0, len(ids), size)):
@PAD@        x = torch.cat([encoder.embed_tokens(torch.tensor(piece)), table])[None]
        at = [*range(@TEXT@), *(@AFTER@ for j in range(@K@))]
        # Without a mask, transformers would take positions that do not rise one by one for several texts in one row.
        out = encoder(inputs_embeds=x, position_ids=torch.tensor([at]), attention_mask=torch.ones(1, len(at)), use_cache=True)
@KEEP@
    return @RESULT@
```

@MEMORY@ The decoder is the base without the adapter.
"""
BOS = """    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        ids = [tokenizer.bos_token_id, *ids]
"""
PAD = """        piece = piece + [tokenizer.eos_token_id] * (@N@ - len(piece))
"""
KEEP_SLOTS = "        parts.append(out.last_hidden_state[0, -@K@:])"
RESULT_SLOTS = "torch.cat(parts)"
MEMORY_SLOTS = "`compress(text)` is the memory `[M, D]`: embeddings for the decoder to read in the text's place."
KEEP_KV = """        layers = out.past_key_values.layers
        parts.append([torch.stack([getattr(layer, name)[0, :, -@K@:] for layer in layers]) for name in ("keys", "values")])"""
RESULT_KV = "[torch.cat(x, 2) for x in zip(*parts)]"
MEMORY_KV = (
    "`compress(text)` is the memory, K and V `[L, heads, M, H]` for the decoder's cache, K rotated to where the encoder wrote it "
    "(icae_jax keeps K before rotation)."
)
