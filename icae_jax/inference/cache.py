"""The engine's cache: keys and values of R rows that decode, and of memories that rows share.

Arrays have fixed shapes and are updated in place (donated). Each is `[L, rows, K, tokens, H]`, or a
tuple of L such arrays where the decoder's layers are apart. Heads come before tokens, so that a
decoding step reads each head's keys in one piece.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.models.axes import constrain
from icae_jax.models.blocks import PrefixPart
from icae_jax.models.pytree import pytree

AXES = ("layers", "batch", "kv_heads", None, None)


@pytree
class Cache:
    """Keys and values, keys rotated.

    k, v: of prompts and answers, C tokens a row. memory_k, memory_v: of memories with their heads,
    P tokens each; memory_mask says which are real, memory_positions what windows count.
    """

    k: Any
    v: Any
    memory_k: Any
    memory_v: Any
    memory_mask: Bool[Any, "S P"]
    memory_positions: Int[Any, "S P"]

    @property
    def tokens(self) -> int:
        """C."""
        return self.k[0].shape[-2]

    def put_memory(self, prefix: Prefix, places: Int[Any, " b"]) -> "Cache":
        """With memories in given places; a place beyond the last is left out."""
        P, given = self.memory_mask.shape[1], prefix.mask.shape[1]
        unused = ((0, 0), (0, P - given))
        mask, positions = jnp.pad(prefix.mask, unused), jnp.pad(prefix.positions, unused)

        def put(cached, new):
            new = jnp.swapaxes(new, -3, -2).astype(cached.dtype)
            return cached.at[places, :, :given].set(new, mode="drop")

        return self.replace(
            memory_k=_by_layer(put, self.memory_k, prefix.k),
            memory_v=_by_layer(put, self.memory_v, prefix.v),
            memory_mask=self.memory_mask.at[places].set(mask, mode="drop"),
            memory_positions=self.memory_positions.at[places].set(positions, mode="drop"),
        )

    def put_tokens(
        self, kv: tuple[Any, Any], rows: Int[Any, " b"], first: Int[Any, " b"]
    ) -> "Cache":
        """With the keys and values of T new tokens of some rows, `[L, b, T, K, H]` or L arrays.

        first: where each row's are put; tokens beyond the row's end are left out.
        """
        T = kv[0][0].shape[1]
        at = first[:, None] + jnp.arange(T)[None]

        def put(cached, new):
            return cached.at[rows[:, None], :, at].set(new.astype(cached.dtype), mode="drop")

        k, v = (_by_layer(put, x, new) for x, new in zip((self.k, self.v), kv, strict=True))
        return self.replace(k=k, v=v)

    def clear(self, row: Int[Any, ""], place: Int[Any, ""]) -> "Cache":
        """With zeros in a row and in a place for memories; one beyond the last is left out."""

        def zeros(cached, at):
            return _by_layer(lambda x, _: x.at[at].set(0, mode="drop"), cached, cached)

        cleared = self.replace(k=zeros(self.k, row), v=zeros(self.v, row))
        if not len(self.memory_mask):  # no index would do
            return cleared
        return cleared.replace(
            memory_k=zeros(self.memory_k, place), memory_v=zeros(self.memory_v, place)
        )

    def memory_part(self, places: Int[Any, " b"] | None) -> PrefixPart:
        """The memories that rows see. places: of each row, None where row i sees memory i."""
        kv, known = (self.memory_k, self.memory_v), (self.memory_mask, self.memory_positions)
        return PrefixPart(*kv, *known, rows=places, heads_first=True)

    def one_memory(self, place: Int[Any, ""]) -> PrefixPart:
        """The memory in one place, as a part that all rows share."""

        def one(x, axis=0):
            return jax.lax.dynamic_slice_in_dim(x, place, 1, axis)

        def of_layers(x):
            return tuple(map(one, x)) if isinstance(x, tuple) else one(x, 1)

        kv = of_layers(self.memory_k), of_layers(self.memory_v)
        return PrefixPart(*kv, one(self.memory_mask), one(self.memory_positions), heads_first=True)

    def own_part(
        self,
        written: Int[Any, " R"],
        starts: Int[Any, " R"],
        rows: Int[Any, " b"] | None = None,
        first: int | None = None,
    ) -> PrefixPart:
        """What rows have written so far. first: only so many tokens, at least all written ones."""
        count = first or self.tokens
        at = jnp.arange(count)[None]
        mask, positions = at < written[:, None], starts[:, None] + at
        return PrefixPart(self.k, self.v, mask, positions, rows, heads_first=True, first=first)


def make(decoder: Decoder, *, rows: int, tokens: int, memories: int, memory_tokens: int) -> Cache:
    """An empty cache for a decoder, in its dtype."""
    config, dtype = decoder.base.config, decoder.base.dtype
    apart = isinstance(decoder.base.params["layers"], tuple)

    def empty(count, length):
        def one():
            return jnp.zeros((count, config.num_kv_heads, length, config.head_dim), dtype)

        if apart:
            return tuple(one() for _ in range(config.num_layers))
        return constrain(jnp.zeros((config.num_layers, *one().shape), dtype), *AXES)

    own = empty(rows, tokens), empty(rows, tokens)
    shared = empty(memories, memory_tokens), empty(memories, memory_tokens)
    mask = jnp.zeros((memories, memory_tokens), bool)
    return Cache(*own, *shared, mask, jnp.zeros(mask.shape, jnp.int32))


def _by_layer(put: Callable, cached, new):
    """`put(cached, new)` for each layer."""
    if isinstance(cached, tuple):
        return tuple(put(c, n) for c, n in zip(cached, new, strict=True))
    return constrain(jax.vmap(put)(cached, new), *AXES)
