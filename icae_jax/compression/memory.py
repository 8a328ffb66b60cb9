"""What a context is compressed into, and what the decoder reads of it.

`Slots` and `KV` hold different things of the same memory tokens, and share all else: `[B, M]` tokens with M = segments x k,

    mask             [B, M], false at segments that a shorter text lacks
    positions        [B, M], where the decoder reads each token, counted from the memory's start
    end              [B], the position after the memory, where the decoder goes on
    segment_lengths  [B, S], tokens of the context that each segment stands for
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from icae_jax.compression import layout as layouts
from icae_jax.errors import UserError


class Memory:
    """The part common to both kinds.

    CONTENTS: the fields that hold what was written. TEXT_AXIS: their axis of texts; that of memory tokens comes next. AXES: their number.
    """

    CONTENTS = ()
    TEXT_AXIS = 0
    AXES = 0

    def __len__(self):
        return self.mask.shape[0]

    def __getitem__(self, rows):
        """The memories of some texts: a number, a slice, or row numbers (a list or an array)."""
        rows = [rows] if isinstance(rows, int | np.integer) else rows
        if not isinstance(rows, slice | jax.Array):
            rows = (
                np.asarray(rows) if len(rows) else np.zeros(0, int)
            )  # an empty list would be an array of floats
        every = {name: x[rows] for name, x in vars(self).items() if name not in self.CONTENTS}
        return self.replace(
            **every,
            **{
                name: x[(slice(None),) * self.TEXT_AXIS + (rows,)]
                for name, x in self.contents.items()
            },
        )

    @property
    def contents(self):
        """`{field: array}` of what was written."""
        return {name: getattr(self, name) for name in self.CONTENTS}

    @property
    def tokens_per_segment(self):
        """The k that the memory was written with."""
        return self.mask.shape[1] // self.segment_lengths.shape[1]

    @property
    def lengths(self):
        """Context tokens of each text, `[B]`."""
        return np.asarray(self.segment_lengths).sum(1)

    @property
    def tokens(self):
        """Memory tokens of each text, `[B]`."""
        return np.asarray(self.mask).sum(1)

    @property
    def bytes_per_token(self):
        """Bytes of one memory token in the dtype it is held in: D numbers for slots, 2 L K H for K/V."""
        return sum(x.nbytes for x in self.contents.values()) // self.mask.size

    @property
    def bytes(self):
        """Bytes of each text's memory, `[B]`."""
        return self.tokens * self.bytes_per_token

    @property
    def ratio(self):
        """Context tokens per memory token, `[B]`."""
        return self.lengths / self.tokens


@struct.dataclass
class Slots(Memory):
    """ICAE's memory: the encoder's last hidden states at the memory tokens (arXiv 2307.06945, section 2.2.1). slots: `[B, M, D]`."""

    CONTENTS = ("slots",)
    AXES = 3

    slots: jnp.ndarray
    mask: jnp.ndarray
    positions: jnp.ndarray
    end: jnp.ndarray
    segment_lengths: jnp.ndarray


@struct.dataclass
class KV(Memory):
    """500xCompressor's memory: K and V of the memory tokens in every layer (arXiv 2408.03094, section 3).

    k, v: `[L, B, M, K, H]`, k before RoPE: whoever reads it rotates it to `positions`.
    """

    CONTENTS = ("k", "v")
    TEXT_AXIS = 1
    AXES = 5

    k: jnp.ndarray
    v: jnp.ndarray
    mask: jnp.ndarray
    positions: jnp.ndarray
    end: jnp.ndarray
    segment_lengths: jnp.ndarray


def place(kind, contents, lengths_BS, config):
    """The memory of S segments a text, `Slots` or `KV` as `kind` says: which tokens are real, and where the decoder reads them."""
    token_axis = kind.TEXT_AXIS + 1
    k = next(iter(contents.values())).shape[token_axis] // lengths_BS.shape[1]
    positions, end = layouts.decoder_positions(
        layouts.get(config.layout), k, lengths_BS, config.segment_tokens
    )
    mask = lengths_BS.__array_namespace__().repeat(lengths_BS > 0, k, axis=1)
    return kind(**contents, mask=mask, positions=positions, end=end, segment_lengths=lengths_BS)


def join(memories, config):
    """One memory that holds all of theirs, text by text, in order: what compressing the joined segments at once would give.

    UserError where they are of different kinds, or hold different numbers of texts, or of memory tokens a segment.
    """
    if not memories:
        raise UserError("there are no memories to join; give at least one")
    alike = {
        "texts": [len(m) for m in memories],
        "memory tokens a segment": [m.tokens_per_segment for m in memories],
        "kind": [type(m).__name__ for m in memories],
    }
    for what, values in alike.items():
        if len(set(values)) != 1:
            raise UserError(
                f"memories of {', '.join(map(str, values))} {what} cannot be joined; compress them alike"
            )
    kind = type(memories[0])
    xp = memories[0].segment_lengths.__array_namespace__()
    contents = {
        name: xp.concatenate([m.contents[name] for m in memories], kind.TEXT_AXIS + 1)
        for name in kind.CONTENTS
    }
    return place(kind, contents, xp.concatenate([m.segment_lengths for m in memories], 1), config)


@struct.dataclass
class Prefix:
    """Head and memory as the decoder's targets see them: per-layer K/V.

    k, v: `[L, B, P, K, H]`, k rotated to its positions. mask, positions: `[B, P]`. end: `[B]`, the position after the memory.
    """

    k: jnp.ndarray
    v: jnp.ndarray
    mask: jnp.ndarray
    positions: jnp.ndarray
    end: jnp.ndarray

    @property
    def seen(self):
        """What `models.llama.Llama` takes as `prefix`."""
        return self.k, self.v, self.mask, self.positions
