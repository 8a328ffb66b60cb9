"""Weights of a base model: the hub's safetensors files, or an Orbax copy, straight onto the devices; and back."""

import contextlib
import gc
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tqdm
from etils import epath

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub import stored
from icae_jax.interop.hub.stored import INDEX, STORED_DTYPES, WHOLE
from icae_jax.models import llama, lora

MOST_HEADER_BYTES = 100_000_000  # of a safetensors file, which takes no more either
BLOCK_BYTES = (
    2 << 20
)  # of a tensor, read at once: small enough to be transposed within the processor's cache
CHUNK_BYTES = (
    4 << 20
)  # of an Orbax copy: small, so that a device's part of a parameter is read without the rest
ORBAX = "params"  # the folder of an Orbax copy, beside config.json and the tokenizer's files
ORBAX_URL = "params.url"  # in its place: where it is, if not on this machine, so that each host reads its own parts there


def tensor_names(config):
    """Every tensor of the hub's checkpoint with its place in our tree: `name -> (path, layer or None, transposed)`."""
    names = {
        "model.embed_tokens.weight": (("embed",), None, False),
        "model.norm.weight": (("norm", "scale"), None, False),
    }
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = (("lm_head",), None, True)
    for i in range(config.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names[f"model.layers.{i}.{norm}.weight"] = (("layers", norm, "scale"), i, False)
        for p in lora.PROJECTIONS:
            names[f"model.layers.{i}.{lora.module_of(p)}.{p}.weight"] = (
                ("layers", lora.module_of(p), p, "kernel"),
                i,
                True,
            )
        for p in config.biased:
            names[f"model.layers.{i}.{lora.module_of(p)}.{p}.bias"] = (
                ("layers", lora.module_of(p), p, "bias"),
                i,
                False,
            )
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            names[f"model.layers.{i}.self_attn.{norm}.weight"] = (
                ("layers", "self_attn", norm, "scale"),
                i,
                False,
            )
    return names


def hub_shapes(config):
    """`{name: shape}` of every tensor of the hub's checkpoint."""
    ours, shapes = llama.param_shapes(config), {}
    for name, (path, layer, transposed) in tensor_names(config).items():
        shape = _leaf(ours, path).shape[0 if layer is None else 1 :]
        shapes[name] = shape[::-1] if transposed else shape
    return shapes


def has_weights(folder: pathlib.Path) -> bool:
    """Whether all of a base's weights are in the folder, or where its Orbax copy says; not so where only the rest was fetched."""
    if is_orbax(folder):
        return True
    held = stored.weight_map(folder)
    return all((folder / name).exists() for name in (set(held.values()) if held else [WHOLE]))


def read_rows(
    folder: pathlib.Path,
    open_file: Callable[[str], BinaryIO],
    name: str,
    rows: Sequence[int] | None = None,
) -> np.ndarray:
    """Rows `[N, D]` of one tensor of a base's safetensors files, float32; nothing else of it is read.

    rows: by default all, of a vector the one.
    folder: holds the index, if there is one. open_file: opens a file of the base by its name, see `sources.remote_opener`.
    """
    file_name = _remote_file(folder, open_file, name)

    def read():
        with open_file(file_name) as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > MOST_HEADER_BYTES:
                stands_there = files.placeholder(start + file.read(56))
                raise UserError(
                    f"{file_name}: {stands_there or f'not a readable safetensors file (its header would have {length} bytes)'}"
                )
            try:
                about = json.loads(file.read(length))[name]
                dtype, (count, width) = STORED_DTYPES[about["dtype"]], (1, *about["shape"])[-2:]
                start = 8 + length + about["data_offsets"][0]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{file_name}: no tensor {name} of {', '.join(STORED_DTYPES)} in it ({error!r})"
                ) from error
            wanted = range(count) if rows is None else rows
            if max(wanted) >= count:
                raise UserError(
                    f"{file_name}: {name} has {count} rows, config.json implies {max(wanted) + 1} or more"
                )
            out = []
            for row in wanted:
                file.seek(start + row * width * dtype.itemsize)
                out.append(np.frombuffer(file.read(width * dtype.itemsize), dtype))
            return np.stack(out).astype(np.float32)

    return errors.retrying(read, f"reading {file_name}")


def _remote_file(folder, open_file, name):
    """In which file of a base that is elsewhere a tensor is, by the rules of `stored.weight_map`."""
    held = stored.weight_map(folder)
    if held is None:
        return WHOLE
    if WHOLE not in held.values():
        with contextlib.suppress(UserError, FileNotFoundError), open_file(WHOLE) as file:
            if file.read(1):
                return WHOLE
    if name not in held:
        raise UserError(
            f"{pathlib.Path(folder) / INDEX}: weight_map does not have {name}; download the folder again"
        )
    return held[name]


def is_orbax(folder):
    """Whether a folder's weights are an Orbax copy (`save_orbax`) and no safetensors files."""
    folder = pathlib.Path(folder)
    if any((folder / name).exists() for name in (WHOLE, INDEX)):
        return False
    return (folder / ORBAX / "_METADATA").is_file() or (folder / ORBAX_URL).is_file()


# ------------------------------------------------------------------------------------------------------------------- in


def _say_copies(folder, orbax):
    """Says which copies of the weights a folder holds beside that which is read."""
    others = [f"{ORBAX}/"] if not orbax and (folder / ORBAX / "_METADATA").is_file() else []
    others += sorted(path.name for path in folder.glob("pytorch_model*.bin"))[:1]
    if others:
        kind = f"the Orbax copy in {ORBAX}/" if orbax else "safetensors"
        files.say(f"{folder}: {kind} is read, not {' and '.join(others)}")
    if (folder / "adapter_config.json").exists():
        files.say(
            f"{folder}: the LoRA adapter beside the weights is not applied, as it would be by transformers with peft"
        )


def load_params(folder, config, dtype=jnp.float32, sharding=None, progress=False, only=()):
    """Parameters of a base's folder in our tree, layers stacked `[L, …]`, kernels `[in, out]`, in `dtype`.

    The folder holds the hub's safetensors files, or an Orbax copy (`save_orbax`). Beside the parameters themselves, host memory holds
    one device's part of one parameter at a time: what a process's devices do not need is not read, what several need is read once.
    sharding: None for the default device, a `jax.sharding.Sharding` for every parameter, or a function that gives each its own:
        `sharding(path, shape)`, path as ("layers", "mlp", "up_proj", "kernel"), shape a `jax.ShapeDtypeStruct`.
    progress: a bar in bytes on stderr, where it takes over a second. only: paths of the parameters to load, by default all.
    UserError, before any weights are read, lists the tensors that are missing, of another shape than config.json implies, or there though
    config.json does not announce them (`stored.find`).
    """
    folder = pathlib.Path(folder)
    targets = _targets(config, dtype, sharding)
    wanted = {path: target for path, target in targets.items() if not only or path in only}
    load, total = (
        _load_orbax if is_orbax(folder) else _load_safetensors,
        sum(map(_bytes, wanted.values())),
    )
    with tqdm.tqdm(
        total=total, unit="B", unit_scale=True, desc="base weights", delay=1, disable=not progress
    ) as bar:
        params = _nest(load(folder, config, targets, wanted, bar))
    _say_copies(folder, load is _load_orbax)
    return params


def _targets(config, dtype, sharding):
    """`{path: jax.ShapeDtypeStruct}` of the parameters to make; a struct's sharding is None for the default device."""
    rule = sharding if callable(sharding) else lambda path, shape: sharding
    targets = {}
    for keys, shape in jax.tree_util.tree_leaves_with_path(llama.param_shapes(config)):
        path = tuple(key.key for key in keys)
        shape = jax.ShapeDtypeStruct(shape.shape, dtype)
        where = rule(path, shape)
        if where is not None:
            try:
                where.shard_shape(shape.shape)
            except ValueError as error:
                raise UserError(
                    f"parameter {'.'.join(path)} {shape.shape} cannot be split by {where}: {error}"
                ) from error
        targets[path] = jax.ShapeDtypeStruct(shape.shape, dtype, sharding=where)
    return targets


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


def _parts(target):
    """The distinct parts of a parameter on this process's devices: `{((start, stop) of every axis): shardings of one device}`."""
    if target.sharding is None:
        return {tuple((0, n) for n in target.shape): [None]}
    parts = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        ranges = tuple(axis.indices(n)[:2] for axis, n in zip(index, target.shape, strict=True))
        place = jax.sharding.SingleDeviceSharding(device, memory_kind=target.sharding.memory_kind)
        parts.setdefault(ranges, []).append(place)
    return parts


def _bytes(target):
    """Bytes of a parameter's distinct parts on this process's devices."""
    return (
        sum(math.prod(stop - start for start, stop in ranges) for ranges in _parts(target))
        * target.dtype.itemsize
    )


def _place(target, read):
    """The array of a target. read: gives the part `[…]` of the ranges (start, stop) of every axis, on the host."""
    arrays = []
    for ranges, places in _parts(target).items():
        part = read(ranges)
        arrays += [jax.device_put(part, place, may_alias=False) for place in places]
        jax.block_until_ready(arrays)
        del part
        gc.collect(
            0
        )  # at which JAX lets go of it too; else it would live on while the next is read
    return (
        arrays[0]
        if target.sharding is None
        else jax.make_array_from_single_device_arrays(target.shape, target.sharding, arrays)
    )


def _load_safetensors(folder, config, targets, wanted, bar):
    names, params = tensor_names(config), {}
    with contextlib.ExitStack() as stack:
        found = stored.find(folder, config, hub_shapes(config), stack.enter_context)
        tensors = {}
        for name, (path, layer, transposed) in names.items():
            tensors.setdefault(path, {})[layer] = found[name][1], transposed
        for path, target in wanted.items():
            params[path] = _place(
                target, lambda ranges, p=path: _read(tensors[p], targets[p].dtype, ranges, bar)
            )
    return params


def _read(tensors, dtype, ranges, bar):
    """One part of a parameter, in `dtype`. tensors: `{layer or None: (safetensors slice, transposed)}`. ranges: of the parameter's axes."""
    part = np.empty([stop - start for start, stop in ranges], dtype)
    layers = [(None, part)] if None in tensors else zip(range(*ranges[0]), part, strict=True)
    for layer, into in layers:
        tensor, transposed = tensors[layer]
        axes = ranges if layer is None else ranges[1:]
        if transposed:
            into, axes = into.T, axes[::-1]
        (first, last), rest = axes[0], tuple(slice(*axis) for axis in axes[1:])
        rows = max(1, BLOCK_BYTES // max(1, into[:1].nbytes))
        for start in range(first, last, rows):
            stop = min(start + rows, last)
            into[start - first : stop - first] = tensor[(slice(start, stop), *rest)]
        bar.update(into.nbytes)
    return part


# ---------------------------------------------------------------------------------------------------------------- Orbax


def save_orbax(folder, params):
    """Writes an Orbax copy of the parameters: `params/` in a folder. UserError where it is there already."""
    import orbax.checkpoint as ocp  # takes a second, which loading safetensors need not wait

    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    with ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
    ) as checkpointer:
        checkpointer.save(
            pathlib.Path(folder).resolve() / ORBAX, args=ocp.args.PyTreeSave(params, save_args=args)
        )


def _load_orbax(folder, config, targets, wanted, bar):
    import orbax.checkpoint as ocp
    import tensorstore

    url = folder / ORBAX_URL
    source = folder.resolve() / ORBAX
    if url.is_file():
        told = url.read_text(encoding="utf-8").strip()
        if "://" not in told or told.startswith("file:"):
            raise UserError(
                f"{url}: {told!r} is not where a bucket has an Orbax copy; give its URL, such as gs://BUCKET/BASE/{ORBAX}"
            )
        source = epath.Path(told)
    with _reading(source), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        errors.retrying(
            (source / "_METADATA").read_bytes, f"reading {source}"
        )  # of what it cannot read, Orbax does not say why
        metadata = checkpointer.metadata(source).item_metadata
        if metadata is None:
            raise UserError("files are missing")
    shapes = {
        tuple(key.key for key in keys): tuple(x.shape)
        for keys, x in jax.tree_util.tree_leaves_with_path(metadata.tree)
    }
    stored.refuse(
        source,
        {
            "missing": [".".join(path) for path in targets.keys() - shapes.keys()],
            "not in the model of config.json": [
                ".".join(path) for path in shapes.keys() - targets.keys()
            ],
            "of another shape": [
                f"{'.'.join(path)} has shape {shapes[path]}, config.json implies {targets[path].shape}"
                for path in targets.keys() & shapes.keys()
                if shapes[path] != targets[path].shape
            ],
        },
    )
    # By tensorstore, in whose formats Orbax writes: Orbax's own restore holds two parts, and the chunks of 128 threads beside them.
    context = tensorstore.Context(
        {"file_io_concurrency": {"limit": 8}, "cache_pool": {"total_bytes_limit": 0}}
    )
    params = {}
    for path, target in wanted.items():
        where = {"driver": "ocdbt", "base": _store(source), "path": f"{'.'.join(path)}/"}
        spec = {"driver": "zarr", "kvstore": where}
        with _reading(source):
            array = errors.retrying(
                lambda spec=spec: tensorstore.open(spec, read=True, context=context).result(),
                f"reading {source}",
            )
        array = tensorstore.cast(array, target.dtype)
        params[path] = _place(
            target, lambda ranges, array=array: _read_chunks(source, array, ranges, bar)
        )
    return params


def _store(source):
    """tensorstore's specification of a folder, here or in a bucket."""
    scheme, _, rest = str(source).rpartition("://")
    if not scheme:
        return {"driver": "file", "path": f"{source}/"}
    bucket, _, path = rest.partition("/")
    return {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": f"{path}/"}


def _read_chunks(source, array, ranges, bar):
    """One part of a parameter. array: the tensorstore of an Orbax copy."""
    with _reading(source):
        part = errors.retrying(
            lambda: array[tuple(slice(*axis) for axis in ranges)].read().result(),
            f"reading {source}",
        )
    bar.update(part.nbytes)
    return part


@contextlib.contextmanager
def _reading(source):
    """Names the Orbax copy in whatever Orbax and tensorstore raise of a damaged one, which may be a plain Exception."""
    try:
        yield
    except Exception as error:
        if errors.transient(error) or isinstance(error, MemoryError):
            raise
        cause = str(error).strip().splitlines()
        raise UserError(
            f"{source}: not a readable Orbax copy of a base ({cause[0] if cause else error!r}); make it anew"
        ) from error


# ------------------------------------------------------------------------------------------------------------------ out


def save_params(folder, config, params, dtype="bfloat16", max_file_bytes=5e9):
    """Writes the tree's tensors under the hub's names: model.safetensors, or several files and their index where they would exceed
    `max_file_bytes`. Beside the parameters, host memory holds one file's tensors at a time. The folder should hold no other weights.
    """
    folder, dtype, size = pathlib.Path(folder), jnp.dtype(dtype), 0
    contents, total = [[]], 0
    for name, (path, layer, _) in tensor_names(config).items():
        leaf = _leaf(params, path)
        nbytes = math.prod(leaf.shape[0 if layer is None else 1 :]) * dtype.itemsize
        if contents[-1] and size + nbytes > max_file_bytes:
            contents.append([])
            size = 0
        contents[-1].append(name)
        size, total = size + nbytes, total + nbytes
    weight_map = {}
    for i, held in enumerate(contents, 1):
        file = WHOLE if len(contents) == 1 else f"model-{i:05}-of-{len(contents):05}.safetensors"
        weight_map |= dict.fromkeys(held, file)
        safetensors.numpy.save_file(
            _hub_tensors(config, params, held, dtype), folder / file, metadata={"format": "pt"}
        )
    if len(contents) > 1:
        files.write_json(
            folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _hub_tensors(config, params, names, dtype):
    """`{name: array}` on the host, as the hub keeps them."""
    tensors, where = {}, tensor_names(config)
    for name in names:
        path, layer, transposed = where[name]
        leaf = _leaf(params, path)
        value = np.asarray(
            leaf if layer is None else leaf[layer]
        )  # a layer alone: `asarray` of the whole would stay on the host
        tensors[name] = np.ascontiguousarray((value.T if transposed else value).astype(dtype))
    return tensors
