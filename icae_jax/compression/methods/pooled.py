"""Mean pooling (BenchPress, arXiv 2510.20797, sections 2 to 4): the encoder reads the text alone.

Its last states are averaged over near-equal groups of tokens and mapped by one trained matrix. No
memory token has a vector of its own, so any number of them can be asked for, and one pass of the
encoder serves all.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from icae_jax.compression import layout, method
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.encoder import encode
from icae_jax.compression.memory import Slots, place
from icae_jax.compression.segments import Contexts
from icae_jax.models.axes import gathered
from icae_jax.models.llama import FrozenModel

PROJECTION = "projection"  # W [D, D] in the trained tree, the identity at first


def groups(k: int, lengths: Int[Any, " R"], N: int) -> Bool[Array, "R k N"]:
    """Which of N tokens each of k near-equal groups of the first `lengths` of them holds.

    No group is empty: where a text has fewer than k tokens, some groups share one.
    """
    j, n = jnp.arange(k)[None, :, None], lengths[:, None, None]
    first = j * n // k
    stop = jnp.maximum((j + 1) * n // k, first + 1)
    tokens = jnp.arange(N)[None, None]
    return (first <= tokens) & (tokens < stop)


def write_several(
    base: FrozenModel,
    trained: dict[str, Any],
    contexts: Contexts,
    ks: Sequence[int],
    config: CompressionConfig,
    dropout_key: jax.Array | None = None,
) -> tuple[Slots, ...]:
    """The slots of contexts at each number of memory tokens, in one pass of the encoder."""
    B, S, N = contexts.ids.shape
    hidden, _ = encode(base, trained, contexts, config, dropout_key, memory_tokens=0, at=None)
    W = gathered(trained[PROJECTION].astype(hidden.dtype), ("embed", None))

    def slots(k):
        inside = groups(k, contexts.lengths.reshape(B * S), N).astype(hidden.dtype)
        sums = jnp.einsum("rkn,rnd->rkd", inside, hidden, preferred_element_type=jnp.float32)
        means = (sums / inside.sum(2, jnp.float32)[..., None]).astype(hidden.dtype)
        return (means @ W).reshape(B, S * k, -1)

    return tuple(place(Slots, {"slots": slots(k)}, contexts.lengths, config) for k in ks)


method.register(
    method.Method(
        name="pooled",
        title="mean pooling",
        write_several=write_several,
        memory=Slots,
        layouts={"servable": layout.SPREAD, "uniform": layout.UNIFORM},
        appends_memory_tokens=False,
        encoder_mask="all",
        pools=True,
        vectors=lambda config: 0,
        tensors=lambda model, config: {PROJECTION: jnp.eye(model.hidden_size)},
        flops=lambda model, shape, k: {"lora": 2 * shape[0] * shape[1] * k * model.hidden_size**2},
        exports=(method.PROMPT_EMBEDS, method.HF_CACHE, method.VLLM_KV, method.PEFT),
    )
)
