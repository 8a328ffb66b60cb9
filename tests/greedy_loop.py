"""What the engine is compared with: greedy decoding of a batch in one compiled loop."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.models.axes import KV_AXES, constrain

TIE = 1e-4  # where the two best logits lie closer, another batch size may choose the other token


class Prompts(NamedTuple):
    """Prompts behind a prefix, right-padded.

    ids: negative ids are rows of the memory table. lengths: real tokens, at least one. starts:
    position of a prompt's first token. limits: most new tokens of each row, from 1 to `greedy`'s
    maximum; None for the maximum.
    """

    ids: Any
    lengths: Any
    starts: Any
    limits: Any | None = None


class Generated(NamedTuple):
    """What `greedy` decoded.

    ids: new tokens, without the stop token, 0 after the end. lengths: how many. stopped: whether a
    stop token came. ties: steps at which the two best logits lay within `TIE`. log_probs: of the
    new tokens and, where it came, the stop token, summed; nats, float32.
    """

    ids: Any
    lengths: Any
    stopped: Any
    ties: Any
    log_probs: Any


class _State(NamedTuple):
    """The loop's state.

    token: the one chosen last, not yet written out. log_prob: its own. cache: K and V, `[prefix |
    prompt | new]`.
    """

    step: Any
    token: Any
    log_prob: Any
    done: Any
    out: Generated
    cache: tuple[Any, Any]


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "stop_ids"))
def greedy(
    decoder: Decoder,
    prefix: Prefix,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
) -> Generated:
    """Decodes greedily behind a prefix and prompts: argmax over the base's vocabulary.

    The prefix's K/V have Bp rows, where Bp divides the prompts' B (see `models.attention.attend`).
    A row ends at its limit whatever its neighbours do.
    """
    (B, T), n = prompts.ids.shape, max_new_tokens
    head = decoder.base.head
    L, Bp, P, K, H = prefix.k.shape
    limits = jnp.full(B, n) if prompts.limits is None else prompts.limits
    stops = jnp.asarray(stop_ids, jnp.int32)

    def choose(hidden_BD):
        """The best token of each row.

        With its log-probability, whether the second best ties with it, and whether it is a stop
        token.
        """
        logits = head.logits(hidden_BD)
        best, ids = jax.lax.top_k(logits, 2)
        token = ids[:, 0].astype(jnp.int32)
        log_prob = best[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        is_stop = jnp.any(token[:, None] == stops[None], axis=1)
        return token, log_prob, best[:, 0] - best[:, 1] < TIE, is_stop

    # ----------------------------------------------------------------------------------- the prompt
    positions = prompts.starts[:, None] + jnp.arange(T)[None]
    x = decoder.embed(prompts.ids)
    hidden, (k, v) = decoder.run(x, positions, prefix.visible, return_kv=True)
    last = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)[:, 0]
    token, log_prob, tie, ends = choose(last)

    def make_cache(prefix_kv, prompt_kv):
        new = jnp.zeros((L, B, n, K, H), prompt_kv.dtype)
        rows = jnp.repeat(prefix_kv, B // Bp, axis=1)
        return constrain(jnp.concatenate([rows, prompt_kv, new], axis=2), *KV_AXES)

    cache = (
        make_cache(prefix.k, k),
        make_cache(prefix.v, v),
    )

    # ----------------------------------------------------------------------------- one token a step
    real_prompt = jnp.arange(T)[None] < prompts.lengths[:, None]
    visible = jnp.concatenate([jnp.repeat(prefix.mask, B // Bp, axis=0), real_prompt], 1)
    first_new = prompts.starts + prompts.lengths
    cache_positions = jnp.concatenate(
        [
            jnp.repeat(prefix.positions, B // Bp, axis=0),
            positions,
            first_new[:, None] + jnp.arange(n)[None],
        ],
        1,
    )

    def unfinished(state):
        return (state.step < n) & ~jnp.all(state.done)

    def step(state):
        # Writes out the token chosen last and runs it to choose the next one. Finished rows run on,
        # masked.
        i, done, out = state.step, state.done, state.out
        position = (first_new + i)[:, None]
        mask = jnp.concatenate([visible, jnp.broadcast_to(jnp.arange(n) < i, (B, n))], 1)
        hidden, (k, v) = decoder.run(
            state.token[:, None], position, (*state.cache, mask, cache_positions), return_kv=True
        )
        cache = tuple(
            constrain(jax.lax.dynamic_update_slice_in_dim(c, new, P + T + i, 2), *KV_AXES)
            for c, new in zip(state.cache, (k, v), strict=True)
        )
        token, log_prob, tie, ends = choose(hidden[:, 0])
        full = i + 1 >= limits
        out = Generated(
            ids=out.ids.at[:, i].set(jnp.where(done, 0, state.token)),
            lengths=out.lengths + ~done,
            stopped=out.stopped | (~done & ends),
            # The last step's choice is never written out unless it is a stop token; otherwise it is
            # no tie that counts.
            ties=out.ties + (tie & ~done & (~full | ends)),
            # Of the token written here and, since it is never written, of a stop token chosen here.
            log_probs=out.log_probs
            + jnp.where(done, 0, state.log_prob)
            + jnp.where(~done & ends, log_prob, 0),
        )
        return _State(i + 1, token, log_prob, done | ends | full, out, cache)

    zeros = jnp.zeros(B, jnp.int32)
    out = Generated(
        jnp.zeros((B, n), jnp.int32),
        zeros,
        ends,
        tie.astype(jnp.int32),
        jnp.where(ends, log_prob, 0),
    )
    start = _State(jnp.zeros((), jnp.int32), token, log_prob, ends, out, cache)
    return jax.lax.while_loop(unfinished, step, start).out
