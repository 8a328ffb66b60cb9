"""Position layouts: where memory tokens, the memory in the decoder, and targets sit.

n: tokens of a segment, k: its memory tokens, M: memory tokens of all segments, N: the length that
`reference` and `padded` pad segments to.

| layout     | encoder: text, memory tokens          | decoder: memory  | targets start         |
|------------|---------------------------------------|------------------|-----------------------|
| SEQUENTIAL | 0 … n-1, then n … n+k-1               | 0 … M-1          | at M                  |
| SPREAD     | 1 … n, spread over the ids they cover | 0 … M-1          | at M                  |
| UNIFORM    | 1 … n, spread over the ids they cover | the same,        | AE at 0, others after |
|            |                                       | over all segments| the text's last id    |
| REFERENCE  | 0 … N-1, then N … N+k-1               | N … N+M-1        | at M                  |
| PADDED     | 0 … N-1, then N … N+k-1               | 0 … M-1          | at M                  |

`SEQUENTIAL` is the reference ICAE (arXiv 2307.06945), `UNIFORM` UPL's. `SPREAD` keeps UPL's encoder
but is read at positions 0, 1, 2, …, as servers number the embeddings of a prompt; configurations of
slots call it "servable", those of K/V "clean". `REFERENCE` is the reference 500xCompressor (arXiv
2408.03094): the text is padded to N tokens with eos, which is attended to, and the memory's keys
lie in the future of every query. `PADDED` is the ICAE that the same repository compares with.
Encoder positions restart in every segment.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Three choices of positions, see the module.

    spread_encoder: in the encoder, memory tokens sit among the positions of the text that they
    cover. spread_decoder: so they do in the decoder. ae_restarts: AE targets start at position 0.
    fixed_length: segments are padded to one length, and the padding is attended to. read_in_place:
    the decoder reads the memory at the positions it was written at. bos_before_text: the encoder
    reads the text with `<s>` in front, if the method does.
    """

    spread_encoder: bool = False
    spread_decoder: bool = False
    ae_restarts: bool = False
    fixed_length: bool = False
    read_in_place: bool = False
    bos_before_text: bool = True

    def encoder_positions(
        self, N: int, k: int, lengths: Int[Any, "..."]
    ) -> Int[Array, "... tokens"]:
        """Positions of `[text padded to N | k memory tokens]`, `[..., N + k]`.

        lengths: tokens of each text, including padding that is attended to.
        """
        text = jnp.broadcast_to(jnp.arange(N) + int(self.spread_encoder), (*lengths.shape, N))
        if self.spread_encoder:
            return jnp.concatenate([text, spread(k, lengths)], -1)
        memory = lengths[..., None] + jnp.broadcast_to(jnp.arange(k), (*lengths.shape, k))
        return jnp.concatenate([text, memory], -1)

    def decoder_positions(
        self, k: int, lengths_BS: Int[Any, "B S"], fixed_length: int
    ) -> tuple[Int[Any, "B M"], Int[Any, " B"]]:
        """Positions of the memory in the decoder, from the memory's start, and where targets start.

        fixed_length: N of the module's table. Segments of zero length take no positions; their
        memory is masked. For NumPy's lengths the result is NumPy's where nothing is spread, so that
        nothing is compiled for their shape.
        """
        B, S = lengths_BS.shape
        xp = lengths_BS.__array_namespace__()
        if self.spread_decoder:
            ends = jnp.cumsum(lengths_BS, axis=1)
            positions = (ends - lengths_BS)[..., None] + spread(k, lengths_BS)
            return positions.reshape(B, S * k), ends[:, -1] + 1
        real = (lengths_BS > 0).astype(jnp.int32)
        ends = k * xp.cumsum(real, axis=1, dtype=jnp.int32)
        within = xp.broadcast_to(xp.arange(k, dtype=jnp.int32), (B, S, k))
        positions = ((ends - k * real)[..., None] + within).reshape(B, S * k)
        return positions + (fixed_length if self.read_in_place else 0), ends[:, -1]

    def restarts(self, objective: str) -> bool:
        """Whether targets of an objective start at position 0, not behind the memory."""
        return objective == "ae" and self.ae_restarts

    def target_starts(self, objective: str, end_B: Int[Any, " B"]) -> Int[Any, " B"]:
        """Position of a target's first token behind memories that end at `end_B` (`Prefix.end`)."""
        return jnp.zeros_like(end_B) if self.restarts(objective) else end_B


SEQUENTIAL = Layout()
SPREAD = Layout(spread_encoder=True)
UNIFORM = Layout(spread_encoder=True, spread_decoder=True, ae_restarts=True)
REFERENCE = Layout(fixed_length=True, read_in_place=True)
PADDED = Layout(fixed_length=True, bos_before_text=False)


def spread(k: int, length: Int[Any, "..."]) -> Int[Array, "... k"]:
    """Positions of k memory tokens over text at 1 … length: the centre of each one's share."""
    return 1 + jnp.einsum("...,k->...k", length, 2 * jnp.arange(k) + 1) // (2 * k)
