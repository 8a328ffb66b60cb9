"""Reading what a store holds: requests behind stored memories, some entries at a time."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from icae_jax.compression.decoder import Prefix
from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError
from icae_jax.inference import store
from icae_jax.inference.compressor import Compressor
from icae_jax.inference.reading import Generation
from icae_jax.inference.sampling import GREEDY, Sampling

AT_ONCE = 64  # entries read at once, whatever a store holds


class Damaged(NamedTuple):
    """An entry whose bytes are not those that were stored, and what is wrong with them."""

    id: str
    error: UserError


def batches(
    opened: store.Store, ids: Sequence[str], damaged: list[Damaged], count: int = AT_ONCE
) -> Iterator[list[store.Entry]]:
    """Entries of these ids, by default of all, some at a time; UserError on an unknown id.

    damaged: takes those that cannot be read; the others are yielded.
    """
    entries: Iterable[store.Entry] = opened.get(ids) if ids else opened.find()
    remaining = iter(entries)
    while batch := list(itertools.islice(remaining, count)):
        good = []
        for entry in batch:
            try:
                _ = entry.memory, entry.prefix  # which are read anew where they are needed
            except UserError as error:
                damaged.append(Damaged(entry.id, error))
            else:
                good.append(entry)
        if good:
            yield good


def _by_k(entries: Sequence[store.Entry]) -> list[list[int]]:
    """The numbers of entries of one k each: only such make one memory."""
    ks = sorted({entry.k for entry in entries})
    return [[i for i, entry in enumerate(entries) if entry.k == k] for k in ks]


def prefixes(
    opened: store.Store, entries: Sequence[store.Entry], head: Sequence[int]
) -> list[Prefix] | None:
    """The stored K/V of entries, where they can be used; None where another head, or none, is.

    head: the ids that are to stand before the memory.
    """
    if not all(entry.has_kv for entry in entries) or opened.info.head != tuple(head):
        return None
    return [entry.prefix for entry in entries]


def ask(
    compressor: Compressor,
    opened: store.Store,
    entries: Sequence[store.Entry],
    questions: Sequence[str],
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    sampling: Sampling = GREEDY,
) -> list[list[Generation]]:
    """Answers to all questions from each entry's memory, nested by entry."""
    answers: list[list[Generation]] = [[] for _ in entries]
    for rows in _by_k(entries):
        some = [entries[row] for row in rows]
        memory = store.memory_of(some, compressor.config)
        found = prefixes(opened, some, compressor.adapter.template.head)
        nested = compressor.ask(
            memory,
            [list(questions)] * len(rows),
            max_new_tokens,
            batch_size,
            details=True,
            sampling=sampling,
            prefixes=found,
        )
        for row, of_entry in zip(rows, nested, strict=True):
            answers[row] = of_entry
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
    opened: store.Store,
    entries: Sequence[store.Entry],
    max_new_tokens: int | None = None,
    batch_size: int = 16,
) -> list[str]:
    """The texts read back out of each entry's memory."""
    texts = [""] * len(entries)
    for rows in _by_k(entries):
        some = [entries[row] for row in rows]
        memory = store.memory_of(some, compressor.config)
        found = prefixes(opened, some, ())
        read = compressor.restore(memory, max_new_tokens, batch_size, prefixes=found)
        for row, text in zip(rows, read, strict=True):
            texts[row] = text
    return texts
