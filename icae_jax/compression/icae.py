"""ICAE (Ge et al., arXiv 2307.06945): an LLM with LoRA writes a text into k memory slots, the same LLM, frozen, reads them."""

import jax
import jax.numpy as jnp

from icae_jax.compression.encoder import encode
from icae_jax.compression.memory import Prefix, Slots, place
from icae_jax.models import llama, rope


def compress(model, base_params, trained, ids_BSN, lengths_BS, config, k, dropout_key=None):
    """`Slots`: the encoder's last hidden states at the memory tokens (section 2.2.1). Arguments as `encoder.encode` has them."""
    B, S, _ = ids_BSN.shape
    hidden = encode(
        model, base_params, trained, ids_BSN, lengths_BS, config, k, "hidden", dropout_key
    )
    return place(Slots, {"slots": hidden.reshape(B, S * k, -1)}, lengths_BS, config)


def read(model, base_params, memory, head=()):
    """Runs the frozen decoder over `head` (ids that stand before the memory) and the slots: the `Prefix` that targets see."""
    B, _, D = memory.slots.shape
    h = len(head)
    x = memory.slots
    if h:
        tokens = llama.embed(base_params, jnp.asarray(head, jnp.int32)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(tokens, (B, h, D)), x], 1)
    positions = jnp.concatenate([jnp.broadcast_to(jnp.arange(h), (B, h)), h + memory.positions], 1)
    real = jnp.concatenate([jnp.ones((B, h), bool), memory.mask], 1)
    with jax.named_scope("memory_prefix"):
        _, (k, v) = model.apply(
            {"params": base_params}, x, positions, real, at=llama.NOWHERE, return_kv=True
        )
    return Prefix(rope.rotate_keys(model.config, k, positions), v, real, positions, h + memory.end)
