"""The engine's programs: prefill chunks of prompts, and decode a token of every row.

They work on a cache of R rows (`inference.cache`), which is donated and updated in place, and on
what is known of each row. A row that is free, or not yet prefilled, runs along masked.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.inference import cache as caches
from icae_jax.inference import sampling
from icae_jax.inference.cache import Cache
from icae_jax.inference.sampling import GREEDY, Choice, Settings
from icae_jax.models.pytree import pytree
from icae_jax.runtime import compiler_options


@pytree
class Rows:
    """What the devices know of each row.

    memory: the place of its memory. start: the position of its prompt's first token. written: how
    many tokens its cache holds. token: chosen last, not yet run. number: how many were chosen.
    seen: tokens that it holds, kept where a row has a penalty.
    """

    memory: Int[Any, " R"]
    start: Int[Any, " R"]
    written: Int[Any, " R"]
    token: Int[Any, " R"]
    number: Int[Any, " R"]
    settings: Settings
    seen: Bool[Any, "R V"]


class Chunks(NamedTuple):
    """A chunk of each of some prompts, right-padded.

    rows: their rows; a row beyond the last is padding. offsets: tokens written before. last:
    whether the prompt ends with this chunk. The others: as of `Rows`.
    """

    rows: Int[Any, " b"]
    ids: Int[Any, "b T"]
    lengths: Int[Any, " b"]
    offsets: Int[Any, " b"]
    last: Bool[Any, " b"]
    memory: Int[Any, " b"]
    start: Int[Any, " b"]
    settings: Settings


class How(NamedTuple):
    """What a program computes.

    sharing: which place each row reads its memory from: "none", "own" (row i reads place i), "one"
    (all read the same) or "any". plain: all rows take the best token, with no regard to earlier
    ones. alternatives: see `Sampling`. reach: how many of its row's tokens a chunk looks back at.
    """

    sharing: str
    plain: bool
    alternatives: int
    reach: int = 0


def _memory_parts(cache, how, places, one):
    if how.sharing == "none":
        return []
    if how.sharing == "one":
        return [cache.one_memory(one)]
    return [cache.memory_part(None if how.sharing == "own" else places)]


def _choose(decoder, hidden_bD, how, settings, seen, number) -> Choice:
    logits = decoder.base.head.logits(hidden_bD)
    if how.plain:
        return sampling.best(logits, how.alternatives)
    return sampling.choose(logits, settings, seen, number, how.alternatives)


def _behind(first, token):
    """`first`, known only when the token is.

    So XLA writes to the cache behind its last reader, in place; else it would copy the cache.
    """
    return jnp.minimum(first, first + token)


def prefill(
    decoder: Decoder, cache: Cache, rows: Rows, chunks: Chunks, *, how: How
) -> tuple[Cache, Rows, Choice]:
    """Runs chunks of prompts, and chooses the token behind each."""
    b, T = chunks.ids.shape
    positions = chunks.start[:, None] + chunks.offsets[:, None] + jnp.arange(T)[None]
    parts = _memory_parts(cache, how, chunks.memory, chunks.memory[0])
    if how.reach:
        own = cache.own_part(rows.written, rows.start, chunks.rows, how.reach)
        parts.append(own)
    last = (chunks.lengths - 1)[:, None]
    apart = isinstance(decoder.base.params["layers"], tuple)
    x, at = decoder.embed(chunks.ids), last if apart else None
    hidden, kv = decoder.run(x, positions, parts, at=at, return_kv=True)
    hidden = hidden[:, 0] if apart else jnp.take_along_axis(hidden, last[..., None], 1)[:, 0]

    seen = rows.seen
    if not how.plain:
        before = jnp.take(seen, chunks.rows, 0, mode="clip") & (chunks.offsets > 0)[:, None]
        real = (jnp.arange(T)[None] < chunks.lengths[:, None]) & (chunks.ids >= 0)
        ids = jnp.where(real, chunks.ids, before.shape[1])
        before = before.at[jnp.arange(b)[:, None], ids].set(True, mode="drop")
        seen = seen.at[chunks.rows].set(before, mode="drop")
    number = jnp.zeros(b, jnp.int32)
    behind = jnp.take(seen, chunks.rows, 0, mode="clip") if not how.plain else None
    choice = _choose(decoder, hidden, how, chunks.settings, behind, number)

    def put(x, new):
        return x.at[chunks.rows].set(new, mode="drop")

    if not how.plain:
        chosen = jnp.where(chunks.last, choice.token, seen.shape[1])
        seen = seen.at[chunks.rows, chosen].set(True, mode="drop")
    cache = cache.put_tokens(kv, chunks.rows, _behind(chunks.offsets, choice.token))
    rows = rows.replace(
        memory=put(rows.memory, chunks.memory),
        start=put(rows.start, chunks.start),
        written=put(rows.written, chunks.offsets + chunks.lengths),
        token=put(rows.token, choice.token),
        number=put(rows.number, jnp.ones(b, jnp.int32)),
        settings=jax.tree.map(put, rows.settings, chunks.settings),
        seen=seen,
    )
    return cache, rows, choice


def step(
    decoder: Decoder,
    cache: Cache,
    rows: Rows,
    active: Bool[Any, " R"],
    place: Int[Any, ""],
    *,
    how: How,
) -> tuple[Cache, Rows, Choice]:
    """Runs the token that each row chose last, and chooses the next.

    active: the rows that have their prompts; what the others choose means nothing. place: the one
    that all read, if `how` says so.
    """
    R = len(rows.token)
    positions = (rows.start + rows.written)[:, None]
    parts = [
        *_memory_parts(cache, how, rows.memory, place),
        cache.own_part(rows.written, rows.start),
    ]
    x = decoder.embed(rows.token[:, None])
    hidden, kv = decoder.run(x, positions, parts, return_kv=True)
    choice = _choose(decoder, hidden[:, 0], how, rows.settings, rows.seen, rows.number)
    cache = cache.put_tokens(kv, jnp.arange(R), _behind(rows.written, choice.token))
    seen = rows.seen
    if not how.plain:
        chosen = jnp.where(active, choice.token, seen.shape[1])
        seen = seen.at[jnp.arange(R), chosen].set(True, mode="drop")
    rows = rows.replace(
        written=rows.written + active,
        token=jnp.where(active, choice.token, rows.token),
        number=rows.number + active,
        seen=seen,
    )
    return cache, rows, choice


def load(cache: Cache, prefix: Prefix, texts: Int[Any, " b"], places: Int[Any, " b"]) -> Cache:
    """Writes the memories of some texts of a prefix into places of the cache."""
    taken = Prefix(
        *(jnp.take(x, texts, 1) for x in (prefix.k, prefix.v)),
        *(jnp.take(x, texts, 0) for x in (prefix.mask, prefix.positions, prefix.end)),
    )
    return cache.put_memory(taken, places)


def clear(cache: Cache, row: Int[Any, ""], place: Int[Any, ""]) -> Cache:
    """Writes zeros over a row and a place: NaN survives the mask's product with 0."""
    return cache.clear(row, place)


class Programs(NamedTuple):
    """Compiled once for all engines of the same shapes."""

    prefill: Any
    step: Any
    load: Any
    clear: Any
    empty: Any


@functools.cache
def programs() -> Programs:
    """The jitted programs."""
    options = compiler_options.for_decoding() or None
    how = {"static_argnames": "how", "compiler_options": options, "donate_argnums": (1, 2)}
    return Programs(
        jax.jit(prefill, **how),
        jax.jit(step, **how),
        jax.jit(load, donate_argnums=0),
        jax.jit(clear, donate_argnums=0),
        jax.jit(empty, static_argnames=("rows", "tokens", "memories", "memory_tokens")),
    )


def empty(
    decoder: Decoder, *, rows: int, tokens: int, memories: int, memory_tokens: int
) -> tuple[Cache, Rows]:
    """An empty cache, and rows that are free. Sizes: as of `engine.Engine`."""
    cache = caches.make(
        decoder,
        rows=rows,
        tokens=tokens,
        memories=memories,
        memory_tokens=memory_tokens,
    )
    settings = jax.tree.map(jnp.asarray, Settings.of([GREEDY] * rows))
    zeros = [jnp.zeros(rows, jnp.int32) for _ in range(5)]
    seen = jnp.zeros((rows, decoder.base.config.vocab_size), bool)
    return cache, Rows(*zeros, settings, seen)
