"""Requests to the engine, and what has been decoded of one that runs."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from icae_jax.compression.decoder import Prefix
from icae_jax.errors import UserError
from icae_jax.inference.sampling import GREEDY, Choice, Sampling
from icae_jax.inference.streaming import TextStream


class Request(NamedTuple):
    """What is decoded.

    prompt: ids, at least one; negative ids are rows of the memory table. sampling: how. start: the
    position of the first id. prefix: what is seen before the prompt, None: nothing. text: which
    text of the prefix. Requests with one prefix and text share its place in the cache. stop_ids:
    ids that end the text. tag: the caller's own.
    """

    prompt: Sequence[int]
    sampling: Sampling = GREEDY
    start: int = 0
    prefix: Prefix | None = None
    text: int = 0
    stop_ids: tuple[int, ...] = ()
    tag: Any = None


class Running:
    """A request in a row of an engine, and what was decoded of it.

    Attributes:
      request: the request.
      ids: new tokens, without the stop token.
      log_probs: of the ids and, where it came, the stop token; nats.
      ties: steps at which the two best logits lay within `sampling.TIE`.
      alternatives: for each id, `(ids, log-probabilities)` of the most likely tokens.
      stopped: whether a stop token or a stop text came.
      done: whether it has ended.
      stream: the text of the ids, if the engine has a tokenizer.
      news: whether it has got on since `Engine.stream` yielded it last.
      error: why the engine did not take it (`Engine.stream`) or gave it up, if so.
    """

    def __init__(self, request: Request, row: int, place: int, tokenizer: Any = None):
        self.request, self.row, self.place = request, row, place
        self.stream = None if tokenizer is None else TextStream(tokenizer, request.sampling.stop)
        self.news = False
        self._taken = 0  # characters of the text
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.alternatives: list[tuple[list[int], list[float]]] = []
        self.ties, self.stopped, self.done = 0, False, False
        self.error: UserError | None = None
        self.prefilled = 0  # tokens of the prompt that were given to the devices

    @property
    def log_prob(self) -> float:
        """The sum of `log_probs`, in float32."""
        return float(np.cumsum(np.asarray(self.log_probs or [0], np.float32))[-1])

    @property
    def waiting(self) -> int:
        """Tokens of the prompt that are not yet prefilled."""
        return len(self.request.prompt) - self.prefilled

    def take(self, choice: Choice, i: int) -> None:
        """Takes row i of what a program chose."""
        sampling = self.request.sampling
        if not math.isfinite(choice.log_prob[i]):
            self.done, self.news = True, True
            self.error = UserError(
                "what the base computes is not finite: base, memory or adapter are damaged, or "
                "overflow in their dtype; load them in float32"
            )
            return
        stopped = int(choice.token[i]) in self.request.stop_ids
        full = len(self.ids) >= sampling.max_new_tokens  # then only a stop token counts
        if not full or stopped:
            self.ties += int(choice.tie[i])
            self.log_probs.append(float(choice.log_prob[i]))
        if not full and not stopped:
            self.ids.append(int(choice.token[i]))
            if sampling.alternatives:
                others = choice.others[i], choice.other_log_probs[i]
                self.alternatives.append(tuple(x[: sampling.alternatives].tolist() for x in others))
        at_limit = len(self.ids) >= sampling.max_new_tokens and not sampling.past_limit
        self.done = stopped or full or at_limit
        if self.stream:
            new = [] if full or stopped else self.ids[-1:]
            self.stream.add(new, self.done)
            stopped |= bool(self.stream.stopped_by)
            self.done |= stopped
        self.stopped, self.news = stopped, True

    def take_text(self) -> str:
        """What the text has grown by since this was called last: whole characters.

        Nothing if the engine has no tokenizer.
        """
        if self.stream is None:
            return ""
        taken, self._taken = self._taken, len(self.stream.text)
        return self.stream.text[taken:]
