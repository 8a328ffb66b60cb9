"""`icae compress --store`: what is stored, skipped, replaced and refused, and in which shards."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from cli_helpers import sentence
from conftest import TINY, close, random_trained, same, seen_devices, write_adapter, write_jsonl
from suite_helpers import compressor

from icae_jax.cli import main as cli
from icae_jax.compression.config import CompressionConfig
from icae_jax.data import documents, sources
from icae_jax.data.rows import Sieve
from icae_jax.errors import UserError
from icae_jax.inference import loading, store
from icae_jax.inference.batching import segment_batches
from icae_jax.inference.texts import Size, content_hash
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.models.lora import LoraConfig
from icae_jax.workflows import compress_store, store_work
from icae_jax.workflows.compress_store import Request

LENGTHS = (1, 3, 15, 16, 17, 30, 40, 5, 70, 16, 24, 33)  # words of the documents
SHAPE = {"batch_size": 4}


def rows():
    rng = np.random.default_rng(0)
    return [
        {"id": f"doc '{i}'\n", "text": sentence(rng, n), "metadata": {"number": i}, "lang": "de"}
        for i, n in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_base):
    """(folder, adapter of slots, input, what compresses it)."""
    folder = tmp_path_factory.mktemp("filled")
    adapter = write_adapter(folder / "adapter", bases.load_base(tiny_base))
    source = write_jsonl(folder / "docs.jsonl", rows())
    return folder, str(adapter), source, loading.load(adapter)


@pytest.fixture(scope="module")
def filled(world):
    """The path of a store with all documents, in groups of 5, and what filling it returned."""
    folder, adapter, source, _ = world
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_work, "GROUP", 5)
        path = str(folder / "store")
        return path, compress_store.compress_store(Request(source, path, adapter, **SHAPE))


@pytest.fixture
def groups_of_5(monkeypatch):
    monkeypatch.setattr(store_work, "GROUP", 5)


@pytest.fixture
def no_base(monkeypatch):
    """Fails a test that loads a base."""

    def fail(*args, **more):
        pytest.fail("the base was loaded")

    monkeypatch.setattr(loading, "load_base", fail)


@pytest.fixture
def copied(filled, tmp_path):
    """A copy of the store that a test may change."""
    return str(shutil.copytree(filled[0], tmp_path / "copied"))


def content(path):
    """What a store holds: bytes of its shards by name, rows of its index by id."""
    shards = {p.name: p.read_bytes() for p in (store.open_store(path).shards.folder).iterdir()}
    with store.open_store(path) as opened:
        return shards, {entry.id: entry.as_json() | entry.spans for entry in opened.find()}


# --- What is stored ---


def test_stored_memories_are_those_that_compress_gives(world, filled):
    """Breaks when segments of other texts get into a memory, or in another order; when padding
    reaches one; or when id, metadata or sizes are another document's.
    """
    _, _, _, reference = world
    path, result = filled
    documents_ = rows()
    assert result["stored"] == len(LENGTHS) == result["documents"] and result["shards"] == 3
    with store.open_store(path) as opened:
        entries = opened.get([row["id"] for row in documents_])
        for row, entry in zip(documents_, entries, strict=True):
            want = reference.compress(row["text"])
            same(entry.memory.segment_lengths, want.segment_lengths)
            same(entry.memory.positions, want.positions)
            close(entry.memory.slots, want.slots)
            assert entry.metadata == row["metadata"] and entry.tokens == int(want.lengths[0])
        assert result["context_tokens"] == sum(entry.tokens for entry in entries)
        assert result["memory_tokens"] == sum(entry.memory_tokens for entry in entries)
        assert result["bytes"] == sum(entry.bytes for entry in entries)


@pytest.mark.parametrize(
    "method, layout", [("x500", "uniform"), ("pooled", ""), ("x500", "reference")]
)
def test_each_kind_of_memory(method, layout, tiny_base):
    """Breaks when memories of K/V are joined along another axis, or a layout whose positions depend
    on all segments gets those of one.
    """
    one = compressor(tiny_base, method, layout=layout)
    contexts = [one.context_ids(row["text"]) for row in rows()[:8]]
    memories, work = one.writer.write_each(contexts, 4, 4)
    assert work.tokens == sum(map(len, contexts)) <= work.computed
    for context, memory in zip(contexts, memories, strict=True):
        want = one.compress_ids([context], 1, 4)
        for name in want.contents:
            close(memory.contents[name], want.contents[name])
        same(memory.positions, want.positions)
        same(memory.end, want.end)


def test_batches_hold_every_segment_once_with_little_padding():
    """Breaks when a segment is left out, is cut, or goes twice; when batches of a group are padded
    by more than a tenth; or when every group has shapes of its own.
    """
    rng, shapes, tokens, computed = np.random.default_rng(1), set(), 0, 0
    config = CompressionConfig(k=16, rate=16)
    for _ in range(20):  # groups: texts of like lengths, cut into near-equal segments
        texts = rng.integers(20, 1500) * rng.uniform(0.9, 1.1, 256)
        counts = np.ceil(texts / config.segment_tokens).astype(int)
        lengths = [int(n / s) + 1 for n, s in zip(texts, counts, strict=True) for _ in range(s)]
        lengths = [min(n, config.segment_tokens) for n in lengths]
        batches = segment_batches(lengths, config, 16, lambda n: -(-n // 4) * 4)
        held = sorted(i for batch in batches for i in batch.segments)
        assert held == list(range(len(lengths)))
        for batch in batches:
            assert len(batch.segments) <= batch.rows and batch.rows % 4 == 0
            assert max(lengths[i] for i in batch.segments) <= batch.tokens
            assert batch.rows * batch.tokens <= 16 * config.segment_tokens
            shapes.add(batch[1:])
            computed += batch.rows * batch.tokens
        tokens += sum(lengths)
    assert 1 - tokens / computed < 0.1 and len(shapes) <= 64
    of_six = segment_batches([256] * 7, config, 16, lambda n: -(-n // 6) * 6)
    assert [batch.rows % 6 for batch in of_six] == [0] * len(of_six)
    assert sum(len(batch.segments) for batch in of_six) == 7
    with pytest.raises(UserError, match="batch_size is 0"):
        segment_batches([1], config, 0)


def test_ratio_and_tokens_choose_for_each_document(world, tmp_path, tiny_base):
    """Breaks when one k is taken for all documents, or a document is compressed again with the
    same flags, or is not with others.
    """
    _, _, source, _ = world
    base = bases.load_base(tiny_base)
    config = CompressionConfig(k=4, rate=4, k_choices=(1, 2, 4))
    adapter = adapters.Adapter(
        config,
        LoraConfig(4),
        adapters.load_adapter(world[1], base).template,
        random_trained(TINY, 4),
        str(tiny_base),
        base.fingerprint,
    )
    adapters.save_adapter(tmp_path / "several", adapter)
    request = Request(source, str(tmp_path / "s"), str(tmp_path / "several"), **SHAPE)

    def fill(**size):
        changed = dataclasses.replace(request, size=Size(**size))
        return compress_store.compress_store(changed)["stored"]

    assert fill(tokens=4) == len(LENGTHS)
    with store.open_store(tmp_path / "s") as opened:
        assert {entry.k for entry in opened.find()} == {1, 2, 4}
        assert all(entry.memory_tokens in (4, 5) for entry in opened.find() if entry.tokens > 64)
    assert fill(tokens=4) == 0 and fill(k=4) == len(LENGTHS) and fill() == 0
    with pytest.raises(UserError, match="k is 3"):
        fill(k=3)


# --- Again ---


def test_what_is_stored_is_skipped_without_the_base(world, filled, no_base):
    """Breaks when a second run compresses or loads anything, or does not see that all is there."""
    _, _, source, _ = world
    result = compress_store.compress_store(Request(source, filled[0], **SHAPE))
    assert (result["stored"], result["unchanged"]) == (0, len(LENGTHS))


def test_what_changed_is_replaced(world, copied, tmp_path, groups_of_5):
    """Breaks when a changed text keeps its memory, others of its group are written again, metadata
    need the base, or what is gone is removed unasked or stays though asked.
    """
    changed = rows()
    changed[3]["text"] = "the cat sat ."
    changed[5]["metadata"] = {"new": [1, None]}
    del changed[0]
    source = write_jsonl(tmp_path / "changed.jsonl", changed)
    result = compress_store.compress_store(Request(source, copied, **SHAPE))
    counts = ("stored", "unchanged", "metadata_changed", "pruned", "shards")
    assert [result[name] for name in counts] == [1, len(LENGTHS) - 3, 1, 0, 1]
    with store.open_store(copied) as opened:
        assert len(opened) == len(LENGTHS)
        close(opened[changed[2]["id"]].memory.slots, world[3].compress("the cat sat .").slots)
        assert opened[changed[4]["id"]].metadata == {"new": [1, None]}
    result = compress_store.compress_store(Request(source, copied, prune=True, **SHAPE))
    assert result["pruned"] == 1 and result["stored"] == 0
    with store.open_store(copied) as opened:
        assert len(opened) == len(LENGTHS) - 1 and rows()[0]["id"] not in opened
    # Rows that say nothing of metadata leave what is kept.
    silent = write_jsonl(tmp_path / "silent.jsonl", [row | {"metadata": None} for row in changed])
    result = compress_store.compress_store(Request(silent, copied, **SHAPE))
    assert result["unchanged"] == len(changed) and not result["metadata_changed"]
    with store.open_store(copied) as opened:
        assert opened[changed[4]["id"]].metadata == {"new": [1, None]}


def test_a_killed_run_goes_on_to_the_same_bytes(world, filled, tmp_path, groups_of_5):
    """Breaks when the groups of a run that goes on are others than those of one that was not
    stopped, or a shard's bytes depend on what was done before.
    """
    _, adapter, source, _ = world
    path = str(tmp_path / "killed")
    told = []

    def killed(ids):
        told.extend(ids)
        raise KeyboardInterrupt

    for done in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            compress_store.compress_store(Request(source, path, adapter, **SHAPE), killed)
        with store.open_store(path) as opened:
            assert set(opened) == set(told) and opened.stats()["shards"] == done
    result = compress_store.compress_store(Request(source, path, adapter, **SHAPE))
    assert result["shards"] == 1
    assert content(path) == content(filled[0])


def test_processes_share_an_input_without_a_word(world, filled, tmp_path, groups_of_5):
    """Breaks when two processes store one group, one is left out, what another process left is not
    merged, or the bytes depend on how many there are.
    """
    _, adapter, source, _ = world
    path = str(tmp_path / "shared")
    stored = []
    for process in (2, 1, 0):
        request = Request(source, path, adapter, process=process, processes=3, **SHAPE)
        stored.append(compress_store.compress_store(request)["stored"])
    assert sorted(stored) == [2, 5, 5]
    assert content(path) == content(filled[0])
    with pytest.raises(UserError, match="--process 3 --processes 3"):
        compress_store.compress_store(Request(source, path, adapter, process=3, processes=3))


def test_a_mesh_splits_batches(world, filled, tmp_path, groups_of_5):
    """Breaks when rows that a mesh cannot split are sent to it, or it gives other memories."""
    _, adapter, source, _ = world
    path = str(tmp_path / "mesh")
    with seen_devices(4):
        request = Request(source, path, adapter, mesh="data=4", **SHAPE)
        compress_store.compress_store(request)
    with store.open_store(path) as got, store.open_store(filled[0]) as want:
        for text_id in want:
            close(got[text_id].memory.slots, want[text_id].memory.slots)


# --- What cannot be stored ---


def test_bad_documents_are_left_out_and_the_rest_goes_on(world, tmp_path, capsys):
    """Breaks when one bad document ends a run, is stored, or is not told with its place; when
    --strict passes one; or when what cannot be done is tried at each run.
    """
    _, adapter, _, _ = world
    good = {"id": "a", "text": "the cat sat"}
    bad = {
        "is that of another text too": [good, {"id": "a", "text": "a dog"}],
        "the base has 256": [{"id": "b", "text": "the cat " * 600}],
        "metadata is 'x', which is not an object": [{"id": "c", "text": "a cat", "metadata": "x"}],
        "metadata holds nan": [{"id": "d", "text": "a fish", "metadata": {"a": float("nan")}}],
        "left out 1 empty text": [{"id": "e", "text": " "}],
    }
    for number, (message, lines) in enumerate(bad.items()):
        lines = lines if good in lines else [good, *lines]
        source = write_jsonl(tmp_path / f"{number}.jsonl", lines)
        path = str(tmp_path / str(number))
        argv = ["compress", "--adapter", adapter, "--input", source, "--store", path, "--json"]
        with pytest.MonkeyPatch.context() as patch:
            assert cli.main(argv) == 0
            out = capsys.readouterr()
            assert message in out.err and f"{number}.jsonl:2" in out.err
            result = json.loads(out.out)
            assert result["stored"] == 1 and result["problems"] == ("empty" not in message)
            patch.setattr(loading, "load_base", lambda *args: pytest.fail("the base was loaded"))
            assert cli.main(argv) == 0 and capsys.readouterr()
            strict = str(tmp_path / f"strict{number}")
            argv[argv.index(path)] = strict
            assert cli.main([*argv, "--strict"]) == 2
            assert "without --strict" in capsys.readouterr().err and not store.exists(strict)


def test_what_does_not_go_together_is_told_before_the_base_loads(
    world, filled, tmp_path, tiny_base, no_base
):
    """Breaks when another adapter, dtype or form fills a store, or that is found only when the
    base has been loaded.
    """
    _, adapter, source, _ = world
    base = bases.load_base(tiny_base)
    other = adapters.load_adapter(adapter, base)
    table = {"memory_table": other.trained["memory_table"] + 1}
    other = dataclasses.replace(other, trained=other.trained | table)
    adapters.save_adapter(tmp_path / "other", other)
    path = filled[0]
    for request, message in (
        (Request(source, path, str(tmp_path / "other")), "was written with adapter"),
        (Request(source, path, dtype="int8"), "holds float32, not int8; give --dtype float32"),
        (Request(source, path, kv=True), "holds no K/V of the decoder"),
        (Request(source, str(tmp_path / "new")), "--adapter is not given"),
        (Request(source, path, batch_size=0), "--batch_size is 0"),
        (Request(source, path, size=Size(k=3)), "k is 3"),
        (Request("absent.jsonl", path), "absent.jsonl: no such file"),
        (Request(write_jsonl(tmp_path / "e.jsonl", [{"text": ""}]), path), "no rows; all were"),
    ):
        with pytest.raises(UserError, match=message):
            compress_store.compress_store(request)


def test_flags_of_a_store_are_not_for_a_memory_file(world, tmp_path, capsys):
    """Breaks when a flag is silently without effect."""
    _, adapter, source, _ = world
    argv = ["compress", "--input", source, "--output", str(tmp_path / "m.safetensors")]
    for more, message in (
        (["--adapter", adapter, "--kv"], "--kv is for a --store"),
        (["--adapter", adapter, "--process", "1"], "--process is for a --store"),
        ([], "--adapter is not given"),
    ):
        assert cli.main([*argv, *more]) == 2
        assert message in capsys.readouterr().err


# --- Reading the input ---


def test_an_input_is_read_a_window_at_a_time(monkeypatch):
    """Breaks when the documents of an input are held together."""
    read = []

    def endless(*args, **more):
        for i in range(10**9):
            read.append(i)
            row = sources.Row(f"text {i}", None, None, "here", str(i), "", True)
            yield row, {"id": str(i), "text": row.text}

    monkeypatch.setattr(sources, "read_with_raw", endless)
    first = next(store_work.windows(documents.Documents("x")))
    assert len(first) == store_work.WINDOW and len(read) == store_work.WINDOW + 1
    assert first[7] == documents.Document("7", "text 7", "here", None)
    long = [first[0]._replace(text="x" * (store_work.WINDOW_CHARACTERS // 2))] * 5
    assert list(map(len, store_work.windows(long))) == [2, 2, 1]
    grouped = store_work.groups(long, lambda _: store_work.GROUP_BYTES // 2)
    assert list(map(len, grouped)) == [2, 2, 1]


def test_documents_are_named_as_rows_of_a_memory_file_are(tmp_path):
    """Breaks when a context with many questions is stored once a question, an id that repeats is
    lost, chosen fields are not kept, or rows are counted that cannot be used.
    """
    lines = [
        {"context": "a cat", "question": "q", "answers": ["x"], "lang": "de"},
        {"context": "a cat", "question": "r", "answers": ["y"]},
        {"id": "0", "text": "own"},
        {"id": "b", "text": "a cat", "lang": None, "url": "u"},
        {"id": "b", "text": "a cat"},
        {"text": ""},
    ]
    source, refused = write_jsonl(tmp_path / "in.jsonl", lines), []
    read = documents.Documents(
        source, ("lang", "url"), Sieve(questions=False), lambda d, why: refused.append((d.id, why))
    )
    assert [(d.id, d.metadata) for d in read] == [
        ("0", {"lang": "de"}),
        ("b", {"lang": None, "url": "u"}),
    ]
    assert refused == [("0", f"its id is that of another text too ({source}:1)")]
    assert read.sieve.counts == {f"empty texts (the first: {source}:6)": 1}
    assert "b" in read and "1" not in read
    read.leave_out("b")
    assert "b" not in read


def test_a_fault_of_the_network_does_not_begin_anew(tmp_path, monkeypatch):
    """Breaks when documents come twice or are lost, or empty rows are counted twice, after a fault
    that passes.
    """
    monkeypatch.setattr("icae_jax.errors.FIRST_DELAY", 0)
    lines = [{"id": str(i), "text": f"text {i}" if i % 3 else ""} for i in range(9)]
    source, faults = write_jsonl(tmp_path / "in.jsonl", lines), [3, 5]
    whole = sources.read_with_raw

    def faulty(*args, **more):
        for number, item in enumerate(whole(*args, **more)):
            if faults and number == faults[0]:
                faults.pop(0)
                raise ConnectionError("gone")
            yield item

    monkeypatch.setattr(sources, "read_with_raw", faulty)
    read = documents.Documents(source)
    assert [document.id for document in read] == ["1", "2", "4", "5", "7", "8"] and not faults
    assert list(read.sieve.counts.values()) == [3]


def test_a_content_hash_is_of_text_and_size():
    """Breaks when a document counts as unchanged although its text or the memory asked for did."""
    config = CompressionConfig(k=4, rate=4, k_choices=(2, 4))
    asked = [Size().asked(config), Size(k=2).asked(config), Size(tokens=4).asked(config)]
    hashes = {content_hash(text, size) for text in ("a", "b") for size in asked}
    assert len(hashes) == 6 and Size(k=4).asked(config) == asked[0]
