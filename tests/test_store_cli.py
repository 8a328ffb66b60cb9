"""`icae store`, and memory files out of stores and into them."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from conftest import TINY, write_adapter
from store_helpers import INFO, SLOTS, entry, origin, write

from icae_jax.cli import main as cli
from icae_jax.compression import memory as memories
from icae_jax.errors import UserError
from icae_jax.inference import loading, memory_file, store
from icae_jax.inference.store import exchange

ODD = 'a\n"; DROP TABLE entries; --/../x'


@pytest.fixture
def icae(capsys):
    """Runs `icae store`; returns what it printed, of --json as objects."""

    def run(*argv, code=0):
        assert cli.main(["store", *map(str, argv)]) == code
        out, err = capsys.readouterr()
        lines = out.splitlines()
        printed = [json.loads(line) for line in lines] if "--json" in argv else lines
        return (printed, err) if code else printed

    return run


@pytest.fixture
def path(tmp_path):
    """A store of three entries."""
    path = tmp_path / "s"
    entries = [entry("a", [4], 1, {"lang": "de", "n": 1}), entry(ODD, [8, 3], 2), entry("c", [4])]
    write(path, entries).close()
    return path


def test_listing_and_removing(path, icae, tmp_path):
    """Breaks when a line is not one entry's, an id is more than data, --where cannot tell 1 from a
    text, or removed entries keep their room.
    """
    assert [row["id"] for row in icae("ls", path, "--json")] == ["a", ODD, "c"]
    (line,) = icae("ls", path, "--where", "lang=de", "--where", "n=1")
    assert line.split() == ["4", "2", "64", "a", '{"lang":', '"de",', '"n":', "1}"]
    assert not icae("ls", path, "--where", 'n="1"') and not icae("ls", path, "--where", "lang=en")
    assert len(icae("ls", path)) == 3  # the odd id is quoted
    assert [row["id"] for row in icae("ls", path, "--json", "--after", "a", "--limit", 1)] == [ODD]
    assert [row["id"] for row in icae("ls", path, "--json", "--prefix", "a")] == ["a", ODD]
    (shown,) = icae("show", path, "--json", "--id", ODD)
    assert (shown["lengths"], shown["memory_tokens"], shown["kv"]) == ([8, 3], 4, False)
    assert "lengths        [8, 3]" in icae("show", path, "--id", ODD)
    (stats,) = icae("stats", path, "--json")
    assert (stats["entries"], stats["tokens"], stats["method"]) == (3, 19, "icae")
    assert stats["shards_at"] == str(path / "shards") and stats["base"] == "/base"
    assert icae("rm", path, "--id", ODD, "--json") == [{"removed": 1}]
    (done,) = icae("compact", path, "--unused", 0.4, "--json")
    assert (done["removed"], done["written"]) == (1, 1) and done["freed_bytes"] > 0
    assert icae("verify", path) == [f"{path}: 2 entries in 1 shard read, 0 damaged"]
    for argv, message in (
        (["show", path, "--id", ODD], "has no entry 'a\\n"),
        (["rm", path, "--id", "a", "--id", "x"], "has no entry 'x'"),
        (["rm", path], "give either --id or --damaged"),
        (["ls", path, "--where", "lang"], "give KEY=VALUE"),
        (["ls", path, "--after", "x"], "has no entry 'x'"),
        (["ls", path, "--limit", "-1"], "limit is -1"),
        (["ls", tmp_path / "no"], "is not there; icae compress --store makes one"),
        (["compact", path, "--unused", "1"], "--unused 1.0"),
    ):
        assert message in icae(*argv, code=2)[1]
    assert len(icae("ls", path)) == 2


def test_damage_is_told_and_removed(path, icae):
    """Breaks when verify ends as if all were well, or rm --damaged takes more than the damaged."""
    with store.open_store(path) as s:
        file = path / "shards" / f"{s['c'].shard}.safetensors"
        offset = s["c"].spans["memory"].offset
    with open(file, "r+b") as opened:
        opened.seek(offset)
        opened.write(b"\xff\xff")
    printed, err = icae("verify", path, "--json", code=2)
    assert [row.get("id") for row in printed] == ["c", None] and printed[1]["damaged"] == 1
    assert file.name in printed[0]["problem"] and "1 thing damaged" in err
    assert icae("rm", path, "--damaged", "--json") == [{"removed": 1}]
    assert icae("verify", path, "--json")[0]["entries"] == 2


def test_memory_files_out_and_in(path, icae, tmp_path):
    """Breaks when an entry comes back otherwise than it went, without its content hash or metadata,
    or one of another k or compressor is mixed in.
    """
    one = tmp_path / "one.safetensors"
    icae("export", path, "--id", ODD, "--id", "a", "--to", one)
    memory, ids = memory_file.load(one, origin())
    assert ids == [ODD, "a"] and memory.segment_lengths.tolist() == [[8, 3], [4, 0]]
    with store.Writer(path) as writer:
        slots = np.ones((1, 1, 8), np.float32)
        small = memories.place(memories.Slots, {"slots": slots}, np.asarray([[4]]), SLOTS)
        writer.add_shard([dataclasses.replace(entry("small", [4]), memory=small)])
    with store.open_store(path) as s, pytest.raises(UserError, match=r"'a' \(k 2\), 'small' \(k 1"):
        exchange.export_file(s, s.get(["a", "small"]), one)
    rows = icae("export", path, "--to", tmp_path / "all", "--a_file", 2, "--json")
    names = [pathlib.Path(row["memory"]).name for row in rows]
    assert names == [f"0000{i}.safetensors" for i in range(3)]
    again = tmp_path / "again"
    with store.Writer(again, dataclasses.replace(INFO, dtype="bfloat16")):
        pass
    files = [flag for row in rows for flag in ("--memory", row["memory"])]
    counts = icae("import", again, *files, "--json")
    assert [(c["stored"], c["unchanged"]) for c in counts] == [(2, 0), (1, 0), (1, 0)]
    assert sum(c["unchanged"] for c in icae("import", again, *files, "--json")) == 4
    with store.open_store(path) as old, store.open_store(again) as new:
        assert list(old) == list(new)
        for text in old:
            for name in ("content_hash", "metadata", "lengths", "k"):
                assert getattr(new[text], name) == getattr(old[text], name)
            np.testing.assert_allclose(
                new[text].memory.slots.astype(np.float32), old[text].memory.slots, rtol=2**-8
            )
    memory_file.save(one, memory, [7, "x"], origin(adapter="c"))
    assert "written with adapter cccc" in icae("import", again, "--memory", one, code=2)[1]
    memory_file.save(one, memory, [7, "x"], origin())
    assert icae("import", again, "--memory", one, "--json")[0]["stored"] == 2
    with store.open_store(again) as s:
        assert s["7"].content_hash.startswith("memory ") and s["7"].tokens == 11


def test_a_store_of_a_compressor(tiny_base, tmp_path, icae):
    """Breaks when a store does not know its compressor's sizes, template or identity, is read by
    another one, or stores a prefix that its decoder would not read.
    """
    base = loading.load_base(tiny_base)
    compressor = loading.load(write_adapter(tmp_path / "adapter", base), tiny_base)
    slots = np.random.default_rng(0).standard_normal((2, 4, TINY.hidden_size), np.float32)
    lengths = np.asarray([[16], [9]])
    memory = memories.place(memories.Slots, {"slots": slots}, lengths, compressor.config)
    compressor.save(tmp_path / "m.safetensors", memory, ["x", "y"])
    icae("import", tmp_path / "s", "--memory", tmp_path / "m.safetensors", "--base", tiny_base)
    with store.open_store(tmp_path / "s") as s:
        s.check(compressor)
        assert s.info.base == str(tiny_base) and s.info.adapter == str(tmp_path / "adapter")
        together = store.memory_of(s.get(["y", "x"]), compressor.config)
        for name, value in vars(memory[[1, 0]]).items():
            np.testing.assert_array_equal(getattr(together, name), value)
    with pytest.raises(UserError, match="kv is 'chat', but the adapter's template is 'plain'"):
        store.Info.of(compressor, kv="chat")
    info = store.Info.of(compressor, "float32", "plain")
    head = tuple(compressor.adapter.template.head)
    assert info.head == head and info.kv_sizes == (2, 2, 8)
    prefix = jax.device_get(memory[0].read(compressor.decoder, head))
    with store.Writer(tmp_path / "kv", info) as writer:
        writer.add_shard([store.NewEntry("x", "h", memory[0], prefix)])
    with store.open_store(tmp_path / "kv") as s:
        s.check(compressor)
        for name, value in vars(prefix).items():
            np.testing.assert_array_equal(getattr(s["x"].prefix, name), value)
    other = dataclasses.replace(info, head=(*head, 5))
    with pytest.raises(UserError, match=r"holds K/V behind the head .* of template plain, not K/V"):
        store.Writer(tmp_path / "kv", other)
