"""Many requests of different lengths: some at once in an engine's rows, against one at a time."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from icae_jax.inference.compressor import Compressor
from icae_jax.inference.engine import Engine
from icae_jax.inference.requests import Request
from icae_jax.inference.sampling import Sampling

PROMPT_TOKENS = 16, 128  # least and most of a request
FEWEST_NEW = 4  # new tokens of a request

Drawn = Sequence[tuple[int, int]]


def draw(requests: int, new_tokens: int, seed: int) -> list[tuple[int, int]]:
    """(tokens of the prompt, new tokens) of each request, drawn from the seed.

    new_tokens: the most of a request.
    """
    rng = np.random.default_rng([seed, requests])
    bounds = PROMPT_TOKENS, (min(FEWEST_NEW, new_tokens), new_tokens)
    lengths = [rng.integers(least, most + 1, requests) for least, most in bounds]
    return [(int(prompt), int(new)) for prompt, new in zip(*lengths, strict=True)]


class Throughput:
    """Engines for drawn requests, which the base alone answers.

    rows: of the engine; 1 is one at a time.
    """

    def __init__(self, compressor: Compressor, drawn: Drawn):
        self._compressor, self._engines = compressor, {}
        vocabulary, rng = compressor.base.config.vocab_size, np.random.default_rng(len(drawn))
        self._tokens = max(prompt + new for prompt, new in drawn)
        self._requests = [
            Request(
                rng.integers(vocabulary, size=prompt).tolist(),
                Sampling(max_new_tokens=new, past_limit=False),
                tag=i,
            )
            for i, (prompt, new) in enumerate(drawn)
        ]

    def run(self, rows: int) -> dict[str, Any]:
        """`seconds` until all have ended, and each one's `ids` and `ties`."""
        if rows not in self._engines:
            c = self._compressor
            engine = Engine(c.plain_decoder, c.devices, rows=rows, tokens=self._tokens)
            self._engines[rows] = engine
        began = time.perf_counter()
        ended = list(self._engines[rows].run(self._requests))
        seconds = time.perf_counter() - began
        ended.sort(key=lambda running: running.request.tag)
        return {
            "seconds": seconds,
            "ids": [running.ids for running in ended],
            "ties": [running.ties for running in ended],
        }
