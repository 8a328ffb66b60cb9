"""ICAE (Ge et al., arXiv 2307.06945): memory is the last hidden states at the memory tokens."""

from typing import Any

import jax

from icae_jax.compression import layout, method
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.encoder import encode
from icae_jax.compression.memory import Slots, place
from icae_jax.compression.segments import Contexts
from icae_jax.models.llama import FrozenModel


def write(
    base: FrozenModel,
    trained: dict[str, Any],
    contexts: Contexts,
    config: CompressionConfig,
    dropout_key: jax.Array | None = None,
) -> Slots:
    """The slots of contexts (section 2.2.1)."""
    B, S, _ = contexts.ids.shape
    hidden, _ = encode(base, trained, contexts, config, dropout_key)
    return place(Slots, {"slots": hidden.reshape(B, S * contexts.k, -1)}, contexts.lengths, config)


method.register(
    method.Method(
        name="icae",
        title="ICAE",
        write=write,
        memory=Slots,
        layouts={
            "servable": layout.SPREAD,
            "sequential": layout.SEQUENTIAL,
            "uniform": layout.UNIFORM,
            "padded": layout.PADDED,
        },
        exports=(method.PROMPT_EMBEDS, method.HF_CACHE, method.VLLM_KV, method.PEFT),
    )
)
