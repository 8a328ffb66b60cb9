"""What a context is compressed into, and how the decoder reads it.

A kind of memory is a subclass of `Memory`. All kinds have `[B, M]` memory tokens, with M = segments
x k, and share

    mask             [B, M], false for segments that a shorter text lacks
    positions        [B, M], where the decoder reads each token, counted from the memory's start
    end              [B], the position after the memory, where the decoder goes on
    segment_lengths  [B, S], tokens of the context that each segment stands for
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.errors import UserError
from icae_jax.models import rope
from icae_jax.models.llama import ModelConfig
from icae_jax.models.pytree import pytree


class Memory:
    """What all kinds share.

    CONTENTS: the fields that hold what was written. TEXT_AXIS: their axis of texts; the next one is
    that of memory tokens. AXES: the number of their axes. RUNS_IN_DECODER: reading runs the memory
    through the decoder's blocks (FLOPs are counted by it).
    """

    CONTENTS: ClassVar[tuple[str, ...]] = ()
    TEXT_AXIS: ClassVar[int] = 0
    AXES: ClassVar[int] = 0
    RUNS_IN_DECODER: ClassVar[bool] = True

    @staticmethod
    def sizes(model: ModelConfig) -> tuple[int, ...]:
        """Sizes of the contents' axes, without those of texts and memory tokens, for a base."""
        raise NotImplementedError

    def read(self, decoder: Decoder, head: tuple[int, ...] = ()) -> Prefix:
        """The prefix that targets see: `head`, ids that stand before the memory, and the memory.

        The memory's positions count from behind the head. It is read in the decoder's dtype,
        whatever its own, since it shares a cache with what is decoded behind it.
        """
        contents = {name: jnp.asarray(x, decoder.base.dtype) for name, x in self.contents.items()}
        return self.replace(**contents)._read(decoder, tuple(head))

    def _read(self, decoder, head):
        raise NotImplementedError

    def __len__(self):
        return self.mask.shape[0]

    def __getitem__(self, rows):
        """The memories of some texts: a number, a slice, or row numbers (a list or an array)."""
        rows = [rows] if isinstance(rows, int | np.integer) else rows
        if not isinstance(rows, slice | jax.Array):
            rows = np.asarray(rows, None if len(rows) else int)  # an empty list would be of floats
        shared = {name: x[rows] for name, x in vars(self).items() if name not in self.CONTENTS}
        at = (slice(None),) * self.TEXT_AXIS + (rows,)
        return self.replace(**shared, **{name: x[at] for name, x in self.contents.items()})

    @property
    def contents(self) -> dict[str, Any]:
        """What was written, by field."""
        return {name: getattr(self, name) for name in self.CONTENTS}

    @property
    def tokens_per_segment(self) -> int:
        """The k that the memory was written with."""
        return self.mask.shape[1] // self.segment_lengths.shape[1]

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Context tokens of each text."""
        return np.asarray(self.segment_lengths).sum(1)

    @property
    def tokens(self) -> Int[np.ndarray, " B"]:
        """Memory tokens of each text."""
        return np.asarray(self.mask).sum(1)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one memory token in its dtype: D numbers for slots, 2 L K H for K/V."""
        return sum(x.nbytes for x in self.contents.values()) // self.mask.size

    @property
    def bytes(self) -> Int[np.ndarray, " B"]:
        """Bytes of each text's memory."""
        return self.tokens * self.bytes_per_token

    @property
    def ratio(self) -> Float[np.ndarray, " B"]:
        """Context tokens per memory token of each text."""
        return self.lengths / self.tokens


@pytree
class Slots(Memory):
    """Embeddings that the decoder reads in the text's place (arXiv 2307.06945, section 2.2.1)."""

    CONTENTS: ClassVar[tuple[str, ...]] = ("slots",)
    AXES: ClassVar[int] = 3

    slots: Float[Any, "B M D"]
    mask: Bool[Any, "B M"]
    positions: Int[Any, "B M"]
    end: Int[Any, " B"]
    segment_lengths: Int[Any, "B S"]

    @staticmethod
    def sizes(model: ModelConfig) -> tuple[int, ...]:
        """(D,)."""
        return (model.hidden_size,)

    def _read(self, decoder, head):
        """Runs the decoder over head and slots."""
        B, h, x = len(self), len(head), self.slots
        if h:
            tokens = decoder.base.embed(jnp.asarray(head, jnp.int32)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(tokens, (B, h, x.shape[-1])), x], 1)
        before = jnp.broadcast_to(jnp.arange(h), (B, h))
        positions = jnp.concatenate([before, h + self.positions], 1)
        real = jnp.concatenate([jnp.ones((B, h), bool), self.mask], 1)
        k, v = decoder.prefix_kv(x, positions, real)
        return Prefix(k, v, real, positions, h + self.end)


@pytree
class KV(Memory):
    """K and V of every layer, which the decoder finds in its cache (arXiv 2408.03094, section 3).

    k is stored before RoPE; reading rotates it to `positions`.
    """

    CONTENTS: ClassVar[tuple[str, ...]] = ("k", "v")
    TEXT_AXIS: ClassVar[int] = 1
    AXES: ClassVar[int] = 5
    RUNS_IN_DECODER: ClassVar[bool] = False

    k: Float[Any, "L B M K H"]
    v: Float[Any, "L B M K H"]
    mask: Bool[Any, "B M"]
    positions: Int[Any, "B M"]
    end: Int[Any, " B"]
    segment_lengths: Int[Any, "B S"]

    @staticmethod
    def sizes(model: ModelConfig) -> tuple[int, ...]:
        """(L, K, H)."""
        return model.num_layers, model.num_kv_heads, model.head_dim

    def _read(self, decoder, head):
        """Rotates the keys to where they are read. Only the head runs, once for all texts."""
        B, h = len(self), len(head)
        positions, real, v = h + self.positions, self.mask, self.v
        k = rope.rotate_keys(decoder.base.config, self.k, positions)
        if h:
            before = jnp.arange(h)[None]
            ids = jnp.asarray(head, jnp.int32)[None]
            k_head, v_head = decoder.prefix_kv(ids, before, jnp.ones((1, h), bool))

            def behind(head_kv, memory_kv):
                head_kv = jnp.broadcast_to(head_kv, (head_kv.shape[0], B, *head_kv.shape[2:]))
                return jnp.concatenate([head_kv.astype(memory_kv.dtype), memory_kv], 2)

            k, v = behind(k_head, k), behind(v_head, v)
            positions = jnp.concatenate([jnp.broadcast_to(before, (B, h)), positions], 1)
            real = jnp.concatenate([jnp.ones((B, h), bool), real], 1)
        return Prefix(k, v, real, positions, h + self.end)


def place(
    kind: type[Memory],
    contents: dict[str, Any],
    lengths_BS: Int[Any, "B S"],
    config: CompressionConfig,
) -> Memory:
    """The memory of S segments per text: which tokens are real, where the decoder reads them."""
    k = contents[kind.CONTENTS[0]].shape[kind.TEXT_AXIS + 1] // lengths_BS.shape[1]
    positions, end = config.position_layout.decoder_positions(k, lengths_BS, config.segment_tokens)
    mask = lengths_BS.__array_namespace__().repeat(lengths_BS > 0, k, axis=1)
    return kind(**contents, mask=mask, positions=positions, end=end, segment_lengths=lengths_BS)


def join(memories: Sequence[Memory], config: CompressionConfig) -> Memory:
    """Concatenates memories along their segments, text by text, in order.

    The result is what compressing the joined segments at once would give.

    UserError if they are of different kinds, or hold different numbers of texts or of memory tokens
    per segment.
    """
    if not memories:
        raise UserError("there are no memories to join; give at least one")
    properties = {
        "texts": [len(m) for m in memories],
        "memory tokens per segment": [m.tokens_per_segment for m in memories],
        "kind": [type(m).__name__ for m in memories],
    }
    for what, values in properties.items():
        if len(set(values)) != 1:
            raise UserError(
                f"memories of {', '.join(map(str, values))} {what} cannot be joined; compress them "
                "alike"
            )
    kind = type(memories[0])
    xp = memories[0].segment_lengths.__array_namespace__()
    contents = {
        name: xp.concatenate([m.contents[name] for m in memories], kind.TEXT_AXIS + 1)
        for name in kind.CONTENTS
    }
    lengths = xp.concatenate([m.segment_lengths for m in memories], 1)
    # Segments that a shorter text lacks come last, as they do where segments are cut.
    order = xp.argsort(lengths == 0, axis=1, stable=True)
    k = memories[0].tokens_per_segment
    tokens = (order[..., None] * k + xp.arange(k)).reshape(len(order), order.shape[1] * k)
    after = (1,) * (kind.AXES - kind.TEXT_AXIS - 2)
    tokens = tokens.reshape((1,) * kind.TEXT_AXIS + tokens.shape + after)
    contents = {
        name: xp.take_along_axis(x, tokens, kind.TEXT_AXIS + 1) for name, x in contents.items()
    }
    return place(kind, contents, xp.take_along_axis(lengths, order, 1), config)
