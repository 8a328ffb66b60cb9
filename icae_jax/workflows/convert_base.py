"""Converts a base model into a new folder: the hub's format or an Orbax copy, in any dtype."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator

import jax

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import gguf_folder, locations, orbax_copy, stored_scheme, weights
from icae_jax.interop.hub.stored_scheme import StoredScheme
from icae_jax.models.families import multimodal, tensor_names
from icae_jax.models.families.config_fields import QUANTIZATION
from icae_jax.models.families.config_json import parse_config, stored_dtype
from icae_jax.models.schemes import SCHEMES

DTYPES = ("bfloat16", "float32", "float16")
FORMATS = ("hub", "orbax")
WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
}
MOST_BYTES = 256 << 20  # larger files are weights by another name


@dataclasses.dataclass(frozen=True)
class ConvertedBase:
    """What was written: `tensors` arrays of `dtype`, `bytes` in all."""

    path: str
    format: str
    tensors: int
    dtype: str
    bytes: int
    fingerprint: str

    def __str__(self):
        return (
            f"{self.path}: {self.format} format, {self.tensors} tensors in {self.dtype}, "
            f"{self.bytes:,} bytes, fingerprint {self.fingerprint[:12]}"
        )


def files_to_carry(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """The files that a copy of the base needs beside config.json and weights.

    These are generation_config.json, the tokenizer's files, a licence. Code is never carried.
    """
    for path in sorted(pathlib.Path(folder).iterdir()):
        left_out = (
            path.name in ("config.json", orbax_copy.ORBAX_URL, gguf_folder.NOTE)
            or path.name.endswith(".index.json")
            or path.name.startswith((".", "README"))
            or path.suffix in WEIGHT_SUFFIXES
            or path.suffix == ".py"
        )
        if not left_out and path.is_file() and path.stat().st_size <= MOST_BYTES:
            yield path


def convert(
    source: str | os.PathLike,
    to: str | os.PathLike,
    form: str | None = None,
    dtype: str | None = None,
    progress: bool = False,
) -> ConvertedBase:
    """Writes a base into a new folder.

    config.json keeps everything but its dtype, so transformers loads the same model. The weights
    pass through our own parameter tree, which checks them.

    Args:
        source: see `locations.local_folder`.
        to: the folder.
        form: "hub" (safetensors) or "orbax" (`params/`); by default the first, or the second where
            the weights are quantised.
        dtype: one of DTYPES or a scheme of `models.schemes`; by default the source's own.
        progress: whether to show a bar.

    Raises:
        UserError: before anything is written, if `to` holds something, the source does not load,
            or quantised weights are to be in the hub's format.
    """
    to = pathlib.Path(to)
    files.check_new_folder(to, "--to")
    if form == "hub" and dtype in SCHEMES:
        raise UserError(
            f"--format hub has no place for {dtype}; leave --format out for an Orbax copy, or give "
            f"--dtype {' or '.join(DTYPES)}"
        )
    folder = locations.local_folder(source, progress)
    if to.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--to {to} is inside --from {source}; give a folder elsewhere")
    path = folder / "config.json"
    raw = files.read_json(path, "the base model's configuration")
    raw = multimodal.text_part(raw, path)  # only that is written
    config = parse_config(raw, path)
    held = stored_scheme.read(folder)
    quantize = dtype if dtype in SCHEMES else None
    if held is not None and dtype is None:
        quantize = held.scheme
        if form == "hub":
            raise UserError(
                f"--format hub has no place for {quantize}, in which {source} is stored; leave "
                f"--format out, or give --dtype {' or '.join(DTYPES)}"
            )
    own = stored_dtype(raw, path) or "bfloat16"
    dtype = own if dtype is None or quantize else dtype
    if dtype not in DTYPES:
        raise UserError(f"{path}: dtype is {dtype!r}; choose one with --dtype: {', '.join(DTYPES)}")
    form = form or ("orbax" if quantize else "hub")
    loaded = weights.load(folder, config, dtype, _host_sharding(), progress, quantize=quantize)
    params, fingerprint = loaded.params, loaded.fingerprint
    if not quantize:  # of what is written, which may have been dequantised
        fingerprint = bases.fingerprint(config, params)
    dtype_fields = [name for name in ("dtype", "torch_dtype") if name in raw] or ["dtype"]
    raw = {name: value for name, value in raw.items() if held is None or name != QUANTIZATION}
    raw |= dict.fromkeys(dtype_fields, dtype)
    if quantize:
        raw |= StoredScheme(quantize, fingerprint, loaded.weights).as_json()
    elif held is not None:
        errors.say(
            f"{to}: with the rounded weights it is another base than the one before {held.scheme}"
        )
    with files.replacing_folder(to) as tmp:
        for file in files_to_carry(folder):
            shutil.copyfile(file, tmp / file.name)
        files.write_json(tmp / "config.json", raw)
        if form == "orbax":
            orbax_copy.save_orbax(tmp, params)
        else:
            weights.save_params(tmp, config, params, dtype)
    leaves = jax.tree.leaves(params)
    return ConvertedBase(
        path=str(to),
        format=form,
        tensors=len(leaves) if form == "orbax" else len(tensor_names.tensor_names(config)),
        dtype=quantize or dtype,
        bytes=sum(leaf.nbytes for leaf in leaves),
        fingerprint=fingerprint,
    )


def _host_sharding() -> jax.sharding.Sharding | None:
    """Keeps arrays in the host's memory, which is larger than an accelerator's.

    None if JAX has no CPU backend.
    """
    try:
        return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return None
