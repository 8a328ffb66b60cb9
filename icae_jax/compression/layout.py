"""Position layouts: where memory tokens sit in the encoder, where the memory sits in the decoder, where targets start.

| name       | encoder: text, memory tokens        | decoder: memory              | targets start            |
|------------|-------------------------------------|------------------------------|--------------------------|
| sequential | 0 … n-1, then n … n+k-1             | 0, 1, 2, …                   | after the memory         |
| uniform    | 1 … n, spread over the ids they cover | the same, running over segments | AE at 0, others after the text |
| servable   | 1 … n, spread over the ids they cover | 0, 1, 2, …                 | after the memory         |

`sequential` is the reference ICAE (arXiv 2307.06945). `uniform` is UPL's. `servable` keeps UPL's encoder, but can be read by servers that
take embeddings in a prompt, since those number positions 0, 1, 2, …  Encoder positions restart in every segment.
"""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layout:
    """spread_encoder, spread_decoder: memory tokens sit at the ids of the text they cover. ae_restarts: AE targets start at 0."""

    name: str
    spread_encoder: bool
    spread_decoder: bool
    ae_restarts: bool


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("sequential", False, False, False),
        Layout("uniform", True, True, True),
        Layout("servable", True, False, False),
    )
}


def get(name):
    """The `Layout` of that name; ValueError with the choices otherwise."""
    if name not in LAYOUTS:
        raise ValueError(f"layout is {name!r}; choose from {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def spread(k, length):
    """Positions of k memory tokens over text at 1 … length: the centre of each one's share. `[..., k]` for `length [...]`."""
    return 1 + jnp.einsum("...,k->...k", length, 2 * jnp.arange(k) + 1) // (2 * k)


def encoder_positions(layout, N, k, lengths):
    """Positions of `[text padded to N | k memory tokens]`, `[..., N + k]`, for text lengths `[...]`."""
    text = jnp.broadcast_to(jnp.arange(N) + int(layout.spread_encoder), (*lengths.shape, N))
    after = lengths[..., None] + jnp.broadcast_to(jnp.arange(k), (*lengths.shape, k))
    memory = spread(k, lengths) if layout.spread_encoder else after
    return jnp.concatenate([text, memory], -1)


def decoder_positions(layout, k, lengths_BS):
    """Positions of the memory in the decoder, counted from the memory's start, and the position after it.

    Returns `[B, S * k]` and `[B]`. Segments of zero length take no positions (their memory is masked).
    """
    B, S = lengths_BS.shape
    if not layout.spread_decoder:
        tokens = k * jnp.sum(lengths_BS > 0, axis=1)
        return jnp.broadcast_to(jnp.arange(S * k), (B, S * k)), tokens
    ends = jnp.cumsum(lengths_BS, axis=1)
    positions = (ends - lengths_BS)[..., None] + spread(k, lengths_BS)
    return positions.reshape(B, S * k), ends[:, -1] + 1


def target_starts(layout, objective, prefix):
    """Position of a target's first token, `[B]`: what it would have alone behind this head and memory."""
    if objective == "ae" and layout.ae_restarts:
        return jnp.zeros_like(prefix.end)
    return prefix.end
