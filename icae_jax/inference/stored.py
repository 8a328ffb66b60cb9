"""Reading what a store holds: requests behind stored memories, some entries at a time."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from icae_jax.compression.decoder import Prefix
from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError
from icae_jax.inference import store
from icae_jax.inference.batching import concatenate
from icae_jax.inference.compressor import Compressor
from icae_jax.inference.reading import Generation
from icae_jax.inference.sampling import GREEDY, Sampling

AT_ONCE = 64  # entries read at once, whatever a store holds


class Document(NamedTuple):
    """What a store holds of a document. prefix: None where there is none behind the wanted head."""

    id: str
    memory: Memory
    prefix: Prefix | None


class Damaged(NamedTuple):
    """A document whose bytes are not those that were stored, and what is wrong with them."""

    id: str
    error: UserError


def batches(
    opened: store.Store,
    ids: Sequence[str],
    head: Sequence[int],
    damaged: list[Damaged],
    count: int = AT_ONCE,
) -> Iterator[list[Document]]:
    """Documents of these ids, by default of all, some at a time; UserError on an unknown id.

    head: the ids that are to stand before a memory; only K/V behind them are read. damaged: takes
    the documents that cannot be read.
    """
    entries: Iterable[store.Entry] = opened.get(ids) if ids else opened.find()
    with_kv, remaining = opened.info.head == tuple(head), iter(entries)
    while batch := list(itertools.islice(remaining, count)):
        documents = []
        for entry in batch:
            try:
                prefix = entry.prefix if with_kv and entry.has_kv else None
                documents.append(Document(entry.id, entry.memory, prefix))
            except UserError as error:
                damaged.append(Damaged(entry.id, error))
        if documents:
            yield documents


def _by_k(compressor, documents):
    """Yields (rows, memory, prefixes) of documents of one k each: only such make one memory."""
    ks = [document.memory.tokens_per_segment for document in documents]
    for k in sorted(set(ks)):
        rows = [row for row, of_row in enumerate(ks) if of_row == k]
        memory = concatenate([documents[row].memory for row in rows], compressor.config)
        prefixes = [documents[row].prefix for row in rows]
        yield rows, memory, None if None in prefixes else prefixes


def ask(
    compressor: Compressor,
    documents: Sequence[Document],
    questions: Sequence[str],
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    sampling: Sampling = GREEDY,
) -> list[list[Generation]]:
    """Answers to all questions from each document's memory, nested by document."""
    answers: list[list[Generation]] = [[] for _ in documents]
    for rows, memory, prefixes in _by_k(compressor, documents):
        nested = compressor.ask(
            memory,
            [list(questions)] * len(rows),
            max_new_tokens,
            batch_size,
            details=True,
            sampling=sampling,
            prefixes=prefixes,
        )
        for row, of_document in zip(rows, nested, strict=True):
            answers[row] = of_document
    return answers


def joined(compressor: Compressor, entries: Sequence[store.Entry]) -> Memory:
    """The memories of several documents as one, to be asked together.

    UserError if they differ in k, or the base has too few positions.
    """
    if not entries:
        raise UserError("--join needs documents; give their ids with --id")
    for entry in entries[1:]:
        if entry.k != entries[0].k:
            raise UserError(
                f"--join: document {entries[0].id!r} has {entries[0].k} memory tokens per segment, "
                f"{entry.id!r} has {entry.k}; compress them alike"
            )
    return compressor.join([entry.memory for entry in entries])


def restore(
    compressor: Compressor,
    documents: Sequence[Document],
    max_new_tokens: int | None = None,
    batch_size: int = 16,
) -> list[str]:
    """The texts read back out of each document's memory."""
    texts = [""] * len(documents)
    for rows, memory, prefixes in _by_k(compressor, documents):
        read = compressor.restore(memory, max_new_tokens, batch_size, prefixes=prefixes)
        for row, text in zip(rows, read, strict=True):
            texts[row] = text
    return texts
