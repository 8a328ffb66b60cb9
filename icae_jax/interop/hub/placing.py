"""Where a base's parameters go, and how they are put there part by part."""

import gc
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from icae_jax.errors import UserError
from icae_jax.models import llama, schemes

# Of a parameter, such as ("layers", "mlp", "up_proj", "kernel"); a quantised one's arrays have the
# names of `schemes.LEAVES` behind that.
Path = tuple[str, ...]
Ranges = tuple[tuple[int, int], ...]  # (start, stop) along each axis of a parameter
Rule = Callable[[Path, jax.ShapeDtypeStruct], Sharding]


def parameter(path: Path) -> Path:
    """The path of the parameter that an array belongs to."""
    return path[:-1] if path[-1] in schemes.LEAVES else path


def make_targets(
    config: llama.ModelConfig,
    dtype: DTypeLike,
    sharding: Sharding | Rule | None,
    scheme: str = "",
    blocks: Mapping[Path, int] | None = None,
) -> dict[Path, jax.ShapeDtypeStruct]:
    """The shape, dtype and sharding of every array to load.

    Args:
        config: the model.
        dtype: of all that is not quantised.
        sharding: None for the default device, one for all parameters, or a rule for each; asked for
            each array of a quantised parameter by the parameter's path.
        scheme: see `schemes.quantized_shapes`.
        blocks: likewise.

    Raises:
        UserError: a parameter cannot be split by its sharding, or quantised.
    """
    rule = sharding if callable(sharding) else lambda path, shape: sharding
    shapes = schemes.quantized_shapes(llama.param_shapes(config), scheme, dtype, blocks)
    targets = {}
    for keys, shape in jax.tree_util.tree_leaves_with_path(shapes):
        path = tuple(getattr(key, "key", None) or key.name for key in keys)
        placed = rule(parameter(path), shape)
        if placed is not None:
            try:
                placed.shard_shape(shape.shape)
            except ValueError as error:
                raise UserError(
                    f"parameter {'.'.join(path)} {shape.shape} cannot be split by {placed}: {error}"
                ) from error
        targets[path] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=placed)
    return targets


def _shards(target: jax.ShapeDtypeStruct) -> dict[Ranges, list[SingleDeviceSharding | None]]:
    """The distinct shards of a parameter on this process's devices, with the devices of each."""
    if target.sharding is None:
        return {tuple((0, n) for n in target.shape): [None]}
    shards = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        ranges = tuple(axis.indices(n)[:2] for axis, n in zip(index, target.shape, strict=True))
        place = SingleDeviceSharding(device, memory_kind=target.sharding.memory_kind)
        shards.setdefault(ranges, []).append(place)
    return shards


def local_bytes(target: jax.ShapeDtypeStruct) -> int:
    """The bytes of a parameter's distinct shards on this process's devices."""
    sizes = (math.prod(stop - start for start, stop in ranges) for ranges in _shards(target))
    return sum(sizes) * target.dtype.itemsize


def place(target: jax.ShapeDtypeStruct, read: Callable[[Ranges], np.ndarray]) -> jax.Array:
    """Puts a parameter on its devices, one shard at a time; a shared shard is read once.

    Args:
        target: from `make_targets`.
        read: returns the shard of these ranges as a host array.
    """
    arrays = []
    for ranges, devices in _shards(target).items():
        shard = read(ranges)
        arrays += [jax.device_put(shard, device, may_alias=False) for device in devices]
        jax.block_until_ready(arrays)
        del shard
        gc.collect(0)  # JAX frees the host array only now, else while the next one is read
    if target.sharding is None:
        return arrays[0]
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, arrays)
