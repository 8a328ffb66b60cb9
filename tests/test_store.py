"""A store: what is put in is found and read again, whatever ids and metadata are, in each dtype."""

import dataclasses
import json

import numpy as np
import pytest
from store_helpers import INFO, KV_INFO, entry, kv_entry, write

import icae_jax
from icae_jax.errors import UserError
from icae_jax.inference import store
from icae_jax.inference.store import codec

ODD_IDS = [
    "../../etc/passwd",
    "a'; DROP TABLE entries; --",
    'quote " and \\',
    "two\nlines\ttab",
    "nul\0behind",
    "nul\0other",
    "",
    " ",
    "日本 😀",
    "\u00e9",
    "e\u0301",
    "x" * 10_000,
    "%",
    "_",
]


def test_what_is_stored_is_read_again(tmp_path):
    """Breaks when an entry's numbers, lengths or metadata are another's, or padding is kept."""
    entries = [entry("a", [8, 3]), entry("b", [5], metadata={"lang": "de"})]
    padded = dataclasses.replace(entries[1], memory=_padded(entries[1].memory))
    with write(tmp_path / "s", [entries[0], padded]) as s:
        assert len(s) == 2 and list(s) == ["a", "b"] and "b" in s and "c" not in s and 3 not in s
        for expected in entries:
            got = s[expected.id]
            assert got.content_hash == f"hash of {expected.id}"
            _same(got.memory, expected.memory)
            assert got.prefix is None and not got.has_kv
        b = s["b"]
        assert (b.tokens, b.k, b.lengths, b.memory_tokens) == (5, 2, (5,), 2)
        assert (b.ratio, b.bytes, b.metadata) == (2.5, 2 * 8 * 4, {"lang": "de"})
        assert [e.id for e in s.get(["b", "a", "b"])] == ["b", "a", "b"]
        together = store.memory_of(s.get(["b", "a"]), INFO.compression)
        np.testing.assert_array_equal(together.segment_lengths, [[5, 0], [8, 3]])
        np.testing.assert_array_equal(together.slots[1], entries[0].memory.slots[0])
    assert icae_jax.open_store(tmp_path / "s")["a"].tokens == 11


def _same(got, expected):
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(got, name), value)


def _padded(memory):
    """With a second segment that the text lacks, and what a batch left in it."""
    from icae_jax.compression import memory as memories

    slots = np.pad(memory.slots, [(0, 0), (0, 2), (0, 0)], constant_values=7)
    lengths = np.pad(memory.segment_lengths, [(0, 0), (0, 1)])
    return memories.place(memories.Slots, {"slots": slots}, lengths, INFO.compression)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0), ("bfloat16", 2**-8), ("int8", 1)])
def test_kv_and_prefix_in_each_dtype(tmp_path, dtype, bound):
    """Breaks when k and v change places, scales are of another head, a prefix loses its head or
    its positions, or numbers are off by more than the dtype rounds.
    """
    info = dataclasses.replace(KV_INFO, dtype=dtype)
    new = kv_entry("a", [8, 3])
    with write(tmp_path / "s", [new, kv_entry("b", [4])], info) as s:
        got = s["a"]
        assert got.has_kv and got.memory.k.dtype == ("bfloat16" if dtype == "bfloat16" else "f4")
        for have, expected in ((got.memory, new.memory), (got.prefix, new.prefix)):
            for name, value in vars(expected).items():
                if name in ("k", "v"):
                    scale = np.abs(value).max(-1, keepdims=True) / 254 if dtype == "int8" else 1
                    error = np.abs(getattr(have, name).astype(np.float32) - value)
                    if dtype == "int8":
                        assert (error <= 1.0001 * scale).all() and error.any()
                    else:
                        assert (error <= bound * np.abs(value)).all()
                        assert error.any() == (bound > 0)
                else:
                    np.testing.assert_array_equal(getattr(have, name), value)
        numbers = 2 * 3 * 1 * (4 + 3 + 4) * (6 if dtype != "int8" else 10)
        assert got.bytes == numbers * {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]


def test_int8_of_zeros_and_extremes():
    """Breaks when a head of zeros divides by nothing, or the largest number is out of range."""
    x = np.asarray([[0, 0, 0], [1, -127, 126.4], [3e38, -3e38, 0]], np.float32)
    stored = codec.encode(x, "int8")
    assert stored.dtype == np.uint8 and stored.shape == (3, 7)
    again = codec.decode(stored.reshape(-1), x.shape, "int8")
    np.testing.assert_allclose(again, [[0, 0, 0], [1, -127, 126], [3e38, -3e38, 0]], rtol=1e-6)


def test_ids_are_only_data(tmp_path):
    """Breaks when an id is part of a path or of SQL, is cut at a null byte, or is normalised."""
    with write(tmp_path / "s", [entry(text, [4], seed=i) for i, text in enumerate(ODD_IDS)]) as s:
        assert list(s) == ODD_IDS
        for i, text in enumerate(ODD_IDS):
            np.testing.assert_array_equal(s[text].memory.slots, entry(text, [4], i).memory.slots)
        assert [e.id for e in s.find(prefix="nul\0")] == ["nul\0behind", "nul\0other"]
        assert [e.id for e in s.find(prefix="%")] == ["%"]
        assert "nul" not in s and "\ud83d" not in s
        with pytest.raises(UserError, match=r"has no entry 'no', '\\ud83d'; icae store ls"):
            s.get(["%", "no", "\ud83d"])
        with pytest.raises(UserError, match="has no entry 'no'"):
            s["no"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_finding(tmp_path):
    """Breaks when a page ends the search, true is 1, a key is taken for a path, or entries come
    twice or out of order.
    """
    odd = {'a"b': 1, "$.x": 2, "x.y": [1, {"z": None}], "none": None, "n": 1.5, "yes": True}
    entries = [entry(f"d{i:04}", [4], metadata={"i": i, "even": i % 2 == 0}) for i in range(1100)]
    entries.append(entry("odd", [4], metadata=odd))
    with write(tmp_path / "s", entries) as s:
        assert [e.id for e in s.find()] == [e.id for e in entries] == list(s)
        assert [e.id for e in s.find(where={"even": True})] == [e.id for e in entries[:1100:2]]
        assert [e.id for e in s.find({"even": False}, "d1", 2, "d1003")] == ["d1005", "d1007"]
        assert [e.id for e in s.find(after="d1097", limit=2)] == ["d1098", "d1099"]
        assert [e.id for e in s.find(where={"i": 7})] == ["d0007"]
        assert not list(s.find(where={"even": 1})) and not list(s.find(limit=0))
        for key, value in odd.items():
            assert [e.id for e in s.find(where={key: value})] == ["odd"]
        assert not list(s.find(where={"absent": None}))
        assert s.stats()["entries"] == 1101


def test_replacing_and_metadata(tmp_path):
    """Breaks when an entry of the same id is kept twice, keeps its old numbers, or loses its place;
    or metadata change without being asked for.
    """
    path = tmp_path / "s"
    write(path, [entry("a", [4], 1, {"v": 1}), entry("b", [4])]).close()
    with store.Writer(path, INFO) as writer:
        new = dataclasses.replace(entry("a", [8, 8], 2), content_hash="new")
        writer.add_shard([new])
        assert writer.known(["a", "b", "c"]) == {
            "a": store.Known("new", False, {}),
            "b": store.Known("hash of b", False, {}),
        }
        writer.set_metadata({"b": {"ü": [1]}})
        with pytest.raises(UserError, match="no entry 'c'"):
            writer.set_metadata({"b": {}, "c": {}})
        with pytest.raises(UserError, match="two entries have the id 'a'"):
            writer.add_shard([new, new])
    with store.open_store(path) as s:
        assert list(s) == ["a", "b"] and s["b"].metadata == {"ü": [1]}
        np.testing.assert_array_equal(s["a"].memory.slots, new.memory.slots)
        assert s.stats()["unused_bytes"] == 2 * 8 * 4 and s.stats()["shards"] == 2


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": float("nan")}, "metadata holds nan"),
        ({"a": b"\xff"}, r"metadata holds b'\\xff', a bytes; .* \(bytes decoded\)"),
        ({"a": "\ud83d"}, "is not valid text"),
        ({1: "a"}, "metadata has the key 1"),
        (["a"], "metadata is \\['a'\\], which is not an object"),
        (json.loads('{"a":' + "[" * 80 + "]" * 80 + "}"), "nested deeper than 64"),
    ],
)
def test_metadata_that_cannot_be_kept(tmp_path, metadata, message):
    """Breaks when what SQLite's JSON functions do not read is stored, and spoils every search."""
    with store.Writer(tmp_path / "s", INFO) as writer:
        good = entry("good", [4])
        # Around the annotation: a file of the user's may hold anything.
        bad = object.__new__(store.NewEntry)
        vars(bad).update(vars(good), id="bad", metadata=metadata)
        with pytest.raises(UserError, match=f"entry 'bad': .*{message}"):
            writer.add_shard([good, bad])
        assert not writer.known(["good", "bad"])


def test_entries_that_do_not_fit(tmp_path):
    """Breaks when a store takes numbers that are not finite, of another kind or size, or K/V that
    nobody asked it to keep.
    """
    with store.Writer(tmp_path / "s", INFO) as writer:
        good = entry("a", [4])
        slots = good.memory.slots.copy()
        slots[0, 0, 0] = np.inf
        for change, message in (
            ({"memory": good.memory.replace(slots=slots)}, "its memory is not finite in float32"),
            ({"memory": kv_entry("a", [4]).memory}, "memory is KV of 1 texts; give Slots of one"),
            ({"memory": good.memory.replace(slots=slots[..., :4])}, r"shape \(2, 4\), but .*2, 8"),
            ({"prefix": kv_entry("a", [4]).prefix}, "has a prefix, but the store keeps none"),
            ({"id": "\ud83d"}, "is not valid text"),
        ):
            with pytest.raises(UserError, match=message):
                writer.add_shard([dataclasses.replace(good, **change)])
    new = kv_entry("a", [4])
    with store.Writer(tmp_path / "kv", KV_INFO) as writer:
        shifted = new.prefix.replace(positions=new.prefix.positions + 1)
        with pytest.raises(UserError, match="not that of its memory behind a head of 3 ids"):
            writer.add_shard([dataclasses.replace(new, prefix=shifted)])


def test_a_group_written_twice_is_one_file(tmp_path):
    """Breaks when a shard's name or bytes depend on when, where or in which order it was asked for:
    an interrupted run would not complete to the same bytes.
    """
    entries = [entry(f"d{i}", [4, 2], i) for i in range(20)]
    names = {}
    for place in ("one", "two"):
        with store.Writer(tmp_path / place, dataclasses.replace(INFO, base=place)) as writer:
            names[place] = {writer.add_shard(entries), writer.add_shard(entries)}
    assert names["one"] == names["two"] and len(names["one"]) == 1
    (name,) = names["one"]
    one, two = (tmp_path / p / "shards" / f"{name}.safetensors" for p in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    others = [
        [dataclasses.replace(entries[0], content_hash="other"), *entries[1:]],
        [entry("d0", [4, 2], 99), *entries[1:]],  # other numbers, as of another device
        entries[1:],
    ]
    with store.Writer(tmp_path / "one", INFO) as writer:
        assert len({name, *map(writer.add_shard, others)}) == 4


def test_processes_leave_what_process_0_merges(tmp_path):
    """Breaks when what another process was told is stored is lost, or merged twice or too early."""
    path = tmp_path / "s"
    with store.Writer(path, INFO, process=1, processes=2) as other:
        other.add_shard([entry("b", [4], 1)])
        other.add_shard([entry("b", [4], 2)])
        other.set_metadata({"b": {"x": 1}})
        assert other.known(["a", "b"]) == {"b": store.Known("hash of b", False, {"x": 1})}
        with store.Writer(path, INFO, processes=2) as writer:
            assert writer.known(["b"])["b"].metadata == {"x": 1}
            writer.add_shard([entry("a", [4])])
            other.add_shard([entry("c", [4])])
            with store.open_store(path) as s:
                assert list(s) == ["b", "a"] and s.stats()["pending"] == 1
                assert writer.merge() == 1 and writer.merge() == 0
                assert list(s) == ["b", "a", "c"]
                np.testing.assert_array_equal(s["b"].memory.slots, entry("b", [4], 2).memory.slots)
                assert s["b"].metadata == {"x": 1}
        with pytest.raises(UserError, match="in use"):
            store.Writer(path, INFO, process=1, processes=2)
    strange = dataclasses.replace(INFO, dtype="int8")
    with store.Writer(tmp_path / "t", strange, process=1, processes=2) as other:
        other.add_shard([entry("b", [4])])
    (left,) = (tmp_path / "t" / "pending").glob("*.json")
    left.rename(path / "pending" / left.name)
    with pytest.raises(UserError, match="is of another store: its dtype differ"):
        store.Writer(path, INFO)
