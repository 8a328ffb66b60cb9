"""Where arrays live: a mesh of devices with three axes, and rules that map the models' logical axes to them.

    data     batches are split over it, parameters are copies
    fsdp     batches are split over it, and so are parameters, which every layer gathers before it computes
    tensor   heads, the MLP's width and the vocabulary are split over it

| logical axis          | of                                   | mesh axes    |
|-----------------------|--------------------------------------|--------------|
| batch                 | rows of whatever is computed         | data, fsdp   |
| embed, rank           | parameters, where they are stored    | fsdp         |
| heads, kv_heads       | parameters and activations, KV cache | tensor       |
| mlp, vocab            | parameters and activations           | tensor       |

An axis whose length the mesh does not divide stays whole. Norms, the memory table and scalars are copies.
"""

import contextlib
import dataclasses
import functools
import math

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from icae_jax.errors import UserError
from icae_jax.models import axes

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1, for at most one of them: all that the others leave."""

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
    def sizes(self):
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def text(self):
        return ", ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)

    def shape(self, devices):
        """The sizes over so many devices. UserError where their product is another number."""
        known = math.prod(size for size in self.sizes if size > 0)
        if devices % known or (-1 not in self.sizes and known != devices):
            raise UserError(
                f"mesh is {self.text}, which does not make {devices} devices; set one of its axes to -1"
            )
        return tuple(devices // known if size == -1 else size for size in self.sizes)


def parse(text):
    """A `MeshConfig` of a flag such as "fsdp=4,tensor=2": axes left out are 1, but data is what is left where none is -1."""
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not size.lstrip("-").isdigit():
            raise UserError(
                f"--mesh {text}: write AXIS=SIZE,… with the axes {', '.join(AXES)}, such as fsdp=4,tensor=2"
            )
        sizes[axis] = int(size)
    return MeshConfig(**{"data": 1 if -1 in sizes.values() else -1, "fsdp": 1, "tensor": 1} | sizes)


def make_mesh(config=MeshConfig(), devices=None):
    """The mesh over some devices, by default all of every process. Auto axes: the compiler places what the program does not."""
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    # Neighbours on the wires become neighbours in the mesh, the last axis first.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh(config=MeshConfig(data=-1, fsdp=1)):
    """A mesh over this process's devices alone, for work that needs no other process."""
    return make_mesh(config, jax.local_devices())


class Placement:
    """Where the arrays of one model lie on one mesh.

    mesh: as `make_mesh` gives it. model: its `ModelConfig`, whose head counts and widths say what can be split.
    """

    def __init__(self, mesh, model):
        self.mesh = mesh
        counts = {
            "embed": model.hidden_size, "heads": model.num_heads, "kv_heads": model.num_kv_heads, "mlp": model.intermediate_size,
            "vocab": model.vocab_size,
        }  # fmt: skip
        wanted = {
            "embed": "fsdp",
            "rank": "fsdp",
            "heads": "tensor",
            "kv_heads": "tensor",
            "mlp": "tensor",
            "vocab": "tensor",
        }
        self.whole = sorted(
            name for name, count in counts.items() if count % mesh.shape[wanted[name]]
        )
        split = tuple((name, axis) for name, axis in wanted.items() if name not in self.whole)
        self.rules = (("batch", BATCH), *split)

    def notes(self):
        """Lines on what the mesh cannot split."""
        uneven = [
            name
            for name in self.whole
            if self.mesh.shape[dict(embed="fsdp").get(name, "tensor")] > 1
        ]
        return (
            [f"mesh: {', '.join(uneven)} of the base cannot be split evenly and stay whole"]
            if uneven
            else []
        )

    @contextlib.contextmanager
    def active(self):
        """Within it the models' constraints hold, for whatever is traced."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
            yield

    def sharding(self, *names):
        """Of an array with these logical axes (None: not split)."""
        return NamedSharding(self.mesh, nn.logical_to_mesh_axes(names, self.rules))

    def parameter(self, path, shape):
        """Of the parameter at a path, as ("layers", "mlp", "up_proj", "kernel"), also of its optimizer state. shape: has `.shape`."""
        spec = nn.logical_to_mesh_axes(axes.logical_axes(path), self.rules)
        fits = [
            axis and (None if n % self.mesh.shape[axis] else axis)
            for axis, n in zip(spec, shape.shape, strict=False)
        ]  # LoRA's rank
        return NamedSharding(self.mesh, PartitionSpec(*fits))

    def tree(self, tree):
        """The shardings of a tree of parameters, or of a train state."""

        def of(path, x):
            return self.parameter(
                tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey)), x
            )

        return jax.tree_util.tree_map_with_path(of, tree)


# ------------------------------------------------------------------------------------------------------------- batches


def rows_at_once(mesh):
    """How many parts batches are split into: rows come in multiples of it."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch_size(mesh, batch_size, accumulate):
    """UserError where a microbatch does not divide over the devices."""
    parts = rows_at_once(mesh)
    if (batch_size // accumulate) % parts:
        raise UserError(
            f"batch_size / accumulate is {batch_size // accumulate}; it must be a multiple of mesh.data x mesh.fsdp, {parts}"
        )


def batch_sharding(mesh, axis=0):
    """Rows, along `axis`, split over the mesh."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


@functools.lru_cache(maxsize=8)
def local_rows(mesh, batch_size):
    """The row numbers of a global batch that this process's devices hold, rising: only these need be made here."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in parts.values()]))


def put_batch(mesh, batch, rows, batch_size):
    """Global arrays, split by their first axis, of the rows that this process holds. rows: as `local_rows` gives them."""
    sharding = batch_sharding(mesh)

    def put(x):
        def part(index):
            return x[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def split(mesh, x, axis=0):
    """A host array on the devices of a mesh, split along `axis`, whose length must be a multiple of `rows_at_once`."""
    return jax.device_put(x, batch_sharding(mesh, axis))


def put(tree, shardings):
    """Arrays that every process has whole, as global arrays with these shardings."""

    def of(x, where):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(of, tree, shardings)


def on_host(tree):
    """A tree of arrays as numpy arrays. Where parts of them are in other processes, all of these must ask for it together."""
    from jax.experimental import multihost_utils

    def of(x):
        elsewhere = isinstance(x, jax.Array) and not x.is_fully_addressable
        return multihost_utils.process_allgather(x, tiled=True) if elsewhere else np.asarray(x)

    return jax.tree.map(of, tree)
