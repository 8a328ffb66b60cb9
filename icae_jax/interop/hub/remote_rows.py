"""Single rows of a remote base's tensors, without the rest of its files."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np
from jaxtyping import Float32

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub import stored
from icae_jax.models.families import multimodal

MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


def read_rows(
    folder: pathlib.Path,
    open_file: Callable[[str], BinaryIO],
    name: str,
    rows: Sequence[int] | None = None,
) -> Float32[np.ndarray, "N D"]:
    """Rows of one tensor of a base's safetensors files; nothing else of it is read.

    Args:
        folder: holds the weight index, if there is one.
        open_file: opens a file of the base by its name, see `locations.remote_opener`.
        name: the tensor; a vector counts as one row.
        rows: by default all.

    Raises:
        UserError: the file is damaged, or does not have the tensor or a row.
    """
    file_name = _file_with(folder, open_file, name)

    def read():
        with open_file(file_name) as file:
            start, dtype, count, width = _find_tensor(file, file_name, name)
            wanted = range(count) if rows is None else rows
            if max(wanted) >= count:
                raise UserError(
                    f"{file_name}: {name} has {count} rows, "
                    f"config.json implies {max(wanted) + 1} or more"
                )
            result = []
            for row in wanted:
                file.seek(start + row * width * dtype.itemsize)
                result.append(np.frombuffer(file.read(width * dtype.itemsize), dtype))
            return np.stack(result).astype(np.float32)

    return errors.retrying(read, f"reading {file_name}")


def _find_tensor(file, file_name, name):
    """(offset in the file, dtype, rows, length of a row) of a tensor."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MOST_HEADER_BYTES:
        problem = files.placeholder(start + file.read(56))
        problem = problem or (
            f"not a readable safetensors file (its header would have {length} bytes)"
        )
        raise UserError(f"{file_name}: {problem}")
    try:
        header = json.loads(file.read(length))
        names = {multimodal.text_name(stored_name): stored_name for stored_name in header}
        header = header[names[name]]
        dtype, (count, width) = stored.STORED_DTYPES[header["dtype"]], (1, *header["shape"])[-2:]
        return 8 + length + header["data_offsets"][0], dtype, count, width
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file_name}: no tensor {name} of {', '.join(stored.STORED_DTYPES)} in it ({error!r})"
        ) from error


def _file_with(folder, open_file, name):
    """The file that holds a tensor of a remote base, by the rules of `stored.weight_map`."""
    index = stored.weight_map(folder)
    index = index and {multimodal.text_name(key): file for key, file in index.items()}
    if index is None:
        return stored.WHOLE
    if stored.WHOLE not in index.values():
        with contextlib.suppress(UserError, FileNotFoundError), open_file(stored.WHOLE) as file:
            if file.read(1):
                return stored.WHOLE
    if name not in index:
        raise UserError(
            f"{pathlib.Path(folder) / stored.INDEX}: weight_map does not have {name}; "
            "download the folder again"
        )
    return index[name]
