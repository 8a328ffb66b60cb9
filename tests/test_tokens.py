"""Tokenising a source once: grouping, errors, and the cache."""

import concurrent.futures
import errno
import gzip
import hashlib
import json
import os
import random
import threading
import time

import numpy as np
import pytest
from conftest import WORDS, make_tokenizer, write_jsonl

from icae_jax import errors
from icae_jax.data import places, sources, tokenising, tokens
from icae_jax.errors import UserError
from icae_jax.interop.hub import tokenizer as tokenizers


def words(ids):
    return " ".join(WORDS[i] for i in ids)


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def qa(context, question, answer):
    return {"context": context, "question": question, "answer": answer}


def test_questions_are_grouped_by_context(tmp_path, cache, tiny_tokenizer):
    """Breaks when questions go to another context, special tokens are added, or equal plain texts
    are merged.
    """
    rows = [
        qa("the cat sat", "who", "cat"),
        {"text": "the dog"},
        qa("a bird", "what", "a bird"),
        qa("the cat sat", "did", "sat"),
    ]
    data = tokens.tokenise(
        write_jsonl(tmp_path / "a.jsonl", [*rows, {"text": "the dog"}]), tiny_tokenizer, cache
    )
    assert [words(data.text(i)) for i in range(len(data.text_offsets) - 1)] == [
        "the cat sat",
        "the dog",
        "a bird",
        "the dog",
    ]
    assert data.question_offsets.tolist() == [0, 2, 2, 3, 3]
    assert [(words(data.prompt(q)), words(data.answer(q))) for q in range(3)] == [
        ("who", "cat"),
        ("did", "sat"),
        ("what", "a bird"),
    ]


def test_cache_is_used_until_source_or_tokenizer_change(
    tmp_path, cache, tiny_tokenizer, monkeypatch
):
    """Breaks when the cache is never used, or is used after the data or the tokenizer changed."""
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "the cat"}])
    builds, build = [], tokenising.write_arrays
    monkeypatch.setattr(
        tokenising, "write_arrays", lambda *args: builds.append(args) or build(*args)
    )
    first = tokens.tokenise(str(path), tiny_tokenizer, cache)
    again = tokens.tokenise(str(path), tiny_tokenizer, cache)
    assert (
        len(builds) == 1
        and again.key == first.key
        and again.text(0).tolist() == first.text(0).tolist()
    )

    other = tokens.tokenise(
        str(path), make_tokenizer([*WORDS[:8], "cat", "the", *WORDS[10:]]), cache
    )
    assert (
        len(builds) == 2
        and other.key != first.key
        and other.text(0).tolist() != first.text(0).tolist()
    )

    os.utime(path, ns=(1, 1))
    assert tokens.tokenise(str(path), tiny_tokenizer, cache).key == first.key and len(builds) == 2

    write_jsonl(path, [{"text": "the dog"}])  # as long as before
    os.utime(path, ns=(1, 1))
    changed = tokens.tokenise(str(path), tiny_tokenizer, cache)
    assert len(builds) == 3 and changed.key != first.key and words(changed.text(0)) == "the dog"


def test_a_failed_build_leaves_no_cache(tmp_path, cache, tiny_tokenizer, monkeypatch):
    """Breaks when a cache entry cut short by a full disk is used by the next run."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the cat"}])
    extend, extended = tokenising.Column.extend, []

    def full_disk(*args):
        if len(extended) == 4:
            raise OSError(errno.ENOSPC, "no space left")
        extended.append(extend(*args))

    with monkeypatch.context() as patch:
        patch.setattr(tokenising.Column, "extend", full_disk)
        with pytest.raises(OSError, match="no space left"):
            tokens.tokenise(path, tiny_tokenizer, cache)
    assert len(extended) == 4 and os.listdir(os.path.join(cache, "tokens")) == []
    assert words(tokens.tokenise(path, tiny_tokenizer, cache).text(0)) == "the cat"


def test_the_first_version_s_key_is_still_known(tmp_path, cache, tiny_tokenizer):
    """Breaks when a workdir of the first version cannot be continued. Its key was sha256 over
    version 1, the tokenizer, and each file's name, size, modification time, and sha256 of its first
    and last MiB.
    """
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "the cat"}])
    content, stat = path.read_bytes(), path.stat()
    ends = hashlib.sha256(content + content).hexdigest()
    identity = [
        1,
        tiny_tokenizer.backend_tokenizer.to_str(),
        [["a.jsonl", stat.st_size, stat.st_mtime_ns, ends]],
    ]
    made = tokens.tokenise(str(path), tiny_tokenizer, cache)
    assert made.earlier_key == hashlib.sha256(json.dumps(identity).encode()).hexdigest() != made.key


def test_questions_of_rows_that_stand_apart(tmp_path, cache, tiny_tokenizer, monkeypatch):
    """Breaks when the order of texts or questions changes, also at batch boundaries. It is that of
    the first version, which held all rows at once: texts by first appearance, those with questions
    once; questions by text, then by row.
    """
    rng = random.Random(0)
    rows = []
    for _ in range(200):
        if rng.random() < 0.3:
            rows.append({"text": rng.choice(("the cat", "a dog"))})
        else:
            text = f"{rng.choice(WORDS[7:20])} {rng.choice(('the', 'cat'))}"
            answer = " ".join(rng.choices(WORDS[7:], k=3))
            rows.append(qa(text, rng.choice(WORDS[7:]), answer))
    texts, questions, place = [], [], {}
    for row in rows:
        at = len(texts) if "text" in row else place.setdefault(row["context"], len(texts))
        if at == len(texts):
            texts.append(row.get("text") or row["context"])
            questions.append([])
        if "text" not in row:
            questions[at].append(
                (row["question"], row["answers"][0] if "answers" in row else row["answer"])
            )
    monkeypatch.setattr(tokenising, "BATCH", 7)
    monkeypatch.setattr(tokenising, "SORT_BATCH", 11)
    data = tokens.tokenise(write_jsonl(tmp_path / "a.jsonl", rows), tiny_tokenizer, cache)
    assert [words(data.text(i)) for i in range(len(data.text_offsets) - 1)] == texts
    assert data.question_offsets.tolist() == np.cumsum([0, *map(len, questions)]).tolist()
    made = [
        (words(data.prompt(q)), words(data.answer(q))) for q in range(len(data.prompt_offsets) - 1)
    ]
    assert made == [pair for of_text in questions for pair in of_text]
    assert {name: getattr(data, name).dtype for name in tokens.ARRAYS} == {
        name: np.dtype(np.int32 if name.endswith("_ids") else np.int64) for name in tokens.ARRAYS
    }


def test_rows_are_read_as_they_are_tokenised(tmp_path, cache, tiny_tokenizer, monkeypatch):
    """Breaks when a whole corpus is read into memory before any of it is tokenised and written."""
    monkeypatch.setattr(tokenising, "BATCH", 10)
    monkeypatch.setattr(tokenising, "BATCH_CHARACTERS", 60)
    read, seen, made = sources.read_rows, [], tokenising.user_ids
    monkeypatch.setattr(
        sources, "read_rows", lambda *args: (seen.append(row) or row for row in read(*args))
    )
    at_once = []

    def user_ids(tokenizer, texts):
        at_once.append((len(seen), len(texts)))
        return made(tokenizer, texts)

    monkeypatch.setattr(tokenising, "user_ids", user_ids)
    rows = [{"text": "the cat"}] * 30 + [
        {"text": "the cat sat on the mat , very big and very old ."}
    ] * 4
    assert (
        len(
            tokens.tokenise(
                write_jsonl(tmp_path / "a.jsonl", rows), tiny_tokenizer, cache
            ).text_offsets
        )
        == 35
    )
    assert [call for call in at_once if call[1]] == [
        (9, 9),
        (18, 9),
        (27, 9),
        (31, 4),
        (33, 2),
        (34, 1),
    ]


def test_one_process_tokenises_and_the_others_wait(
    tmp_path, cache, tiny_tokenizer, monkeypatch, capsys
):
    """Breaks when several processes of a host tokenise the same source at once, or wait forever for
    one that died.
    """
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the cat"}])
    builds, build, begun, go_on = [], tokenising.write_arrays, threading.Event(), threading.Event()

    def slow(*args):
        builds.append(args)
        begun.set()
        assert go_on.wait(30)
        if len(builds) == 1:
            raise MemoryError("as if this process had died")
        return build(*args)

    monkeypatch.setattr(tokenising, "write_arrays", slow)
    with concurrent.futures.ThreadPoolExecutor(
        3
    ) as pool:  # threads lock as processes do: each opens the file for itself
        made = [pool.submit(tokens.tokenise, path, tiny_tokenizer, cache)]
        assert begun.wait(30)
        made += [pool.submit(tokens.tokenise, path, tiny_tokenizer, cache) for _ in range(2)]
        deadline = time.monotonic() + 30
        shown = ""
        while shown.count("another process is at it; waiting") < 2 and time.monotonic() < deadline:
            shown += capsys.readouterr().err
            time.sleep(0.01)
        assert len(builds) == 1
        go_on.set()
        with pytest.raises(MemoryError):
            made[0].result()
        assert [words(m.result().text(0)) for m in made[1:]] == ["the cat"] * 2 and len(builds) == 2
    assert [
        name for name in os.listdir(os.path.join(cache, "tokens")) if name.startswith(".")
    ] == []


def test_a_source_is_read_again_after_a_fault_that_passes(
    tmp_path, cache, tiny_tokenizer, monkeypatch
):
    """Breaks when a stale file handle in the middle of a corpus ends a run, or rows read before it
    count twice.
    """
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the cat"}, {"text": "a dog"}])
    read, failed = sources.read_rows, []

    def stale_once(*args):
        for row in read(*args):
            yield row
            if not failed:
                failed.append(row)
                raise OSError(errno.ESTALE, "stale file handle")

    monkeypatch.setattr(sources, "read_rows", stale_once)
    monkeypatch.setattr(errors, "FIRST_DELAY", 0.0)
    monkeypatch.setattr(tokenising, "BATCH", 1)
    data = tokens.tokenise(path, tiny_tokenizer, cache)
    assert failed and [words(data.text(i)) for i in range(len(data.text_offsets) - 1)] == [
        "the cat",
        "a dog",
    ]


def test_what_a_text_spells_is_no_control_token(tmp_path, cache, tiny_tokenizer):
    """Breaks when `</s>` or `<s>` written by a user in a text, question or answer becomes a control
    token (prompt injection).
    """
    rows = [qa("the cat </s> sat <s>", "who </s>", "cat</s>"), {"text": "a</s>b <s>the"}]
    data = tokens.tokenise(write_jsonl(tmp_path / "a.jsonl", rows), tiny_tokenizer, cache)
    control = {WORDS.index(word) for word in ("<s>", "</s>")}
    for ids in (data.text_ids, data.prompt_ids, data.answer_ids):
        assert len(ids) and not control & set(ids.tolist())
    assert words(data.text(0)).split()[:2] == ["the", "cat"] and tokenizers.bos_id(
        tiny_tokenizer
    ) == WORDS.index("<s>")


def test_the_hash_of_a_large_file_is_kept(tmp_path, monkeypatch):
    """Breaks when a huge file is hashed at each start, or a hash is kept after a change of the
    file, or stored while it may still be changing.
    """
    monkeypatch.setattr(tokens, "REMEMBERED", 10)
    path, hashed, content_hash = tmp_path / "a.jsonl", [], tokens.reading.content_hash
    monkeypatch.setattr(
        tokens.reading, "content_hash", lambda p: hashed.append(p) or content_hash(p)
    )
    write_jsonl(path, [{"text": "the cat"}])
    young = [tokens._content_hash(tmp_path, path) for _ in range(2)]
    os.utime(path, ns=(1, 1))
    kept = [tokens._content_hash(tmp_path, path) for _ in range(3)]
    assert len(hashed) == 3 and set(young) == set(kept) == {content_hash(path)}
    write_jsonl(path, [{"text": "the dog"}])
    os.utime(path, ns=(1, 2))
    assert (
        tokens._content_hash(tmp_path, path) == content_hash(path) != kept[0] and len(hashed) == 4
    )
    assert len(list((tmp_path / "hashes").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, tiny_tokenizer):
    """Breaks when the error does not say what the folder is for or how to choose another, or
    reading an existing entry needs write access.
    """
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the cat"}])
    with pytest.raises(
        UserError,
        match=r"^cache /proc/nope/tokens: cannot be written: .*; set data\.cache_dir or \$ICAE_",
    ):
        tokens.tokenise(path, tiny_tokenizer, "/proc/nope")


def test_long_sources_are_encoded_in_batches(tmp_path, cache, tiny_tokenizer, monkeypatch):
    """Breaks when texts at the boundaries of the tokenizer's batches are lost."""
    monkeypatch.setattr(tokenising, "BATCH", 2)
    texts = ["the cat", "a dog", "bird", "the fish sat", "a"]
    data = tokens.tokenise(
        write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]), tiny_tokenizer, cache
    )
    assert [words(data.text(i)) for i in range(5)] == texts


WITHOUT_TOKENS = [
    {"text": "the cat"},
    {"text": "  "},
    qa("a dog", "who", "dog"),
    qa("a dog", " ", "dog"),
    qa("a dog", "what", " "),
    qa(" ", "who", "cat"),
    {"text": "a"},
    qa("a bird", "who", ""),
    {"text": ""},
    qa("a bird", "what", "bird"),
    qa(" ", "who", "dog"),
    qa("a dog", "did", "a"),
]


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_what_has_no_tokens_is_left_out_and_counted(
    tmp_path, cache, tiny_tokenizer, monkeypatch, batch
):
    """Breaks when a row without tokens ends a run, is trained on, is left out silently, or shifts
    questions to another text; or when the count is lost at the next start, from the cache.
    """
    monkeypatch.setattr(tokenising, "BATCH", batch)
    path = write_jsonl(tmp_path / "a.jsonl", WITHOUT_TOKENS)
    for _ in range(2):
        data = tokens.tokenise(path, tiny_tokenizer, cache)
        assert [words(data.text(i)) for i in range(len(data.text_offsets) - 1)] == [
            "the cat",
            "a dog",
            "a",
            "a bird",
        ]
        assert data.question_offsets.tolist() == [0, 0, 2, 2, 3]
        assert [(words(data.prompt(q)), words(data.answer(q))) for q in range(3)] == [
            ("who", "dog"),
            ("did", "a"),
            ("what", "bird"),
        ]
        assert data.left_out == {
            f"texts without tokens (the first: {path}:2)": 3,
            f"questions without tokens (the first: {path}:4)": 1,
            f"answers without tokens (the first: {path}:5)": 1,
            f"questions without an answer (the first: {path}:8)": 1,
            f"empty texts (the first: {path}:9)": 1,
        }


def test_strict_data_are_refused_whatever_the_cache_holds(tmp_path, cache, tiny_tokenizer):
    """Breaks when data.strict lets an empty row pass, changes the key, or is ignored for cached
    data.
    """
    path = write_jsonl(tmp_path / "a.jsonl", WITHOUT_TOKENS[:2])
    for _ in range(2):
        with pytest.raises(
            UserError, match=f"^{path}:2: the text has no tokens; .* without data.strict"
        ):
            tokens.tokenise(path, tiny_tokenizer, cache, strict="data.strict")
        lenient = tokens.tokenise(path, tiny_tokenizer, cache)
    write_jsonl(tmp_path / "a.jsonl", WITHOUT_TOKENS[:1])
    whole = tokens.tokenise(path, tiny_tokenizer, cache)
    assert (
        tokens.tokenise(path, tiny_tokenizer, cache, strict="data.strict").key
        == whole.key
        != lenient.key
    )


def test_an_answer_of_ones_own_is_part_of_the_key(tmp_path, cache, tiny_tokenizer):
    """Breaks when data.no_answer trains nothing, uses tokens cached without it, or changes the key
    of other data.
    """
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [qa("the cat", "who", "cat"), {"context": "the cat", "question": "what", "answers": []}],
    )
    plain = tokens.tokenise(path, tiny_tokenizer, cache)
    own = tokens.tokenise(path, tiny_tokenizer, cache, no_answer="so .")
    assert [words(own.answer(q)) for q in range(2)] == ["cat", "so ."] and not own.left_out
    assert (
        len(plain.prompt_offsets) == 2
        and own.key != plain.key == tokens.tokenise(path, tiny_tokenizer, cache, no_answer="").key
    )


def test_the_key_of_sources_read_as_before(tmp_path, cache, tiny_tokenizer):
    """Breaks when tokens cached before tables, folders and other packings were supported are not
    found.
    """
    for name, how, packed in (
        ("a.jsonl", "json lines", ""),
        ("a.txt", "text", ""),
        ("a.jsonl.gz", "json lines", ".gz"),
    ):
        (tmp_path / name).write_bytes(
            gzip.compress(b'{"text": "the cat"}') if packed else b'{"text": "the cat"}'
        )
        content = (tmp_path / name).read_bytes()
        hashed = hashlib.sha256(f"{len(content)} ".encode() + content).hexdigest()
        known = json.dumps([2, tiny_tokenizer.backend_tokenizer.to_str(), [[how, packed, hashed]]])
        assert (
            tokens.tokenise(str(tmp_path / name), tiny_tokenizer, cache).key
            == hashlib.sha256(known.encode()).hexdigest()
        )


def test_a_cache_without_counts_is_read(tmp_path, cache, tiny_tokenizer):
    """Breaks when cache entries from before rows could be left out do not load."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the cat"}])
    tokens.tokenise(path, tiny_tokenizer, cache)
    about = next((tmp_path / "cache/tokens").glob("*/about.json"))
    about.write_text(json.dumps({"version": 2, "source": path}))
    assert tokens.tokenise(path, tiny_tokenizer, cache, strict="data.strict").left_out == {}


@pytest.mark.parametrize("content", [b"", bytes(400), None], ids=["empty", "zeros", "gone"])
def test_a_damaged_cache_is_made_anew(tmp_path, cache, tiny_tokenizer, content, capfd):
    """Breaks when a cache entry damaged by a power loss ends every later run, or is trained on."""
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"context": "the cat saw", "question": "who", "answers": ["the cat"]}],
    )
    whole = tokens.tokenise(path, tiny_tokenizer, cache)
    arrays = {name: np.array(getattr(whole, name)) for name in tokens.ARRAYS}
    for name in (tokens.cache.ABOUT, *(f"{name}.npy" for name in tokens.ARRAYS)):
        harmed = next((tmp_path / "cache/tokens").glob(f"[!.]*/{name}"))
        harmed.unlink() if content is None else harmed.write_bytes(content)
        tokens.errors.say.cache_clear()
        again = tokens.tokenise(path, tiny_tokenizer, cache)
        for array, value in arrays.items():
            np.testing.assert_array_equal(getattr(again, array), value)
        told = capfd.readouterr().err
        assert (name == tokens.cache.ABOUT and content is None) or (
            "its files are damaged" in told and told.count("\n") == 1
        )


def test_arrays_of_another_length_are_no_cache(tmp_path, cache, tiny_tokenizer):
    """Breaks when arrays whose lengths do not match are used."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the cat saw"}])
    tokens.tokenise(path, tiny_tokenizer, cache)
    np.save(next((tmp_path / "cache/tokens").glob("*/text_ids.npy")), np.zeros(1, np.int32))
    assert tokens.tokenise(path, tiny_tokenizer, cache).text(0).tolist() == [8, 9, 17]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{}], "data source .*a.jsonl: no rows; the data set is empty"),
        (
            [{"text": " "}, {"text": ""}],
            r"no rows; all were left out: 1 empty text \(the first: .*:2\); "
            r"1 text without tokens \(.*:1\)",
        ),
    ],
)
def test_a_source_without_texts_is_refused(tmp_path, cache, tiny_tokenizer, rows, message):
    """Breaks when training starts without data, or the error does not say why nothing is left."""
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    if not rows[0]:
        (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match=message):
        tokens.tokenise(path, tiny_tokenizer, cache)


def test_missing_source_is_named(cache, tiny_tokenizer):
    """Breaks when a wrong path is noticed only after the tokenizer ran."""
    with pytest.raises(ValueError, match="data file absent"):
        tokens.tokenise("absent.jsonl", tiny_tokenizer, cache)
    assert places.split_source("a.jsonl,b.txt") == ["a.jsonl", "b.txt"]
