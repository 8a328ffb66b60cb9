"""How a context is cut into segments, and how many positions it takes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.models.pytree import pytree, static


@pytree
class Contexts:
    """Contexts cut into segments, as the encoder reads them.

    ids: token ids, padded. lengths: tokens of each segment, 0 for a segment that a shorter text
    lacks. k: memory tokens per segment.
    """

    ids: Int[Any, "B S N"]
    lengths: Int[Any, "B S"]
    k: int = static()


def segment_shape(tokens: int, config: CompressionConfig) -> tuple[int, int]:
    """(segments, tokens per segment): near-equal, at most k x rate tokens (reference ICAE, v2)."""
    segments = max(1, math.ceil(tokens / config.segment_tokens))
    return segments, math.ceil(tokens / segments)


def choose_k(
    config: CompressionConfig,
    lengths: Sequence[int],
    *,
    k: int | np.integer | None = None,
    tokens: int | None = None,
    ratio: float | None = None,
) -> int:
    """The memory tokens per segment that a caller asks for; by default the most.

    One k holds for all texts. Of those that the compressor knows (`config.choices`, or any up to
    `config.segment_tokens`) it is the one for which the mean over texts of log²(memory tokens /
    wanted memory tokens) is least; of two alike, the larger. So twice as many count as far off as
    half as many, and with one text `tokens` and `ratio` are met as closely as they can be.

    Args:
      config: of the compressor.
      lengths: context tokens of each text, `<s>` included where the encoder reads one.
      k: memory tokens per segment.
      tokens: wanted memory tokens of each text, over all of its segments.
      ratio: wanted context tokens per memory token.

    Raises:
      UserError: more than one is given, k is unknown, or tokens or ratio is not positive.
    """
    given = {"k": k, "tokens": tokens, "ratio": ratio}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        values = " and ".join(f"{name} {value}" for name, value in given.items())
        raise UserError(f"{values} are given; give one of k, tokens and ratio")
    for name in ("tokens", "ratio"):
        if name in given and not 0 < given[name] < math.inf:  # NaN too
            raise UserError(f"{name} is {given[name]}; it must be positive and finite")
    if not lengths or given.keys() <= {"k"}:
        return config.choose(k)
    n = np.asarray(lengths, float)
    segments = np.asarray([segment_shape(length, config)[0] for length in lengths])
    wanted = np.full_like(n, tokens) if ratio is None else n / ratio
    # The mean of squared logs is least for the k nearest to this one.
    best = np.log(wanted / segments).mean()
    known = range(1, config.segment_tokens + 1) if config.any_k else config.choices
    return min(known, key=lambda k: (round(abs(math.log(k) - best), 9), -k))


def segment_contexts(
    contexts: Sequence[Sequence[int] | Int[np.ndarray, " n"]],
    config: CompressionConfig,
    shape: tuple[int, int] | None = None,
    pad_id: int = 0,
) -> tuple[Int[np.ndarray, "B S N"], Int[np.ndarray, "B S"]]:
    """Cuts token lists into near-equal segments, padded with `pad_id`: ids and lengths, int32.

    shape: (S, N) to pad to, by default just enough for the longest text. In a layout of fixed
    length N is `config.segment_tokens`, and the padding is attended to. A row without tokens has
    lengths 0.
    """
    shapes = [segment_shape(len(c), config) for c in contexts]
    S, N = shape or (max(s for s, _ in shapes), max(n for _, n in shapes))
    if config.position_layout.fixed_length:
        N = config.segment_tokens
    ids = np.full((len(contexts), S, N), pad_id, np.int32)
    lengths = np.zeros((len(contexts), S), np.int32)
    for b, (context, (segments, size)) in enumerate(zip(contexts, shapes, strict=True)):
        for s in range(segments):
            piece = context[s * size : (s + 1) * size]
            ids[b, s, : len(piece)] = piece
            lengths[b, s] = len(piece)
    return ids, lengths


class PositionBudget(NamedTuple):
    """Positions that a context takes of the base's.

    encoder: of one segment and its memory tokens. decoder: up to the memory's last position. start:
    where targets behind the memory start. The decoder's are counted from the sequence's start, with
    the head before the memory.
    """

    encoder: int
    decoder: int
    start: int

    def needed(self, behind: int = 0) -> int:
        """Positions that the base must have, with so many tokens behind the memory."""
        return max(self.encoder, self.decoder, self.start + behind)


def position_budget(
    config: CompressionConfig,
    tokens: int,
    *,
    k: int | None = None,
    segments: int | None = None,
    segment_tokens: int | None = None,
    head: int = 0,
) -> PositionBudget:
    """The positions that a context of so many tokens takes, for every caller that needs to know.

    k: memory tokens per segment, by default the most. segments, segment_tokens: how it is cut, by
    default into as few near-equal segments as hold it. head: tokens before the memory in the
    decoder.
    """
    k, layout, N = config.choose(k), config.position_layout, config.segment_tokens
    segments = segments or segment_shape(tokens, config)[0]
    size = segment_tokens or math.ceil(tokens / segments)
    encoder = N if layout.fixed_length else size + int(layout.spread_encoder)
    encoder += k if config.spec.appends_memory_tokens else 0
    if layout.spread_decoder:
        return PositionBudget(encoder, head + tokens + 1, head + tokens + 1)
    start = head + segments * k
    return PositionBudget(encoder, start + (N if layout.read_in_place else 0), start)
