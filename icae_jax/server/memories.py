"""Memories that requests name, or whose texts they bring: found, compressed, and kept.

What was read or compressed is kept for the next question, up to so many bytes, so that questions
about one memory also share its place in the engine (`Request.prefix`).
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from icae_jax.compression.decoder import Prefix
from icae_jax.compression.memory import Memory
from icae_jax.compression.segments import position_budget
from icae_jax.errors import UserError
from icae_jax.inference.compressor import BATCH_SIZE, Compressor
from icae_jax.inference.engine import padded
from icae_jax.inference.store import Entry, NewEntry
from icae_jax.inference.store.entries import metadata_text
from icae_jax.inference.texts import Size, content_hash
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.server.documents import Documents, damaged
from icae_jax.server.failures import ApiError, shown
from icae_jax.server.scheduler import is_out_of_memory, no_room

CHARACTERS = 64  # more than a token has in any text but odd ones
AT_ONCE = 16  # texts that wait are compressed together, up to so many
STORE, CACHE = "store", "cache"


@dataclasses.dataclass(eq=False)
class Kept:
    """The memory of one text, or of several that are read together, on the host.

    Attributes:
        id: the document's.
        memory: the memory.
        context_tokens: of the text.
        metadata: the user's.
        where: STORE or CACHE.
        content_hash: of the text and the memory asked for, of one that no store has.
        prefixes: what the decoder reads, by whether the template's head stands before it.
        key: by which it is kept.
    """

    id: str
    memory: Memory
    context_tokens: int
    metadata: dict[str, Any]
    where: str
    content_hash: str = ""
    prefixes: dict[bool, Prefix] = dataclasses.field(default_factory=dict)
    key: Hashable = None

    @property
    def memory_tokens(self) -> int:
        """Memory tokens in all."""
        return int(self.memory.tokens[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the memory alone."""
        return int(self.memory.bytes[0])

    @property
    def held(self) -> int:
        """Bytes that keeping it takes."""
        numbers = [*self.memory.contents.values()]
        numbers += [x for prefix in self.prefixes.values() for x in (prefix.k, prefix.v)]
        return sum(np.asarray(x).nbytes for x in numbers)

    def facts(self) -> dict[str, Any]:
        """The fields of `schema.MemoryObject`."""
        return _facts(
            self.id,
            self.context_tokens,
            self.memory_tokens,
            self.memory.tokens_per_segment,
            self.nbytes,
            self.where,
            self.metadata,
        )


def _facts(memory_id, tokens, memory_tokens, k, nbytes, where, metadata):
    return {
        "id": memory_id,
        "object": "memory",
        "context_tokens": tokens,
        "memory_tokens": memory_tokens,
        "memory_tokens_per_segment": k,
        "ratio": tokens / memory_tokens,
        "bytes": nbytes,
        "kept": where,
        "metadata": metadata,
    }


def entry_facts(entry: Entry) -> dict[str, Any]:
    """The fields of `schema.MemoryObject`, of a document that need not be read."""
    return _facts(
        entry.id,
        entry.tokens,
        entry.memory_tokens,
        entry.k,
        entry.spans["memory"].nbytes,
        STORE,
        entry.metadata,
    )


class Cache:
    """Memories by key, up to so many bytes; the one used longest ago goes first."""

    def __init__(self, nbytes: int):
        self.most, self.used = nbytes, 0
        self._kept: collections.OrderedDict[Hashable, tuple[Kept, int]] = collections.OrderedDict()
        self._mutex = threading.Lock()
        self.hits = self.misses = 0

    def __len__(self):
        """Memories that are kept."""
        return len(self._kept)

    def get(self, key: Hashable) -> Kept | None:
        """The memory of a key, which counts as used now."""
        with self._mutex:
            if key not in self._kept:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, kept: Kept) -> None:
        """Keeps a memory; older ones go until there is room."""
        kept.key = key
        with self._mutex:
            self._put(key, kept)

    def _put(self, key, kept):
        self._take_out(key)
        size = kept.held
        if size > self.most:
            return
        self._kept[key] = kept, size
        self.used += size
        while self.used > self.most:
            self._take_out(next(iter(self._kept)))

    def count_again(self, kept: Kept) -> None:
        """Counts the bytes of a memory anew, if it is still the one that is kept."""
        with self._mutex:
            if self._kept.get(kept.key, (None, 0))[0] is kept:
                self._put(kept.key, kept)

    def drop(self, key: Hashable) -> bool:
        """Forgets a memory; whether it was there."""
        with self._mutex:
            return self._take_out(key)

    def _take_out(self, key):
        if key not in self._kept:
            return False
        self.used -= self._kept.pop(key)[1]
        return True

    def named(self) -> list[Kept]:
        """The memories that no store has, by their ids; none counts as used."""
        with self._mutex:
            named = [kept for key, (kept, _) in self._kept.items() if key[0] == CACHE]
        return sorted(named, key=lambda kept: kept.id)


class Work(NamedTuple):
    """A text to compress, or something else to do where the store is written."""

    future: concurrent.futures.Future
    context: list[int]
    k: int
    call: Callable[[], Any] | None = None


class Memories:
    """Finds, compresses and keeps memories.

    Methods block, and may be called from any thread; only `compress` and what writes the store go
    to the one thread that does both, which takes all texts that wait together.

    Args:
        compressor: what compresses.
        documents: the store; None for none.
        cache_bytes: of memories that are kept for the next question.
        max_context_tokens: of a text; by default what the base has positions for.
        compressed: told (context tokens, seconds) of each batch.
    """

    def __init__(
        self,
        compressor: Compressor,
        documents: Documents | None,
        cache_bytes: int,
        max_context_tokens: int | None = None,
        compressed: Callable[[int, float], None] = lambda tokens, seconds: None,
    ):
        self.compressor, self.documents = compressor, documents
        self.cache, self._compressed = Cache(cache_bytes), compressed
        self.max_context_tokens = min(max_context_tokens or 1 << 62, self._most_tokens())
        # A tokenizer changes while it encodes, so threads take turns.
        self.tokenizing = threading.Lock()
        self._reading = threading.Lock()  # so that a memory is not read twice at the same time
        self._asking = threading.Lock()
        self._asked: dict[Hashable, concurrent.futures.Future] = {}  # being compressed
        self._closed = False
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compressing", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, after what it has begun."""
        with self._asking:
            self._closed = True
            with contextlib.suppress(queue.Empty):
                while True:
                    self._work.get_nowait().future.set_exception(_ending())
            self._work.put(None)
        self._thread.join()

    def _most_tokens(self) -> int:
        """Tokens of the longest text that leaves positions for a question and an answer."""
        config = self.compressor.config
        positions, least, most = self.compressor.base.config.max_position_embeddings, 1, 1
        least_k = 1 if config.any_k else min(config.choices)
        while self._needed(2 * most, least_k) <= positions:
            most *= 2
        most *= 2
        while least < most - 1:
            middle = (least + most) // 2
            fits = self._needed(middle, least_k) <= positions
            least, most = (middle, most) if fits else (least, middle)
        return least

    def _needed(self, tokens, k):
        """Positions for a text, and behind its memory a question and an answer of a token each."""
        template = self.compressor.adapter.template
        budget = position_budget(self.compressor.config, tokens, k=k, head=len(template.head))
        return budget.needed(behind=len(template.prompt([0])) + 1)

    # --- Finding ---

    def find(self, memory_id: str) -> Kept:
        """The memory of an id, of the store or kept. ApiError 404 if there is none."""
        entry = None if self.documents is None else self.documents.entry(memory_id)
        if entry is None:
            kept = self.cache.get((CACHE, memory_id))
            if kept is None:
                raise self._unknown(memory_id)
            return kept
        spans = tuple(span.checksum for span in entry.spans.values())
        key = (STORE, memory_id, entry.content_hash, spans)
        with self._reading:
            kept = self.cache.get(key)
            if kept is None:
                kept = self._read(entry)
                self.cache.put(key, kept)
        return kept

    def _unknown(self, memory_id):
        what = "neither stored nor kept" if self.documents is not None else "not kept (any more)"
        return ApiError(
            404,
            f"memory {shown(memory_id)} is {what}; POST its text to /v1/memories",
            "memory",
            "memory_not_found",
        )

    def _read(self, entry):
        template = self.compressor.adapter.template
        try:
            kept = Kept(entry.id, entry.memory, entry.tokens, entry.metadata, STORE)
            prefix = None
            if entry.has_kv and self.documents.current().info.head == tuple(template.head):
                prefix = entry.prefix
        except UserError as error:
            raise damaged(error) from error
        if prefix is not None:
            kept.prefixes[bool(template.head)] = _padded(prefix)
        return kept

    def facts(self, memory_id: str) -> dict[str, Any]:
        """What `GET /v1/memories/ID` says; its numbers are not read."""
        entry = None if self.documents is None else self.documents.entry(memory_id)
        return self.find(memory_id).facts() if entry is None else entry_facts(entry)

    def page(self, prefix: str, after: str | None, limit: int) -> tuple[list[dict], bool]:
        """Some memories behind one of them, and whether there are more."""
        if self.documents is not None:
            facts = [entry_facts(e) for e in self.documents.page(prefix, after, limit + 1)]
        else:
            named = [kept for kept in self.cache.named() if kept.id.startswith(prefix)]
            behind = [kept.facts() for kept in named if after is None or kept.id > after]
            facts = behind[: limit + 1]
        return facts[:limit], len(facts) > limit

    def together(self, parts: Sequence[Kept]) -> Kept:
        """One memory of several, read in this order. ApiError 400 if their k differ."""
        if len(parts) == 1:
            return parts[0]
        ks = {part.memory.tokens_per_segment for part in parts}
        if len(ks) > 1:
            raise ApiError(
                400,
                f"the memories have {sorted(ks)} memory tokens per segment, so they cannot be read "
                "together; compress them alike",
                "memory",
            )
        key = ("together", *((part.key, part.content_hash) for part in parts))
        with self._reading:
            kept = self.cache.get(key)
            if kept is None:
                memory = self.compressor.join([part.memory for part in parts])
                tokens = sum(part.context_tokens for part in parts)
                kept = Kept("", memory, tokens, {}, CACHE)
                self.cache.put(key, kept)
        return kept

    def prefix(self, kept: Kept, template: bool) -> Prefix:
        """What the decoder reads of a memory, always the same object while it is kept.

        template: with the head of the adapter's template before it, as questions are asked.
        """
        headed = template and bool(self.compressor.adapter.template.head)
        with self._reading:
            if headed not in kept.prefixes:
                # Few shapes are compiled: a memory has whole segments.
                kept.prefixes[headed] = _padded(self.compressor.prefix(kept.memory, headed))
                self.cache.count_again(kept)
        return kept.prefixes[headed]

    # --- Compressing ---

    def check_length(self, text: str, tokens: int, param: str) -> None:
        """ApiError 400 if a text is far longer than so many tokens.

        Tokenizing it to say how many it has would keep all others waiting.
        """
        most = tokens * CHARACTERS
        if len(text) > most:
            raise ApiError(
                400,
                f"{param} has {len(text):,} characters, and at most {tokens:,} tokens are taken; "
                "send it in several parts",
                param,
                "context_length_exceeded",
            )

    def context_ids(self, text: str, param: str) -> list[int]:
        """A text as the encoder reads it. ApiError 400 if it has too many tokens, or none."""
        self.check_length(text, self.max_context_tokens, param)
        with self.tokenizing:
            try:
                context = self.compressor.context_ids(text)
            except UserError as error:
                raise ApiError(400, f"{param}: {error}", param) from error
        if len(context) == len(self.compressor.framing.start):
            raise ApiError(400, f"{param}: the text has no tokens", param)
        try:
            size = self.compressor.base.config.vocab_size
            tokenizers.check_ids([context], size, lambda _: param, self.compressor.base.tokenizer)
        except UserError as error:
            raise ApiError(400, str(error), param) from error
        if len(context) > self.max_context_tokens:
            raise ApiError(
                400,
                f"{param} has {len(context):,} tokens, more than the {self.max_context_tokens:,} "
                "that are taken; send it in several parts",
                param,
                "context_length_exceeded",
            )
        return context

    def compress(
        self,
        text: str,
        size: Size,
        param: str,
        memory_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        keep: bool = False,
    ) -> tuple[Kept, bool]:
        """The memory of a text, and whether it is new.

        size: of the memory. param: the request's field, for messages. memory_id: by default made of
        the text. keep: in the store, if there is one.
        """
        config = self.compressor.config
        hashed = content_hash(text, size.asked(config))
        memory_id = memory_id or f"mem-{hashed[:24]}"
        stored = keep and self.documents is not None
        if stored:
            self.documents.check_writable()
        if known := self._known(memory_id, hashed, stored, metadata):
            return known, False
        context = self.context_ids(text, param)
        try:
            k = size.k_of(config, len(context))
        except UserError as error:
            raise ApiError(400, str(error), param) from error
        positions = self.compressor.base.config.max_position_embeddings
        if (needed := self._needed(len(context), k)) > positions:
            raise ApiError(
                400,
                f"{param}: {len(context):,} tokens at {k} memory tokens per segment need "
                f"{needed:,} positions, the base has {positions:,}; ask for fewer memory tokens",
                param,
                "context_length_exceeded",
            )
        memory = self._in_turn(context, k)
        where = STORE if stored else CACHE
        kept = Kept(memory_id, memory, len(context), metadata or {}, where, hashed)
        if stored:
            self._store(kept, hashed)
        else:
            self.cache.put((CACHE, memory_id), kept)
        return kept, True

    def _known(self, memory_id, hashed, stored, metadata) -> Kept | None:
        """A memory of the same text and size. ApiError 409 if the id is another's."""
        entry = None if self.documents is None else self.documents.entry(memory_id)
        if entry is not None:
            if not stored and entry.content_hash != hashed:
                raise ApiError(
                    409,
                    f"id {shown(memory_id)} is a document's of the store; keep the text there, or "
                    "give it another id",
                    "id",
                    "id_taken",
                )
            same = entry.content_hash == hashed and metadata in (None, entry.metadata)
            return self.find(memory_id) if same else None
        kept = None if stored else self.cache.get((CACHE, memory_id))
        if kept is None or kept.content_hash != hashed or metadata not in (None, kept.metadata):
            return None
        return kept

    def _store(self, kept, hashed):
        prefix = None
        if self.documents.stores_kv:
            prefix = self.compressor.prefix(kept.memory)
        entry = NewEntry(kept.id, hashed, kept.memory, prefix, kept.metadata)
        self._call(functools.partial(self.documents.add, [entry]))
        self.cache.drop((CACHE, kept.id))

    def warm(self, context: list[int]) -> Kept:
        """A memory that nobody asked for: its programs are compiled with it."""
        memory = self._in_turn(context, self.compressor.config.choose())
        return Kept("", memory, len(context), {}, CACHE)

    def remove(self, memory_id: str) -> None:
        """Forgets a memory, and removes it from the store. ApiError 404 if there is none."""
        if self.documents is not None and self.documents.entry(memory_id) is not None:
            self.documents.check_writable()
            self._call(functools.partial(self.documents.remove, memory_id))
        elif not self.cache.drop((CACHE, memory_id)):
            raise self._unknown(memory_id)

    # --- The thread that compresses, and writes the store ---

    def _in_turn(self, context: list[int], k: int) -> Memory:
        """The memory of a context, which is compressed once if several ask for it together."""
        key = (tuple(context), k)
        with self._asking:
            future = self._asked.get(key)
            if future is None:
                future = self._asked[key] = self._give(context, k)
        try:
            return future.result()
        finally:
            with self._asking:
                if self._asked.get(key) is future:
                    del self._asked[key]

    def _call(self, call: Callable[[], Any]) -> Any:
        with self._asking:
            future = self._give([], 0, call)
        return future.result()

    def _give(self, context, k, call=None) -> concurrent.futures.Future:
        """Gives the thread something to do; with `_asking` held, so that nothing comes too late."""
        if self._closed:
            raise _ending()
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._work.put(Work(future, context, k, call))
        return future

    def _run(self):
        while (first := self._work.get()) is not None:
            batch, ended = [first], False
            while len(batch) < AT_ONCE and not self._work.empty():
                work = self._work.get()
                if work is None:
                    ended = True
                    break
                batch.append(work)
            for work in batch:
                if work.call is not None:
                    _settle([work], lambda work=work: [work.call()])
            for k in sorted({work.k for work in batch if work.call is None}):
                alike = [work for work in batch if work.call is None and work.k == k]
                self._compress_all(alike, k)
            if ended:
                return

    def _compress_all(self, alike: Sequence[Work], k: int) -> None:
        """Compresses texts together: one by one if that fails, so that none spoils another."""
        if len(alike) > 1:
            try:
                memories = self._compress(alike, k)
            except Exception:
                memories = []
            for work, memory in zip(alike, memories, strict=False):
                work.future.set_result(memory)
            alike = alike[len(memories) :]
        for work in alike:
            _settle([work], lambda work=work: self._compress([work], k))

    def _compress(self, alike: Sequence[Work], k: int) -> list[Memory]:
        began = time.perf_counter()
        contexts = [work.context for work in alike]
        memories, _ = self.compressor.writer.write_each(contexts, k, BATCH_SIZE)
        self._compressed(sum(map(len, contexts)), time.perf_counter() - began)
        return memories


def _ending():
    return ApiError(503, "the server is shutting down", code="draining")


def _settle(works: Sequence[Work], call: Callable[[], Sequence[Any]]) -> None:
    """Gives those that wait their results, or the error that there was."""
    try:
        results = call()
    except Exception as error:
        for work in works:
            work.future.set_exception(no_room() if is_out_of_memory(error) else error)
        return
    for work, result in zip(works, results, strict=True):
        work.future.set_result(result)


def _padded(prefix: Prefix) -> Prefix:
    """A prefix padded to one of few sizes, so that few programs load it."""
    more = padded(prefix.mask.shape[1]) - prefix.mask.shape[1]
    if not more:
        return prefix
    at = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
    return Prefix(
        np.pad(np.asarray(prefix.k), at),
        np.pad(np.asarray(prefix.v), at),
        np.pad(np.asarray(prefix.mask), ((0, 0), (0, more))),
        np.pad(np.asarray(prefix.positions), ((0, 0), (0, more))),
        np.asarray(prefix.end),
    )


def checked_metadata(metadata: dict[str, Any] | None) -> dict[str, Any] | None:
    """Metadata that a store can hold. ApiError 400 otherwise."""
    try:
        if metadata is not None:
            metadata_text(metadata, "metadata")
    except UserError as error:
        raise ApiError(400, str(error), "metadata") from error
    return metadata
