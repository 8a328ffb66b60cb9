"""Compressing rows of data, each distinct text once."""

from collections.abc import Mapping
from typing import Any

from icae_jax.compression.memory import Memory
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
