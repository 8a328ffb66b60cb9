"""A chat over documents: questions behind their memories, and behind the turns so far.

Documents are read as one joined memory, in their order. Turns stand behind it in full, as the
adapter's template frames them, until the base's positions are full; then the oldest are compressed
as well, and their memory is joined behind that of the documents (ICAE, arXiv 2307.06945, section 1,
names long conversations as a use of memories). Without any memory the base alone answers.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from icae_jax.compression.decoder import Prefix
from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError, shown
from icae_jax.inference.batching import concatenate, few_shapes, round_up
from icae_jax.inference.compressor import ANSWER_TOKENS, BATCH_SIZE, SPARE, Compressor
from icae_jax.inference.engine import Engine
from icae_jax.inference.reading import Request, generation
from icae_jax.inference.requests import Request as EngineRequest
from icae_jax.inference.requests import Running
from icae_jax.inference.sampling import GREEDY, Sampling
from icae_jax.inference.store import Store
from icae_jax.interop.prompts import Turn
from icae_jax.workflows import chat_documents
from icae_jax.workflows.chat_documents import Document, Text
from icae_jax.workflows.chat_history import Split, Window, transcript

SMALLEST_ROW = 512  # tokens of the first engine's row; longer ones double it
SMALLEST_MEMORY = 64
FEW = 8  # memories of more segments are padded to multiples of this


@dataclasses.dataclass(frozen=True)
class Status:
    """What a chat reads.

    context_tokens, memory_tokens: of the documents. turns: in full. turns_in_memory,
    turn_memory_tokens: of the older ones. turns_forgotten: those before them, which are read no
    more. positions: that the last prompt and answer took, memory included, of `of_positions`.
    """

    documents: int
    context_tokens: int
    memory_tokens: int
    turns: int
    turns_in_memory: int
    turn_memory_tokens: int
    turns_forgotten: int
    positions: int
    of_positions: int

    def __str__(self) -> str:
        documents = "no documents"
        if self.documents:
            documents = (
                f"{_counted(self.documents, 'document')}, {self.context_tokens:,} tokens in "
                f"{self.memory_tokens:,} memory tokens"
            )
        turns = _counted(self.turns, "turn")
        if self.turns_in_memory:
            turns += f", {self.turns_in_memory} more in {self.turn_memory_tokens} memory tokens"
        if self.turns_forgotten:
            turns += f", {self.turns_forgotten} forgotten"
        return f"[{documents} · {turns} · {self.positions:,} of {self.of_positions:,} positions]"


def _counted(number, thing):
    return f"{number} {thing}{'' if number == 1 else 's'}"


class Chat:
    """Documents, turns, and what is read of both.

    Attributes:
      compressor: base and adapter.
      store: where documents are found by id; None without one.
      documents: those that are read, in order.
      turns: the whole conversation, also what is only in memory by now.
      split: where its turns are.
      k: memory tokens per segment, of documents and older turns.
      last: the last answer, as it was decoded; None if not a token of it came.
      stopped: whether `stop` ended the last text.
    """

    def __init__(
        self,
        compressor: Compressor,
        texts: Sequence[Text] = (),
        *,
        store: Store | None = None,
        ids: Sequence[str] = (),
        ratio: float | None = None,
        max_new_tokens: int | None = None,
        history_tokens: int | None = None,
        sampling: Sampling = GREEDY,
    ):
        """A chat; documents of the store come before texts.

        Args:
          compressor: base and adapter.
          texts: documents to be compressed.
          store: of that compressor.
          ids: documents of the store.
          ratio: wanted context tokens per memory token of texts and older turns; by default the
            least. Where documents of the store are read, theirs counts.
          max_new_tokens: of an answer.
          history_tokens: turns in full have no more tokens than this; by default as many as fit.
          sampling: how tokens are chosen; max_new_tokens takes the place of its limit.

        Raises:
          UserError: an id is not in the store or its bytes are damaged, documents cannot be read
            together, do not fit, or a limit is out of its range.
        """
        self.most = ANSWER_TOKENS if max_new_tokens is None else max_new_tokens
        if self.most < 1:
            raise UserError(f"max_new_tokens is {self.most}; it must be positive")
        if history_tokens is not None and history_tokens < 0:
            raise UserError(
                f"history_tokens is {history_tokens}; give 0 to compress every turn, or more"
            )
        self.compressor, self.store = compressor, store
        self.history_tokens, self.sampling = history_tokens, sampling
        self.documents: list[Document] = []
        self.turns: list[Turn] = []
        self.split, self.last = Split(), None
        self.k = chat_documents.k_for(compressor, [text.text for text in texts], ratio)
        self._positions: int | None = None  # taken by the last answer
        self._older: tuple[Any, Memory] | None = None  # key, memory of older turns
        # Parts of the memory that is read, that memory, and its K/V.
        self._read: tuple[list[Memory], Memory, Prefix] | None = None
        self._engines: dict[bool, Engine] = {}  # behind a memory, and without one
        self._stop = self.stopped = False
        self.add(texts, ids)

    # --- Documents ---

    def add(self, texts: Sequence[Text] = (), ids: Sequence[str] = ()) -> list[Document]:
        """Reads further documents, behind the others; returns them. Arguments as of the class.

        Texts are compressed, also those read before, to the memory tokens per segment that
        documents of the store have. UserError, and all is as before, if they cannot be read.
        """
        if ids and self.store is None:
            raise UserError(f"document {shown(ids[0])}: no store is open; start with --store")
        new: list[Document | Text] = []
        if ids:
            new += [chat_documents.of_entry(entry) for entry in self.store.get(ids)]
        new += texts
        known = {document.id for document in self.documents}
        for document in new:
            if document.id in known:
                raise UserError(
                    f"document {shown(document.id)} is read already; drop it first to read another "
                    "of that id"
                )
            known.add(document.id)
        self._take([*self.documents, *new], self.k)
        return self.documents[len(self.documents) - len(new) :]

    def drop(self, document_id: str) -> None:
        """No longer reads a document. UserError if it is not read."""
        self._find(document_id)
        self._take([d for d in self.documents if d.id != document_id], self.k)

    def set_ratio(self, ratio: float) -> None:
        """Compresses the documents given as text, and older turns, at the nearest known ratio.

        UserError, and all is as before, if the store's documents have another, or there is no room.
        """
        texts = [d.text.text for d in self.documents if d.text is not None]
        k, stored = chat_documents.k_for(self.compressor, texts, ratio), self._common_k()
        if stored is not None and stored != k:
            names = ", ".join(shown(d.id) for d in self.documents if d.entry is not None)
            raise UserError(
                f"ratio {ratio:g} means {k} memory tokens per segment, but documents of the store "
                f"keep theirs, {stored} ({names}), and only like memories are read together; drop "
                "them, or choose another ratio"
            )
        self._take(self.documents, k)

    def _common_k(self):
        return chat_documents.common_k(self.documents)

    def _find(self, document_id: str) -> Document:
        for document in self.documents:
            if document.id == document_id:
                return document
        known = ", ".join(shown(document.id) for document in self.documents) or "none"
        raise UserError(f"document {shown(document_id)} is not read; those that are: {known}")

    def _take(self, wanted: Sequence[Document | Text], k: int) -> None:
        """Has these documents, compressing what is still to be at k or the store's own."""
        stored = chat_documents.common_k([d for d in wanted if isinstance(d, Document)])
        k = k if stored is None else self.compressor.config.choose(stored)
        documents = []
        for document in wanted:
            text = document if isinstance(document, Text) else document.text
            if isinstance(document, Text) or (text is not None and document.k != k):
                (document,) = chat_documents.compress(self.compressor, [text], k)
            documents.append(document)
        self._window(documents, k).check()
        self.documents, self.k, self._positions = documents, k, None

    # --- Asking ---

    def ask(self, question: str) -> Iterator[str]:
        """Answers a question; yields the text as it comes, whole characters only.

        The turn counts when the answer has ended. One that is left early (`stop`, or by closing the
        iterator) is kept as far as it came. UserError, and all is as before, if the question does
        not fit.
        """
        plan = self._window().plan(question, self.turns, self.split)
        memory, prefix = self._memory(plan.split)
        if memory is None:
            sampling = dataclasses.replace(self.sampling, max_new_tokens=plan.most)
            stop_ids = self.compressor.reader.stop_ids("qa")
            request = EngineRequest(plan.prompt, sampling, stop_ids=stop_ids)
        else:
            asked = Request([plan.prompt], plan.most, sampling=self.sampling)
            (request,) = self.compressor.reader.requests(memory, [asked], "qa", 1, [prefix])
        running, ended, self.last = None, False, None
        try:
            with contextlib.closing(self._run(request)) as stream:
                for running in stream:
                    ended = running.done  # by itself: one that is left early counts as done later
                    if text := running.take_text():
                        yield text
        finally:
            if running is not None and (ended or running.stream.text):
                made = generation(self.compressor.base, running, memory)
                self.turns.append(Turn(question, made.text))
                self.split, self.last = plan.split, made
                self._positions = plan.start + len(plan.prompt) + len(made.ids)

    def stop(self) -> None:
        """Ends the text that is being decoded, after its next token. A signal may call it."""
        self._stop = True

    def clear(self) -> None:
        """Forgets all turns."""
        self.turns, self.split, self.last = [], Split(), None
        self._older = self._positions = None

    def restore(self, document_id: str) -> Iterator[str]:
        """The text of a document, read back from its memory; yields it as it comes.

        UserError if the document is not read, or too long to be read back.
        """
        document, compressor = self._find(document_id), self.compressor
        tokens = document.tokens
        asked = Request([[compressor.framing.trigger]], tokens + SPARE, tokens + 1)
        prefix = document.prefix(()) or self._prefix(document.memory, "ae")
        (request,) = compressor.reader.requests(document.memory, [asked], "ae", 1, [prefix])
        with contextlib.closing(self._run(request)) as stream:
            for running in stream:
                if text := running.take_text():
                    yield text

    def _run(self, request: EngineRequest) -> Iterator[Running]:
        """Runs one request; yields it at each token, until it ends or `stop` is called."""
        self._stop = self.stopped = False
        with contextlib.closing(self._engine(request).stream([request])) as stream:
            for running in stream:
                if running.error is not None:
                    raise running.error
                yield running
                if self._stop and not running.done:
                    self.stopped = True
                    return

    def _engine(self, request: EngineRequest) -> Engine:
        """An engine of one row for a request: the last one, unless it is too small.

        Sizes are powers of two, so that programs are compiled once for many turns.
        """
        compressor, prefix = self.compressor, request.prefix
        positions = compressor.base.config.max_position_embeddings
        needed = len(request.prompt) + request.sampling.max_new_tokens
        tokens = few_shapes(max(needed, min(SMALLEST_ROW, positions)), positions)
        memory = 0 if prefix is None else prefix.mask.shape[1]
        engine = self._engines.get(prefix is not None)
        if engine is not None and (needed <= engine.tokens and memory <= engine.memory_tokens):
            return engine
        if engine is not None:  # its room is given back first
            tokens, memory = max(tokens, engine.tokens), max(memory, engine.memory_tokens)
            del self._engines[prefix is not None], engine
        if prefix is None:
            made = Engine(
                compressor.plain_decoder,
                compressor.devices,
                rows=1,
                tokens=tokens,
                tokenizer=compressor.base.tokenizer,
            )
        else:
            memory = 1 << (max(memory, SMALLEST_MEMORY) - 1).bit_length()
            made = compressor.reader.engine(
                "qa", rows=1, tokens=tokens, memory_tokens=memory, stop=True
            )
        self._engines[prefix is not None] = made
        return made

    # --- Memories ---

    def _window(self, documents: Sequence[Document] | None = None, k: int | None = None) -> Window:
        documents = self.documents if documents is None else documents
        segments = [n for d in documents for n in d.memory.segment_lengths[0].tolist() if n]
        return Window(self.compressor, segments, k or self.k, self.most, self.history_tokens)

    def _older_memory(self, split: Split) -> Memory | None:
        """The memory of the turns that a split compresses, as one text; None without any.

        All of them are compressed again when there are more, so that one segment at most is short.
        """
        text = transcript(self.turns[split.forgotten : split.compressed])
        if not self.compressor.ids(text):
            return None
        key = text, self.k
        if self._older is None or self._older[0] != key:
            context = self.compressor.context_ids(text)
            (memory,), _ = self.compressor.writer.write_each([context], self.k, BATCH_SIZE)
            self._older = key, memory
        return self._older[1]

    def _memory(self, split: Split) -> tuple[Memory | None, Prefix | None]:
        """What is read: documents and older turns, joined, and its K/V; nothing without either."""
        older = self._older_memory(split)
        parts = [document.memory for document in self.documents]
        parts += [] if older is None else [older]
        if not parts:
            return None, None
        read = self._read[0] if self._read else []
        if len(read) != len(parts) or any(a is not b for a, b in zip(read, parts, strict=True)):
            prefix = None
            if len(self.documents) == len(parts) == 1:
                prefix = self.documents[0].prefix(self.compressor.reader.head("qa"))
            memory = parts[0] if len(parts) == 1 else self.compressor.join(parts)
            if prefix is None:
                prefix = self._prefix(memory, "qa")
            self._read = parts, memory, prefix
        return self._read[1:]

    def _prefix(self, memory: Memory, objective: str) -> Prefix:
        """K/V of a memory, padded to few numbers of segments: each is a program."""
        segments = memory.segment_lengths.shape[1]
        few = few_shapes(segments, FEW) if segments <= FEW else round_up(segments, FEW)
        if few > segments:
            memory = concatenate([memory], self.compressor.config, few)
        rows = self.compressor.devices.rows(1)  # as many as a mesh can split; the first is read
        prefix = self.compressor.reader.read(memory[[0] * rows], objective)
        return prefix.replace(end=np.asarray(prefix.end))

    # --- What it says of itself ---

    @property
    def status(self) -> Status:
        """What is read now."""
        window, (forgotten, compressed) = self._window(), self.split
        older = window.segments(self.turns[forgotten:compressed])
        positions = window.start(older) if self._positions is None else self._positions
        return Status(
            documents=len(self.documents),
            context_tokens=sum(document.tokens for document in self.documents),
            memory_tokens=sum(document.memory_tokens for document in self.documents),
            turns=len(self.turns) - compressed,
            turns_in_memory=compressed - forgotten,
            turn_memory_tokens=len(older) * self.k,
            turns_forgotten=forgotten,
            positions=positions,
            of_positions=window.positions,
        )
