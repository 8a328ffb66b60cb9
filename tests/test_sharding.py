"""Several devices: arrays are really split, and losses and gradients equal one device's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    FRAMING,
    TINY,
    close,
    eight_devices,
    random_lora,
    random_params,
    random_trained_of,
)
from jax.sharding import AbstractMesh

from icae_jax.compression import encoder
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.segments import Contexts, segment_contexts
from icae_jax.data.drawing import StaticInt, StaticInts
from icae_jax.models import llama, lora
from icae_jax.models.llama import FrozenModel
from icae_jax.objectives import loss, targets
from icae_jax.objectives.packing import pack
from icae_jax.runtime import sharding
from icae_jax.training import step
from icae_jax.training.compressor_task import ks_of
from icae_jax.training.config import OptimizerConfig
from icae_jax.training.optimizer import make_optimizer


class Autoencoding:
    """The smallest compressor with the interface of a task."""

    weights = {"ae": 1.0}  # noqa: RUF012

    def __init__(self, method, remat):
        self.model = llama.Llama(TINY, lora_scale=0.5, remat=remat)
        self.compression = CompressionConfig(
            method=method, k=3, rate=8 / 3, k_choices=(2, 3), encoder_mask=MASKS.get(method, "")
        )

    def counts(self, batch):
        return {"ae": jnp.sum(batch["targets"]["label_mask"]).astype(jnp.float32)}

    def tokens(self, batch):
        return self.counts(batch)["ae"]

    def losses(self, trained, frozen, batch, key):
        c, ks = self.compression, ks_of(batch)
        memories = encoder.compress_several(
            FrozenModel(self.model, frozen),
            trained,
            Contexts(batch["context"], batch["lengths"], max(ks)),
            ks,
            c,
        )
        decoder, total = Decoder.of(FrozenModel(self.model, frozen), trained), 0.0
        for memory in memories:
            losses = loss.label_losses(
                decoder, memory, {"ae": batch["targets"]}, {"ae": ()}, c.position_layout, 5
            )
            (of_k, count) = loss.objective_sums(losses, {"ae": batch["targets"]})["ae"]
            total += of_k
        return {"ae": (total, count)}


def spec(x):
    """The mesh axes that each dimension is split over, as text."""
    return [
        "+".join([axes] if isinstance(axes, str) else axes or ())
        for axes in (*x.sharding.spec, *[None] * x.ndim)[: x.ndim]
    ]


def train(method, mesh_config, remat):
    """One accumulated step with a drawn k, or with both where one pass serves them: its results,
    and how batch, parameters, optimizer state and K/V lie on the mesh.
    """
    task, mesh = Autoencoding(method, remat), sharding.make_mesh(mesh_config)
    placement = sharding.Placement(mesh, TINY)
    rng = np.random.default_rng(0)
    texts = [
        rng.integers(3, 64, n).tolist() for n in (5, 8, 3, 4, 7, 6, 2, 8, 8, 1, 3, 5, 6, 6, 7, 2)
    ]
    ids, lengths = segment_contexts(texts, task.compression)
    packed = pack([[targets.ae_target(t, FRAMING)] for t in texts], 1, 9, 9)
    several = task.compression.spec.write_several is not None
    k = StaticInts((2, 3)) if several else StaticInt(2)
    batch = {"context": ids, "lengths": lengths, "targets": packed, "k": k}
    optimizer, _ = make_optimizer(OptimizerConfig(warmup_steps=0), 1)
    tree = random_trained_of(task.compression)
    params, state = random_params(TINY), step.init_state(tree, optimizer)
    shardings = placement.tree(state)
    with placement.active():
        batch = sharding.put_batch(mesh, batch, sharding.local_rows(mesh, len(texts)), len(texts))
        params, state = sharding.put(params, placement.tree(params)), sharding.put(state, shardings)
        state, metrics = step.make_train_step(task, optimizer, 0, 2, shardings)(
            state, params, batch
        )
        kv = keys(task.model, params, batch["context"]) if mesh_config == KV else None
    leaves = {
        jax.tree_util.keystr(p): x
        for p, x in jax.tree_util.tree_leaves_with_path({"base": params, "state": state})
    }
    return {
        "loss": float(metrics["sums"]["ae"]),
        "grad_norm": float(metrics["grad_norm"]),
        "trained": {
            name: np.asarray(x).ravel().tolist() for name, x in leaves.items() if "trained" in name
        },
        "gradient": {
            name: np.asarray(x).ravel().tolist() for name, x in leaves.items() if ".mu" in name
        },
        "split": {
            name: [list(x.shape), list(x.addressable_shards[0].data.shape), spec(x)]
            for name, x in leaves.items()
        },
        "batch": [
            sorted(s.index[0].start or 0 for s in x.addressable_shards)
            for x in (batch["context"], batch["targets"]["ids"])
        ],
        "kv": None if kv is None else [list(kv.shape), list(kv.addressable_shards[0].data.shape)],
    }


@functools.partial(jax.jit, static_argnums=0)
def keys(model, params, context_BSN):
    """The keys `[L, B, T, K, H]` that a first segment leaves."""
    T = context_BSN.shape[2]
    return model.apply(
        {"params": params},
        context_BSN[:, 0],
        jnp.arange(T)[None],
        llama.causal_mask(T),
        return_kv=True,
    )[1][0]


MASKS = {"icae": "slots"}  # other methods have their own

# One axis, and all of them. Remat policies: one device uses none, test_distributed's eight dots.
CASES = [("icae", (1, 8, 1), "full"), ("x500", (2, 2, 2), "frozen")]
KV = sharding.MeshConfig(2, 2, 2)


@pytest.fixture(scope="module")
def runs():
    """`{case: result}` on eight devices, and `{method: result}` on one, without remat."""
    alone = {method: train(method, sharding.MeshConfig(), "none") for method in ("icae", "x500")}
    with eight_devices():
        return {
            case: train(case[0], sharding.MeshConfig(*case[1]), case[2]) for case in CASES
        }, alone


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["pooled", "sac"])
def test_methods_without_memory_tokens_on_eight_devices(method):
    """Breaks when groups, anchors or the projection are of another device's rows, or the projection
    is used in part or stored whole everywhere.
    """
    want = train(method, sharding.MeshConfig(), "none")
    with eight_devices():
        got = train(method, KV, "none")
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert got["gradient"].keys() == want["gradient"].keys()
    for name, value in want["gradient"].items():
        close(got["gradient"][name], value)
    if method == "pooled":
        name = "['state']['trained']['projection']"
        assert got["split"][name] == [[32, 32], [16, 32], ["fsdp", ""]]


def test_biases_on_eight_devices():
    """Breaks when a bias is added per shard or once for every term of a sum over devices, also
    beside LoRA.
    """
    config = dataclasses.replace(TINY, qkv_bias=True, o_bias=True, mlp_bias=True)
    params, adapter = random_params(config), random_lora(config, targets=lora.PROJECTIONS)
    ids = np.random.default_rng(0).integers(0, 64, (4, 8))

    def hidden(params, adapter):
        variables = {"params": params, "lora": adapter}
        return llama.Llama(config).apply(
            variables, ids, jnp.arange(8)[None], np.ones((1, 8), bool)
        )[0]

    want = jax.jit(hidden)(params, adapter)
    without = jax.tree_util.tree_map_with_path(lambda path, x: x * (path[-1].key != "bias"), params)
    assert np.abs(np.asarray(jax.jit(hidden)(without, adapter) - want)).max() > 0.1
    with eight_devices():
        placement = sharding.Placement(sharding.make_mesh(KV), config)
        with placement.active():
            split = sharding.put(params, placement.tree(params))
            got = jax.jit(hidden)(split, sharding.put(adapter, placement.tree(adapter)))
        layers = split["layers"]
        assert (
            spec(layers["self_attn"]["q_proj"]["bias"])
            == spec(layers["mlp"]["up_proj"]["bias"])
            == ["", "tensor"]
        )
        assert (
            spec(layers["self_attn"]["o_proj"]["bias"])
            == spec(layers["mlp"]["down_proj"]["bias"])
            == ["", "fsdp"]
        )
        close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_eight_devices_equal_one(case, runs):
    """Breaks when a device sees others' rows, sums miss a device, a split weight is used in part,
    or a remat policy changes a value.
    """
    assert {remat for *_, remat in CASES} | {"none", "dots"} == set(llama.REMAT_POLICIES)
    assert runs[1]["icae"]["loss"] != runs[1]["x500"]["loss"]
    got, want = runs[0][case], runs[1][case[0]]
    for name in ("loss", "grad_norm"):
        assert got[name] == pytest.approx(want[name], rel=1e-5)
    for tree in ("trained", "gradient"):
        assert got[tree].keys() == want[tree].keys() and len(want[tree]) == 5
        for name, value in want[tree].items():
            close(got[tree][name], value)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_arrays_are_split_as_the_rules_say(case, runs):
    """Breaks when something that the mesh can split is replicated: base, optimizer state, batches
    or K/V.
    """
    (data, fsdp, tensor), got = case[1], runs[0][case]
    parts = dict(data=data, fsdp=fsdp, tensor=tensor)
    for name, (shape, shard, axes) in got["split"].items():
        split = [
            np.prod([parts[axis] for axis in axis.split("+") if axis], dtype=int) for axis in axes
        ]
        assert [n // by for n, by in zip(shape, split, strict=True)] == shard, name
    in_base = {
        name: axes
        for name, (*_, axes) in got["split"].items()
        if name.startswith("['base']") and "kernel" in name
    }
    assert len(in_base) == 7 and all(
        sorted(axes) == ["", "fsdp", "tensor"] for axes in in_base.values()
    )
    shards = {name: shard for name, (_, shard, _) in got["split"].items()}
    assert shards["['base']['layers']['self_attn']['q_proj']['kernel']"] == [
        2,
        32 // fsdp,
        32 // tensor,
    ]
    assert shards["['base']['layers']['self_attn']['o_proj']['kernel']"] == [
        2,
        32 // tensor,
        32 // fsdp,
    ]
    assert shards["['base']['layers']['mlp']['up_proj']['kernel']"] == [2, 32 // fsdp, 48 // tensor]
    assert shards["['base']['layers']['mlp']['down_proj']['kernel']"] == [
        2,
        48 // tensor,
        32 // fsdp,
    ]
    assert shards["['base']['embed']"] == [64 // tensor, 32 // fsdp]
    first_moments = {
        name[-5:]: shard for name, shard in shards.items() if ".mu" in name and "q_proj" in name
    }
    rank = 4 if 4 % fsdp else 4 // fsdp  # four does not divide over eight
    assert first_moments == {"['a']": [2, 32 // fsdp, 4], "['b']": [2, rank, 32 // tensor]}
    rows = data * fsdp
    assert got["batch"] == [sorted(tensor * list(range(0, 16, 16 // rows)))] * 2
    assert got["kv"] == (
        [[2, 16, 8, 2, 8], [2, 16 // rows, 8, 2 // tensor, 8]] if KV.sizes == case[1] else None
    )


def test_what_the_mesh_cannot_divide_stays_whole_and_is_named():
    """Breaks when a mesh that does not fit the base's sizes is a compiler error, or silently
    replicates.
    """
    mesh = AbstractMesh((1, 5, 4), sharding.AXES)
    placement = sharding.Placement(mesh, TINY)
    assert placement.whole == ["embed", "kv_heads"]
    assert placement.notes() == [
        "mesh: embed, kv_heads of the base cannot be split evenly and stay whole"
    ]
    kernel = jax.ShapeDtypeStruct((2, 32, 32), jnp.float32)
    path = ("layers", "self_attn", "q_proj", "kernel")
    assert placement.parameter(path, kernel).spec == jax.sharding.PartitionSpec(
        None, None, "tensor"
    )
    assert sharding.Placement(AbstractMesh((8, 1, 1), sharding.AXES), TINY).notes() == []


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("fsdp=4,tensor=2", (-1, 4, 2)),
        ("tensor=2", (-1, 1, 2)),
        ("data=1,fsdp=-1", (1, -1, 1)),
        ("", (-1, 1, 1)),
        ("data=2", (2, 1, 1)),
    ],
)
def test_meshes_as_flags(text, sizes):
    """Breaks when a flag sets other axes than it names, or devices are left over."""
    assert sharding.parse(text).sizes == sizes


@pytest.mark.parametrize(
    "text", ["fsdp", "fsdp=", "fsdp=x", "heads=2", "fsdp=2,fsdp=2", "fsdp=2;tensor=2"]
)
def test_bad_flags_name_the_axes(text):
    with pytest.raises(
        ValueError, match=f"--mesh {text}: write AXIS=SIZE,… with the axes data, fsdp, tensor"
    ):
        sharding.parse(text)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (-1, -1, 1)])
def test_bad_sizes_are_named(sizes):
    with pytest.raises(
        ValueError,
        match=f"mesh is data {sizes[0]}, fsdp {sizes[1]}, tensor {sizes[2]}; give positive sizes",
    ):
        sharding.MeshConfig(*sizes)


def test_meshes_take_all_devices_or_say_so():
    """Breaks when devices idle, or only JAX notices that a mesh does not fit them."""
    assert sharding.MeshConfig(2, -1, 2).shape(8) == (2, 2, 2) and sharding.MeshConfig(
        1, 8, 1
    ).shape(8) == (1, 8, 1)
    for sizes, remedy in (
        ((1, 4, 1), "set one of its axes to -1"),
        ((1, -1, 3), "give smaller axes"),
        ((2, 8, 1), "give smaller axes"),
    ):
        message = rf"mesh is .*, which does not make 8 devices; {remedy}"
        with pytest.raises(ValueError, match=message):
            sharding.MeshConfig(*sizes).shape(8)


def test_microbatches_must_divide_over_the_devices():
    """Breaks when a batch that cannot be split is only found by a sharding error."""
    mesh = AbstractMesh((2, 4, 2), sharding.AXES)
    sharding.check_batch_size(mesh, 16, 2)
    with pytest.raises(
        ValueError,
        match=r"batch_size / accumulate is 4; it must be a multiple of mesh.data x mesh.fsdp, 8",
    ):
        sharding.check_batch_size(mesh, 8, 2)


def test_host_arrays_are_split_along_any_axis():
    """Breaks when the wrong axis is split, or a local mesh takes in other processes' devices."""
    mesh = sharding.local_mesh()
    assert mesh.devices.ravel().tolist() == jax.local_devices() and mesh.axis_names == (
        "data",
        "fsdp",
        "tensor",
    )
    x = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    for axis in range(3):
        y = sharding.split(mesh, np.swapaxes(x, 1, axis), axis)
        assert y.sharding.spec == jax.sharding.PartitionSpec(*[None] * axis, ("data", "fsdp"))
        np.testing.assert_array_equal(y, np.swapaxes(x, 1, axis))


def test_rows_are_put_where_they_belong():
    """Breaks when rows that one process makes reach a batch in another order, or come back from the
    devices changed.
    """
    mesh = sharding.make_mesh()
    rows = sharding.local_rows(mesh, 8)
    assert rows.tolist() == list(range(8))
    x = np.arange(16).reshape(8, 2)
    batch = sharding.put_batch(mesh, {"x": x, "k": StaticInt(2)}, rows, 8)
    assert batch["k"] == 2 and isinstance(batch["k"], StaticInt)
    np.testing.assert_array_equal(sharding.on_host(batch)["x"], x)
