"""Converts a base model into a new folder: the hub's format or an Orbax copy, in any dtype."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator

import jax

from icae_jax import files
from icae_jax.errors import UserError
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations, orbax_copy, weights
from icae_jax.models.families import multimodal, tensor_names
from icae_jax.models.families.config_json import parse_config, stored_dtype

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
            path.name in ("config.json", orbax_copy.ORBAX_URL)
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
    form: str = "hub",
    dtype: str | None = None,
    progress: bool = False,
) -> ConvertedBase:
    """Writes a base into a new folder.

    source: see `locations.local_folder`. form: "hub" (safetensors) or "orbax" (`params/`).
    dtype: one of DTYPES; by default the source's own. config.json keeps everything but its dtype,
    so transformers loads the same model. The weights pass through our own parameter tree, which
    checks them. UserError, before anything is written, if `to` holds something or the source does
    not load.
    """
    to = pathlib.Path(to)
    files.check_new_folder(to, "--to")
    folder = locations.local_folder(source, progress)
    if to.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--to {to} is inside --from {source}; give a folder elsewhere")
    path = folder / "config.json"
    raw = files.read_json(path, "the base model's configuration")
    raw = multimodal.text_part(raw, path)  # only that is written
    config = parse_config(raw, path)
    dtype = dtype or stored_dtype(raw, path) or "bfloat16"
    if dtype not in DTYPES:
        raise UserError(f"{path}: dtype is {dtype!r}; choose one with --dtype: {', '.join(DTYPES)}")
    params = weights.load_params(folder, config, dtype, _host_sharding(), progress)
    dtype_fields = [name for name in ("dtype", "torch_dtype") if name in raw] or ["dtype"]
    with files.replacing_folder(to) as tmp:
        for file in files_to_carry(folder):
            shutil.copyfile(file, tmp / file.name)
        files.write_json(tmp / "config.json", raw | dict.fromkeys(dtype_fields, dtype))
        if form == "orbax":
            orbax_copy.save_orbax(tmp, params)
        else:
            weights.save_params(tmp, config, params, dtype)
    leaves = jax.tree.leaves(params)
    return ConvertedBase(
        path=str(to),
        format=form,
        tensors=len(leaves) if form == "orbax" else len(tensor_names.tensor_names(config)),
        dtype=dtype,
        bytes=sum(leaf.nbytes for leaf in leaves),
        fingerprint=bases.fingerprint(config, params),
    )


def _host_sharding() -> jax.sharding.Sharding | None:
    """Keeps arrays in the host's memory, which is larger than an accelerator's.

    None if JAX has no CPU backend.
    """
    try:
        return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return None
