"""Reading memories: greedy decoding and log-probabilities behind them, in batches."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.compression.layout import Layout
from icae_jax.compression.memory import Memory
from icae_jax.compression.trained import SPECIAL_ROWS
from icae_jax.errors import UserError
from icae_jax.inference.batching import batch_starts, few_shapes, round_up
from icae_jax.inference.devices import Devices
from icae_jax.inference.engine import Engine
from icae_jax.inference.requests import Request as EngineRequest
from icae_jax.inference.requests import Running
from icae_jax.inference.sampling import GREEDY, Sampling
from icae_jax.inference.streaming import decoded
from icae_jax.interop.adapters.folder import Adapter
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.objectives import loss
from icae_jax.objectives.packing import PackedTargets, pack
from icae_jax.objectives.targets import Target

LOSS_CHUNK = 128  # labels whose logits are computed at once

# Compiled once for all compressors of one base and configuration.
_read = jax.jit(Memory.read, static_argnames="head")


@functools.partial(jax.jit, static_argnames=("objective", "head", "layout"))
def _losses(
    decoder: Decoder,
    memory: Memory,
    targets: PackedTargets,
    *,
    objective: str,
    head: tuple[int, ...],
    layout: Layout,
) -> Float[Array, "B G U"]:
    """Losses of the labels of one objective's packed targets, in nats."""
    losses = loss.label_losses(
        decoder, memory, {objective: targets}, {objective: head}, layout, LOSS_CHUNK
    )
    return losses[objective]


class Generation(NamedTuple):
    """One decoded text.

    ids: without the stop token. stopped: whether a stop token or a stop text came. ties: steps at
    which the two best logits lay within `sampling.TIE`. log_prob: of the ids and, where it came,
    the stop token, summed; nats. k, tokens: of the memory that it was decoded behind: memory tokens
    per segment, and in all. tokens_read: memory tokens read in all, those of smaller memories of a
    ladder included. These are 0 where there was no memory. alternatives: for each id its
    log-probability and `{id: log-probability}` of the most likely tokens, where the sampling asks
    for them. stopped_by: the stop text before which it ended, "" if none did.
    """

    text: str
    ids: list[int]
    stopped: bool
    ties: int
    log_prob: float
    k: int = 0
    tokens: int = 0
    tokens_read: int = 0
    alternatives: tuple[tuple[float, dict[int, float]], ...] = ()
    stopped_by: str = ""

    @property
    def mean_log_prob(self) -> float:
        """The log-probability per token, stop token included: at most 0, nats."""
        stop_tokens = int(self.stopped and not self.stopped_by)
        return self.log_prob / (len(self.ids) + stop_tokens)


def generation(
    base: bases.Base, running: Running, memory: Memory | None = None, text: int = 0
) -> Generation:
    """What an engine decoded, behind a text's memory where there was one."""
    stream = running.stream
    alternatives = zip(running.log_probs, running.alternatives, strict=False)  # but the stop's
    made = Generation(
        stream.text if stream else decoded(base.tokenizer, running.ids),
        running.ids,
        running.stopped,
        running.ties,
        running.log_prob,
        alternatives=tuple((p, dict(zip(*others, strict=True))) for p, others in alternatives),
        stopped_by=stream.stopped_by if stream else "",
    )
    if memory is None:
        return made
    tokens = int(memory.tokens[text])
    return made._replace(k=memory.tokens_per_segment, tokens=tokens, tokens_read=tokens)


class Score(NamedTuple):
    """log_prob: sum over the scored tokens, in nats. tokens: how many were scored."""

    log_prob: float
    tokens: int


class Request(NamedTuple):
    """What is decoded behind one memory.

    prompts: each a list of ids. most: new tokens at most, fewer if the base's positions end.
    needed: new tokens that must fit. sampling: how they are chosen; `most` takes the place of its
    limit.
    """

    prompts: list[list[int]]
    most: int
    needed: int = 1
    sampling: Sampling = GREEDY


def check_most(requests: Sequence[Request]) -> None:
    """Raises UserError unless every `most` is positive."""
    least = min((request.most for request in requests), default=1)
    if least <= 0:
        raise UserError(f"max_new_tokens is {least}; it must be positive")


class MemoryReader:
    """Decodes and scores behind memories of one adapter.

    An objective ("ae", "lm" or "qa") says where targets start, and whether the template's head
    stands before the memory.
    """

    def __init__(self, base: bases.Base, adapter: Adapter, decoder: Decoder, devices: Devices):
        self.base, self.adapter, self.decoder, self.devices = base, adapter, decoder, devices
        self.layout = adapter.compression.position_layout

    def head(self, objective: str) -> tuple[int, ...]:
        """Ids before the memory."""
        return tuple(self.adapter.template.head) if objective == "qa" else ()

    def stop_ids(self, objective: str) -> tuple[int, ...]:
        """Ids that end a decoded text."""
        template_stop = {self.adapter.template.stop} if objective == "qa" else set()
        return tuple(sorted({*self.base.stop_ids, *template_stop}))

    def check_kind(self, memory: Memory) -> None:
        """Raises UserError if another method made the memory, or for a base of other sizes."""
        compression = self.adapter.compression
        kind = compression.spec.memory
        if not isinstance(memory, kind):
            raise UserError(
                f"memory is {type(memory).__name__}, but this adapter's method "
                f"{compression.method} reads {kind.__name__}"
            )
        shape = next(iter(memory.contents.values())).shape
        have = shape[: kind.TEXT_AXIS] + shape[kind.TEXT_AXIS + 2 :]
        sizes = kind.sizes(self.base.config)
        if have != sizes:
            raise UserError(
                f"memory has sizes {have}, but the base's are {sizes}; give the base and adapter "
                "that it was made with"
            )

    def _room(self, memory: Memory, objective: str, needed: Sequence[int]) -> Int[np.ndarray, " B"]:
        """Positions left behind each memory; UserError if the `needed` ones do not fit."""
        self.check_kind(memory)
        start = len(self.head(objective)) + np.asarray(memory.end)
        if self.layout.restarts(objective):
            start = np.zeros_like(start)
        positions = self.base.config.max_position_embeddings
        over = np.flatnonzero(np.asarray(needed) > positions - start)
        if len(over):
            i = over[0]
            raise UserError(
                f"{needed[i]} tokens behind a memory that ends at position {start[i]} exceed the "
                f"base's {positions} positions"
            )
        return positions - start

    def _check_ids(self, texts: Sequence[Sequence[Sequence[int]]], what: str) -> None:
        """Raises UserError if an id has no embedding, of which JAX would silently make NaN."""
        for i, rows in enumerate(texts):
            tokenizers.check_ids(
                rows,
                self.base.config.vocab_size,
                lambda j, i=i: f"text {i}: {what} {j}",
                self.base.tokenizer,
                SPECIAL_ROWS,
            )

    def _batches(self, count: int, batch_size: int):
        """Yields (first row, rows) of batches; the rows repeat to fill all batches alike."""
        for start in batch_starts(count, batch_size):
            size = min(batch_size, count - start)
            padded = self.devices.rows(batch_size if start else size)
            yield start, np.resize(np.arange(start, start + size), padded)

    # --- Decoding ---

    def read(self, memory: Memory, objective: str) -> Prefix:
        """Head and memory as the decoder sees them, on the devices."""
        with self.devices.active():
            return _read(self.devices.put_memory(memory), self.decoder, head=self.head(objective))

    def engine(
        self,
        objective: str,
        *,
        rows: int,
        tokens: int,
        memory_tokens: int,
        memories: int | None = None,
        stop: bool = False,
    ) -> Engine:
        """An engine of so many rows for prompts behind memories.

        tokens: of a prompt with its answer. memory_tokens: of a memory, head not counted. memories:
        places for them, by default one for each row. stop: whether texts end answers.
        """
        return Engine(
            self.decoder,
            self.devices,
            rows=rows,
            tokens=tokens,
            memories=memories,
            memory_tokens=len(self.head(objective)) + memory_tokens,
            tokenizer=self.base.tokenizer if stop else None,
        )

    def requests(
        self,
        memory: Memory,
        requests: Sequence[Request],
        objective: str,
        batch_size: int,
        prefixes: Sequence[Prefix] | None = None,
    ) -> list[EngineRequest] | Iterator[EngineRequest]:
        """What an engine takes, one for each prompt; tag: (text, prompt). Arguments: `generate`."""
        check_most(requests)
        batch_starts(len(requests), batch_size)
        if not requests:
            return []
        self._check_ids([request.prompts for request in requests], "prompt")
        longest = [max(map(len, request.prompts)) for request in requests]
        needed = [n + request.needed for n, request in zip(longest, requests, strict=True)]
        room = self._room(memory, objective, needed)
        return self._in_order(memory, requests, objective, batch_size, prefixes, room)

    def _in_order(self, memory, requests, objective, batch_size, prefixes, room):
        stop_ids = self.stop_ids(objective)
        for text, prefix, i in self._prefixes(memory, objective, batch_size, prefixes):
            start = int(self.layout.target_starts(objective, prefix.end)[i])
            request = requests[text]
            for j, prompt in enumerate(request.prompts):
                most = min(request.most, int(room[text]) - len(prompt))
                sampling = dataclasses.replace(request.sampling, max_new_tokens=most)
                yield EngineRequest(prompt, sampling, start, prefix, i, stop_ids, (text, j))

    def generate(
        self,
        memory: Memory,
        requests: Sequence[Request],
        objective: str,
        batch_size: int,
        prefixes: Sequence[Prefix] | None = None,
    ) -> list[list[Generation]]:
        """Decodes behind every prompt of every memory, nested as the prompts are.

        requests: one per text. prefixes: of each text, where its memory was read before (`read`).
        UserError if `most` is not positive or `needed` does not fit.
        """
        of_engine = self.requests(memory, requests, objective, batch_size, prefixes)
        if not requests:
            return []
        positions = self.base.config.max_position_embeddings
        longest = max(
            min(len(prompt) + request.most, positions)
            for request in requests
            for prompt in request.prompts
        )
        count = sum(len(request.prompts) for request in requests)
        at_once = batch_size * max(len(request.prompts) for request in requests)
        own = memory.mask.shape[1]
        if prefixes is not None:
            own = max(prefix.mask.shape[1] for prefix in prefixes) - len(self.head(objective))
        engine = self.engine(
            objective,
            rows=few_shapes(min(count, at_once), at_once),
            tokens=longest,
            memories=few_shapes(min(len(requests), at_once), at_once),
            memory_tokens=own,
            stop=any(request.sampling.stop for request in requests),
        )
        generations: list[list] = [[None] * len(request.prompts) for request in requests]
        for running in engine.run(of_engine):
            text, j = running.request.tag
            generations[text][j] = generation(self.base, running, memory, text)
        return generations

    def _prefixes(self, memory, objective, batch_size, prefixes):
        """Yields (text, prefix, which text of the prefix it is), read in batches."""
        if prefixes is not None:
            for text, prefix in enumerate(prefixes):
                yield text, prefix, 0
            return
        for start, rows in self._batches(len(memory), batch_size):
            prefix = self.read(memory[rows], objective)
            prefix = prefix.replace(end=np.asarray(prefix.end))
            for i in range(min(batch_size, len(memory) - start)):
                yield start + i, prefix, i

    # --- Scoring ---

    def score(
        self,
        memory: Memory,
        targets: Sequence[Sequence[Target]],
        objective: str,
        batch_size: int,
    ) -> list[list[Score]]:
        """Log-probabilities of the labels of targets behind each memory, nested as the targets are.

        targets: at least one per text. UserError if one leaves the base's positions.
        """
        if not targets:
            return []
        self._check_ids([[t.ids for t in row] for row in targets], "target")
        longest = [max(len(t.ids) - 1 for t in row) for row in targets]
        self._room(memory, objective, longest)
        labels = max(len(t.ids) - t.label_start for row in targets for t in row)
        shape = max(map(len, targets)), round_up(max(longest)), round_up(labels)
        scores = []
        for start, rows in self._batches(len(targets), batch_size):
            batch = targets[start : start + batch_size]
            packed = pack([*batch, *[[]] * (len(rows) - len(batch))], *shape)
            with self.devices.active():
                losses = _losses(
                    self.decoder,
                    self.devices.put_memory(memory[rows]),
                    self.devices.put(packed),
                    objective=objective,
                    head=self.head(objective),
                    layout=self.layout,
                )
            sums = np.where(packed["label_mask"], np.asarray(losses), 0).sum(2)
            counts = packed["label_mask"].sum(2)
            scores += [
                [Score(-float(sums[b, g]), int(counts[b, g])) for g in range(len(row))]
                for b, row in enumerate(batch)
            ]
        return scores
