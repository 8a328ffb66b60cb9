"""Safetensors files and pickled flat dicts of tensors, opened lazily; nothing else is unpickled."""

import dataclasses
import os
import pathlib
from collections.abc import Callable

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Shaped

from icae_jax import errors, files
from icae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file, read by `np.asarray`: a save with two copies of the base exceeds memory.

    dtype: as the file's format spells it.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Shaped[np.ndarray, "..."]]

    def __array__(self, dtype=None, copy=None) -> Shaped[np.ndarray, "..."]:
        value = self.read()
        return value if dtype is None else value.astype(dtype)


def file_kind(path: str | os.PathLike) -> str | None:
    """By a file's first bytes: "safetensors", "pickle" (written by `torch.save`) or None."""
    path = pathlib.Path(path)

    def first_bytes():
        with open(path, "rb") as f:
            return f.read(9)

    with errors.naming(f"{path}: cannot be read"):
        start = errors.retrying(first_bytes, f"reading {path}")
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return "pickle"
    header = int.from_bytes(start[:8], "little")
    return "safetensors" if start[8:] == b"{" and header + 8 <= path.stat().st_size else None


def open_tensors(path: str | os.PathLike) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, or of a pickled flat dict of tensors.

    UserError if the file is neither, or if a pickle holds anything but tensors and numbers: it is
    loaded with `weights_only=True`, which runs no code.
    """
    path = pathlib.Path(path)
    files.check_real(path)
    kind = file_kind(path)
    if kind is None:
        raise UserError(f"{path}: neither safetensors nor a file that torch.save wrote")
    if kind == "safetensors":
        return files.read_safetensors(path, _open_safetensors)
    return _open_pickle(path), {}


def _open_safetensors(path):
    with safetensors.safe_open(path, framework="numpy") as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
        tensors = {
            name: Stored(tuple(s.get_shape()), s.get_dtype(), _reader(path, name))
            for name, s in slices.items()
        }
        return tensors, f.metadata() or {}


def _reader(path, name):
    def read(path):
        with safetensors.safe_open(path, framework="numpy") as f:
            return f.get_tensor(name)

    return lambda: files.read_safetensors(path, read)


def _open_pickle(path):
    torch = errors.need_torch(f"reading {path}, a pickle,")
    try:
        content = errors.retrying(
            lambda: torch.load(path, map_location="cpu", weights_only=True), f"reading {path}"
        )
    except Exception as error:  # a pickle can fail in any way; none of them runs code
        if errors.transient(error) or isinstance(error, MemoryError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: refused, a pickle with more in it than tensors, or a damaged one ({reason})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: refused, it holds a {type(content).__name__} and not a flat dict of tensors"
        )
    allowed = (torch.Tensor, float, int)  # icae-v1 has numbers, zeros, for the base's tensors
    others = [
        f"{name!r}: {type(value).__name__}"
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, allowed))
    ]
    if others:
        raise UserError(
            f"{path}: refused, a flat dict of tensors is expected and it holds "
            f"{', '.join(others[:5])}"
        )

    def stored(value):
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Stored(tuple(tensor.shape), dtype, lambda: tensor.detach().float().numpy())

    return {name: stored(value) for name, value in content.items()}
