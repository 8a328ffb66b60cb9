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


def put_batch(mesh, batch):
    """Global arrays, split over `data` by their first axis, of this process's rows."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
