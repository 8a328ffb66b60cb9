"""The engine: requests join and leave a running batch (continuous batching; Orca, OSDI 2022).

A cache of fixed shape holds R rows. `Engine.insert` puts a request into a free row: its memory,
which rows may share, and its prompt, which is prefilled in chunks. `Engine.step` prefills a chunk
or decodes one token of every row that has its prompt. What a row decodes does not depend on its
neighbours.

One program is compiled for each bucket of memories, one for each bucket of prompts, and one for the
step (`inference.decoding`).
"""

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.errors import UserError
from icae_jax.inference import decoding
from icae_jax.inference.batching import few_shapes, round_up
from icae_jax.inference.decoding import Chunks, How
from icae_jax.inference.devices import Devices
from icae_jax.inference.requests import Request, Running
from icae_jax.inference.sampling import GREEDY, MOST_ALTERNATIVES, Settings

CHUNK = 512  # tokens of prompts that are prefilled between two steps of the others
ALONE = 4  # times as many where nobody waits for a step
# Up to so many tokens, memories and rows are padded to multiples of this.
STEPS = ((64, 16), (256, 32), (1 << 62, 128))
SHORT = 64  # tokens of a short chunk; longer ones are padded to multiples of it


def padded(tokens: int) -> int:
    """What a memory or a row of so many tokens is padded to."""
    return round_up(tokens, next(step for most, step in STEPS if tokens <= most))


class Engine:
    """R rows that decode at once.

    Attributes:
      rows: R.
      tokens: of a prompt and its answer together, at most.
      memories: places for memories; rows with one memory share its place.
      memory_tokens: of a memory with its head, at most; 0: requests have none.
    """

    def __init__(
        self,
        decoder: Decoder,
        devices: Devices,
        *,
        rows: int,
        tokens: int,
        memories: int | None = None,
        memory_tokens: int = 0,
        chunk: int = CHUNK,
        tokenizer: Any = None,
    ):
        """An engine.

        Args:
          decoder: the base, perhaps with a LoRA.
          devices: where it runs.
          rows: see the class; rounded up to what a mesh can split.
          tokens: see the class; rounded up.
          memories: see the class; by default one for each row.
          memory_tokens: see the class; rounded up.
          chunk: tokens of prompts that are prefilled between two steps of the others.
          tokenizer: makes text of tokens as they come; stop texts need it.

        Raises:
          UserError: a size is not positive.
        """
        for name, value in (("rows", rows), ("tokens", tokens), ("chunk", chunk)):
            if value < 1:
                raise UserError(f"{name} of the engine is {value}; it must be positive")
        self.devices, self.decoder = devices, devices.for_decoding(decoder)
        self.rows, self.tokens = devices.rows(rows), padded(tokens)
        self.memory_tokens = padded(memory_tokens) if memory_tokens else 0
        self.memories = devices.rows(min(memories or self.rows, self.rows)) if memory_tokens else 0
        self.chunk, self.tokenizer = chunk, tokenizer
        self._free = list(range(self.rows))
        self._running: dict[int, Running] = {}  # by row
        self._prefilling: collections.deque[Running] = collections.deque()
        self._memories: list[tuple[Prefix, int] | None] = [None] * self.memories  # in each place
        self._readers = [0] * self.memories  # requests that read each place
        self._doubted: set[int] = set()  # places that may hold what is not finite
        self._to_load: list[tuple[Prefix, int, int]] = []  # prefix, text, place
        self._decode_next = False  # a chunk was prefilled last, so it is the others' turn
        self._nothing = _no_memory(self.decoder) if memory_tokens else None
        sizes = {"rows": self.rows, "tokens": self.tokens}
        sizes |= {"memories": self.memories, "memory_tokens": self.memory_tokens}
        self._programs = decoding.programs()
        with devices.active():
            self._cache, self._rows = self._programs.empty(self.decoder, **sizes)
        # As what the programs return is, for which they would be compiled once more.
        leaves = jax.tree.leaves(self.decoder.base.params)
        committed = [x for x in leaves if isinstance(x, jax.Array) and x.committed]
        if devices.mesh is None and committed:
            where = committed[0].sharding
            self._cache, self._rows = jax.device_put((self._cache, self._rows), where)

    def __len__(self):
        """Requests that it holds."""
        return len(self._running)

    @property
    def free(self) -> int:
        """Rows that are free."""
        return len(self._free)

    def check(self, request: Request) -> None:
        """Raises UserError if a request does not fit into a row."""
        if not len(request.prompt):
            raise UserError("the prompt has no tokens; there is nothing to go on from")
        most = request.sampling.max_new_tokens
        if len(request.prompt) + most > self.tokens:
            raise UserError(
                f"a prompt of {len(request.prompt)} tokens and max_new_tokens {most} exceed the "
                f"{self.tokens} tokens of a row of the engine; shorten one, or make an engine with "
                "more tokens"
            )
        config, table = self.decoder.base.config, len(self.decoder.table)
        lowest, highest = min(request.prompt), max(request.prompt)
        if lowest < -table or highest >= config.vocab_size:
            raise UserError(
                f"the prompt holds id {lowest if lowest < -table else highest}, of which the base "
                f"has no embedding; ids are below {config.vocab_size}"
            )
        if request.start + len(request.prompt) + most > config.max_position_embeddings:
            raise UserError(
                f"a prompt of {len(request.prompt)} tokens from position {request.start} on and "
                f"max_new_tokens {most} exceed the base's {config.max_position_embeddings} "
                "positions; shorten one"
            )
        memory = 0 if request.prefix is None else request.prefix.mask.shape[1]
        if memory > self.memory_tokens:
            raise UserError(
                f"a memory of {memory} tokens, head included, exceeds the engine's "
                f"{self.memory_tokens}; make one with more memory_tokens"
            )
        if request.sampling.stop and self.tokenizer is None:
            raise UserError(
                f"stop is {list(request.sampling.stop)}, but the engine knows no text; make it "
                "with a tokenizer"
            )

    # --- Requests come and go ---

    def insert(self, request: Request) -> Running | None:
        """Puts a request into a free row; None if none, or no place for its memory, is free.

        UserError if it does not fit.
        """
        self.check(request)
        if not self._free:
            return None
        row, place = self._free[0], 0
        if self.memories:
            prefix, text = request.prefix, request.text
            if prefix is None:
                prefix, text = self._nothing, 0
            found = self._place(prefix, text)
            if found is None:
                return None
            row, place = found
            self._readers[place] += 1
        self._free.remove(row)
        running = Running(request, row, place, self.tokenizer)
        self._running[row] = running
        self._prefilling.append(running)
        return running

    def _place(self, prefix, text):
        """A free row and the place of its memory, which is loaded if none holds it; or None."""
        for place, held in enumerate(self._memories):
            if held is not None and held[0] is prefix and held[1] == text:
                return self._free[0], place
        # A row's own place if it can be, for a step is faster where all rows read their own.
        unread = [place for place, readers in enumerate(self._readers) if not readers]
        if not unread:
            return None
        row = next((row for row in self._free if row in unread), self._free[0])
        place = row if row in unread else unread[0]
        self._memories[place] = prefix, text
        self._to_load = [load for load in self._to_load if load[2] != place]
        self._to_load.append((prefix, text, place))
        return row, place

    def remove(self, running: Running) -> None:
        """Ends a request early and frees its row; nothing if it is done."""
        if self._running.get(running.row) is not running:
            return
        running.done = True
        if running in self._prefilling:
            self._prefilling.remove(running)
        self._leave(running, finite=False)

    def _leave(self, running, finite):
        """Frees a row. finite: whether all that the request wrote and read is known to be; what is
        not would reach the next in its row, or in the place of its memory.
        """
        del self._running[running.row]
        self._free = sorted([*self._free, running.row])
        place = self.memories  # that is cleared: none
        if self.memories:
            self._readers[running.place] -= 1
            (self._doubted.discard if finite else self._doubted.add)(running.place)
            if running.place in self._doubted and not self._readers[running.place]:
                place = running.place
                self._doubted.remove(place)
                self._memories[place] = None
                self._to_load = [load for load in self._to_load if load[2] != place]
        if not finite:
            row = np.int32(running.row)
            with self.devices.active():
                self._cache = self._programs.clear(self._cache, row, np.int32(place))

    # --- Prefilling and decoding ---

    def step(self) -> list[Running]:
        """Prefills a chunk, or decodes; returns the requests that have a new token, or ended.

        Chunks and steps take turns where both are to be done.
        """
        ready = [running for running in self._running.values() if not running.waiting]
        with self.devices.active():
            if self._prefilling and not (self._decode_next and ready):
                self._load_memories()
                self._decode_next = True
                moved = self._prefill(decoding_too=bool(ready))
            else:
                self._decode_next = False
                moved = self._decode(ready) if ready else []
        for running in moved:
            if running.done:
                self._leave(running, finite=running.error is None)
        return moved

    def _decode(self, ready):
        own = self.memories == self.rows and all(r.row == r.place for r in ready)
        one = len({running.place for running in ready}) == 1 and len(ready) > 1
        how = self._how(ready, "own" if own else "one" if one else "any")
        active = np.zeros(self.rows, bool)
        active[[running.row for running in ready]] = True
        self._cache, self._rows, out = self._programs.step(
            self.decoder, self._cache, self._rows, active, np.int32(ready[0].place), how=how
        )
        choice = jax.device_get(out)
        for running in ready:
            running.take(choice, running.row)
        return ready

    def _how(self, requests, sharing, reach=0):
        samplings = [running.request.sampling for running in requests]
        return How(
            sharing if self.memories else "none",
            all(sampling.greedy for sampling in samplings),
            MOST_ALTERNATIVES if any(sampling.alternatives for sampling in samplings) else 0,
            reach,
        )

    def _load_memories(self):
        """Writes the memories of new requests into the cache, those of one prefix together."""
        while self._to_load:
            prefix = self._to_load[0][0]
            alike = [load for load in self._to_load if load[0] is prefix]
            self._to_load = [load for load in self._to_load if load[0] is not prefix]
            count = few_shapes(len(alike), self.memories)
            texts, places = np.zeros(count, np.int32), np.full(count, self.memories, np.int32)
            for i, (_, text, place) in enumerate(alike):
                texts[i], places[i] = text, place
            self._cache = self._programs.load(self._cache, prefix, texts, places)

    def _prefill(self, decoding_too):
        """Prefills a chunk of the next prompt, and of those that go together with it."""
        shape = self._chunk_shape(self._prefilling[0])
        tokens, reach = shape
        most = self.chunk if decoding_too else ALONE * self.chunk
        alike = [r for r in self._prefilling if self._chunk_shape(r) == shape]
        together = alike[: max(1, most // tokens)]
        chunks = self._chunks(together, tokens)
        one = len({running.place for running in together}) == 1
        how = self._how(together, "one" if one else "any", reach)
        self._cache, self._rows, out = self._programs.prefill(
            self.decoder, self._cache, self._rows, self.devices.put(chunks), how=how
        )
        for i, running in enumerate(together):
            running.prefilled += int(chunks.lengths[i])
        complete = [(i, r) for i, r in enumerate(together) if not r.waiting]
        if complete:
            choice = jax.device_get(out)
            for i, running in complete:
                self._prefilling.remove(running)
                running.take(choice, i)
        return [running for _, running in complete]

    def _chunk_shape(self, running):
        """What the next chunk of a prompt is padded to, and how far it looks back."""
        tokens = min(running.waiting, self.chunk)
        tokens = round_up(tokens, SHORT) if tokens > SHORT else max(16, few_shapes(tokens, SHORT))
        if not running.prefilled:
            return tokens, 0
        return tokens, few_shapes(running.prefilled, self.tokens)

    def _chunks(self, together, tokens):
        b = 1
        while b < len(together):  # few sizes, and fewer where padding costs little
            b *= 4 if tokens <= SHORT else 2
        b = self.devices.rows(min(b, self.rows))
        ids, last = np.zeros((b, tokens), np.int32), np.zeros(b, bool)
        rows, lengths = np.full(b, self.rows, np.int32), np.ones(b, np.int32)
        offsets, start = np.zeros((2, b), np.int32)
        places = np.full(b, together[0].place, np.int32)
        samplings = [running.request.sampling for running in together]
        for i, running in enumerate(together):
            request, done = running.request, running.prefilled
            piece = request.prompt[done : done + self.chunk]
            rows[i], ids[i, : len(piece)], lengths[i] = running.row, piece, len(piece)
            offsets[i], places[i], start[i] = done, running.place, request.start
            last[i] = done + len(piece) == len(request.prompt)
        settings = Settings.of(samplings + [GREEDY] * (b - len(together)))
        return Chunks(rows, ids, lengths, offsets, last, places, start, settings)

    # --- Many requests ---

    def stream(self, requests: Iterable[Request]) -> Iterator[Running]:
        """Runs requests, as many at once as there are rows; yields each whenever it has new tokens.

        Requests are taken from the iterator when a row is free. Others that the engine holds go on.
        One that does not fit is yielded once, with its error, and the others go on.
        """
        left, own = iter(requests), []
        upcoming = next(left, None)
        try:
            while upcoming is not None or own:
                while upcoming is not None and self._free:
                    try:
                        running = self.insert(upcoming)
                    except UserError as error:
                        running = Running(upcoming, -1, -1)
                        running.done, running.error = True, error
                        yield running
                    else:
                        if running is None:  # no place for its memory, until others end
                            break
                        own.append(running)
                    upcoming = next(left, None)
                if not any(running.news for running in own):  # nor by another's step
                    self.step()
                for running in [running for running in own if running.news]:
                    running.news = False
                    yield running
                own = [running for running in own if running.news or not running.done]
        finally:
            for running in own:  # the caller has gone away
                self.remove(running)

    def run(self, requests: Iterable[Request]) -> Iterator[Running]:
        """As `stream`, but yields each request when it has ended."""
        return (running for running in self.stream(requests) if running.done)


def _no_memory(decoder):
    """A prefix of which nothing is seen, for requests without one."""
    config = decoder.base.config
    empty = np.zeros((config.num_layers, 1, 1, config.num_kv_heads, config.head_dim), np.float32)
    zeros = np.zeros((1, 1), np.int32)
    return Prefix(empty, empty, zeros.astype(bool), zeros, zeros[0])
