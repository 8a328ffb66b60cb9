"""Attention in plain XLA: exact, with any mask, on any device.

Texts are computed in groups and queries in chunks, each with the scores of the keys that it may
see; one chunk's scores are materialised at a time, also in the backward pass. So memory grows with
T + S, not T x S (as in flash attention, arXiv 2205.14135).

Queries are `[b, K, G, Q, T, H]`: those of b texts, each read by G rows (B = b * G). A source of
keys is `(k, v, mask)`: k and v `[b, G, S, K, H]`, each row's own, or `[b, S, K, H]`, one text's for
all its rows; mask `[b or 1, 1, G or 1, 1, T or 1, S]`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from icae_jax.models import axes

# Queries at a time: long enough for matmuls, short enough that a CPU's cache holds their scores.
CHUNK = 128
# Scores of a chunk up to which several texts are taken at a time: 4 MiB, for the same reason.
SCORES = 1 << 20


class Scores(NamedTuple):
    """How scores are made of products of queries and keys: scaled, then perhaps softly capped."""

    scale: float
    softcap: float | None = None

    def capped(self, scaled: Any) -> Any:
        """Capped scores of scaled ones."""
        return scaled if self.softcap is None else self.softcap * jnp.tanh(scaled / self.softcap)

    def uncapped_gradient(self, gradient: Any, scaled: Any) -> Any:
        """The gradient of scaled scores from that of the capped ones."""
        if self.softcap is None:
            return gradient
        return gradient * (1 - jnp.square(jnp.tanh(scaled / self.softcap)))


class _Schedule(NamedTuple):
    """How the work is cut.

    ends: for each chunk of queries, how many keys of the first source it may see at most; later
    keys are skipped. turns: groups into which the texts of each of `devices` are
    divided, computed one after another. unroll: whether the loop over groups is written out.
    """

    ends: tuple[int, ...]
    turns: int
    devices: int
    unroll: bool


def attend(
    q_BTNH: Float[Any, "B T N H"],
    k_BSKH: Float[Any, "B S K H"],
    v_BSKH: Float[Any, "B S K H"],
    mask: Bool[Any, "_ _ S"],
    prefix: Any,
    ends: tuple[int, ...],
    unroll: bool,
    scores: Scores,
) -> Float[Array, "B T N H"]:
    """As `attention.attend`; a prefix is read in place by all rows that it serves.

    ends: the most keys that each chunk of `CHUNK` queries sees, counted from the first.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    prefixes = prefix if isinstance(prefix, list) else [] if prefix is None else [prefix]
    prefixes = [part for part in prefixes if part[0].shape[1]]
    b = min((len(k) for k, _, _ in prefixes), default=B)

    def as_source(mask):
        """`[1 or b or B, T or 1, S]` as a source has it."""
        return mask.reshape(min(len(mask), b), 1, -1, 1, *mask.shape[1:])

    q = (q_BTNH * jnp.asarray(scores.scale, q_BTNH.dtype)).reshape(b, B // b, T, K, N // K, H)
    q = q.transpose(0, 3, 1, 4, 2, 5)

    def by_text(x):
        """Keys or values of each row, by its text."""
        return x.reshape(b, B // b, *x.shape[1:])

    sources = ((by_text(k_BSKH), by_text(v_BSKH), as_source(mask)),)
    for k, v, seen in prefixes:
        kv = (k, v) if len(k) == b else (by_text(k), by_text(v))
        sources += ((*kv, as_source(seen[:, None] if seen.ndim == 2 else seen)),)
    _, devices = axes.split("batch", b)
    keys = sum(mask.shape[-1] for _, _, mask in sources)
    most = max(1, SCORES // (B // b * N * min(T, CHUNK) * keys))  # texts at a time
    texts = b // devices
    turns = next(n for n in range(1, texts + 1) if texts % n == 0 and texts // n <= most)
    schedule = _Schedule(tuple(ends), turns, devices, unroll)
    out = _softmax_attention(q, sources, schedule, scores)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _softmax_attention(q, sources, schedule, scores):
    """Softmax attention over all keys of the sources, `[b, K, G, Q, T, H]`. q: scaled."""
    return _attention_fwd(q, sources, schedule, scores)[0]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _attention_fwd(q, sources, schedule, scores):
    forward = functools.partial(_forward, schedule.ends, scores)
    out, logs = (checkpoint_name(x, "attention") for x in _in_turns(schedule, forward, q, sources))
    return out, (q, sources, out, logs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attention_bwd(schedule, scores, residuals, g):
    backward = functools.partial(_backward, schedule.ends, scores)
    d_q, d_sources = _in_turns(schedule, backward, *residuals, g)
    return d_q, tuple((*d_kv, None) for d_kv in d_sources)


_softmax_attention.defvjp(_attention_fwd, _attention_bwd)


def _in_turns(schedule, function, *trees):
    """`function(*trees)` for one group of texts after another.

    Arrays `[b, …]` are cut along their first axis; those `[1, …]` are for all texts.
    """
    if schedule.turns == 1:
        return function(*trees)
    leaves, tree = jax.tree.flatten(trees)

    def cut(x):
        each = len(x) // (schedule.devices * schedule.turns)
        x = x.reshape(schedule.devices, schedule.turns, each, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1).reshape(schedule.turns, -1, *x.shape[3:])

    def joined(x):
        each = x.shape[1] // schedule.devices
        x = x.reshape(schedule.turns, schedule.devices, each, *x.shape[2:])
        return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:])

    def turn(_, xs):
        xs = iter(xs)
        group = [x if len(x) == 1 else next(xs) for x in leaves]
        return None, function(*jax.tree.unflatten(tree, group))

    xs = [cut(x) for x in leaves if len(x) > 1]
    _, out = jax.lax.scan(turn, None, xs, unroll=schedule.unroll)
    return jax.tree.map(joined, out)


def _product(x, y, out):
    """An einsum in float32 of two `(letters, array)`.

    Queries are "bkgqth", scores "bkgqts", keys and values as `_letters` says.
    """
    return jnp.einsum(f"{x[0]},{y[0]}->{out}", x[1], y[1], preferred_element_type=jnp.float32)


def _letters(k):
    return "bgskh" if k.ndim == 5 else "bskh"


def _scaled(q, k):
    """Scaled scores in float32; q is scaled."""
    return _product(("bkgqth", q), (_letters(k), k), "bkgqts")


def _masked(scores, mask):
    """Scores, far below all others where the mask is false."""
    lowered = jnp.where(mask, np.float32(0), jnp.finfo(jnp.float32).min / 2)
    return scores + jnp.broadcast_to(lowered, scores.shape)


def _chunks(sources, ends, T):
    """The queries in chunks with what each may see: `(slice of queries, [(k, v, mask), …])`."""
    for number, end in enumerate(ends):
        at = slice(number * CHUNK, min(T, (number + 1) * CHUNK))
        (k, v, mask), *shared = sources
        visible = [(k[..., :end, :, :], v[..., :end, :, :], mask[..., :end]), *shared]
        yield (
            at,
            [(k, v, mask if mask.shape[4] == 1 else mask[..., at, :]) for k, v, mask in visible],
        )


def _forward(ends, how, q, sources):
    """The output, and the logarithms of the softmax's sums, `[b, K, G, Q, T, 1]` float32."""
    outs, logs = [], []
    for at, visible in _chunks(sources, ends, q.shape[4]):
        scores = [_masked(how.capped(_scaled(q[..., at, :], k)), mask) for k, _, mask in visible]
        top = functools.reduce(jnp.maximum, (s.max(-1, keepdims=True) for s in scores))
        weights = [jnp.exp(s - top) for s in scores]
        total = sum(w.sum(-1, keepdims=True) for w in weights)
        values = [(_letters(v), v) for _, v, _ in visible]
        read = sum(
            _product(("bkgqts", w.astype(v[1].dtype)), v, "bkgqth")
            for w, v in zip(weights, values, strict=True)
        )
        outs.append((read / total).astype(q.dtype))
        logs.append(top + jnp.log(total))
    return jnp.concatenate(outs, 4), jnp.concatenate(logs, 4)


def _backward(ends, how, q, sources, out, logs, g):
    """The gradients of the queries, and of each source's keys and values. Scores are recomputed."""
    # The mean of the weights' gradients, weighted by the weights.
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    d_q, d_kv = [], [[jnp.zeros(x.shape, jnp.float32) for x in (k, v)] for k, v, _ in sources]
    for at, visible in _chunks(sources, ends, q.shape[4]):
        q_at, g_at, logs_at, mean_at = (x[..., at, :] for x in (q, g, logs, mean))
        d_q_at = 0.0
        for (k, v, mask), d in zip(visible, d_kv, strict=True):
            letters = _letters(k)
            scaled = _scaled(q_at, k)
            weights = jnp.exp(_masked(how.capped(scaled), mask) - logs_at)
            d_weights = _product(("bkgqth", g_at), (letters, v), "bkgqts")
            d_scores = weights * (d_weights - mean_at)
            d_scores = how.uncapped_gradient(d_scores, scaled).astype(q.dtype)
            d_q_at += _product(("bkgqts", d_scores), (letters, k), "bkgqth")
            factors = ((d_scores, q_at), (weights.astype(g.dtype), g_at))
            for i, (scores, rows) in enumerate(factors):
                update = _product(("bkgqts", scores), ("bkgqth", rows), letters)
                d[i] = d[i].at[..., : k.shape[-3], :, :].add(update)
        d_q.append(d_q_at.astype(q.dtype))
    return jnp.concatenate(d_q, 4), [
        (dk.astype(k.dtype), dv.astype(v.dtype))
        for (k, v, _), (dk, dv) in zip(sources, d_kv, strict=True)
    ]
