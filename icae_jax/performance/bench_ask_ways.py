"""Our side of `icae bench ask`: the ways to answer a question about a context, and how long each
takes.

    full       the base alone reads context and question
    compress   the context is compressed, then the question is asked of its memory
    memory     the memory is at hand (slots: the decoder reads them; K/V: its keys are rotated)
    kv         what the decoder sees of the memory is at hand

Everything at hand is in the host's memory, as a store's reader gives it. Stop tokens are ignored,
so that exactly as many tokens are decoded as were asked for. A request is counted from the moment
at which all requests of a run are given.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from icae_jax.compression import trained
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Prefix
from icae_jax.compression.memory import KV, Memory
from icae_jax.errors import UserError
from icae_jax.inference import loading, reading
from icae_jax.inference.compressor import Compressor
from icae_jax.inference.engine import Engine
from icae_jax.inference.requests import Request
from icae_jax.inference.sampling import Sampling
from icae_jax.interop.adapters.adapter import Adapter
from icae_jax.interop.hub import base as bases
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives.targets import make_template

WAYS = ("full", "compress", "memory", "kv")
QUESTION = "What is this text about?"

# Per request: when each token came (seconds), the tokens, and at how many of them two lay alike.
Timed = dict[str, list]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What answers.

    adapter: a trained compressor; None for an untrained one of method, k and ratio, since what its
    numbers are does not change how long they take. base: by default the adapter's. base_dtype: as
    of `loading.load`. seed: of the contexts' tokens.
    """

    adapter: str | None = None
    base: str | None = None
    base_dtype: str | None = None
    method: str = CompressionConfig.method
    k: int = 128
    ratio: float = 4.0
    seed: int = 0

    def load(self) -> Compressor:
        """The compressor. UserError on bad input."""
        if self.adapter:
            return loading.load(self.adapter, self.base, dtype=self.base_dtype)
        compression = CompressionConfig(method=self.method, k=self.k, rate=self.ratio)
        base = loading.load_base(self.base, self.base_dtype)
        template = make_template("plain", base.tokenizer)
        lora = LoraConfig()
        tree = trained.init(
            jax.random.key(self.seed), base.params["embed"], base.config, lora, compression
        )
        adapter = Adapter(compression, lora, template, tree, base.path, base.fingerprint)
        return Compressor(base, adapter, "", bases.precision(self.base_dtype)[0])


class Ways:
    """The ways on one compressor. What belongs to a context length is kept until the next one."""

    def __init__(self, subject: Subject):
        self.compressor, self.seed = subject.load(), subject.seed
        self._length = 0
        self._engines: dict[tuple, Engine] = {}
        template, question = self.compressor.adapter.template, self.compressor.ids(QUESTION)
        self.prompt = template.prompt(question)
        # What means nothing without a memory is left out.
        self._head = [i for i in template.head if i >= 0]
        self._plain_prompt = [i for i in self.prompt if i >= 0]

    # --- What is measured ---

    def describe(self) -> dict[str, Any]:
        """What a report says of the subject."""
        c = self.compressor
        kind = c.config.spec.memory
        return {
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "platform": jax.default_backend(),
            "base": c.base.path,
            "base_format": c.base.quantize or jnp.dtype(c.decoder.base.dtype).name,
            "method": c.config.method,
            "k": c.config.k,
            "ratio": c.config.rate,
            "memory": kind.__name__,
            "question_tokens": len(self.prompt),
            # Of K/V, what is kept is what is read: there is no second thing to have at hand.
            "ways": [way for way in WAYS if way != "memory" or not issubclass(kind, KV)],
        }

    def check(self, contexts: Sequence[int], new_tokens: int) -> None:
        """UserError if a context does not fit the base, read in full or as a memory."""
        c, positions = self.compressor, self.compressor.base.config.max_position_embeddings
        around = len(self._head) + len(self._plain_prompt) + new_tokens
        for tokens in contexts:
            # A memory's segments, its head and what stands behind it.
            memory = c.positions(len(c.framed([0] * tokens)))
            behind = memory[1] + len(c.reader.head("qa")) + len(self.prompt) + new_tokens
            needed = max(tokens + around, memory[0], behind)
            if needed > positions:
                raise UserError(
                    f"--contexts {tokens}: with question and answer it takes {needed} positions, "
                    f"the base has {positions}; give at most {positions - around}, or fewer "
                    "--new_tokens"
                )

    def contexts(self, tokens: int, requests: int) -> list[list[int]]:
        """Contexts of so many tokens, drawn from the seed: those of fewer requests first."""
        vocabulary = self.compressor.base.config.vocab_size
        draws = (np.random.default_rng([self.seed, tokens, i]) for i in range(requests))
        return [rng.integers(vocabulary, size=tokens).tolist() for rng in draws]

    def prompts(self, tokens: int, requests: int) -> list[list[int]]:
        """What the base alone reads: head, context and question."""
        contexts = self.contexts(tokens, requests)
        return [[*self._head, *context, *self._plain_prompt] for context in contexts]

    # --- Measuring ---

    def run(self, way: str, tokens: int, requests: int, new_tokens: int) -> Timed:
        """Answers questions about contexts of so many tokens, one each, all at once.

        The first run of its kind also prepares what is at hand, and compiles.
        """
        if tokens != self._length:
            self._length = tokens
            self._engines.clear()
            self._memory.cache_clear()
            self._prefixes.cache_clear()
        sampling = Sampling(max_new_tokens=new_tokens, past_limit=False)
        if way == "full":
            prompts = self.prompts(tokens, requests)
            engine = self._engine(way, requests, len(prompts[0]) + new_tokens)
            asked = [Request(p, sampling, tag=(i, 0)) for i, p in enumerate(prompts)]
            return answer(engine, time.perf_counter(), asked)
        # Prepared before time is taken, except for what the way itself does.
        memory = None if way == "compress" else self._memory(tokens, requests)
        prefixes = self._at_hand(tokens, requests) if way == "kv" else None
        contexts = [self.compressor.framed(ids) for ids in self.contexts(tokens, requests)]
        engine = self._engine(way, requests, len(self.prompt) + new_tokens, tokens)
        began = time.perf_counter()
        if memory is None:
            memory = self.compressor.compress_ids(contexts, requests)
        asked = [reading.Request([self.prompt], new_tokens, sampling=sampling)] * requests
        of_engine = self.compressor.reader.requests(memory, asked, "qa", requests, prefixes)
        return answer(engine, began, (r._replace(stop_ids=()) for r in of_engine))

    @functools.lru_cache(8)  # noqa: B019 (cleared with the length)
    def _memory(self, tokens: int, requests: int) -> Memory:
        contexts = [self.compressor.framed(ids) for ids in self.contexts(tokens, requests)]
        return jax.device_get(self.compressor.compress_ids(contexts, requests))

    @functools.lru_cache(8)  # noqa: B019 (cleared with the length)
    def _prefixes(self, tokens: int, requests: int) -> list[Prefix]:
        memory = self._memory(tokens, requests)
        return [self.compressor.prefix(memory[np.asarray([i])]) for i in range(requests)]

    def _at_hand(self, tokens: int, requests: int) -> list[Prefix] | None:
        """Of each text what the decoder sees; None where the memory is K/V itself."""
        if issubclass(self.compressor.config.spec.memory, KV):
            return None
        # New objects, which the engine does not know to be in its cache from the last round.
        return [prefix.replace() for prefix in self._prefixes(tokens, requests)]

    def _engine(self, way: str, rows: int, tokens: int, context: int = 0) -> Engine:
        """An engine, made once: ways behind a memory share it."""
        memory = 0
        if way != "full":
            memory = self._memory(context, rows).mask.shape[1]
        key = rows, tokens, memory
        if key not in self._engines:
            c = self.compressor
            if memory:
                made = c.reader.engine("qa", rows=rows, tokens=tokens, memory_tokens=memory)
            else:
                made = Engine(c.plain_decoder, c.devices, rows=rows, tokens=tokens)
            self._engines[key] = made
        return self._engines[key]


def answer(engine: Engine, began: float, requests: Any) -> Timed:
    """Runs requests that all fit into an engine's rows. began: the clock when they were given.

    Their tags are (number, …).
    """
    running = [engine.insert(request) for request in requests]
    times: dict[int, list[float]] = {r.request.tag[0]: [] for r in running}
    while len(engine):
        moved = engine.step()
        now = time.perf_counter() - began
        for r in moved:
            times[r.request.tag[0]].append(now)
    return {
        "times": [times[i] for i in sorted(times)],
        "ids": [r.ids for r in running],
        "ties": [r.ties for r in running],
    }
