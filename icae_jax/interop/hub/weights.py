"""A base's weights, from safetensors files or an Orbax copy onto the devices, and back."""

import contextlib
import math
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tqdm
from jax.sharding import Sharding
from jax.typing import DTypeLike

from icae_jax import errors, files
from icae_jax.interop.hub import gguf_folder, orbax_copy, placing, stored
from icae_jax.interop.hub.stored import INDEX, WHOLE
from icae_jax.models import llama
from icae_jax.models.families.tensor_names import hub_shapes, tensor_names

# Read from a tensor at once: small enough to be transposed within the processor's cache.
BLOCK_BYTES = 2 << 20


def has_weights(folder: pathlib.Path) -> bool:
    """Whether a folder has all of a base's weights, or the location of their Orbax copy."""
    if orbax_copy.is_orbax(folder) or gguf_folder.source(folder):
        return True
    index = stored.weight_map(folder)
    return all((folder / name).exists() for name in (set(index.values()) if index else [WHOLE]))


def load_params(
    folder: str | pathlib.Path,
    config: llama.ModelConfig,
    dtype: DTypeLike = jnp.float32,
    sharding: Sharding | placing.Rule | None = None,
    progress: bool = False,
    only: Sequence[placing.Path] = (),
) -> dict:
    """The parameters of a base's folder in our tree: layers stacked `[L, …]`, kernels `[in, out]`.

    Beside the parameters themselves, host memory holds one device's shard of one parameter at a
    time. What this process's devices do not need is not read; what several need is read once.

    Args:
        folder: holds safetensors files or an Orbax copy (`orbax_copy`), or stands for a GGUF file
            (`gguf_folder`).
        config: the model.
        dtype: of the parameters.
        sharding: None for the default device, one for all parameters, or a function of the path,
            such as ("layers", "mlp", "up_proj", "kernel"), and the `jax.ShapeDtypeStruct` of each.
        progress: whether to show a bar on stderr if loading takes over a second.
        only: paths of the parameters to load, by default all.

    Raises:
        UserError: tensors are missing, have other shapes than config.json implies, or are there
            though config.json does not announce them. Raised before any weights are read.
    """
    folder = pathlib.Path(folder)
    targets = placing.make_targets(config, dtype, sharding)
    wanted = {path: target for path, target in targets.items() if not only or path in only}
    total = sum(map(placing.local_bytes, wanted.values()))
    is_orbax = orbax_copy.is_orbax(folder)
    with tqdm.tqdm(
        total=total, unit="B", unit_scale=True, desc="base weights", delay=1, disable=not progress
    ) as bar:
        if is_orbax:
            params = orbax_copy.load_orbax(folder, targets, wanted, bar)
        else:
            params = _load_safetensors(folder, config, wanted, bar)
    _say_unread_copies(folder, is_orbax)
    return _nest(params)


def _say_unread_copies(folder, orbax):
    """Names the copies of the weights beside the one that is read."""
    copy = folder / orbax_copy.ORBAX / "_METADATA"
    others = [f"{orbax_copy.ORBAX}/"] if not orbax and copy.is_file() else []
    others += sorted(path.name for path in folder.glob("pytorch_model*.bin"))[:1]
    if others:
        kind = f"the Orbax copy in {orbax_copy.ORBAX}/" if orbax else "safetensors"
        errors.say(f"{folder}: {kind} is read, not {' and '.join(others)}")
    if (folder / "adapter_config.json").exists():
        errors.say(
            f"{folder}: the LoRA adapter beside the weights is not applied, as it would be by "
            "transformers with peft"
        )


def _nest(flat):
    """The tree of `{path: value}`."""
    tree = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def _leaf(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _load_safetensors(folder, config, wanted, bar):
    params = {}
    with contextlib.ExitStack() as stack:
        slices = stored.open_tensors(folder, config, hub_shapes(config), stack.enter_context)
        tensors = {}  # path -> {layer or None: (safetensors slice, transposed, first row)}
        for name, places in tensor_names(config).items():
            for path, layer, *where in places:
                tensors.setdefault(path, {})[layer] = slices[name][1], *where
        for path, target in wanted.items():
            params[path] = placing.place(
                target,
                lambda ranges, path=path, dtype=target.dtype: _read_shard(
                    tensors[path], dtype, ranges, bar
                ),
            )
    return params


def _read_shard(tensors, dtype, ranges, bar):
    """One shard of a parameter as a host array.

    Args:
        tensors: `{layer or None: (safetensors slice, transposed, first row)}`.
        dtype: of the result.
        ranges: (start, stop) along each axis of the parameter.
        bar: progress in bytes.
    """
    shard = np.empty([stop - start for start, stop in ranges], dtype)
    layers = [(None, shard)] if None in tensors else zip(range(*ranges[0]), shard, strict=True)
    for layer, out in layers:
        tensor, transposed, first_row = tensors[layer]
        axes = ranges if layer is None else ranges[1:]
        if transposed:
            out, axes = out.T, axes[::-1]
        (first, last), rest = axes[0], tuple(slice(*axis) for axis in axes[1:])
        rows = max(1, BLOCK_BYTES // max(1, out[:1].nbytes))
        for start in range(first, last, rows):
            stop = min(start + rows, last)
            stored_rows = slice(first_row + start, first_row + stop)
            out[start - first : stop - first] = tensor[(stored_rows, *rest)]
        bar.update(out.nbytes)
    return shard


# ------------------------------------------------------------------------------------- writing


def save_params(
    folder: str | pathlib.Path,
    config: llama.ModelConfig,
    params: dict,
    dtype: DTypeLike = "bfloat16",
    max_file_bytes: int | float = 5e9,
) -> None:
    """Writes the parameters as the hub's safetensors files.

    Beside the parameters, host memory holds one file's tensors at a time.

    Args:
        folder: should hold no other weights.
        config: the model.
        params: its parameters.
        dtype: of the stored tensors.
        max_file_bytes: a larger model is split over several files, with an index.
    """
    folder, dtype, size = pathlib.Path(folder), jnp.dtype(dtype), 0
    contents, total = [[]], 0
    for name, shape in hub_shapes(config).items():
        nbytes = math.prod(shape) * dtype.itemsize
        if contents[-1] and size + nbytes > max_file_bytes:
            contents.append([])
            size = 0
        contents[-1].append(name)
        size, total = size + nbytes, total + nbytes
    weight_map = {}
    for i, names in enumerate(contents, 1):
        file = WHOLE if len(contents) == 1 else f"model-{i:05}-of-{len(contents):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        safetensors.numpy.save_file(
            _hub_tensors(config, params, names, dtype), folder / file, metadata={"format": "pt"}
        )
    if len(contents) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(folder / INDEX, index)


def _hub_tensors(config, params, names, dtype):
    """`{name: host array}` of the hub's tensors with these names."""
    tensors, places = {}, tensor_names(config)
    for name in names:
        parts = []
        for path, layer, transposed, _ in places[name]:
            leaf = _leaf(params, path)
            # Only this layer: the host copy that `asarray` makes of a whole array stays cached.
            value = np.asarray(leaf if layer is None else leaf[layer])
            parts.append((value.T if transposed else value).astype(dtype))
        tensors[name] = np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))
    return tensors
