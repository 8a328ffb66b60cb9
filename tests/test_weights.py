"""A base's weights: loading them onto devices, what is refused, and saving them."""

import dataclasses
import errno
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tqdm
from conftest import TINY, eight_devices, random_params, same
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from icae_jax import errors
from icae_jax.interop.hub import orbax_copy, weights
from icae_jax.models.families import tensor_names


@pytest.fixture
def orbax(tmp_path, tiny_params):
    """A folder with an Orbax copy of the tiny base's weights."""
    orbax_copy.save_orbax(tmp_path / "orbax", tiny_params)
    return tmp_path / "orbax"


def test_sharded_weights(folder, tensors, tiny_params):
    """Breaks when only one of several files is read, or the index is ignored."""
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, held in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in held}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(weights.load_params(folder, TINY), tiny_params)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=r"model-00002-of-00002\.safetensors: named in the weight index but not there",
    ):
        weights.load_params(folder, TINY)


@pytest.mark.parametrize(
    "url", ["../other/params", "/elsewhere/params", "file:///elsewhere/params", ""]
)
def test_an_orbax_copy_elsewhere_is_in_a_bucket(tmp_path, url):
    """Breaks when a downloaded base makes other folders of this machine be read."""
    (tmp_path / orbax_copy.ORBAX_URL).write_text(url)
    with pytest.raises(
        errors.UserError, match=r"params\.url: .* is not where a bucket has an Orbax copy"
    ):
        weights.load_params(tmp_path, TINY)


def test_a_network_filesystem_that_comes_back(folder, orbax, tiny_params, monkeypatch):
    """Breaks when one failed read of weights ends a start, or a lasting failure counts as a damaged
    file, which nobody would retry.
    """
    import tensorstore

    monkeypatch.setattr(errors, "FIRST_DELAY", 0)
    left = []

    def failing():
        if left:
            raise left.pop()

    class Array:
        def __init__(self, array):
            self.array = array

        def __getitem__(self, index):
            failing()
            return self.array[index]

    safe_open, cast = weights.safetensors.safe_open, tensorstore.cast
    monkeypatch.setattr(
        weights.safetensors, "safe_open", lambda *args, **kw: failing() or safe_open(*args, **kw)
    )
    monkeypatch.setattr(tensorstore, "cast", lambda *args: Array(cast(*args)))
    stale = safetensors.SafetensorError(
        "Error while deserializing header: I/O error: Stale file handle (os error 116)"
    )
    for source, error in (
        (folder, stale),
        (folder, OSError(errno.EIO, "Input/output error")),
        (orbax, ValueError("UNAVAILABLE: later")),
    ):
        left.append(error)
        same(weights.load_params(source, TINY), tiny_params)
        assert not left
        left += [error] * errors.TRIES
        with pytest.raises(type(error)) as caught:
            weights.load_params(source, TINY)
        assert caught.value is error and not errors.is_users(caught.value) and not left


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_every_dtype_into_every_other(folder, tensors, stored, monkeypatch):
    """Breaks when a value is rounded other than by one conversion, or a block's edge is lost."""
    monkeypatch.setattr(weights, "BLOCK_BYTES", 200)  # a few rows
    safetensors.numpy.save_file(
        {k: v.astype(stored) for k, v in tensors.items()}, folder / "model.safetensors"
    )
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params = weights.load_params(folder, TINY, dtype)
        for name, ((path, layer, transposed, _),) in tensor_names.tensor_names(TINY).items():
            leaf = params
            for key in path:
                leaf = leaf[key]
            want = tensors[name].astype(stored).astype(dtype)
            np.testing.assert_array_equal(
                leaf if layer is None else np.asarray(leaf)[layer], want.T if transposed else want
            )
            assert leaf.dtype == dtype


def test_parameters_own_their_memory(folder, tiny_params):
    """Breaks when an array is a view of the mapped file, or of a buffer that is used again."""
    params = weights.load_params(folder, TINY)
    path = folder / "model.safetensors"
    with open(path, "r+b") as f:
        f.write(bytes(path.stat().st_size))
    same(params, tiny_params)


def test_without_a_sharding_parameters_follow_other_arguments(folder, orbax):
    """Breaks when parameters on the default device are committed to it: a program over several
    devices would refuse them.
    """
    for source in (folder, orbax):
        assert not any(x.committed for x in jax.tree.leaves(weights.load_params(source, TINY)))


def test_only_some_parameters(folder, orbax):
    """Breaks when unwanted parameters are read too, or a fault in them goes unnoticed."""
    for source in (folder, orbax):
        some = weights.load_params(source, TINY, only=(("embed",), ("norm", "scale")))
        assert jax.tree.structure(some) == jax.tree.structure({"embed": 0, "norm": {"scale": 0}})
        np.testing.assert_array_equal(some["embed"], weights.load_params(source, TINY)["embed"])


def test_progress(folder, orbax, capsys, monkeypatch):
    """Breaks when the bar does not reach its end, does not count bytes, or shows unasked or for a
    moment.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(random_params(TINY)))
    bar = tqdm.tqdm
    for source in (folder, orbax):
        for progress in (True, False):
            weights.load_params(source, TINY, progress=progress)
            assert not capsys.readouterr().err
            with monkeypatch.context() as patch:
                patch.setattr(weights.tqdm, "tqdm", lambda **kw: bar(**kw | {"delay": 0}))
                weights.load_params(source, TINY, progress=progress)
            shown = capsys.readouterr().err.strip().split("\r")[-1]
            assert not shown or (
                shown.startswith("base weights: 100%")
                and f"{size / 1000:.1f}k/{size / 1000:.1f}k" in shown
            )
            assert bool(shown) == progress


# ---------------------------------------------------------------------------------- several devices


def loaded_on_eight_devices(folder):
    """`{rule: [equal to the host's, shards lie where the rule says, reads, bytes read]}`, and the
    error of a rule that fails.
    """
    devices = np.asarray(jax.devices())
    mesh, square = Mesh(devices, ("x",)), Mesh(devices.reshape(4, 2), ("a", "b"))

    def split(mesh, *spec):
        """Kernels by the spec's last axes, the rest replicated."""
        return lambda path, shape: NamedSharding(
            mesh, PartitionSpec(*spec) if path[-1] == "kernel" else PartitionSpec()
        )

    rules = {
        "replicated": NamedSharding(mesh, PartitionSpec()),
        "outputs": split(mesh, None, None, "x"),
        "inputs": split(mesh, None, "x", None),
        "both": split(square, None, "b", "a"),
        "layers and inputs": split(square, "b", "a"),
    }
    host, read, result = weights.load_params(folder, TINY), weights._read_shard, {}
    for name, rule in rules.items():
        parts = []
        weights._read_shard = lambda *args, parts=parts: parts.append(read(*args)) or parts[-1]
        params = weights.load_params(folder, TINY, sharding=rule)
        equal = all(
            jax.tree.leaves(
                jax.tree.map(
                    lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), params, host
                )
            )
        )
        kernel, table = params["layers"]["mlp"]["down_proj"]["kernel"], params["embed"]
        want = rule if name == "replicated" else rule(("kernel",), None)
        placed = (
            kernel.sharding == want
            and table.sharding.is_fully_replicated
            and len(table.sharding.device_set) == 8
        )
        result[name] = [equal, placed, len(parts), sum(p.nbytes for p in parts)]
    weights._read_shard = read
    try:
        weights.load_params(folder, TINY, sharding=NamedSharding(mesh, PartitionSpec("x")))
    except ValueError as error:
        result["error"] = str(error)
    return result


def test_eight_devices(folder, orbax):
    """Breaks when a shard is read from the wrong place, lies on the wrong device, or is read again
    for each replica, in either format.
    """
    with eight_devices():
        hub, copy = (loaded_on_eight_devices(f) for f in (folder, orbax))
    params = random_params(TINY)
    size, kernels, others = (
        sum(x.nbytes for x in jax.tree.leaves(params)),
        7,
        5,
    )  # the embedding, the head and three norms
    parts = {"replicated": 1, "outputs": 8, "inputs": 8, "both": 8, "layers and inputs": 8}
    assert (
        hub["error"].startswith("parameter layers.input_layernorm.scale (2, 32) cannot be split by")
        and copy["error"] == hub["error"]
    )
    for name, number in parts.items():
        assert hub[name] == [True, True, kernels * number + others, size], name
        assert copy[name][:2] == [True, True], name


# ---------------------------------------------------------------------------------- what is refused


def test_missing_and_misshapen_tensors_are_named(folder, tensors):
    """Breaks when uninitialised memory stands in for a missing tensor, or only the model finds a
    wrong shape.
    """
    path = folder / "model.safetensors"
    absent = ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
    rest = {k: v for k, v in tensors.items() if k not in absent}
    safetensors.numpy.save_file(rest, path)
    with pytest.raises(
        ValueError, match=r"2 tensors missing: lm_head.weight, model.layers.1.mlp.up_proj.weight$"
    ):
        weights.load_params(folder, TINY)
    wrong = {
        "model.layers.1.self_attn.k_proj.weight": np.zeros((32, 16), np.float32),
        "model.norm.weight": np.zeros(32, np.int32),
    }
    safetensors.numpy.save_file(rest | wrong, path)
    with pytest.raises(ValueError) as error:
        weights.load_params(folder, TINY)
    for part in (
        "2 tensors missing: lm_head.weight",
        "2 tensors not as expected: model.layers.1.self_attn.k_proj.weight has shape (32, 16) "
        "in model.safetensors, ",
        "config.json implies (16, 32)",
        "model.norm.weight is I32 in model.safetensors; only BF16, F16, F32",
    ):
        assert part in str(error.value)
    safetensors.numpy.save_file({"model.norm.weight": tensors["model.norm.weight"]}, path)
    with pytest.raises(ValueError, match=r"20 tensors missing: ([\w.]+, ){5}…$"):
        weights.load_params(folder, TINY)


def test_everything_is_checked_before_anything_is_read(folder, tensors, monkeypatch):
    """Breaks when gigabytes are read before the last file turns out to be wrong."""
    tensors["model.norm.weight"] = np.zeros(16, np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    monkeypatch.setattr(weights, "_read_shard", lambda *args: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(16,\)"):
        weights.load_params(folder, TINY)


def test_unreadable_weights_are_named(folder):
    """Breaks when a truncated download or pickled weights end in a traceback."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        weights.load_params(folder, TINY)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights .* are not read"):
        weights.load_params(folder, TINY)


# -------------------------------------------------------------------------------------------- Orbax


def test_orbax_copy(orbax, tiny_params):
    """Breaks when the copy is not Orbax's, gives other values or dtypes than its source, or is
    overwritten.
    """
    import orbax.checkpoint as ocp

    assert orbax_copy.is_orbax(orbax)
    same(weights.load_params(orbax, TINY), tiny_params)
    with ocp.StandardCheckpointer() as checkpointer:
        same(
            checkpointer.restore(
                orbax / "params", jax.tree.map(ocp.utils.to_shape_dtype_struct, tiny_params)
            ),
            tiny_params,
        )
    rounded = weights.load_params(orbax, TINY, jnp.bfloat16)
    same(rounded, jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), tiny_params))
    assert rounded["embed"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="already exists"):
        orbax_copy.save_orbax(orbax, rounded)


def test_biases_in_both_formats(tmp_path):
    """Breaks when a bias is left out of a copy, or put at another projection."""
    config = dataclasses.replace(TINY, qkv_bias=True, o_bias=True, mlp_bias=True)
    params = random_params(config)
    weights.save_params(tmp_path, config, params, "float32")
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert sum(name.endswith(".bias") for name in stored) == 2 * 7
    np.testing.assert_array_equal(
        stored["model.layers.1.mlp.down_proj.bias"], params["layers"]["mlp"]["down_proj"]["bias"][1]
    )
    same(weights.load_params(tmp_path, config), params)
    (tmp_path / "orbax").mkdir()
    orbax_copy.save_orbax(tmp_path / "orbax", params)
    same(weights.load_params(tmp_path / "orbax", config), params)
    with pytest.raises(
        errors.UserError,
        match=r"params: 7 tensors not in the model of config\.json: layers\.mlp\.down_proj\.bias",
    ):
        weights.load_params(tmp_path / "orbax", TINY)


def test_orbax_copy_is_stored_in_small_chunks(tmp_path, tiny_params, monkeypatch):
    """Breaks when a process must read a whole parameter to get its shard."""
    import orbax.checkpoint as ocp

    monkeypatch.setattr(orbax_copy, "CHUNK_BYTES", 1024)
    orbax_copy.save_orbax(tmp_path, tiny_params)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(tmp_path / "params").item_metadata.tree
    assert all(np.prod(x.storage.chunk_shape) * 4 <= 1024 for x in jax.tree.leaves(tree))
    same(weights.load_params(tmp_path, TINY), tiny_params)


def test_safetensors_come_before_an_orbax_copy(folder, tiny_params):
    """Breaks when a folder with both is read from the copy, which may be older."""
    orbax_copy.save_orbax(folder, jax.tree.map(np.zeros_like, jax.device_get(tiny_params)))
    assert not orbax_copy.is_orbax(folder)
    same(weights.load_params(folder, TINY), tiny_params)


def test_orbax_copy_of_another_model_is_named(tmp_path, tiny_params):
    """Breaks when Orbax pads, truncates or leaves out what does not fit config.json."""
    params = {k: v for k, v in tiny_params.items() if k != "lm_head"}
    orbax_copy.save_orbax(
        tmp_path, params | {"norm": {"scale": jnp.ones(16), "bias": jnp.ones(16)}}
    )
    with pytest.raises(ValueError) as error:
        weights.load_params(tmp_path, TINY)
    for part in (
        "params: 1 tensor missing: lm_head;",
        "1 tensor not in the model of config.json: norm.bias;",
        "1 tensor of another shape: norm.scale has shape (16,), config.json implies (32,)",
    ):
        assert part in str(error.value)


def test_damaged_orbax_copy_is_named(orbax):
    """Breaks when a copy that lost its data gives a traceback, or is filled with zeros."""
    max((orbax / "params").rglob("d/*"), key=lambda path: path.stat().st_size).unlink()
    with pytest.raises(ValueError, match="params: not a readable Orbax copy of a base"):
        weights.load_params(orbax, TINY)


# ---------------------------------------------------------------------------------------------- out


def test_saved_in_several_files(tmp_path, tiny_params, monkeypatch):
    """Breaks when a file exceeds the limit, the index omits a tensor, or several files' tensors are
    held at a time.
    """
    held, save = [], safetensors.numpy.save_file
    monkeypatch.setattr(
        weights.safetensors.numpy,
        "save_file",
        lambda t, *a, **k: held.append(sum(x.nbytes for x in t.values())) or save(t, *a, **k),
    )
    weights.save_params(tmp_path, TINY, tiny_params, "float32", max_file_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    written = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert (
        written == [f"model-{i:05}-of-{len(held):05}.safetensors" for i in range(1, len(held) + 1)]
        and len(held) > 3
    )
    assert max(held) <= 20_000 and sum(held) == index["metadata"]["total_size"] == sum(
        x.nbytes for x in jax.tree.leaves(tiny_params)
    )
    assert index["weight_map"].keys() == tensor_names.tensor_names(TINY).keys()
    same(weights.load_params(tmp_path, TINY), tiny_params)


def test_a_tensor_over_the_limit_has_a_file_of_its_own(tmp_path, tiny_params):
    """Breaks when a limit below the largest tensor makes empty files, or never ends."""
    weights.save_params(tmp_path, TINY, tiny_params, "float32", max_file_bytes=1)
    assert len(list(tmp_path.glob("model-*-of-00021.safetensors"))) == 21
    same(weights.load_params(tmp_path, TINY), tiny_params)
