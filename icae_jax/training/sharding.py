"""Where arrays live: a mesh over all devices, batches split over it, everything else on every device."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh():
    """A mesh with one axis, `data`, over all devices. Auto axes: the compiler places what the program does not."""
    devices = np.asarray(jax.devices())
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh):
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(mesh, batch_size, accumulate):
    """ValueError where a microbatch does not divide over the devices."""
    devices = mesh.size
    if (batch_size // accumulate) % devices:
        raise ValueError(f"batch_size / accumulate is {batch_size // accumulate}; it must be a multiple of the {devices} devices")


def local_mesh():
    """A mesh like that of `make_mesh` over this process's devices alone, for work that needs no other process."""
    return Mesh(np.asarray(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))


def split(mesh, x, axis=0):
    """A host array on the devices of a mesh, split over `data` along `axis`, whose length must be a multiple of the devices."""
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*[None] * axis, "data")))


def put_batch(mesh, batch):
    """Global arrays, split over `data` by their first axis, of this process's rows."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
