"""Where arrays live: a mesh of devices, and rules that map the model's logical axes to it.

The mesh has three axes:

    data     splits batches; parameters are replicated
    fsdp     splits batches, and parameters, which every layer gathers before it computes
    tensor   splits heads, the MLP's width and the vocabulary

| logical axis          | arrays                                      | mesh axes    |
|-----------------------|---------------------------------------------|--------------|
| batch                 | rows of every batch                         | data, fsdp   |
| embed, rank           | parameters, where they are stored           | fsdp         |
| heads, kv_heads       | parameters, activations and the KV cache    | tensor       |
| mlp, vocab            | parameters and activations                  | tensor       |

An axis that the mesh does not divide evenly stays whole. Norms, the memory table and scalars are
replicated.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree

from icae_jax.errors import UserError, counted
from icae_jax.models import axes
from icae_jax.models.llama import ModelConfig

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1, for at most one axis, takes the rest of them."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self):
        sizes = self.sizes
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(
                f"mesh is {self.text}; give positive sizes, and -1 for one of them at most"
            )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The axes' sizes, in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def text(self) -> str:
        """The sizes as messages show them."""
        return ", ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)

    def shape(self, devices: int) -> tuple[int, int, int]:
        """The sizes over this many devices. UserError if their product differs from it."""
        known = math.prod(size for size in self.sizes if size > 0)
        if devices % known or (-1 not in self.sizes and known != devices):
            remedy = "give smaller axes" if devices % known else "set one of its axes to -1"
            raise UserError(
                f"mesh is {self.text}, which does not make {counted(devices, 'devices')}; {remedy}"
            )
        return tuple(devices // known if size == -1 else size for size in self.sizes)


def parse(text: str) -> MeshConfig:
    """The `MeshConfig` of a flag such as "fsdp=4,tensor=2".

    Axes that are left out are 1, except that data takes the remaining devices if no axis is -1.
    """
    sizes = {}
    for setting in filter(None, text.split(",")):
        axis, _, size = setting.partition("=")
        if axis not in AXES or axis in sizes or not size.lstrip("-").isdigit():
            raise UserError(
                f"--mesh {text}: write AXIS=SIZE,… with the axes {', '.join(AXES)}, "
                "such as fsdp=4,tensor=2"
            )
        sizes[axis] = int(size)
    return MeshConfig(**{"data": 1 if -1 in sizes.values() else -1, "fsdp": 1, "tensor": 1} | sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over these devices, by default all devices of all processes.

    Its axes are Auto: the compiler places what the program does not.
    """
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    # Devices that are neighbours in hardware are neighbours in the mesh, the last axis first.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh(config: MeshConfig = MeshConfig(data=-1, fsdp=1)) -> Mesh:
    """A mesh over this process's devices only, for work that needs no other process."""
    return make_mesh(config, jax.local_devices())


class Placement:
    """Where the arrays of one model lie on one mesh.

    Args:
        mesh: from `make_mesh`.
        model: its head counts and widths say what can be split.

    Attributes:
        rules: (logical axis, mesh axes) of every axis that is split.
        whole: the logical axes that the mesh does not divide evenly.
    """

    def __init__(self, mesh: Mesh | AbstractMesh, model: ModelConfig):
        self.mesh = mesh
        lengths = {
            "embed": model.hidden_size,
            "heads": model.num_heads,
            "kv_heads": model.num_kv_heads,
            "mlp": model.intermediate_size,
            "vocab": model.vocab_size,
        }
        mesh_axes = {"embed": "fsdp", "rank": "fsdp"}
        mesh_axes |= dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), "tensor")
        self.whole = sorted(
            name for name, length in lengths.items() if length % mesh.shape[mesh_axes[name]]
        )
        split = tuple((name, axis) for name, axis in mesh_axes.items() if name not in self.whole)
        self.rules = (("batch", BATCH), *split)

    def notes(self) -> list[str]:
        """Notes for the user on what the mesh cannot split."""
        if not self.whole:
            return []
        return [f"mesh: {', '.join(self.whole)} of the base cannot be split evenly and stay whole"]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While active, the models' sharding constraints apply to whatever is traced."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
            yield

    def sharding(self, *names: str | None) -> NamedSharding:
        """The sharding of an array with these logical axes (None: not split)."""
        return NamedSharding(self.mesh, nn.logical_to_mesh_axes(names, self.rules))

    def parameter(self, path: tuple[str, ...], param: Any) -> NamedSharding:
        """The sharding of a parameter, or of its optimizer state.

        Args:
            path: such as ("layers", "mlp", "up_proj", "kernel").
            param: an array or a `jax.ShapeDtypeStruct`.
        """
        spec = nn.logical_to_mesh_axes(axes.logical_axes(path), self.rules)
        # The lengths of the rules' axes are the base's; LoRA's rank is only known here.
        fitting = [
            axis and (None if n % self.mesh.shape[axis] else axis)
            for axis, n in zip(spec, param.shape, strict=False)
        ]
        return NamedSharding(self.mesh, PartitionSpec(*fitting))

    def tree(self, tree: PyTree) -> PyTree[NamedSharding]:
        """The shardings of a tree of parameters, or of a train state."""

        def sharding(path, param):
            keys = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
            return self.parameter(keys, param)

        return jax.tree_util.tree_map_with_path(sharding, tree)


# ------------------------------------------------------------------------------------- batches


def rows_at_once(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is split; its rows must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch_size(mesh: Mesh | AbstractMesh, batch_size: int, accumulate: int) -> None:
    """UserError if a microbatch does not divide evenly over the devices."""
    parts = rows_at_once(mesh)
    if (batch_size // accumulate) % parts:
        raise UserError(
            f"batch_size / accumulate is {batch_size // accumulate}; "
            f"it must be a multiple of mesh.data x mesh.fsdp, {parts}"
        )


def batch_sharding(mesh: Mesh | AbstractMesh, axis: int = 0) -> NamedSharding:
    """The sharding that splits rows, along `axis`, over the mesh."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


@functools.lru_cache(maxsize=8)
def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " rows"]:
    """The rows of a global batch that this process's devices hold, ascending.

    A process needs to make no others.
    """
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices.values()]))


def put_batch(
    mesh: Mesh, batch: PyTree, rows: Int[np.ndarray, " rows"], batch_size: int
) -> PyTree[jax.Array]:
    """Global arrays, split by rows, from the rows that this process holds.

    Args:
        mesh: from `make_mesh`.
        batch: arrays whose first axis is `rows`.
        rows: from `local_rows`.
        batch_size: the rows of all processes.
    """
    sharding = batch_sharding(mesh)

    def put(x):
        def shard(index):
            return x[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, shard)

    return jax.tree.map(put, batch)


def split(mesh: Mesh, x: PyTree, axis: int = 0) -> PyTree[jax.Array]:
    """Puts a host array on a mesh, split along `axis`.

    The length of the axis must be a multiple of `rows_at_once`.
    """
    return jax.device_put(x, batch_sharding(mesh, axis))


def put(tree: PyTree, shardings: PyTree) -> PyTree[jax.Array]:
    """Global arrays with these shardings, from arrays that every process has whole."""

    def put_one(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put_one, tree, shardings)


def on_host(tree: PyTree) -> PyTree[np.ndarray]:
    """A tree of arrays as numpy arrays.

    Where parts of them are in other processes, all of these must call it together.
    """
    from jax.experimental import multihost_utils

    def fetch(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(fetch, tree)
