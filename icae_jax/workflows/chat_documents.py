"""The documents of a chat: texts that it compresses, and entries of a store."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from icae_jax.compression.decoder import Prefix
from icae_jax.compression.memory import Memory
from icae_jax.compression.segments import choose_k
from icae_jax.data.sources import read_texts, with_ids
from icae_jax.errors import UserError, shown
from icae_jax.inference import store
from icae_jax.inference.compressor import Compressor


class Text(NamedTuple):
    """A document that is still to be compressed. where: its place, for messages."""

    id: str
    text: str
    where: str


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """One document that a chat reads.

    memory: of this one text. bytes: that it takes, in the store where it is of one. text: None if
    it is of a store. entry: that of the store, None for a text.
    """

    id: str
    memory: Memory
    bytes: int
    text: Text | None = None
    entry: store.Entry | None = None

    @property
    def k(self) -> int:
        """Memory tokens per segment."""
        return self.memory.tokens_per_segment

    @property
    def tokens(self) -> int:
        """Of the text."""
        return int(self.memory.lengths[0])

    @property
    def memory_tokens(self) -> int:
        """In all."""
        return int(self.memory.tokens[0])

    def prefix(self, head: Sequence[int]) -> Prefix | None:
        """The K/V that a store keeps of head and memory; None if it keeps none behind this head."""
        if self.entry is None or self.entry.store.info.head != tuple(head):
            return None
        return self.entry.prefix

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "id": self.id,
            "tokens": self.tokens,
            "memory_tokens": self.memory_tokens,
            "k": self.k,
            "ratio": self.tokens / self.memory_tokens,
            "bytes": self.bytes,
            "from_store": self.entry is not None,
        }

    def __str__(self) -> str:
        """One line of `/docs`."""
        return (
            f"{one_line(self.id)}: {self.tokens:,} tokens in {self.memory_tokens:,} memory tokens "
            f"({self.tokens / self.memory_tokens:.1f}x), {self.bytes:,} bytes, "
            f"{'text' if self.entry is None else 'of the store'}"
        )


def one_line(text: str) -> str:
    """A text as a line shows it: quoted if it has control characters."""
    return text if text.isprintable() else repr(text)


def read_files(paths: Sequence[str], what: str = "FILE") -> list[Text]:
    """The texts of files, or of anything that `data.sources` reads, with their ids.

    UserError if a file is absent, or of no known format; what: names them in messages.
    """
    if not paths:
        return []
    rows = with_ids(read_texts(",".join(paths), what))
    return [Text(text_id, row.text, row.where) for text_id, row in rows.items()]


def of_entry(entry: store.Entry) -> Document:
    """An entry of a store. UserError if its bytes are damaged."""
    return Document(entry.id, entry.memory, entry.bytes, None, entry)


def compress(compressor: Compressor, texts: Sequence[Text], k: int) -> list[Document]:
    """Texts, compressed one by one, since each is a memory of its own."""
    documents = []
    for text in texts:
        memory = compressor.compress(text.text, where=[text.where], k=k)
        documents.append(Document(text.id, memory, int(memory.bytes[0]), text))
    return documents


def common_k(documents: Sequence[Document]) -> int | None:
    """The memory tokens per segment that the store's documents have; None without any.

    UserError if they differ: they cannot be read together.
    """
    stored = [document for document in documents if document.entry is not None]
    for other in stored[1:]:
        if other.k != stored[0].k:
            raise UserError(
                f"document {shown(stored[0].id)} of the store has {stored[0].k} memory tokens per "
                f"segment, {shown(other.id)} has {other.k}, so they cannot be read together; "
                "compress them alike"
            )
    return stored[0].k if stored else None


def k_for(compressor: Compressor, texts: Sequence[str], ratio: float | None) -> int:
    """The memory tokens per segment for a wanted ratio, see `segments.choose_k`.

    texts: those that it is chosen for; without any it is chosen for a whole segment.
    """
    lengths = [len(compressor.context_ids(text)) for text in texts]
    lengths = lengths or [compressor.config.segment_tokens]
    return choose_k(compressor.config, lengths, ratio=ratio)


def known_ratios(compressor: Compressor) -> str:
    """The ratios that an adapter knows, in words."""
    config = compressor.config
    if config.any_k:
        return (
            f"any from 1x to {config.segment_tokens}x; trained with "
            f"{', '.join(map(str, config.choices))} memory tokens per segment of "
            f"{config.segment_tokens}"
        )
    return ", ".join(
        f"{config.segment_tokens / k:.1f}x ({k} memory tokens for {config.segment_tokens} tokens)"
        for k in reversed(config.choices)
    )
