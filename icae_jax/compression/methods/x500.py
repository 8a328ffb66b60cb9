"""500xCompressor (Li et al., arXiv 2408.03094): memory is K and V at the memory tokens.

The decoder does no work for the memory: what the encoder kept of its own layers is the decoder's
cache prefix.
"""

from typing import Any

import jax

from icae_jax.compression import layout, method
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.encoder import encode
from icae_jax.compression.memory import KV, place
from icae_jax.compression.segments import Contexts
from icae_jax.models.llama import FrozenModel


def write(
    base: FrozenModel,
    trained: dict[str, Any],
    contexts: Contexts,
    config: CompressionConfig,
    dropout_key: jax.Array | None = None,
) -> KV:
    """K (before RoPE) and V of the memory tokens in every layer (section 3)."""
    B, S, _ = contexts.ids.shape
    _, kv = encode(base, trained, contexts, config, dropout_key, keeps="kv")
    by_text = [x.reshape(x.shape[0], B, S * contexts.k, *x.shape[3:]) for x in kv]
    return place(KV, dict(zip(KV.CONTENTS, by_text, strict=True)), contexts.lengths, config)


method.register(
    method.Method(
        name="x500",
        title="500xCompressor",
        write=write,
        memory=KV,
        layouts={
            "clean": layout.SPREAD,
            "sequential": layout.SEQUENTIAL,
            "reference": layout.REFERENCE,
            "uniform": layout.UNIFORM,
        },
        trigger="bos",
        bos_before_text=False,  # `<s>` is what the decoder starts regeneration with
        keeps="kv",
        exports=(method.HF_CACHE, method.VLLM_KV, method.PEFT),
    )
)
