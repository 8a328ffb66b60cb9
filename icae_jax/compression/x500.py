"""500xCompressor (Li et al., arXiv 2408.03094): an LLM with LoRA writes a text into the K/V of k tokens, which the same LLM, frozen, reads.

The decoder does no work for the memory: what the encoder kept of its own layers is the decoder's cache prefix.
"""

import jax
import jax.numpy as jnp

from icae_jax.compression.encoder import encode
from icae_jax.compression.memory import KV, Prefix, place
from icae_jax.models import llama, rope


def compress(model, base_params, trained, ids_BSN, lengths_BS, config, k, dropout_key=None):
    """`KV`: K (before RoPE) and V of the memory tokens in every layer of the encoder (section 3).

    Arguments as `encoder.encode` has them.
    """
    B, S, _ = ids_BSN.shape
    kv = encode(model, base_params, trained, ids_BSN, lengths_BS, config, k, "kv", dropout_key)
    contents = {
        name: x.reshape(x.shape[0], B, S * k, *x.shape[3:])
        for name, x in zip(KV.CONTENTS, kv, strict=True)
    }
    return place(KV, contents, lengths_BS, config)


def read(model, base_params, memory, head=()):
    """The `Prefix` that targets see: the memory's keys rotated to where they are read, behind the K/V of `head`, if any.

    head: ids that stand before the memory; the memory's positions count from behind them. The head is run through the frozen decoder.
    """
    B = len(memory)
    h = len(head)
    at, v, real = h + memory.positions, memory.v, memory.mask
    k = rope.rotate_keys(model.config, memory.k, at)
    if h:
        positions = jnp.arange(h)[None]
        at = jnp.concatenate([jnp.broadcast_to(positions, (B, h)), at], 1)
        with jax.named_scope("memory_prefix"):
            ids = jnp.asarray(head, jnp.int32)[None]
            real_head = jnp.ones((1, h), bool)
            _, (k_head, v_head) = model.apply(
                {"params": base_params}, ids, positions, real_head, at=llama.NOWHERE, return_kv=True
            )
        k_head = rope.rotate_keys(model.config, k_head, positions)

        def behind(head_kv, memory_kv):
            shape = (head_kv.shape[0], B, *head_kv.shape[2:])
            return jnp.concatenate(
                [jnp.broadcast_to(head_kv, shape).astype(memory_kv.dtype), memory_kv], 2
            )

        k, v, real = (
            behind(k_head, k),
            behind(v_head, v),
            jnp.concatenate([jnp.ones((B, h), bool), real], 1),
        )
    return Prefix(k, v, real, at, h + memory.end)
