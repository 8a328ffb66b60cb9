"""Reading memories: greedy decoding and log-probabilities behind them, in batches."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from icae_jax.compression.decoder import Decoder
from icae_jax.compression.layout import Layout
from icae_jax.compression.memory import Memory
from icae_jax.compression.trained import SPECIAL_ROWS
from icae_jax.errors import UserError
from icae_jax.inference import generate as decoding
from icae_jax.inference.batching import batch_starts, round_up
from icae_jax.inference.devices import Devices
from icae_jax.interop.adapters.folder import Adapter
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.objectives import loss
from icae_jax.objectives.packing import PackedTargets, pack
from icae_jax.objectives.targets import Target

LOSS_CHUNK = 128  # labels whose logits are computed at once
PROMPT_STEP = 16  # prompts are padded to multiples of this

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

    ids: without the stop token. stopped: whether a stop token came. ties: steps at which the two
    best logits lay within `generate.TIE`. log_prob: of the ids and, where it came, the stop token,
    summed; nats. k, tokens: of the memory that it was decoded behind: memory tokens per segment,
    and in all. tokens_read: memory tokens read in all, those of smaller memories of a ladder
    included. These are 0 where there was no memory.
    """

    text: str
    ids: list[int]
    stopped: bool
    ties: int
    log_prob: float
    k: int = 0
    tokens: int = 0
    tokens_read: int = 0

    @property
    def mean_log_prob(self) -> float:
        """The log-probability per token, stop token included: at most 0, nats."""
        return self.log_prob / (len(self.ids) + self.stopped)


def generation(base: bases.Base, out: decoding.Generated, i: int) -> Generation:
    """One row of what `generate.greedy` returned."""
    ids = out.ids[i, : out.lengths[i]].tolist()
    text = base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    log_prob = float(out.log_probs[i])
    return Generation(text, ids, bool(out.stopped[i]), int(out.ties[i]), log_prob)


class Score(NamedTuple):
    """log_prob: sum over the scored tokens, in nats. tokens: how many were scored."""

    log_prob: float
    tokens: int


class Request(NamedTuple):
    """What is decoded behind one memory.

    prompts: each a list of ids. most: new tokens at most, fewer if the base's positions end.
    needed: new tokens that must fit.
    """

    prompts: list[list[int]]
    most: int
    needed: int = 1


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

    def generate(
        self, memory: Memory, requests: Sequence[Request], objective: str, batch_size: int
    ) -> list[list[Generation]]:
        """Decodes greedily behind every prompt of every memory, nested as the prompts are.

        requests: one per text. UserError if `most` is not positive or `needed` does not fit.
        """
        check_most(requests)
        if not requests:
            return []
        self._check_ids([request.prompts for request in requests], "prompt")
        longest = [max(map(len, request.prompts)) for request in requests]
        needed = [n + request.needed for n, request in zip(longest, requests, strict=True)]
        room = self._room(memory, objective, needed)
        G, T = max(len(request.prompts) for request in requests), max(longest)
        T = T if T == 1 else round_up(T, PROMPT_STEP)
        generations, tokens = [], memory.tokens
        for start, rows in self._batches(len(requests), batch_size):
            ids = np.zeros((len(rows) * G, T), np.int32)
            lengths, limits = np.zeros((2, len(rows) * G), np.int32)
            for b, row in enumerate(rows):
                request = requests[row]
                prompts = (request.prompts * G)[:G]  # missing prompts repeat others
                for i, prompt in enumerate(prompts, b * G):
                    ids[i, : len(prompt)], lengths[i] = prompt, len(prompt)
                    limits[i] = min(request.most, room[row] - len(prompt))
            out = self._decode(memory[rows], ids, lengths, limits, objective)
            for b, request in enumerate(requests[start : start + batch_size]):
                indices = range(b * G, b * G + len(request.prompts))
                size = {"k": memory.tokens_per_segment, "tokens": int(tokens[start + b])}
                size["tokens_read"] = size["tokens"]
                made = (generation(self.base, out, i) for i in indices)
                generations.append([g._replace(**size) for g in made])
        return generations

    def _decode(self, memory, ids, lengths, limits, objective) -> decoding.Generated:
        """Decodes behind one batch of memories, equally many prompts each, on the devices."""
        memory = self.devices.put_memory(memory)
        with self.devices.active():
            prefix = _read(memory, self.decoder, head=self.head(objective))
            starts_B = np.asarray(self.layout.target_starts(objective, prefix.end))
            starts = np.repeat(starts_B, len(ids) // len(memory))
            prompts = decoding.Prompts(*self.devices.put((ids, lengths, starts, limits)))
            out = decoding.greedy(
                self.decoder,
                prefix,
                prompts,
                max_new_tokens=round_up(int(limits.max())),
                stop_ids=self.stop_ids(objective),
            )
        return jax.device_get(out)

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
