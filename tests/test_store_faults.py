"""A store where something is wrong: the entry and the shard are named, and the others are read on.

Nothing that was reported stored is lost, whatever fails.
"""

import contextlib
import dataclasses
import errno
import json
import os
import sqlite3

import numpy as np
import pytest
from store_helpers import INFO, KV_INFO, entry, kv_entry, origin, write

from icae_jax import errors
from icae_jax.errors import UserError
from icae_jax.inference import store
from icae_jax.inference.store import entries, index


def shards(path):
    return sorted((path / "shards").glob("*.safetensors"))


@contextlib.contextmanager
def tampering(path):
    """The index, to be edited."""
    connection = sqlite3.connect(path / "index.sqlite")
    with connection:
        yield connection
    connection.close()


@pytest.fixture
def two_shards(tmp_path):
    """A store of a, b and c in one shard and d in another."""
    path = tmp_path / "s"
    with store.Writer(path, KV_INFO) as writer:
        first = writer.add_shard([kv_entry(text, [4, 4], i) for i, text in enumerate("abc")])
        second = writer.add_shard([kv_entry("d", [4], 9)])
    return path, first, second


def damaged(path):
    """The ids of what verify finds damaged, and what it says."""
    with store.open_store(path) as s:
        seen = store.verify(s)
    return {d.id: d.problem for d in seen.damage}, seen


def test_a_flipped_bit_is_one_entrys(two_shards):
    """Breaks when damaged numbers are taken for a memory, the message does not say where they are,
    or the other entries of the shard are lost with them.
    """
    path, first, _ = two_shards
    with store.open_store(path) as s:
        span = s["b"].spans
    file = path / "shards" / f"{first}.safetensors"
    data = bytearray(file.read_bytes())
    for part, others in (("memory", "prefix"), ("kv", "memory")):
        spoiled = data.copy()
        spoiled[span[part].offset + span[part].nbytes - 1] ^= 1
        file.write_bytes(spoiled)
        with store.open_store(path) as s:
            message = rf"entry 'b' cannot be read: shard .*{first}\.safetensors is damaged: its ch"
            with pytest.raises(UserError, match=message):
                getattr(s["b"], "memory" if part == "memory" else "prefix")
            assert getattr(s["b"], others) is not None
            assert all(np.isfinite(s[text].prefix.k).all() for text in "acd")
        found, seen = damaged(path)
        assert list(found) == ["b"] and seen.entries == 4 and seen.shards == 2


def test_a_shard_that_is_cut_short_or_gone(two_shards):
    """Breaks when reading behind a file's end ends the process, or one shard takes another along;
    also where the shard was whole when it was first read.
    """
    path, first, second = two_shards
    file = path / "shards" / f"{first}.safetensors"
    with open(file, "ab") as opened:
        opened.write(b"x")
    assert list(damaged(path)[0]) == [None]  # all entries are there
    with store.open_store(path) as s:
        _ = s["a"].memory, s["c"].memory  # mapped
        whole = file.stat().st_size
        os.truncate(file, s["c"].spans["kv"].offset + 8)
        assert s["a"].prefix is not None
        with pytest.raises(UserError, match=rf"entry 'c' .*{first}\.safetensors is cut short"):
            _ = s["c"].memory
        with pytest.raises(UserError, match="is cut short"):  # begins before the file's end
            _ = s["c"].prefix
    assert list(damaged(path)[0]) == ["c"]
    os.truncate(file, whole)  # zeros
    assert list(damaged(path)[0]) == ["c"]
    os.truncate(file, 0)
    assert list(damaged(path)[0]) == ["a", "b", "c"]
    file.unlink()
    found, _ = damaged(path)
    assert list(found) == ["a", "b", "c"] and f"{first}.safetensors is not there" in found["a"]
    with store.Writer(path) as writer:
        writer.remove(list(found))
        assert store.compact(writer).removed == 0
        assert writer.add_shard([kv_entry(t, [4, 4], i) for i, t in enumerate("abc")]) == first
    assert not damaged(path)[0] and {p.stem for p in shards(path)} == {first, second}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("offset = -8", "offset is -8"),
        ("nbytes = -72", "nbytes is -72"),
        ("nbytes = 1 << 60", "nbytes is"),
        ("offset = 1 << 60", "is cut short"),
        ("offset = 'x'", "offset is 'x'"),
        ("k = 0", "k is 0"),
        ("tokens = -8, lengths = '[-4, -4]'", "tokens is -8"),
        ("lengths = '[4, 4'", "are not JSON"),
        ("lengths = '[8, 0]'", r"lengths are \[8, 0\]"),
        ("memory_tokens = 8", "memory_tokens is 8"),
        ("metadata = '[]'", r"metadata is \[\]"),
        ("checksum = x'00'", "checksum is"),
        ("kv_nbytes = -1", "kv_nbytes is -1"),
        ("kv_offset = NULL", "kv_offset is None"),
        ("offset = offset + 4", "checksum differs"),
    ],
)
def test_an_index_that_was_tampered_with(two_shards, change, problem):
    """Breaks when numbers of the index are believed: negative sizes, offsets behind the file, more
    memory than a text has.
    """
    path, first, _ = two_shards
    with tampering(path) as connection:
        connection.execute(f"UPDATE entries SET {change} WHERE id = 'b'")
    with store.open_store(path) as s:
        with pytest.raises(UserError, match=f"entry 'b'.*{problem}"):
            _ = s["b"].prefix if "kv" in change else s["b"].memory
        # The others are found.
        assert [e.id for e in s.find() if e.id != "b"] == ["a", "c", "d"]
        assert not list(s.find(where={"x": 1}))
    found, _ = damaged(path)
    assert list(found) == ["b"] and first in found["b"]
    with store.Writer(path) as writer:
        assert writer.known("ab").keys() == {"a", "b"}
        writer.remove(["b"])
    assert not damaged(path)[0]


def test_numbers_that_are_not_finite(tmp_path, monkeypatch):
    """Breaks when verify takes what has the right checksum for a memory."""
    monkeypatch.setattr(entries, "_check_finite", lambda *of_entry: None)
    nan = entry("a", [4])
    nan = dataclasses.replace(nan, memory=nan.memory.replace(slots=nan.memory.slots * np.nan))
    write(tmp_path / "s", [nan, entry("b", [4])]).close()
    assert damaged(tmp_path / "s")[0] == {"a": "its numbers are not finite"}


def test_a_row_without_a_shard(two_shards):
    """Breaks when verify sees only the rows that a look-up finds."""
    path, *_ = two_shards
    with tampering(path) as connection:
        connection.execute("UPDATE entries SET shard = 99 WHERE id = 'a'")
    assert damaged(path)[0] == {"a": "its shard is not in the index"}


def test_no_index_and_others(tmp_path):
    """Breaks when a folder of something else is filled, or what is no index ends in a traceback."""
    with pytest.raises(UserError, match=r"no is not there; icae compress --store makes one"):
        store.open_store(tmp_path / "no")
    with pytest.raises(UserError, match="holds no store"):
        store.Writer(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file; give a folder"):
        store.Writer(tmp_path / "file", INFO)
    with pytest.raises(UserError, match=r"folder with other files, such as file; give a new one"):
        store.Writer(tmp_path, INFO)
    assert not (tmp_path / "index.sqlite").exists()
    path = tmp_path / "s"
    write(path, [entry("a", [4])]).close()
    whole = (path / "index.sqlite").read_bytes()
    for content, message in (
        (b"not a database, but a text that is long enough " * 9, "is not a store's index, or is d"),
        (whole[:5000], "is not a store's index, or is damaged"),
        (b"", "s is empty: it is being made just now, or its making was stopped"),
    ):
        (path / "index.sqlite").write_bytes(content)
        for opening in (lambda path: store.open_store(path)["a"], store.Writer):
            with pytest.raises(UserError, match=message):
                opening(path)
    store.Writer(path, INFO).close()  # goes on with the making
    assert not len(store.open_store(path))
    for opening in (store.open_store, store.Writer):
        with pytest.raises(UserError, match=r"gs://b/s: the index of a store is on this machine"):
            opening("gs://b/s")


def test_a_newer_version(tmp_path):
    """Breaks when a store of a later release is read, or written, as if it were one of this."""
    path = tmp_path / "s"
    write(path, [entry("a", [4])]).close()
    with tampering(path) as connection:
        connection.execute("UPDATE info SET value = '2' WHERE key = 'format_version'")
        connection.execute("UPDATE info SET value = '9.0' WHERE key = 'created_by'")
    for opening in (store.open_store, store.Writer, lambda path: store.Writer(path, INFO)):
        with pytest.raises(
            UserError, match=r"format_version 2 \(made by icae_jax 9\.0\); .* reads 1; install a ne"
        ):
            opening(path)


def test_another_compressor(tmp_path):
    """Breaks when a store of another adapter, base, tokenizer, dtype or template is added to, or
    one of the differences is not named, with both sides.
    """
    path = tmp_path / "s"
    write(path, [entry("a", [4])]).close()
    other = {"weights": "w" * 64, "tokenizer": "u" * 64}
    for changed, message in (
        (origin(adapter="c"), "adapter aaaaaaaaaaaa, but cccccccccccc"),
        (origin(base="c"), "base bbbbbbbbbbbb, but cccccccccccc"),
        (origin(base_identity=other), "tokenizer tttttttttttt, but the base's is uuuuuuuuuuuu"),
        (origin(lora_scale=2.0), None),
    ):
        info = dataclasses.replace(INFO, origin=changed)
        if message is None:  # what an earlier version did not write is not compared
            store.Writer(path, info).close()
            continue
        with pytest.raises(UserError, match=message):
            store.Writer(path, info)
    everything = dataclasses.replace(
        INFO, origin=origin(base="x", adapter="y", base_identity=other), dtype="int8", kv="chat"
    )
    with pytest.raises(UserError) as raised:
        store.Writer(path, everything)
    lines = str(raised.value).splitlines()
    assert len(lines) == 5 and all(line.startswith(f"store {path} ") for line in lines)
    for line, both in zip(
        lines,
        (
            ("bbbb", "xxxx"),
            ("aaaa", "yyyy"),
            ("tttt", "uuuu"),
            ("float32", "int8"),
            ("no K", "chat"),
        ),
        strict=True,
    ):
        assert all(side in line for side in both)
    with pytest.raises(UserError, match="dtype is 'int4'; choose from float32, bfloat16, int8"):
        dataclasses.replace(INFO, dtype="int4")


def test_two_writers(tmp_path):
    """Breaks when two processes write one index, or a process keeps the lock of what it closed."""
    path = tmp_path / "s"
    with store.Writer(path, INFO) as writer:
        with pytest.raises(UserError, match=r"--store .* is in use: process \d+"):
            store.Writer(path, INFO)
        writer.add_shard([entry("a", [4])])
    with store.Writer(path, INFO) as writer:
        assert list(writer.known(["a"])) == ["a"]
        with pytest.raises(UserError, match="process is 2 of 2"):
            store.Writer(path, INFO, process=2, processes=2)


@contextlib.contextmanager
def disk_full_at(monkeypatch, name, call):
    """The disk is full at one call of a function of `os`."""
    original, calls = getattr(os, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing)
        yield calls


@pytest.mark.parametrize("process", [0, 1])
def test_a_full_disk(tmp_path, monkeypatch, process):
    """Breaks when a full disk loses what was stored, leaves half of a group, or cannot be gone on
    from once there is room.
    """
    path = tmp_path / "s"
    write(path, [entry("a", [4])]).close()
    new = [entry("b", [4], 1), entry("a", [4], 2)]
    with store.Writer(path, INFO, process, 2) as writer:
        failed = 0
        for name in ("fsync", "replace"):
            for call in range(1, 9):
                with disk_full_at(monkeypatch, name, call):
                    try:
                        writer.add_shard(new)
                        break
                    except OSError as error:
                        assert errors.disk_full(error)
                        failed += 1
                with store.open_store(path) as s:
                    assert s.get(["a"])[0].memory.slots.shape == (1, 2, 8)
                assert not damaged(path)[0]
        assert failed >= (3 if process == 0 else 5)
        assert set(writer.known(["a", "b"])) == {"a", "b"}
    with store.Writer(path, INFO, 0, 2) as writer:
        store.compact(writer)
    with store.open_store(path) as s:
        np.testing.assert_array_equal(s["a"].memory.slots, new[1].memory.slots)
        assert list(s) == ["a", "b"] and not damaged(path)[0]


def test_an_index_that_finds_no_room(tmp_path):
    """Breaks when SQLite's own word for a full disk is no full disk, or half of a group stays."""
    path = tmp_path / "s"
    with store.Writer(path, INFO) as writer:
        writer.add_shard([entry("a", [4])])
        (pages,) = writer.connection.execute("PRAGMA page_count").fetchone()
        writer.connection.execute(f"PRAGMA max_page_count={pages}")
        many = [entry(f"{i:0300}", [4], i) for i in range(200)]
        with pytest.raises(OSError, match=r"No space left on device .*full") as raised:
            writer.add_shard(many)
        assert errors.disk_full(raised.value)
        with store.open_store(path) as s:
            assert list(s) == ["a"]
        writer.connection.execute("PRAGMA max_page_count=1000000")
        writer.add_shard(many)
    assert damaged(path)[1].entries == 201 and not damaged(path)[0]


def test_a_damaged_pending_file(tmp_path):
    """Breaks when what another process left is damaged and the message does not say which file."""
    path = tmp_path / "s"
    with store.Writer(path, INFO, 1, 2) as other:
        name = other.add_shard([entry("a", [4])])
    (left,) = (path / "pending").glob("*.json")
    whole = json.loads(left.read_text())
    for content, message in (
        ('{"info": {}', "not valid JSON"),
        (json.dumps({"entries": [], "metadata": {}}), "info missing"),
        (json.dumps(whole | {"entries": [{"id": "a"}]}), r"\{'id': 'a'\} is no entry"),
    ):
        left.write_text(content)
        with pytest.raises(UserError, match=rf"pending/.*{name}\.json: {message}"):
            store.Writer(path, INFO)
    left.write_text(json.dumps(whole))
    with store.Writer(path, INFO) as writer:
        assert list(writer.known("a")) == ["a"]


def test_media_that_cannot_be_written(tmp_path, monkeypatch):
    """Breaks when a store on read-only media is not read, or one whose last transactions are still
    in its log is read without them.
    """
    path = tmp_path / "s"
    connect = index._connect

    def refusing(path_to, how):
        # SQLite's answer where it cannot make a log's shared memory.
        if how == "mode=ro":
            error = sqlite3.OperationalError("unable to open database file")
            error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
            raise error
        opened.append(how)
        return connect(path_to, how)

    opened = []
    monkeypatch.setattr(index, "_connect", refusing)
    with store.Writer(path, INFO) as writer:
        writer.add_shard([entry("a", [4])])
        assert (path / "index.sqlite-wal").stat().st_size
        with store.open_store(path) as s:
            assert list(s) == ["a"] and opened == ["mode=rw"]
    assert not (path / "index.sqlite-wal").exists()
    with store.open_store(path) as s:
        assert list(s) == ["a"] and opened[1:] == ["mode=ro&immutable=1"]
        monkeypatch.undo()
        write(path, [entry("b", [4])]).close()  # by another host
        monkeypatch.setattr(index, "_connect", refusing)
        assert list(s) == ["a", "b"]
