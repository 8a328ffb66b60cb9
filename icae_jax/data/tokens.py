"""A source tokenised once: flat id arrays, memory-mapped from a cache keyed by tokenizer and source."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile

import numpy as np

from icae_jax.data import sources
from icae_jax.errors import UserError
from icae_jax.interop import files

CACHE_VERSION = 1
BATCH = 1000  # texts handed to the tokenizer at once
ARRAYS = (
    "text_ids", "text_offsets", "prompt_ids", "prompt_offsets", "answer_ids", "answer_offsets", "question_offsets",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Texts and their questions as ids, without special tokens; all int32 but the offsets (int64).

    Text i is `text_ids[text_offsets[i] : text_offsets[i + 1]]`; its questions are number question_offsets[i] …
    question_offsets[i + 1] - 1, each with a prompt and an answer. key: identity of tokenizer and source.
    """

    text_ids: np.ndarray
    text_offsets: np.ndarray
    prompt_ids: np.ndarray
    prompt_offsets: np.ndarray
    answer_ids: np.ndarray
    answer_offsets: np.ndarray
    question_offsets: np.ndarray
    key: str

    def text(self, i):
        return self.text_ids[self.text_offsets[i] : self.text_offsets[i + 1]]

    def prompt(self, q):
        return self.prompt_ids[self.prompt_offsets[q] : self.prompt_offsets[q + 1]]

    def answer(self, q):
        return self.answer_ids[self.answer_offsets[q] : self.answer_offsets[q + 1]]


def _tokenizer_identity(tokenizer):
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)


def _encode(tokenizer, texts):
    """Flat ids and offsets of many texts."""
    pieces, lengths = [], [0]
    for start in range(0, len(texts), BATCH):
        # verbose=False: these texts are cut into windows later, so the tokenizer's length warning would mislead.
        for ids in tokenizer(texts[start : start + BATCH], add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(np.asarray(ids, np.int32))
            lengths.append(len(ids))
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int32), np.cumsum(lengths, dtype=np.int64)


def _group(rows):
    """Texts in order of first appearance, each with its questions; questions of one context come together."""
    texts, wheres, questions, place = [], [], [], {}
    for row in rows:
        if row.question is None:
            at = len(texts)
        else:
            at = place.setdefault(row.text, len(texts))
        if at == len(texts):
            texts.append(row.text)
            wheres.append(row.where)
            questions.append([])
        if row.question is not None:
            questions[at].append((row.question, row.answer, row.where))
    return texts, wheres, questions


def _build(source, tokenizer, tfds_dir):
    texts, wheres, questions = _group(sources.read_rows(source, tfds_dir))
    if not texts:
        raise UserError(f"data source {source}: no rows; the data set is empty")
    flat = [q for group in questions for q in group]
    result = {}
    result["text_ids"], result["text_offsets"] = _encode(tokenizer, texts)
    result["prompt_ids"], result["prompt_offsets"] = _encode(tokenizer, [q for q, _, _ in flat])
    result["answer_ids"], result["answer_offsets"] = _encode(tokenizer, [a for _, a, _ in flat])
    result["question_offsets"] = np.cumsum([0] + [len(group) for group in questions], dtype=np.int64)
    empty = np.flatnonzero(np.diff(result["text_offsets"]) == 0)
    if len(empty):
        raise UserError(f"{wheres[empty[0]]}: the text has no tokens ({len(empty)} such rows); remove it from the data")
    for name in ("prompt", "answer"):
        empty = np.flatnonzero(np.diff(result[f"{name}_offsets"]) == 0)
        if len(empty):
            raise UserError(f"{flat[empty[0]][2]}: the {name} has no tokens ({len(empty)} such rows); remove it from the data")
    return result


def tokenise(source, tokenizer, cache_dir="", tfds_dir=None):
    """`Tokens` of a source, from the cache where the same tokenizer and source were tokenised before.

    UserError names the file and line of malformed rows, empty texts, or an empty data set.
    """
    identity = json.dumps([CACHE_VERSION, _tokenizer_identity(tokenizer), sources.identity(source, tfds_dir)])
    key = hashlib.sha256(identity.encode()).hexdigest()
    folder = files.cache_folder(cache_dir) / "tokens" / key[:32]
    if not folder.exists():
        arrays = _build(source, tokenizer, tfds_dir)
        folder.parent.mkdir(parents=True, exist_ok=True)
        tmp = tempfile.mkdtemp(dir=folder.parent, prefix=".new.")
        try:
            for name in ARRAYS:
                np.save(os.path.join(tmp, f"{name}.npy"), arrays[name])
            try:
                os.rename(tmp, folder)
            except OSError:
                if not folder.exists():  # else another process of this host was first, with the same content
                    raise
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    return Tokens(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}, key=key)
