"""Compacting a store, shards elsewhere, and kills."""

import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from store_helpers import INFO, entry, fill, write

from icae_jax.errors import UserError
from icae_jax.inference import store
from icae_jax.inference.store import index, upkeep
from icae_jax.inference.store.shards import Shards

GROUPS = 400  # written by processes that are killed


def filled(path, groups=3, a_group=8, **options):
    """A store of some shards, all but one entry of each replaced; returns the entries it has."""
    expected = {}
    with store.Writer(path, INFO, **options) as writer:
        for group in range(groups):
            new = [entry(f"g{group}-{i}", [4, 3], 10 * group + i) for i in range(a_group)]
            writer.add_shard(new)
            expected |= {e.id: e for e in new}
        changed = [
            dataclasses.replace(e, memory=entry(e.id, [8], 100 + i).memory, content_hash="new")
            for i, e in enumerate(expected.values())
            if not e.id.endswith("-0")
        ]
        writer.add_shard(changed)
        expected |= {e.id: e for e in changed}
    return expected


def check(path, expected):
    """That a store holds these entries, and all of them whole."""
    with store.open_store(path) as s:
        assert list(s) == list(expected) and not store.verify(s).damage
        for text, new in expected.items():
            assert s[text].content_hash == new.content_hash
            np.testing.assert_array_equal(s[text].memory.slots, new.memory.slots)


def test_compacting(tmp_path, monkeypatch):
    """Breaks when compacting loses or changes an entry, keeps what nobody uses, moves shards that
    are in use, or takes from a reader what it looked up before.
    """
    path = tmp_path / "s"
    expected = filled(path)
    with store.open_store(path) as reader:
        before = {text: reader[text] for text in expected}
        _ = before["g0-0"].memory  # mapped
        (path / "shards" / ("0" * 32 + ".safetensors")).write_bytes(b"orphan")
        (path / "shards" / ".x.safetensors.1234").write_bytes(b"half")
        (path / "shards" / "not ours.txt").write_text("kept")
        monkeypatch.setattr(upkeep, "SHARD_ENTRIES", 2)
        with store.Writer(path) as writer:
            done = store.compact(writer)
        # Of three shards one entry each was in use, now in two new ones; the fourth is as it was.
        assert (done.removed, done.written, done.damaged) == (4, 2, 0)
        assert done.freed_bytes > 3 * 7 * 4 * 8 * 4
        names = {p.name for p in (path / "shards").iterdir()}
        assert len(names) == 4 and "not ours.txt" in names
        for text, new in expected.items():
            np.testing.assert_array_equal(before[text].memory.slots, new.memory.slots)
        stats = reader.stats()
        assert (stats["unused_bytes"], stats["shards"]) == (0, 3)
    check(path, expected)
    with store.Writer(path) as writer:
        assert vars(store.compact(writer)) == vars(upkeep.Compacted())


def test_a_reader_of_what_was_replaced(tmp_path):
    """Breaks when a reader gets another memory than it looked up."""
    path = tmp_path / "s"
    with write(path, [entry("a", [4], 1), entry("b", [4], 2)]) as reader:
        old_a, old_b = reader["a"], reader["b"]
        with store.Writer(path) as writer:
            writer.add_shard([entry("a", [4], 3)])
            writer.remove(["b"])
            store.compact(writer)
        with pytest.raises(UserError, match="'a' has been replaced since it was looked up"):
            _ = old_a.memory
        with pytest.raises(UserError, match="'b' has been removed since it was looked up"):
            _ = old_b.memory


class Killed(BaseException):
    """Ends what runs, as a kill does, as far as one process can see it."""


@contextlib.contextmanager
def killed_at(monkeypatch, call):
    """Ends a process at one of the steps at which a store changes on disk."""
    calls = []

    def counted(original):
        def step(*args, **kwargs):
            calls.append(original)
            if len(calls) == call:
                raise Killed
            return original(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        for owner, name in ((Shards, "write"), (Shards, "remove"), (index, "transaction")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield


def test_compacting_that_is_killed(tmp_path, monkeypatch):
    """Breaks when a shard is removed before the index names another, or a second call does not
    finish what a kill left.
    """
    monkeypatch.setattr(upkeep, "SHARD_ENTRIES", 2)
    for call in range(1, 20):
        path = tmp_path / str(call)
        expected = filled(path)
        try:
            with killed_at(monkeypatch, call), store.Writer(path) as writer:
                store.compact(writer)
            break
        except Killed:
            check(path, expected)
        with store.Writer(path) as writer:
            store.compact(writer)
        check(path, expected)
        assert len(list((path / "shards").iterdir())) == 3
    assert call > 7


def test_compacting_waits_for_other_processes(tmp_path):
    """Breaks when compacting takes a shard for an orphan that another process is about to name."""
    path = tmp_path / "s"
    expected = filled(path)
    with (
        store.Writer(path, INFO, 1, 2),
        store.Writer(path, INFO, 0, 2) as writer,
        pytest.raises(UserError, match="process1 is in use"),
    ):
        store.compact(writer)
    check(path, expected)


def test_damage_stays_where_it_is(tmp_path):
    """Breaks when compacting gives damaged bytes a new checksum, or removes them with the shard
    that a backup could mend.
    """
    path = tmp_path / "s"
    filled(path)
    with store.open_store(path) as s:
        spoiled, shard = s["g0-0"].spans["memory"], s["g0-0"].shard
    with open(path / "shards" / f"{shard}.safetensors", "r+b") as file:
        file.seek(spoiled.offset)
        file.write(b"\xff")
    with store.Writer(path) as writer:
        done = store.compact(writer)
    assert (done.damaged, done.written) == (1, 1)
    with store.open_store(path) as s:
        assert [d.id for d in store.verify(s).damage] == ["g0-0"] and s["g0-0"].shard == shard
        assert s["g1-0"].memory.slots.shape == (1, 4, 8)


@pytest.fixture
def bucket(tmp_path):
    """gs://bucket as a local folder, as an object storage has it: without folders to make."""
    root = tmp_path / "bucket"

    def mapped(original, path, *args, **kwargs):
        local = os.fspath(path).replace("gs://bucket", str(root))
        if args[:1] == ("wb",) or args[:1] == ("w",):
            os.makedirs(os.path.dirname(local), exist_ok=True)
        return original(local, *args, **kwargs)

    names = ("open", "isdir", "listdir", "stat", "exists", "remove", "makedirs")
    with epath.testing.mock_epath(**dict.fromkeys(names, mapped)):
        yield root


def test_shards_in_a_bucket(bucket, tmp_path):
    """Breaks when shards of a bucket are written, read, checked or swept otherwise than local ones,
    or two stores share a place, where compacting one would remove the other's.
    """
    path = tmp_path / "s"
    expected = filled(path, shards="gs://bucket/far/shards")
    assert len(list((bucket / "far" / "shards").glob("*.safetensors"))) == 4
    assert not list((path / "shards").iterdir())
    check(path, expected)
    with store.open_store(path) as s:
        assert s.info.shards == "gs://bucket/far/shards"
        victim = s["g1-0"]
        with store.Writer(path) as writer:
            assert store.compact(writer).removed == 3
        np.testing.assert_array_equal(victim.memory.slots, expected["g1-0"].memory.slots)
    check(path, expected)
    with pytest.raises(UserError, match="far/shards has the shards of another store"):
        store.Writer(tmp_path / "t", INFO, shards="gs://bucket/far/shards")
    write(tmp_path / "t", [entry("a", [4])]).close()
    with pytest.raises(UserError, match=r"keeps its shards in gs://bucket/far/shards; leave --sha"):
        store.Writer(path, INFO, shards="gs://bucket/elsewhere")
    marker = bucket / "far" / "shards" / "icae_store"  # as by a store that was made meanwhile
    own = marker.read_text()
    marker.write_text("another")
    with pytest.raises(UserError, match="far/shards has the shards of another store"):
        store.Writer(path)
    marker.write_text(own)
    with store.open_store(path) as s:
        file = bucket / "far" / "shards" / f"{s['g1-0'].shard}.safetensors"
        os.truncate(file, 8)
        with pytest.raises(
            UserError, match=r"'g1-0' .* gs://bucket/far/.*safetensors is cut short"
        ):
            _ = s["g1-0"].memory
        file.unlink()
        with pytest.raises(UserError, match="is not there"):
            _ = s["g1-0"].memory


def test_shards_in_another_folder(tmp_path):
    """Breaks when shards of another disk are looked for in the store's folder."""
    expected = filled(tmp_path / "s", shards=str(tmp_path / "disk"))
    assert len(list((tmp_path / "disk").glob("*.safetensors"))) == 4
    check(tmp_path / "s", expected)


@pytest.mark.nightly
def test_a_store_survives_kills(tmp_path, monkeypatch):
    """Breaks when a kill at a random moment leaves an index that is damaged or names what is not
    there, loses a group that was reported done, or other bytes than without a kill.
    """
    rng, reported = random.Random(0), set()
    path = tmp_path / "s"
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["store_helpers"])  # importing would take most of the time

    def start(number):
        pipe, other = processes.Pipe(duplex=False)
        process = processes.Process(target=fill, args=(path, number, GROUPS, other))
        process.start()
        other.close()
        return process, pipe

    def reports(pipe):
        with contextlib.suppress(EOFError, OSError):  # the end, also in the middle of a report
            while True:
                yield pipe.recv()

    for attempt in range(12):
        fillers = [start(number) for number in (0, 1)]
        if attempt < 11:
            reported |= {next(reports(pipe)) for _, pipe in fillers}
            time.sleep(rng.uniform(0, 1.5))
            for process, _ in fillers:
                process.kill()
        for process, pipe in fillers:
            reported |= set(reports(pipe))
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
        with store.Writer(path, INFO, 0, 2) as writer, store.open_store(path) as s:
            assert not store.verify(s).damage
            ids = [f"{group}-{i}" for group in reported for i in range(10)]
            assert len(s.get(ids)) == len(ids)
            if attempt % 3 == 2:
                store.compact(writer)
                seen = store.verify(s)
                assert not seen.damage and not seen.orphans
    with store.open_store(path) as s:
        assert len(s) == GROUPS * 10 + 1
        for group in range(GROUPS):
            expected = entry("", [4, 3], group).memory.slots
            np.testing.assert_array_equal(s[f"{group}-7"].memory.slots, expected)
