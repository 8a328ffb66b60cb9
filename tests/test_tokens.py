"""Tokenising a source once: grouping, errors, and the cache."""

import os

import pytest
from conftest import WORDS, make_tokenizer, write_jsonl

from icae_jax.data import sources, tokens


def words(ids):
    return " ".join(WORDS[i] for i in ids)


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def qa(context, question, answer):
    return {"context": context, "question": question, "answer": answer}


def test_questions_are_grouped_by_context(tmp_path, cache, tiny_tokenizer):
    """Breaks when questions are counted to another context, special tokens get in, or equal plain texts are merged."""
    rows = [qa("the cat sat", "who", "cat"), {"text": "the dog"}, qa("a bird", "what", "a bird"), qa("the cat sat", "did", "sat")]
    data = tokens.tokenise(write_jsonl(tmp_path / "a.jsonl", [*rows, {"text": "the dog"}]), tiny_tokenizer, cache)
    assert [words(data.text(i)) for i in range(len(data.text_offsets) - 1)] == ["the cat sat", "the dog", "a bird", "the dog"]
    assert data.question_offsets.tolist() == [0, 2, 2, 3, 3]
    assert [(words(data.prompt(q)), words(data.answer(q))) for q in range(3)] == [
        ("who", "cat"),
        ("did", "sat"),
        ("what", "a bird"),
    ]


def test_cache_is_used_until_source_or_tokenizer_change(tmp_path, cache, tiny_tokenizer, monkeypatch):
    """Breaks when tokens are made again every time, or stale ones are used after the data or the tokenizer changed."""
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "the cat"}])
    builds, build = [], tokens._build
    monkeypatch.setattr(tokens, "_build", lambda *args: builds.append(args) or build(*args))
    first = tokens.tokenise(str(path), tiny_tokenizer, cache)
    again = tokens.tokenise(str(path), tiny_tokenizer, cache)
    assert len(builds) == 1 and again.key == first.key and again.text(0).tolist() == first.text(0).tolist()

    other = tokens.tokenise(str(path), make_tokenizer([*WORDS[:8], "cat", "the", *WORDS[10:]]), cache)
    assert len(builds) == 2 and other.key != first.key and other.text(0).tolist() != first.text(0).tolist()

    stat = path.stat()
    write_jsonl(path, [{"text": "the dog"}])  # as long as before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = tokens.tokenise(str(path), tiny_tokenizer, cache)
    assert len(builds) == 3 and changed.key != first.key and words(changed.text(0)) == "the dog"


def test_a_failed_build_leaves_no_cache(tmp_path, cache, tiny_tokenizer, monkeypatch):
    """Breaks when a cache that was cut short (a full disk) is taken for whole by the next run."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the cat"}])
    save, saved = tokens.np.save, []

    def full_disk(*args):
        if len(saved) == 3:
            raise OSError("no space left")
        saved.append(save(*args))

    with monkeypatch.context() as patch:
        patch.setattr(tokens.np, "save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            tokens.tokenise(path, tiny_tokenizer, cache)
    assert len(saved) == 3 and os.listdir(os.path.join(cache, "tokens")) == []
    assert words(tokens.tokenise(path, tiny_tokenizer, cache).text(0)) == "the cat"


def test_long_sources_are_encoded_in_batches(tmp_path, cache, tiny_tokenizer, monkeypatch):
    """Breaks when texts at the seams of the tokenizer's batches are lost."""
    monkeypatch.setattr(tokens, "BATCH", 2)
    texts = ["the cat", "a dog", "bird", "the fish sat", "a"]
    data = tokens.tokenise(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]), tiny_tokenizer, cache)
    assert [words(data.text(i)) for i in range(5)] == texts


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows; the data set is empty"),
        ([{"text": "the cat"}, {"text": " "}], "a.jsonl:2: the text has no tokens \\(1 such rows\\)"),
        ([qa("the cat", "who", "cat"), qa("the cat", "who", "")], "a.jsonl:2: the answer has no tokens"),
        ([qa("the cat", "", "cat")], "a.jsonl:1: the prompt has no tokens"),
    ],
)
def test_data_without_tokens_is_refused(tmp_path, cache, tiny_tokenizer, rows, message):
    """Breaks when a text without tokens, of which nothing can be learned, gets into training."""
    with pytest.raises(ValueError, match=message):
        tokens.tokenise(write_jsonl(tmp_path / "a.jsonl", rows), tiny_tokenizer, cache)


def test_missing_source_is_named(cache, tiny_tokenizer):
    """Breaks when a wrong path is only found after the tokenizer ran."""
    with pytest.raises(ValueError, match="data file absent"):
        tokens.tokenise("absent.jsonl", tiny_tokenizer, cache)
    assert sources.split_source("a.jsonl,b.txt") == ["a.jsonl", "b.txt"]
