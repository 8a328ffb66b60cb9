"""From rows to flat arrays of token ids on disk, a batch of rows at a time."""

import contextlib
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from icae_jax.data.rows import (
    ANSWER_WITHOUT_TOKENS,
    QUESTION_WITHOUT_TOKENS,
    TEXT_WITHOUT_TOKENS,
    Row,
    Sieve,
)
from icae_jax.interop.hub.text import user_ids

BATCH = 1000  # most rows handed to the tokenizer at once
# And the most characters, but for a single longer row: a token takes a hundred bytes meanwhile.
BATCH_CHARACTERS = 1 << 21
SORT_BATCH = 1 << 16  # questions moved at once


class Column:
    """An array that grows in a .npy file; none of it stays in memory."""

    def __init__(self, path: pathlib.Path, dtype: type):
        self.path, self.dtype, self.count = path, np.dtype(dtype), 0
        self._file = open(path, "wb")  # noqa: SIM115 - `close` closes it
        self._write_header()

    def _write_header(self):
        # numpy pads the header, so that its size does not depend on the count.
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.count,),
        }
        np.lib.format.write_array_header_1_0(self._file, header)

    def extend(self, values: Sequence[int] | Int[np.ndarray, " n"]) -> None:
        """Appends values."""
        values = np.ascontiguousarray(values, self.dtype)
        self._file.write(values.tobytes())
        self.count += len(values)

    def close(self) -> None:
        """Completes the file."""
        if not self._file.closed:
            self._file.seek(0)
            self._write_header()
            self._file.close()


class _Sequences:
    """Many short sequences of ids: one after another in a `Column`, their ends in another."""

    def __init__(self, folder, name):
        self.ids = Column(folder / f"{name}_ids.npy", np.int32)
        self.offsets = Column(folder / f"{name}_offsets.npy", np.int64)
        self.offsets.extend([0])

    @property
    def count(self):
        return self.offsets.count - 1

    def extend(self, sequences):
        lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
        flat = itertools.chain.from_iterable(sequences)
        self.offsets.extend(self.ids.count + np.cumsum(lengths))
        self.ids.extend(np.fromiter(flat, np.int32, int(lengths.sum())))

    def close(self):
        self.ids.close()
        self.offsets.close()


def write_arrays(folder: pathlib.Path, rows: Iterable[Row], tokenizer: Any, sieve: Sieve) -> int:
    """Writes the arrays of `data.tokens.Tokens` into a folder; returns the number of texts.

    Texts are in order of first appearance; a text with questions is stored once, with all its
    questions in order. Texts and questions without tokens are left out, and counted by the sieve.
    Only a hash of each text with questions stays in memory.
    """
    numbers = {}  # hash of a text with questions -> its number, None if it has no tokens
    with contextlib.ExitStack() as stack:
        texts, prompts, answers = (
            stack.enter_context(contextlib.closing(_Sequences(folder, name)))
            for name in ("text", "prompt", "answer")
        )
        # The text of each question, in the order of the rows.
        owners = stack.enter_context(contextlib.closing(Column(folder / "owners.npy", np.int64)))
        for batch in _batches(rows):
            # Texts without questions are never merged: their key is their place in the batch.
            keys = [_digest(row) or place for place, row in enumerate(batch)]
            new = {k: row.text for k, row in zip(keys, batch, strict=True) if k not in numbers}
            ids = dict(zip(new, user_ids(tokenizer, list(new.values())), strict=True))
            kept = [key for key in new if ids[key]]
            new_numbers = dict.fromkeys(new) | dict(
                zip(kept, itertools.count(texts.count), strict=False)
            )
            texts.extend([ids[key] for key in kept])
            questions = []
            for key, row in zip(keys, batch, strict=True):
                number = numbers[key] if key in numbers else new_numbers[key]
                if number is None:
                    sieve.count(TEXT_WITHOUT_TOKENS, row.where)
                elif row.answers:
                    questions.append((number, row))
            numbers |= {key: n for key, n in new_numbers.items() if isinstance(key, bytes)}
            columns = zip(*_tokenised(questions, tokenizer, sieve), strict=True)
            for column, values in zip((owners, prompts, answers), columns, strict=False):
                column.extend(values)
        count = texts.count
    _sort_questions(folder, np.load(owners.path, mmap_mode="r"), count)
    owners.path.unlink()
    return count


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row.text)
        if len(batch) >= BATCH or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _digest(row):
    """A hash of a text that has a question, None for a text alone."""
    if row.question is None:
        return None
    return hashlib.blake2b(row.text.encode(), digest_size=16).digest()


def _tokenised(questions, tokenizer, sieve):
    """Yields (text number, prompt ids, answer ids) of the questions that have tokens in both."""
    prompts = user_ids(tokenizer, [row.question for _, row in questions])
    answers = user_ids(tokenizer, [row.answer for _, row in questions])
    for (number, row), prompt, answer in zip(questions, prompts, answers, strict=True):
        if prompt and answer:
            yield number, prompt, answer
        else:
            reason = ANSWER_WITHOUT_TOKENS if prompt else QUESTION_WITHOUT_TOKENS
            sieve.count(reason, row.where)


def _sort_questions(folder, owners, count):
    """Sorts questions by text, whose rows may be apart, and writes the texts' offsets into them."""
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(owners, minlength=count), out=offsets[1:])
    np.save(folder / "question_offsets.npy", offsets)
    if len(owners) and (owners[1:] < owners[:-1]).any():
        order = np.argsort(owners, kind="stable")
        for name in ("prompt", "answer"):
            _reorder(folder, name, order)


def _reorder(folder, name, order):
    paths = [folder / f"{name}_{part}.npy" for part in ("ids", "offsets")]
    ids, offsets = (np.load(path, mmap_mode="r") for path in paths)
    with contextlib.closing(_Sequences(folder, f"sorted_{name}")) as ordered:
        for start in range(0, len(order), SORT_BATCH):
            chosen = order[start : start + SORT_BATCH]
            ordered.extend([ids[offsets[q] : offsets[q + 1]] for q in chosen])
    for path in paths:
        os.replace(folder / f"sorted_{path.name}", path)
