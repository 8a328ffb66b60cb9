"""Choosing the next token of each row: greedily, or drawn from what a request allows."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from icae_jax.errors import UserError
from icae_jax.models.pytree import pytree

TIE = 1e-4  # where the two best logits lie closer, another batch may choose the other token
MOST_ALTERNATIVES = 20  # log-probabilities of so many tokens at most


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen, and where they end.

    Attributes:
      max_new_tokens: at most, stop token not counted.
      temperature: of logits; 0 takes the best token.
      top_k: only the k most likely tokens; 0: all.
      top_p: only the fewest most likely tokens whose probabilities sum to p (arXiv 1904.09751).
      min_p: only tokens of at least this part of the best one's probability (arXiv 2407.01082).
      repetition_penalty: divides positive logits of tokens that prompt or answer already hold, and
        multiplies negative ones (arXiv 1909.05858); 1: none.
      seed: of the draws, which depend on nothing else.
      stop: texts before which an answer ends.
      alternatives: log-probabilities of so many most likely tokens are given at each token.
      past_limit: whether the token behind the last is looked at too, in case it ends the text.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    alternatives: int = 0
    past_limit: bool = True

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        finite = 0 <= self.temperature < math.inf
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "it must be positive"),
            "temperature": (finite, "give 0 for the best token, or a positive number"),
            "top_k": (0 <= self.top_k < 2**31, "give 0 for all tokens, or a number below 2^31"),
            "top_p": (0 < self.top_p <= 1, "give a number above 0 and up to 1"),
            "min_p": (0 <= self.min_p <= 1, "give a number from 0 to 1"),
            "repetition_penalty": (
                0.001 <= self.repetition_penalty <= 1000,
                "give 1 for none, or a number from 0.001 to 1000",
            ),
            "seed": (0 <= self.seed < 2**63, "give a whole number from 0 to 2^63 - 1"),
            "stop": (all(self.stop), "a stop text must not be empty"),
            "alternatives": (
                0 <= self.alternatives <= MOST_ALTERNATIVES,
                f"give a number from 0 to {MOST_ALTERNATIVES}",
            ),
        }
        for name, (good, remedy) in checks.items():
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}; {remedy}")

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, with no regard to earlier ones."""
        return self.temperature == 0 and self.repetition_penalty == 1


GREEDY = Sampling()


@pytree
class Settings:
    """`Sampling` of rows on the devices. key: two numbers made of the seed."""

    temperature: Float[Any, " R"]
    top_k: Int[Any, " R"]
    top_p: Float[Any, " R"]
    min_p: Float[Any, " R"]
    penalty: Float[Any, " R"]
    key: Int[Any, "R 2"]

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "Settings":
        """Those of requests, on the host."""

        def column(name, dtype):
            return np.asarray([getattr(sampling, name) for sampling in samplings], dtype)

        seeds = column("seed", np.uint64)
        return cls(
            column("temperature", np.float32),
            column("top_k", np.int32),
            column("top_p", np.float32),
            column("min_p", np.float32),
            column("repetition_penalty", np.float32),
            np.stack([seeds >> np.uint64(32), seeds & np.uint64(2**32 - 1)], 1).astype(np.uint32),
        )


class Choice(NamedTuple):
    """The next token of each row.

    log_prob: of the token, by the model's own logits, in nats. tie: whether it was the best and the
    second best lay within `TIE`. others, other_log_probs: the most likely tokens.
    """

    token: Int[Any, " R"]
    log_prob: Float[Any, " R"]
    tie: Bool[Any, " R"]
    others: Int[Any, "R A"]
    other_log_probs: Float[Any, "R A"]


def best(logits_RV: Float[Any, "R V"], alternatives: int = 0) -> Choice:
    """The most likely token of each row; of equal ones the first."""
    # Not `top_k`, which XLA's CPU backend makes a sort of the vocabulary inside larger programs.
    token = jnp.argmax(logits_RV, -1).astype(jnp.int32)
    return _choice(logits_RV, logits_RV, token, jnp.ones(len(token), bool), alternatives)


def _choice(logits_RV, ranked_RV, token, is_best, alternatives) -> Choice:
    """A `Choice`. ranked_RV: what ties are told by."""
    R, V = logits_RV.shape
    total = jax.nn.logsumexp(logits_RV, -1)
    at = token[:, None]
    top = jnp.take_along_axis(ranked_RV, at, 1)[:, 0]
    second = jnp.where(jnp.broadcast_to(jnp.arange(V)[None], (R, V)) == at, -jnp.inf, ranked_RV)
    tie = is_best & (top - second.max(-1) < TIE)
    others, other_log_probs = jnp.zeros((R, 0), jnp.int32), jnp.zeros((R, 0))
    if alternatives:
        values, others = jax.lax.top_k(logits_RV, alternatives)
        other_log_probs = values - total[:, None]
    log_prob = jnp.take_along_axis(logits_RV, at, 1)[:, 0] - total
    return Choice(token, log_prob, tie, others.astype(jnp.int32), other_log_probs)


def choose(
    logits_RV: Float[Any, "R V"],
    settings: Settings,
    seen_RV: Bool[Any, "R V"],
    number_R: Int[Any, " R"],
    alternatives: int = 0,
) -> Choice:
    """The next token of each row, as its settings say.

    seen_RV: tokens that prompt and answer hold, for the penalty. number_R: how many tokens were
    chosen before, so that every draw of a request has its own key, whatever else is in the batch.
    """
    by_row = settings.penalty[:, None]
    penalised = jnp.where(logits_RV > 0, logits_RV / by_row, logits_RV * by_row)
    ranked = jnp.where(seen_RV, penalised, logits_RV)
    is_best = settings.temperature == 0
    scaled = ranked / jnp.where(is_best, 1, settings.temperature)[:, None]
    allowed = jnp.where(_allowed(scaled, settings), scaled, -jnp.inf)

    def draw(key, number, logits):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), number)
        return jax.random.categorical(key, logits)

    drawn = jax.vmap(draw)(settings.key, number_R, allowed)
    token = jnp.where(is_best, jnp.argmax(ranked, -1), drawn).astype(jnp.int32)
    return _choice(logits_RV, ranked, token, is_best, alternatives)


def _allowed(scaled_RV, settings) -> Bool[Array, "R V"]:
    """Which tokens may be drawn: those within top_k, then top_p of what is left, then min_p."""
    V = scaled_RV.shape[1]
    falling = -jnp.sort(-scaled_RV, axis=-1)
    top_k = jnp.where(settings.top_k > 0, settings.top_k, V)[:, None]
    falling = jnp.where(jnp.arange(V)[None] < top_k, falling, -jnp.inf)
    probabilities = jax.nn.softmax(falling, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities
    top_p = settings.top_p[:, None]
    # Rounded, the sum may exceed 1 before the last token.
    kept = jnp.where((before < top_p) | (top_p >= 1), falling, jnp.inf)
    least = jnp.min(jnp.where(jnp.isfinite(kept), kept, jnp.inf), -1, keepdims=True)
    least = jnp.maximum(least, falling[:, :1] + jnp.log(settings.min_p)[:, None])
    return scaled_RV >= jnp.minimum(least, falling[:, :1])
