"""A base's weights, from safetensors files or an Orbax copy onto the devices, and back."""

import contextlib
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tqdm
from jax.sharding import Sharding
from jax.typing import DTypeLike

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub import (
    gguf_folder,
    identity,
    orbax_copy,
    placing,
    quantizing,
    stored,
    stored_scheme,
)
from icae_jax.interop.hub.stored import INDEX, WHOLE
from icae_jax.models import llama
from icae_jax.models.families.tensor_names import hub_shapes, tensor_names
from icae_jax.models.quantize import is_quantized
from icae_jax.models.schemes import make_matrix, parse_scheme
from icae_jax.runtime.sharding import on_host

# Read from a tensor at once: small enough to be transposed within the processor's cache.
BLOCK_BYTES = 2 << 20
Q8_0_BLOCK = 32  # values that share a scale in GGUF's Q8_0


def has_weights(folder: pathlib.Path) -> bool:
    """Whether a folder has all of a base's weights, or the location of their Orbax copy."""
    if orbax_copy.is_orbax(folder) or gguf_folder.source(folder):
        return True
    index = stored.weight_map(folder)
    return all((folder / name).exists() for name in (set(index.values()) if index else [WHOLE]))


class Loaded(NamedTuple):
    """A base's parameters.

    Attributes:
        params: the tree.
        quantize: the scheme that its numbers are in, "" for none; `params` may be dequantised.
        fingerprint: of a quantised base, `identity.fingerprint` of the weights it was made of.
        weights: likewise `identity.weights_fingerprint`; both are "" where `params` tell them.
    """

    params: dict
    quantize: str = ""
    fingerprint: str = ""
    weights: str = ""


def load_params(
    folder: str | pathlib.Path,
    config: llama.ModelConfig,
    dtype: DTypeLike = jnp.float32,
    sharding: Sharding | placing.Rule | None = None,
    progress: bool = False,
    only: Sequence[placing.Path] = (),
    quantize: str | None = "",
) -> dict:
    """The parameters that `load` loads."""
    return load(folder, config, dtype, sharding, progress, only, quantize, False).params


def load(
    folder: str | pathlib.Path,
    config: llama.ModelConfig,
    dtype: DTypeLike = jnp.float32,
    sharding: Sharding | placing.Rule | None = None,
    progress: bool = False,
    only: Sequence[placing.Path] = (),
    quantize: str | None = "",
    identify: bool = True,
) -> Loaded:
    """The parameters of a base's folder in our tree: layers stacked `[L, …]`, kernels `[in, out]`.

    Beside the parameters themselves, host memory holds one device's shard of one parameter at a
    time, and a few MiB of what is quantised. What this process's devices do not need is not read;
    what several need is read once. Only what is to be quantised is read whole, by all processes
    together, for its scales and its identity; they must then all call this.

    Args:
        folder: holds safetensors files or an Orbax copy (`orbax_copy`), or stands for a GGUF file
            (`gguf_folder`).
        config: the model.
        dtype: of the parameters that are not quantised.
        sharding: None for the default device, one for all parameters, or a function of the path,
            such as ("layers", "mlp", "up_proj", "kernel"), and the `jax.ShapeDtypeStruct` of each.
        progress: whether to show a bar on stderr if loading takes over a second.
        only: paths of the parameters to load, by default all.
        quantize: a scheme of `models.schemes`; "" for what the folder holds, None for full
            precision (what is stored quantised is then dequantised).
        identify: whether to tell the identity of a base that is quantised here, for which what
            stays as it is is summed too.

    Raises:
        UserError: tensors are missing, have other shapes than config.json implies, or are there
            though config.json does not announce them; or the folder is quantised otherwise, or
            nf4's blocks do not divide a parameter. Raised before any weights are read.
    """
    folder = pathlib.Path(folder)
    held = stored_scheme.read(folder)
    scheme = _scheme(folder, held, quantize)
    placing.make_targets(config, dtype, sharding, str(scheme))  # refused before files are opened
    is_orbax = orbax_copy.is_orbax(folder)
    with contextlib.ExitStack() as stack:
        if is_orbax:
            files = orbax_copy.OrbaxCopy(folder)
        elif held is None:
            files = _Tensors(folder, config, stack.enter_context)
        else:
            raise UserError(
                f"{folder}: config.json says that the weights are in {held.scheme}, and only Orbax "
                "copies are; convert the base again"
            )
        blocks = {p: n for p, n in files.blocks.items() if scheme.kind == "int8"}
        targets = placing.make_targets(config, dtype, sharding, str(scheme), blocks)
        if is_orbax:
            files.check(targets if held else placing.make_targets(config, dtype, sharding))
        wanted = {
            path: target
            for path, target in targets.items()
            if not only or placing.parameter(path) in only
        }
        bar = stack.enter_context(
            tqdm.tqdm(
                total=sum(map(placing.local_bytes, wanted.values())),
                unit="B",
                unit_scale=True,
                desc="base weights",
                delay=1,
                disable=not progress,
            )
        )
        params, sums = _load(files, wanted, scheme, held is not None, bar.update)
        loaded = Loaded(_nest(params), str(scheme))
        if held is not None:
            loaded = loaded._replace(fingerprint=held.fingerprint, weights=held.weights)
        elif sums and identify and not only:
            own, all_weights = _identity(files, config, params, sums)
            loaded = loaded._replace(fingerprint=own, weights=all_weights)
    _say_unread_copies(folder, is_orbax)
    if held is None or quantize is not None:
        return loaded
    errors.say(f"{folder}: its weights are stored in {scheme}; dequantised to {jnp.dtype(dtype)}")
    plain = placing.make_targets(config, dtype, sharding)
    return loaded._replace(
        params=_nest({path: _dequantised(w, plain[path]) for path, w in params.items()}),
    )


def _dequantised(w, target):
    """A parameter as an array in its place."""
    if not is_quantized(w):
        return w
    dequantize = jax.jit(lambda w: w.dequantize(target.dtype), out_shardings=target.sharding)
    return dequantize(w)


def _scheme(folder, held, quantize):
    """The scheme to load in. UserError if the folder is quantised in another."""
    if held is None:
        return parse_scheme(quantize or "")
    if quantize not in (None, "", held.scheme):
        raise UserError(
            f"{folder}: its weights are stored in {held.scheme}, of which {quantize} cannot be "
            "made; give the base that was quantised"
        )
    return parse_scheme(held.scheme)


def _load(files, wanted, scheme, held, done):
    """({path: parameter}, {path: checksums of what was quantised}).

    Args:
        files: `_Tensors` or `orbax_copy.OrbaxCopy`.
        wanted: where arrays go, by path.
        scheme: of the parameters.
        held: whether the files are in it.
        done: told the bytes of every array that is loaded.
    """
    params, sums, groups = {}, {}, {}
    for path, target in wanted.items():
        groups.setdefault(placing.parameter(path), {})[path] = target
    for path, targets in groups.items():
        axis = scheme.block_axis(path)
        named = {leaf[-1]: target for leaf, target in targets.items()}
        if axis is not None and not held:
            shape = make_matrix(scheme.kind, axis, named).shape
            read_int8 = files.int8_reader(path) if scheme.kind == "int8" else None
            source = quantizing.Source(shape, files.reader(path, jnp.float32), read_int8)
            params[path], sums[path] = quantizing.load(path, named, scheme.kind, axis, source, done)
            continue
        arrays = {}
        for leaf, target in targets.items():
            arrays[leaf[-1]] = placing.place(target, files.reader(leaf, target.dtype))
            done(placing.local_bytes(target))
        params[path] = arrays[path[-1]] if axis is None else make_matrix(scheme.kind, axis, arrays)
    return params, sums


def _identity(files, config, params, sums):
    """(fingerprint, checksums) of the weights that a quantised base was made of.

    Args:
        files: `_Tensors` or `orbax_copy.OrbaxCopy`.
        config: the model.
        params: by path, quantised or not.
        sums: the checksums of what is quantised, by path.
    """
    ids = identity.fingerprint_rows(config)
    if ("embed",) in sums:
        read = files.reader(("embed",), jnp.float32)
        rows = np.concatenate([read(((i, i + 1), (0, config.hidden_size))) for i in ids.tolist()])
    else:
        rows = on_host(params["embed",][ids])
    own = identity.fingerprint_of(config, on_host(params["norm", "scale"]), rows)
    plain = _nest({path: w for path, w in params.items() if path not in sums})
    return own, identity.checksums_fingerprint(
        _nest(_flat(on_host(identity.checksums(plain))) | sums)
    )


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


def _flat(tree):
    """`{path: leaf}` of nested dictionaries; the inverse of `_nest`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))
    return {tuple(key.key for key in keys): leaf for keys, leaf in leaves}


def _leaf(tree, path):
    for key in path:
        tree = tree[key]
    return tree


class _Tensors:
    """The model's tensors in the files of a folder.

    Attributes:
        blocks: by path, the block length of parameters that are stored in int8.
    """

    def __init__(self, folder: pathlib.Path, config: llama.ModelConfig, enter: Callable):
        slices = stored.open_tensors(folder, config, hub_shapes(config), enter)
        self._tensors = {}  # path -> {layer or None: (tensor, transposed, first row)}
        for name, places in tensor_names(config).items():
            for path, layer, *where in places:
                self._tensors.setdefault(path, {})[layer] = slices[name][1], *where
        self.blocks = {
            path: Q8_0_BLOCK
            for path, tensors in self._tensors.items()
            if all(hasattr(tensor, "read_q8_0") for tensor, *_ in tensors.values())
        }

    def reader(
        self, path: placing.Path, dtype: DTypeLike
    ) -> Callable[[placing.Ranges], np.ndarray]:
        """What reads (start, stop) along each axis of a parameter, in a dtype."""
        return lambda ranges: _read_shard(self._tensors[path], dtype, ranges)

    def int8_reader(self, path: placing.Path) -> Callable | None:
        """`quantizing.Source.read_int8` of a parameter."""
        if path not in self.blocks:
            return None
        return lambda ranges: _read_int8(self._tensors[path], ranges)


def _read_shard(tensors, dtype, ranges):
    """One shard of a parameter as a host array.

    Args:
        tensors: `{layer or None: (tensor of the file, transposed, first row)}`.
        dtype: of the result.
        ranges: (start, stop) along each axis of the parameter.
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
    return shard


def _read_int8(tensors, ranges):
    """(codes, scales) of a chunk of one layer, of which blocks are whole; see `_read_shard`."""
    stacked = None not in tensors
    tensor, transposed, first_row = tensors[ranges[0][0] if stacked else None]
    start, stop = ranges[-1 if transposed else -2]
    parts = tensor.read_q8_0(slice(first_row + start, first_row + stop))
    parts = [part.T if transposed else part for part in parts]
    return tuple(part[None] if stacked else part for part in parts)


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
