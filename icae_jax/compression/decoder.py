"""The decoder: the frozen base behind a memory, as losses, generation and evaluation run it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from icae_jax.compression.trained import DECODER_LORA
from icae_jax.models import blocks
from icae_jax.models.llama import FrozenModel, layers_apart
from icae_jax.models.pytree import pytree


@pytree
class Prefix:
    """Head and memory as targets see them: K/V of every layer, k rotated to its positions.

    mask: which entries are real. end: the position after the memory, where targets start.
    """

    k: Float[Any, "L B P K H"]
    v: Float[Any, "L B P K H"]
    mask: Bool[Any, "B P"]
    positions: Int[Any, "B P"]
    end: Int[Any, " B"]

    @property
    def visible(self) -> tuple[Any, Any, Any, Any]:
        """What `models.llama.Llama` takes as `prefix`."""
        return self.k, self.v, self.mask, self.positions


@pytree
class Decoder:
    """A frozen base that reads memories.

    table: the memory table, whose last rows are the special tokens. lora: a LoRA tree of the
    decoder's own, None if it has none. dropout_key: for that LoRA's dropout, in training only.
    """

    base: FrozenModel
    table: Float[Any, "rows D"]
    lora: Any = None
    dropout_key: jax.Array | None = None

    @classmethod
    def of(
        cls, base: FrozenModel, trained: dict[str, Any], dropout_key: jax.Array | None = None
    ) -> "Decoder":
        """The decoder of a trained tree (`compression.trained`)."""
        lora = trained.get(DECODER_LORA)
        return cls(base, trained["memory_table"], lora, None if lora is None else dropout_key)

    def layers_apart(self) -> "Decoder":
        """The same, for decoding step by step on CPUs; see `FrozenModel.layers_apart`."""
        lora = self.lora
        if lora is not None:
            lora = {**lora, "layers": layers_apart(lora["layers"], self.base.config.num_layers)}
        return self.replace(base=self.base.layers_apart(), lora=lora)

    def embed(self, ids: Int[Any, "..."]) -> Float[Array, "... D"]:
        """Embeddings of ids, where negative ids are rows of the memory table from its end."""
        return embed_with_table(self.base, self.table, ids)

    def _run(self, x, positions, real, number, **how):
        key = self.dropout_key
        key = None if key is None else jax.random.fold_in(key, number)
        return self.base(x, positions, real, lora=self.lora, dropout_key=key, **how)

    def prefix_kv(
        self, x: Any, positions: Int[Any, "... P"], real: Bool[Any, "... P"]
    ) -> tuple[Float[Array, "L B P K H"], Float[Array, "L B P K H"]]:
        """K, rotated to its positions, and V of token ids `[B, P]` or embeddings `[B, P, D]`."""
        with jax.named_scope("memory_prefix"):
            how = {"at": blocks.NOWHERE, "return_kv": True, "rotated": True}
            return self._run(x, positions, real, 0, **how)[1]

    def run(
        self,
        x: Any,
        positions: Int[Any, "... T"],
        prefix: Any,
        *,
        real: Bool[Any, "B T"] | None = None,
        at: Any = None,
        return_kv: bool = False,
    ) -> tuple[Float[Array, "B _ D"], Any]:
        """Runs tokens behind a prefix: each sees the prefix, and the real tokens up to itself.

        x: token ids `[B, T]` or embeddings `[B, T, D]`, padded on the right only, where no real
        token sees the padding. prefix: `Prefix.visible`, or whatever `models.llama.Llama` takes.
        real: which tokens are, by default all. at, return_kv and the result: as for `Llama`, with
        K rotated to its positions.
        """
        real = jnp.ones((1, x.shape[1]), bool) if real is None else real
        how = {"prefix": prefix, "at": at, "return_kv": return_kv, "rotated": return_kv}
        return self._run(x, positions, real, 1, **how)

    def label_hidden(
        self,
        prefix: Prefix,
        starts_B: Int[Any, " B"],
        ids_BGT: Int[Any, "B G T"],
        label_at_BGU: Int[Any, "B G U"],
    ) -> Float[Array, "BG U D"]:
        """Hidden states at label positions of packed targets (`objectives.packing`).

        Every target sees head, memory and itself, at the positions that it would have alone.
        """
        B, G, T = ids_BGT.shape
        x = self.embed(ids_BGT).reshape(B * G, T, -1)
        positions = jnp.repeat(starts_B, G)[:, None] + jnp.arange(T)[None]
        at = label_at_BGU.reshape(B * G, -1)
        with jax.named_scope("decoder"):
            return self.run(x, positions, prefix.visible, at=at)[0]


def embed_with_table(
    base: FrozenModel, table: Float[Any, "rows D"], ids: Int[Any, "..."]
) -> Float[Array, "... D"]:
    """Embeddings of ids; negative ones (`objectives.targets.AE`, …) count from the table's end."""
    special = jnp.take(table, jnp.where(ids < 0, ids + table.shape[0], 0), axis=0)
    tokens = base.embed(jnp.maximum(ids, 0))
    return jnp.where(ids[..., None] < 0, special.astype(tokens.dtype), tokens)
