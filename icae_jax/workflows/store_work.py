"""What of an input is still to be compressed into a store: windows, groups, the check of each text.

The documents are cut into windows in order, those of a window are sorted by length, and cut into
groups. A group is stored as one shard. All of that depends on the input alone, so that a run that
was killed goes on with the groups that are missing, and several processes share them without a
word.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from icae_jax import errors
from icae_jax.compression.segments import position_budget, segment_shape
from icae_jax.data.documents import Document
from icae_jax.errors import UserError
from icae_jax.inference import store
from icae_jax.inference.origin import Origin
from icae_jax.inference.store import entries as store_entries
from icae_jax.inference.texts import Size, content_hash
from icae_jax.interop.adapters.adapter import Adapter
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.text import user_ids
from icae_jax.objectives import targets
from icae_jax.training import trained
from icae_jax.training.trained import Trained

WINDOW, WINDOW_CHARACTERS = 2048, 16 << 20  # most documents of a window, and of their characters
GROUP, GROUP_BYTES = 256, 256 << 20  # most documents of a group, and about the most bytes of it
CHARACTERS_PER_TOKEN = 3  # by which the bytes of a group are estimated
SHOWN = 10  # problems that are told on stderr
KEPT = 100  # problems that the result names


class Problems:
    """Documents that cannot be stored: told, counted, the first of them kept.

    strict: whether one is an error instead.
    """

    def __init__(self, strict: bool = False):
        self.strict, self.count = strict, 0
        self.kept: list[dict[str, str]] = []

    def add(self, document: Document, why: str) -> None:
        """Notes a document. UserError where one is an error."""
        text = f"{document.where}: document {errors.shown(document.id)} is not stored: {why}"
        if self.strict:
            raise UserError(f"{text}; mend or remove it, or leave it out, without --strict")
        self.count += 1
        if self.count <= SHOWN:
            more = "; further ones are only counted" if self.count == SHOWN else ""
            print(text + more, file=sys.stderr, flush=True)
        if len(self.kept) < KEPT:
            self.kept.append({"id": document.id, "where": document.where, "problem": why})


class Prepared:
    """A compressor before its base is loaded: what tells what is to do, and whether it fits.

    Args:
        adapter: see `trained.find`.
        base: by default the one that the adapter names.
        base_dtype: see `loading.load`.

    Attributes:
        found: the trained compressor.
        base: without weights.
        adapter: loaded onto that.
        config: its compression.
    """

    def __init__(self, adapter: str, base: str | None, base_dtype: str | None):
        self.found: Trained = trained.find_whole(adapter)
        self.base_path = base or trained.base_of(self.found)
        _, quantize = bases.precision(base_dtype)
        weights = trained.stated_identity(self.found).get("weights", "")
        self.base = bases.without_weights(self.base_path, weights or "not known", quantize)
        self.path, self.adapter = trained.open_adapter(self.found, self.base)
        self.config = self.adapter.compression
        tokenizer = self.base.tokenizer
        self.framing = targets.make_framing(self.config, tokenizer, tokenizers.bos_id(tokenizer))

    @property
    def origin(self) -> Origin:
        """That of the compressor, but for the weights, which are not known before they are read."""
        identity = {"tokenizer": self.base.identity["tokenizer"]}
        adapter: Adapter = self.adapter
        return Origin(
            self.config,
            self.base.fingerprint,
            adapter.fingerprint,
            self.path,
            identity,
            adapter.lora.scale,
            self.base.quantize,
        )

    def contexts(self, documents: Sequence[Document]) -> list[list[int]]:
        """The texts as the encoder reads them."""
        ids = user_ids(self.base.tokenizer, [document.text for document in documents])
        return [[*self.framing.start, *row] for row in ids]

    def problem(self, context: Sequence[int], k: int) -> str:
        """Why nothing can be made of a context; "" if it can be compressed and asked about."""
        if len(context) == len(self.framing.start):
            return "the text has no tokens"
        positions = self.base.config.max_position_embeddings
        needed = position_budget(self.config, len(context), k=k).needed(behind=2)
        if needed > positions:
            return (
                f"{len(context):,} tokens need {needed:,} positions, the base has {positions:,}; "
                "cut it into several documents"
            )
        try:
            size = self.base.config.vocab_size
            tokenizers.check_ids([context], size, lambda _: "the text", self.base.tokenizer)
        except UserError as error:
            return str(error)
        return ""


def windows(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in order, some thousand at a time."""
    window, characters = [], 0
    for document in documents:
        if window and (
            len(window) == WINDOW or characters + len(document.text) > WINDOW_CHARACTERS
        ):
            yield window
            window, characters = [], 0
        window.append(document)
        characters += len(document.text)
    if window:
        yield window


def groups(window: Sequence[Document], bytes_of: Callable[[Document], int]) -> list[list[Document]]:
    """The groups of a window: documents of like lengths.

    bytes_of: estimates what is stored of a document.
    """
    by_length = sorted(window, key=lambda document: len(document.text))  # stable
    result: list[list[Document]] = []
    held = 0
    for document in by_length:
        size = bytes_of(document)
        if not result or len(result[-1]) == GROUP or held + size > GROUP_BYTES:
            result.append([])
            held = 0
        result[-1].append(document)
        held += size
    return result


class Group(NamedTuple):
    """What is to do of one group.

    Attributes:
        documents: those to compress, with their checked metadata.
        hashes: their content hashes.
        contexts: their ids.
        ks: memory tokens per segment of each.
        metadata: of documents whose text is stored, but with other metadata.
        unchanged: how many documents are stored as they are.
    """

    documents: list[Document]
    hashes: list[str]
    contexts: list[list[int]]
    ks: list[int]
    metadata: dict[str, Any]
    unchanged: int

    @property
    def tokens(self) -> int:
        """Tokens to compress."""
        return sum(map(len, self.contexts))


@dataclasses.dataclass(frozen=True)
class Share:
    """How one process of several goes through an input: group by group, its own ones only.

    Attributes:
        prepared: the compressor.
        info: what the store says of itself.
        size: of the memories.
        process: of this process, from 0.
        processes: how many there are.
    """

    prepared: Prepared
    info: store.Info
    size: Size
    process: int = 0
    processes: int = 1

    def work(
        self,
        documents: Iterable[Document],
        writer: store.Writer | None,
        problems: Callable[[Document, str], None],
    ) -> Iterator[Group]:
        """What is to do, group by group. problems: told (document, why) of what cannot be stored.

        writer: of the store; None where there is none yet.
        """
        for number, window in enumerate(windows(documents)):
            own = [
                group
                for i, group in enumerate(groups(window, self._bytes))
                if (number + i) % self.processes == self.process
            ]
            ids = [document.id for group in own for document in group]
            known = {} if writer is None else writer.known(ids)
            for group in own:
                yield self._group(group, known, problems)

    def _bytes(self, document):
        config, info = self.prepared.config, self.info
        segments, _ = segment_shape(len(document.text) // CHARACTERS_PER_TOKEN, config)
        tokens = segments * (config.choose(self.size.k) if self.size.k else config.k)
        kv = info.nbytes(info.kv_shape(tokens)) if info.kv else 0
        return info.nbytes(info.memory_shape(tokens)) + kv

    def _group(self, group, known, problems) -> Group:
        asked = self.size.asked(self.prepared.config)
        to_do, hashes, metadata, unchanged = [], [], {}, 0
        for document in group:
            there, own_hash = known.get(document.id), content_hash(document.text, asked)
            value = document.metadata
            if value is None:  # the row says nothing: what is kept stays
                value = {} if there is None else there.metadata
            try:
                value = json.loads(store_entries.metadata_text(value, "the row"))
            except UserError as error:
                problems(document, str(error))
                continue
            if there is None or there.content_hash != own_hash or there.kv < bool(self.info.kv):
                to_do.append(document._replace(metadata=value))
                hashes.append(own_hash)
            elif there.metadata != value:
                metadata[document.id] = value
            else:
                unchanged += 1
        contexts = self.prepared.contexts(to_do) if to_do else []
        ks = [self.size.k_of(self.prepared.config, max(1, len(context))) for context in contexts]
        fits = []
        for i, (document, context, k) in enumerate(zip(to_do, contexts, ks, strict=True)):
            if why := self.prepared.problem(context, k):
                problems(document, why)
            else:
                fits.append(i)
        columns = [[column[i] for i in fits] for column in (to_do, hashes, contexts, ks)]
        return Group(*columns, metadata, unchanged)
