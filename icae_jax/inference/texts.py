"""Compressing rows of data, each distinct text once; what a document of a store is made of."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.memory import Memory
from icae_jax.compression.segments import choose_k
from icae_jax.data.rows import Row
from icae_jax.inference.compressor import Compressor


def compress_rows(
    compressor: Compressor,
    rows: Mapping[str, Row],
    batch_size: int,
    k: int | None = None,
    *,
    tokens: int | None = None,
    ratio: float | None = None,
) -> Memory:
    """The memory of the rows' texts, in their order. A text with several ids is compressed once.

    rows: by id. batch_size, k, tokens, ratio: as for `Compressor.compress`.
    """
    where = {row.text: row.where for row in reversed(rows.values())}  # its first row's
    index = {text: i for i, text in enumerate(dict.fromkeys(row.text for row in rows.values()))}
    memory = compressor.compress(
        list(index), batch_size, [where[text] for text in index], k, tokens=tokens, ratio=ratio
    )
    if len(index) == len(rows):
        return memory
    return memory[[index[row.text] for row in rows.values()]]


def summary(memory: Memory) -> dict[str, Any]:
    """How much a memory holds: texts, k, tokens of text and memory, their ratio, bytes."""
    context_tokens, memory_tokens = int(memory.lengths.sum()), int(memory.tokens.sum())
    return {
        "texts": len(memory),
        "k": memory.tokens_per_segment,
        "context_tokens": context_tokens,
        "memory_tokens": memory_tokens,
        "ratio": context_tokens / memory_tokens,
        "bytes": int(memory.bytes.sum()),
    }


@dataclasses.dataclass(frozen=True)
class Size:
    """The memory that a document is to have: at most one of k, tokens and ratio, as of `choose_k`.

    tokens and ratio choose the nearest k for each document by itself.
    """

    k: int | None = None
    tokens: int | None = None
    ratio: float | None = None

    def check(self, config: CompressionConfig) -> None:
        """UserError if a compressor has no such memory."""
        self.k_of(config, 1)

    def k_of(self, config: CompressionConfig, tokens: int) -> int:
        """Memory tokens per segment of a document of so many tokens."""
        return choose_k(config, [tokens], k=self.k, tokens=self.tokens, ratio=self.ratio)

    def asked(self, config: CompressionConfig) -> dict[str, int | float]:
        """What the content hash says of it."""
        given = {"tokens": self.tokens, "ratio": self.ratio}
        given = {name: float(value) for name, value in given.items() if value is not None}
        return given or {"k": config.choose(self.k)}


def content_hash(text: str, asked: dict[str, int | float]) -> str:
    """The hash by which a document counts as unchanged: of its text and the memory asked for."""
    return hashlib.sha256(json.dumps([text, asked]).encode()).hexdigest()
