"""Memory files: what they refuse."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from icae_jax.compression import memory as memories
from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.inference import memory_file
from icae_jax.inference.memory_file import Origin
from icae_jax.workflows import inspection

CONFIG = CompressionConfig(k=2, rate=4)


def memory():
    slots = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)
    return memories.place(memories.Slots, {"slots": slots}, np.asarray([[8, 3], [5, 0]]), CONFIG)


X500 = CompressionConfig(method="x500", k=2, rate=4)


def kv_memory():
    k, v = np.random.default_rng(0).standard_normal((2, 3, 2, 4, 1, 6)).astype(np.float32)
    return memories.place(memories.KV, {"k": k, "v": v}, np.asarray([[8, 3], [5, 0]]), X500)


def origin(config=CONFIG, base="b", adapter="a", path=""):
    return Origin(config, base * 64, adapter * 64, path)


def save(path, ids=("a", "b")):
    memory_file.save(path, memory(), ids, origin(path=path.parent))
    return path


def test_round_trip_with_metadata(tmp_path):
    path = save(tmp_path / "m.safetensors")
    again, ids = memory_file.load(path, origin())
    assert ids == ["a", "b"]
    np.testing.assert_array_equal(again.slots, memory().slots)
    np.testing.assert_array_equal(again.mask, [[True] * 4, [True, True, False, False]])
    np.testing.assert_array_equal(again.segment_lengths, [[8, 3], [5, 0]])
    metadata = memory_file.read_metadata(path)
    assert (metadata["method"], metadata["layout"], metadata["k"]) == ("icae", "servable", "2")
    assert json.loads(metadata["ids"]) == ids and metadata["adapter"] == str(tmp_path.resolve())


def spoiled(path, about=(), **changed):
    """Writes a memory file with some of its tensors, or of its metadata (about), exchanged."""
    with safetensors.safe_open(save(path), framework="numpy") as f:
        metadata = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    safetensors.numpy.save_file(tensors | changed, path, metadata | dict(about))
    return path


@pytest.mark.parametrize(
    "lengths", [[[8, -3], [5, 0]], [[9, 3], [5, 0]], [[8, 3], [0, 0]], [[8, 3], [0, 5]]]
)
def test_lengths_are_those_of_segments(tmp_path, lengths):
    """Breaks when a memory says of a segment that it holds less than nothing or more than one
    holds, or stands behind an absent one.
    """
    path = spoiled(tmp_path / "m.safetensors", lengths=np.asarray(lengths, np.int32))
    with pytest.raises(
        UserError,
        match=r"lengths are not those of segments of 1 to 8 tokens; compress the texts again",
    ):
        memory_file.load(path, origin())


def test_a_memory_of_whole_numbers_is_none(tmp_path):
    """Breaks when integers in a memory's place are read as embeddings."""
    path = spoiled(tmp_path / "m.safetensors", slots=np.ones((2, 4, 8), np.int32))
    with pytest.raises(UserError, match=r"slots does not hold"):
        memory_file.load(path, origin())


def test_an_id_stands_for_one_memory(tmp_path):
    """Breaks when a memory file holds two memories of one id, so that `ask --id` is ambiguous."""
    for ids, repeated in ((["a", "a"], "'a'"), ([1, "1"], "1")):
        with pytest.raises(ValueError, match=f"two memories have the id {repeated}"):
            save(tmp_path / "m.safetensors", ids=ids)
    assert not (tmp_path / "m.safetensors").exists()


def test_an_id_may_be_a_number_and_must_be_whole(tmp_path):
    """Breaks when numbers, which JSON holds, are no ids, or half a surrogate pair, which a file
    cannot hold, ends in a traceback.
    """
    path = tmp_path / "m.safetensors"
    with pytest.raises(UserError, match=r"^the id .* is not valid text"):
        save(path, ids=["a", "\ud83d"])
    assert not path.exists()
    save(path, ids=[1, 2])
    assert memory_file.load(path, origin())[1] == [1, 2]


@pytest.mark.parametrize("ids", [[{"a": 1}, "b"], [["a"], "b"], [None, "b"], [True, "b"]])
def test_an_id_is_a_text_or_a_number(tmp_path, ids):
    """Breaks when a memory's ids are of another kind, on which `ask --id` ends in a traceback; or
    such ones are saved.
    """
    with pytest.raises(UserError, match=r"the id .* is neither a text nor a number"):
        save(tmp_path / "m.safetensors", ids=ids)
    with pytest.raises(
        UserError,
        match=r"ids in its metadata are .*, which is not a list of texts or numbers; compress",
    ):
        memory_file.load(spoiled(tmp_path / "m.safetensors", {"ids": json.dumps(ids)}), origin())


def test_types_that_numpy_has_not(tmp_path):
    """Breaks when tensors in eight bits, which safetensors holds and numpy has not, end in a
    traceback.
    """
    path = spoiled(
        tmp_path / "m.safetensors", slots=np.ones((2, 4, 8)).astype(ml_dtypes.float8_e4m3fn)
    )
    with pytest.raises(
        UserError,
        match=r"m\.safetensors: it holds tensors of a type that is not read \(.*float8_e4m3fn",
    ):
        memory_file.load(path, origin())


def test_key_value_memories(tmp_path):
    """Breaks when K/V are stored under other names, or read back as slots, or an adapter of the
    other method or layout reads them.
    """
    path = tmp_path / "m.safetensors"
    memory_file.save(path, kv_memory(), ["a", "b"], origin(X500, path=tmp_path))
    again, ids = memory_file.load(path, origin(X500))
    assert ids == ["a", "b"] and type(again) is memories.KV
    for name, value in vars(kv_memory()).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    with safetensors.safe_open(path, framework="numpy") as f:
        assert set(f.keys()) == {"k", "v", "lengths"} and (
            f.metadata()["method"],
            f.metadata()["k"],
        ) == ("x500", "2")
    with pytest.raises(ValueError, match="has method x500, the adapter icae"):
        memory_file.load(path, origin())
    with pytest.raises(ValueError, match="has layout clean, the adapter uniform"):
        memory_file.load(path, origin(CompressionConfig("x500", k=2, rate=4, layout="uniform")))
    with safetensors.safe_open(path, framework="numpy") as f:
        metadata = f.metadata()
    safetensors.numpy.save_file({"k": np.zeros((1, 2, 4, 1, 2))}, path, metadata)
    with pytest.raises(ValueError, match="tensors v, lengths missing"):
        memory_file.load(path, origin(X500))


def test_another_base_or_adapter_is_refused_and_named(tmp_path):
    path = save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="base bbbbbbbbbbbb, but cccccccccccc"):
        memory_file.load(path, origin(base="c"))
    with pytest.raises(ValueError, match="adapter aaaaaaaaaaaa, but cccccccccccc"):
        memory_file.load(path, origin(adapter="c"))


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        memory_file.read_metadata(tmp_path / "absent")
    (tmp_path / "broken").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a readable memory file"):
        memory_file.read_metadata(tmp_path / "broken")
    safetensors.numpy.save_file({"x": np.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="format_version"):
        memory_file.read_metadata(tmp_path / "other")
    with pytest.raises(ValueError, match="1 ids for 2"):
        save(tmp_path / "m", ids=["a"])
    with pytest.raises(ValueError, match="is a folder"):
        memory_file.check_output(tmp_path)
    with pytest.raises(ValueError, match="absent or cannot be written"):
        memory_file.check_output(tmp_path / "absent" / "m")


def rewrite(path, metadata=(), **tensors):
    """Writes a memory file with other metadata (None: without it) and other tensors."""
    with safetensors.safe_open(path, framework="numpy") as f:
        told = f.metadata() | dict(metadata)
    tensors = safetensors.numpy.load_file(path) | tensors
    safetensors.numpy.save_file(
        tensors, path, {name: value for name, value in told.items() if value is not None}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"ids": '["a'}}, "ids in its metadata are .* not a list of texts or numbers"),
        (
            {"metadata": {"ids": "3"}},
            "ids in its metadata are '3', which is not a list of texts or numbers",
        ),
        ({"metadata": {"ids": None, "adapter": None}}, "adapter, ids missing in its metadata"),
        ({"metadata": {"k": "two"}}, "k is 'two' in its metadata"),
        ({"metadata": {"ids": '["a"]'}}, "lengths does not hold 1 texts"),
        (
            {"metadata": {"k": "4"}},
            r"slots does not hold 2 texts of segments of k 4 \(slots \[2, 4, 8\], lengths",
        ),
        ({"lengths": np.ones((3, 2), np.int32)}, "lengths does not hold 2 texts"),
        ({"lengths": np.ones(2, np.int32)}, "lengths does not hold 2 texts"),
        ({"lengths": np.ones((2, 0), np.int32)}, "lengths does not hold 2 texts"),
        ({"lengths": np.ones((2, 2), np.float32)}, "lengths does not hold 2 texts"),
        ({"slots": np.ones((2, 4), np.float32)}, "slots does not hold 2 texts"),
        ({"slots": np.ones((1, 4, 8), np.float32)}, "slots does not hold 2 texts"),
    ],
)
def test_damaged_files_are_named(changes, message, tmp_path):
    """Breaks when a damaged memory file ends in a traceback, or is read as far as it goes."""
    path = save(tmp_path / "m.safetensors")
    rewrite(path, **changes)
    with pytest.raises(UserError, match=f"^--memory {path}: {message}"):
        memory_file.load(path, origin())


def test_keys_and_values_are_of_one_shape(tmp_path):
    """Breaks when a file of which half was replaced is read."""
    path = tmp_path / "m.safetensors"
    memory_file.save(path, kv_memory(), ["a", "b"], origin(X500, path=tmp_path))
    rewrite(path, v=np.ones((3, 2, 4, 1, 5), np.float32))
    with pytest.raises(UserError, match="v does not hold 2 texts"):
        memory_file.load(path, origin(X500))


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    """Breaks when a full disk destroys the memories that were there."""
    path = save(tmp_path / "m.safetensors")
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    "fields", [{"encoder_mask": "slots"}, {"encoder_layers": 1}], ids=lambda f: next(iter(f))
)
def test_a_memory_says_how_the_encoder_read(tmp_path, fields):
    """Breaks when an adapter that differs in mask or layers alone, which its tensors do not show,
    reads another's memory; or earlier files, which say neither, can no longer be read.
    """
    other = dataclasses.replace(CONFIG, **fields)
    path = save(tmp_path / "m.safetensors")
    ((name, value),) = fields.items()
    with pytest.raises(UserError, match=rf"has {name} (causal|0), the adapter {value}; give the"):
        memory_file.load(path, origin(other))
    memory_file.save(path, memory(), ["a", "b"], origin(other, path=tmp_path))
    assert memory_file.load(path, origin(other))[1] == ["a", "b"]
    assert inspection.describe(path)[name] == str(value)
    with safetensors.safe_open(path, framework="numpy") as f:
        metadata = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    del metadata[name]
    safetensors.numpy.save_file(tensors, path, metadata)
    assert memory_file.load(path, origin())[1] == ["a", "b"]
    with pytest.raises(UserError, match=f"the adapter {value}"):
        memory_file.load(path, origin(other))
