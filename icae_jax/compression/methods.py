"""Which method writes and reads a memory: by the configuration when it is written, by its kind when it is read."""

import jax.numpy as jnp

from icae_jax.compression import icae, x500
from icae_jax.compression.memory import KV, Slots

KINDS = {"icae": Slots, "x500": KV}


def compress(model, base_params, trained, ids_BSN, lengths_BS, config, k=None, dropout_key=None):
    """Writes contexts into memory with k memory tokens a segment (by default the most): `Slots` or `KV`, as config.method says.

    ids `[B, S, N]`, lengths `[B, S]` as `encoder.segment_contexts` makes them. UserError where the configuration does not know k.
    """
    write = {"icae": icae.compress, "x500": x500.compress}[config.method]
    return write(
        model, base_params, trained, ids_BSN, lengths_BS, config, config.choose(k), dropout_key
    )


def read(model, base_params, memory, head=()):
    """The `Prefix` of head (ids that stand before the memory) and memory, of either kind, in the model's dtype.

    A memory may be of another one, such as that of the base that wrote it: what decodes behind it shares one cache with it.
    """
    memory = memory.replace(
        **{name: jnp.asarray(x, model.dtype) for name, x in memory.contents.items()}
    )
    return (x500 if isinstance(memory, KV) else icae).read(model, base_params, memory, head)
