"""Everything behind the API: the compressor, memories, the scheduler; warming up; waiting."""

import asyncio
import concurrent.futures
import dataclasses
import pathlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.inference.compressor import Compressor
from icae_jax.inference.engine import Engine
from icae_jax.inference.requests import Request
from icae_jax.inference.sampling import Sampling
from icae_jax.server.answers import Tokens
from icae_jax.server.asking import Asked, Asker
from icae_jax.server.documents import Documents
from icae_jax.server.failures import ApiError, of_fault
from icae_jax.server.memories import Memories
from icae_jax.server.metrics import Metrics
from icae_jax.server.options import Options
from icae_jax.server.scheduler import Bucket, Full, Job, Piece, Scheduler, buckets, without_memory

T = TypeVar("T")

THREADS = 64  # requests that look up or compress memories at a time
WARM_BUCKETS = 3  # whose programs are compiled before requests are taken
WARM_PROMPTS = 16, 48  # tokens


class Service:
    """What answers requests.

    Args:
        compressor: what compresses and reads.
        options: limits.
        documents: the store; None for none.

    Attributes:
        name: the model's.
        status: "warming_up", "ready" or "draining".
    """

    def __init__(self, compressor: Compressor, options: Options, documents: Documents | None):
        self.compressor, self.options, self.documents = compressor, options, documents
        self.metrics, self.created = Metrics(), int(time.time())
        self.name = options.model_name or default_name(compressor)
        self.memories = Memories(
            compressor,
            documents,
            options.cache_mib << 20,
            options.max_context_tokens,
            self.metrics.compressed,
        )
        self.asker = Asker(compressor, self.memories, options.max_new_tokens)
        self.tokens = Tokens(compressor.base.tokenizer)
        self._loop: asyncio.AbstractEventLoop | None = None
        positions = compressor.base.config.max_position_embeddings
        sizes = buckets(positions, options.rows, *_sizes(compressor.decoder))
        self.scheduler = Scheduler(
            self._engine,
            sorted([*sizes, *without_memory(sizes)]),
            options.queue,
            lambda call: self._loop.call_soon_threadsafe(call),
        )
        self.status = "warming_up"
        self._watch()
        self._warming_up: threading.Thread | None = None
        # Who asks about what is there does not wait for texts that others have compressed.
        self._looking_up = concurrent.futures.ThreadPoolExecutor(THREADS, "looking up")
        self._compressing = concurrent.futures.ThreadPoolExecutor(THREADS, "compressing")
        self._preparing = 0  # calls that run or wait on these threads
        self._lately = 1.0  # seconds that requests took

    def _watch(self):
        """Has metrics say what is held."""
        scheduler, cache, watch = self.scheduler, self.memories.cache, self.metrics.watch
        watch("icae_ready", "1 when requests are taken", lambda: self.status == "ready")
        watch("icae_waiting", "prompts that wait for a row", lambda: scheduler.waiting)
        watch("icae_running", "prompts that have a row", lambda: scheduler.running)
        watch("icae_rows", "rows of the engines in use", lambda: scheduler.rows)
        watch("icae_cache_bytes", "bytes of kept memories", lambda: cache.used)
        watch("icae_cache_memories", "memories that are kept", lambda: len(cache))
        watch("icae_cache_hits", "look-ups that found a memory", lambda: cache.hits)
        watch("icae_cache_misses", "look-ups that did not", lambda: cache.misses)

    def _engine(self, bucket: Bucket) -> Engine:
        c = self.compressor
        return Engine(
            c.decoder,
            c.devices,
            rows=bucket.rows,
            tokens=bucket.tokens,
            memory_tokens=bucket.memory_tokens,
            tokenizer=c.base.tokenizer,
        )

    # --- Coming and going ---

    def start(self, loop: asyncio.AbstractEventLoop, ready: Callable[[], Any]) -> None:
        """Warms up on a thread of its own, then takes requests.

        loop: where pieces are delivered. ready: called, on that thread, when requests are taken.
        """
        self._loop = loop

        def warm_up():
            try:
                self.scheduler.warm_up(self._warming, WARM_BUCKETS)
            except Exception as error:  # requests will tell who sends them
                of_fault(error)
            self.scheduler.start()
            if self.status == "warming_up":
                self.status = "ready"
                ready()

        self._warming_up = threading.Thread(target=warm_up, name="warming up", daemon=True)
        self._warming_up.start()

    def close(self) -> None:
        """Ends the threads, and closes the store."""
        try:
            self.scheduler.stop()
            if self._warming_up is not None:
                self._warming_up.join()  # it ends behind the program that it compiles
            self.memories.close()
            for threads in (self._looking_up, self._compressing):
                threads.shutdown(wait=False, cancel_futures=True)
        finally:
            if self.documents is not None:
                self.documents.close()

    def _warming(self, bucket: Bucket) -> list[list[Request]]:
        """Requests behind a memory and without: one, and as many as go together."""
        c, how = self.compressor, Sampling(max_new_tokens=2)
        context = c.framed([c.framing.eos] * c.config.segment_tokens)
        kept = self.memories.warm(context)
        prefix = self.memories.prefix(kept, template=True)
        fits = prefix.mask.shape[1] <= bucket.memory_tokens
        groups = []
        for tokens in WARM_PROMPTS:
            prompt = [c.framing.eos] * tokens
            alone = Request(prompt, how)
            groups.append([alone])
            if not fits:
                continue
            read = Request(prompt, how, int(prefix.end[0]), prefix)
            groups += [[read], [read] * bucket.rows]
            groups.append([read._replace(prefix=_copy(prefix)) for _ in range(bucket.rows)])
        room = min(bucket.tokens, c.base.config.max_position_embeddings)
        return [[request for request in group if self._fits(request, room)] for group in groups]

    def _fits(self, request, room):
        return request.start + len(request.prompt) + request.sampling.max_new_tokens <= room

    # --- Blocking work ---

    async def blocking(
        self, ends: float, compressing: bool, call: Callable[..., T], *arguments: Any
    ) -> T:
        """Runs what looks up or compresses memories on a thread.

        ends: when it must have ended, on the monotonic clock. ApiError 429 if too many calls wait,
        those of clients that have gone among them, 504 if it takes too long.
        """
        if self._preparing >= self.options.queue + THREADS:
            raise self._busy(Full(1))
        self._preparing += 1
        loop = asyncio.get_running_loop()

        def ended(future: object = None) -> None:
            self._preparing -= 1

        threads = self._compressing if compressing else self._looking_up
        future = threads.submit(call, *arguments)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended))
        try:
            async with asyncio.timeout(ends - time.monotonic()):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise self.late() from None

    def late(self) -> ApiError:
        """What a client is told whose request took too long."""
        return ApiError(
            504, f"the request took more than {self.options.timeout:g} s", code="timeout"
        )

    def _busy(self, full: Full) -> ApiError:
        headers = {"Retry-After": str(full.seconds)}
        return ApiError(429, f"{full}", code="queue_full", headers=headers)

    # --- Decoding ---

    def feed(self, ends: float, asked: Sequence[Asked], streamed: bool) -> "Feed":
        """Has prompts decoded. ApiError 429 if they may not wait for a row.

        ends: when they must have ended, on the monotonic clock.
        """
        requests = [request for one in asked for request in one.requests]
        feed = Feed(self, ends, requests, streamed)
        try:
            self.scheduler.submit(feed.jobs, self._lately)
        except Full as full:
            raise self._busy(full) from None
        return feed

    def took(self, seconds: float) -> None:
        """Notes how long a request took, for what clients are told when the queue is full."""
        self._lately += 0.1 * (seconds - self._lately)


class Feed:
    """The pieces of a request's choices, as they come."""

    def __init__(self, service: Service, ends: float, requests: Sequence[Request], streamed: bool):
        self._service, self._queue, self._ends = service, asyncio.Queue(), ends
        self._began = time.monotonic()
        self.jobs = [
            Job(request, lambda piece, i=i: self._queue.put_nowait((i, piece)), streamed)
            for i, request in enumerate(requests)
        ]
        self._left = len(self.jobs)
        self._first: list[tuple[int, Piece]] = []

    async def wait(self, seconds: float) -> None:
        """Waits for the first piece, but not longer. ApiError if it is an error."""
        try:
            async with asyncio.timeout(seconds):
                self._first = [await self._queue.get()]
        except TimeoutError:
            return
        except asyncio.CancelledError:  # the client has hung up
            self.close()
            raise
        if error := self._first[0][1].error:
            self.close()
            raise error

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(choice, piece), until all have ended. ApiError if one was given up, or time is over."""
        service = self._service
        try:
            while self._left:
                try:
                    async with asyncio.timeout(self._ends - time.monotonic()):
                        choice, piece = (
                            self._first.pop() if self._first else await self._queue.get()
                        )
                except TimeoutError:
                    raise service.late() from None
                if piece.error is not None:
                    raise piece.error
                self._left -= piece.last
                yield choice, piece
            service.took(time.monotonic() - self._began)
            for job in self.jobs:
                service.metrics.first_token(job.first_seconds or 0.0)
        finally:
            self.close()

    def close(self) -> None:
        """Gives up what has not ended."""
        if self._left:
            self._left = 0
            self._service.scheduler.cancel(self.jobs)

    @property
    def first_seconds(self) -> float | None:
        """Until the first new token of a choice."""
        return min(
            (j.first_seconds for j in self.jobs if j.first_seconds is not None), default=None
        )


def _sizes(decoder: Decoder) -> tuple[int, int]:
    """Bytes of the base, and of a token's keys and values in all of its layers."""
    config, dtype = decoder.base.config, jnp.dtype(decoder.base.dtype)
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder.base.params))
    return base, 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def default_name(compressor: Compressor) -> str:
    """The base's name and the method's."""
    path = pathlib.PurePath(compressor.base.path.rstrip("/"))
    return f"{path.stem if path.suffix == '.gguf' else path.name}-{compressor.config.method}"


def _copy(prefix: Prefix) -> Prefix:
    """The same in another object, which has a place of its own."""
    return dataclasses.replace(prefix)
