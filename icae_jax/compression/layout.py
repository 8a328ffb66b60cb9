"""Position layouts: where memory tokens sit in the encoder, where the memory sits in the decoder, where targets start.

n: tokens of a segment, k: its memory tokens, M: memory tokens of all segments, N: the length that `reference` and `padded` fill up to.

| name       | for        | encoder: text, memory tokens          | decoder: memory                 | targets start               |
|------------|------------|---------------------------------------|---------------------------------|-----------------------------|
| sequential | icae, x500 | 0 … n-1, then n … n+k-1               | 0 … M-1                         | at M                        |
| servable   | icae       | 1 … n, spread over the ids they cover | 0 … M-1                         | at M                        |
| clean      | x500       | 1 … n, spread over the ids they cover | 0 … M-1                         | at M                        |
| reference  | x500       | 0 … N-1, then N … N+k-1               | N … N+M-1                       | at M                        |
| padded     | icae       | 0 … N-1, then N … N+k-1               | 0 … M-1                         | at M                        |
| uniform    | icae, x500 | 1 … n, spread over the ids they cover | the same, running over segments | AE at 0, others at text's end |

`sequential` is the reference ICAE (arXiv 2307.06945), `uniform` UPL's. `servable` keeps UPL's encoder, but can be read by servers that take
embeddings in a prompt, since those number positions 0, 1, 2, …  `reference` is the reference 500xCompressor (arXiv 2408.03094): the
text is padded to N tokens with eos, which is attended to, and the memory's keys lie in the future of every query. `padded` is the ICAE
that the same repository compares with. `clean` masks the padding, spreads the memory as `servable` does, and goes on after it.
Encoder positions restart in every segment.
"""

import dataclasses

import jax.numpy as jnp

from icae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """spread_encoder, spread_decoder: memory tokens sit at the ids of the text they cover. ae_restarts: AE targets start at 0.

    fixed_length: segments are padded to one length with a token that is attended to. read_in_place: the memory is read where it was
    written.
    """

    name: str
    spread_encoder: bool = False
    spread_decoder: bool = False
    ae_restarts: bool = False
    fixed_length: bool = False
    read_in_place: bool = False


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("sequential"),
        Layout("uniform", spread_encoder=True, spread_decoder=True, ae_restarts=True),
        Layout("servable", spread_encoder=True),
        Layout("clean", spread_encoder=True),
        Layout("reference", fixed_length=True, read_in_place=True),
        Layout("padded", fixed_length=True),
    )
}


def get(name):
    """The `Layout` of that name; UserError with the choices otherwise."""
    if name not in LAYOUTS:
        raise UserError(f"layout is {name!r}; choose from {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def spread(k, length):
    """Positions of k memory tokens over text at 1 … length: the centre of each one's share. `[..., k]` for `length [...]`."""
    return 1 + jnp.einsum("...,k->...k", length, 2 * jnp.arange(k) + 1) // (2 * k)


def encoder_positions(layout, N, k, lengths):
    """Positions of `[text padded to N | k memory tokens]`, `[..., N + k]`, for text lengths `[...]` (with padding that is attended to)."""
    text = jnp.broadcast_to(jnp.arange(N) + int(layout.spread_encoder), (*lengths.shape, N))
    after = lengths[..., None] + jnp.broadcast_to(jnp.arange(k), (*lengths.shape, k))
    memory = spread(k, lengths) if layout.spread_encoder else after
    return jnp.concatenate([text, memory], -1)


def decoder_positions(layout, k, lengths_BS, fixed_length):
    """Positions of the memory in the decoder, counted from the memory's start, and the position where targets start.

    fixed_length: N of the table above. Returns `[B, S * k]` and `[B]`. Segments of zero length take no positions (their memory is masked).
    NumPy's lengths are counted in NumPy where nothing is spread, so that no shape of theirs is compiled for.
    """
    B, S = lengths_BS.shape
    xp = lengths_BS.__array_namespace__()
    if layout.spread_decoder:
        ends = jnp.cumsum(lengths_BS, axis=1)
        positions = (ends - lengths_BS)[..., None] + spread(k, lengths_BS)
        return positions.reshape(B, S * k), ends[:, -1] + 1
    real = (lengths_BS > 0).astype(jnp.int32)
    ends = k * xp.cumsum(real, axis=1, dtype=jnp.int32)
    positions = (ends - k * real)[..., None] + xp.broadcast_to(
        xp.arange(k, dtype=jnp.int32), (B, S, k)
    )
    return positions.reshape(B, S * k) + (fixed_length if layout.read_in_place else 0), ends[:, -1]


def target_starts(layout, objective, prefix):
    """Position of a target's first token, `[B]`: what it would have alone behind this head and memory."""
    if objective == "ae" and layout.ae_restarts:
        return jnp.zeros_like(prefix.end)
    return prefix.end


def positions_needed(layout, tokens, segments, size, k, fixed_length):
    """Positions that a text takes: (in the encoder, by the memory in the decoder, where targets start), whole numbers.

    tokens: of the text, cut into `segments` of at most `size`. The decoder's count from the memory's start.
    """
    encoder = (fixed_length if layout.fixed_length else size + int(layout.spread_encoder)) + k
    if layout.spread_decoder:
        return encoder, tokens + 1, tokens + 1
    return encoder, segments * k + (fixed_length if layout.read_in_place else 0), segments * k
