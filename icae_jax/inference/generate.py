"""Greedy decoding behind a memory: one compiled loop over a preallocated K/V cache, batched."""

import functools
import typing

import jax
import jax.numpy as jnp

from icae_jax.compression import encoder
from icae_jax.models import llama, rope

TIE = 1e-4  # where the two best logits lie closer, another batch size may choose the other


class Generated(typing.NamedTuple):
    """ids `[B, n]` new tokens, without the stop token, 0 after the end. lengths `[B]`. stopped `[B]`: a stop id came.

    ties `[B]`: steps at which the two best logits lay within `TIE`.
    """

    ids: jnp.ndarray
    lengths: jnp.ndarray
    stopped: jnp.ndarray
    ties: jnp.ndarray


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "stop_ids"))
def greedy(
    model,
    base_params,
    table,
    prefix,
    starts,
    prompt_ids,
    prompt_lengths,
    limits=None,
    *,
    max_new_tokens,
    stop_ids,
):
    """Decodes greedily behind `prefix` and a prompt; argmax over the base's vocabulary alone.

    prompt_ids `[B, T]`, right-padded, at least one real token a row (negative ids: rows of the memory table). prompt_lengths
    `[B]`. starts `[B]`: position of a prompt's first token. prefix: K/V of Bp rows, where Bp divides B as in `llama.attention`.
    limits `[B]`: most new tokens of each row, from 1 to max_new_tokens (the default): a row ends there, whatever its neighbours do.
    """
    B, T = prompt_ids.shape
    config = model.config
    L, Bp, P, K, H = prefix.k.shape
    n = max_new_tokens
    limits = jnp.full(B, n) if limits is None else limits
    head = llama.head_kernel(base_params)
    params = {"params": base_params}

    def choose(hidden_BD):
        logits = jnp.einsum(
            "bd,dv->bv", hidden_BD, head.astype(hidden_BD.dtype), preferred_element_type=jnp.float32
        )
        best, ids = jax.lax.top_k(logits, 2)
        return ids[:, 0].astype(jnp.int32), best[:, 0] - best[:, 1] < TIE

    # Prompt: behind the shared prefix; its K/V start the rows' own cache, [prefix | prompt | new tokens].
    x = encoder.embed_with_table(base_params, table, prompt_ids)
    positions = starts[:, None] + jnp.arange(T)[None]
    hidden, (k, v) = model.apply(
        params, x, positions, jnp.ones((1, T), bool), prefix=prefix.seen, return_kv=True
    )
    last = jnp.take_along_axis(hidden, (prompt_lengths - 1)[:, None, None], axis=1)[:, 0]
    first, first_tie = choose(last)

    def cache_of(shared, own):
        room = jnp.zeros((L, B, n, K, H), own.dtype)
        return llama.constrain(
            jnp.concatenate([jnp.repeat(shared, B // Bp, axis=1), own, room], axis=2),
            *llama.KV_AXES,
        )

    cache = (cache_of(prefix.k, rope.rotate_keys(config, k, positions)), cache_of(prefix.v, v))
    seen = jnp.concatenate(
        [jnp.repeat(prefix.mask, B // Bp, axis=0), jnp.arange(T)[None] < prompt_lengths[:, None]], 1
    )
    new_positions = (starts + prompt_lengths)[:, None] + jnp.arange(n)[None]
    cache_positions = jnp.concatenate(
        [jnp.repeat(prefix.positions, B // Bp, axis=0), positions, new_positions], 1
    )
    stops = jnp.asarray(stop_ids, jnp.int32)

    def is_stop(ids):
        return jnp.any(ids[:, None] == stops[None], axis=1)

    def unfinished(state):
        return (state["i"] < n) & ~jnp.all(state["done"])

    def step(state):
        # The token chosen last is written out, then run to choose the next one; finished rows run on, masked.
        i, token, done = state["i"], state["token"], state["done"]
        ids = state["ids"].at[:, i].set(jnp.where(done, 0, token))
        lengths = state["lengths"] + ~done
        at = starts + prompt_lengths + i
        mask = jnp.concatenate([seen, jnp.broadcast_to(jnp.arange(n) < i, (B, n))], 1)
        hidden, (k, v) = model.apply(
            params,
            token[:, None],
            at[:, None],
            jnp.ones((1, 1), bool),
            prefix=(*state["cache"], mask, cache_positions),
            return_kv=True,
        )
        k = rope.rotate_keys(config, k, at[:, None])
        cache = tuple(
            jax.lax.dynamic_update_slice_in_dim(c, new, P + T + i, 2)
            for c, new in zip(state["cache"], (k, v), strict=True)
        )
        cache = tuple(llama.constrain(c, *llama.KV_AXES) for c in cache)
        token, tie = choose(hidden[:, 0])
        ends = is_stop(token)
        stopped = state["stopped"] | (~done & ends)
        full = i + 1 >= limits
        # The last step's choice is never written out unless it is a stop, so only choices that count are counted as ties.
        ties = state["ties"] + (tie & ~done & (~full | ends))
        return {
            "i": i + 1, "token": token, "done": done | ends | full, "ids": ids, "lengths": lengths, "stopped": stopped, "ties": ties,
            "cache": cache,
        }  # fmt: skip

    ends = is_stop(first)
    state = jax.lax.while_loop(
        unfinished,
        step,
        {
            "i": jnp.zeros((), jnp.int32),
            "token": first,
            "done": ends,
            "ids": jnp.zeros((B, n), jnp.int32),
            "lengths": jnp.zeros((B,), jnp.int32),
            "stopped": ends,
            "ties": first_tie.astype(jnp.int32),
            "cache": cache,
        },
    )
    return Generated(state["ids"], state["lengths"], state["stopped"], state["ties"])
