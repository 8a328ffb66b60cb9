"""SAC (arXiv 2510.08907): anchors among the text's own tokens; memory is their K and V.

No token is appended. A trained vector is added to the embeddings of the anchors, every token sees
every other one, and the decoder finds the anchors' keys and values at the places they had in the
text.
"""

from typing import Any

import jax
import jax.numpy as jnp

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
    """K (before RoPE) and V of the anchors in every layer (section 3).

    Anchors are the centres of k near-equal parts of each segment. Where it has fewer than k tokens,
    some are anchors twice.
    """
    B, S, N = contexts.ids.shape
    anchors = layout.spread(contexts.k, contexts.lengths.reshape(B * S)) - 1
    tokens = jnp.arange(N)[None, :, None]
    is_anchor = (anchors[:, None] == tokens).any(-1)
    # The number of the first anchor at a token; one vector is row 0 for all.
    number = (anchors[:, None] < tokens).sum(-1)
    vectors = trained["memory_table"][jnp.minimum(number, config.vectors - 1)]
    _, kv = encode(
        base,
        trained,
        contexts,
        config,
        dropout_key,
        keeps="kv",
        memory_tokens=0,
        at=anchors,
        is_memory=is_anchor,
        added=jnp.where(is_anchor[..., None], vectors, 0),
    )
    by_text = [x.reshape(x.shape[0], B, S * contexts.k, *x.shape[3:]) for x in kv]
    return place(KV, dict(zip(KV.CONTENTS, by_text, strict=True)), contexts.lengths, config)


method.register(
    method.Method(
        name="sac",
        title="SAC",
        write=write,
        memory=KV,
        layouts={"uniform": layout.UNIFORM, "clean": layout.SPREAD},
        bos_before_text=False,
        appends_memory_tokens=False,
        encoder_mask="all",
        keeps="kv",
        anchors=True,
        vectors=lambda config: 1 if config.anchor_vectors == "one" else None,
        options=("anchor_vectors",),
        exports=(method.HF_CACHE, method.VLLM_KV, method.PEFT),
    )
)
