"""The header of a GGUF file: its metadata, and where its tensors lie.

`gguf.GGUFReader` is not used for this: it makes several arrays of each string (half a minute for
Gemma's vocabulary), and a damaged count has it loop without end. Here nothing is believed before it
is within the file.
"""

import dataclasses
import functools
import itertools
import math
import mmap
import pathlib
import re
import struct
from typing import Any, NamedTuple

import numpy as np

from icae_jax import errors, files
from icae_jax.errors import UserError

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# The numbers by their codes in the format; 8 is a text and 9 an array.
_NUMBERS = dict(
    enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8"))
)
_TEXT, _ARRAY = 8, 9
_MOST_KEY_BYTES, _MOST_ITEMS, _MOST_AXES = 2**16 - 1, 2**22, 4
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Tensor(NamedTuple):
    """A stored tensor, not read yet.

    Attributes:
        path: the file.
        shape: outermost axis first, as the hub has it and in reverse to the file.
        kind: the block type's name, such as "Q4_K".
        block: (numbers, bytes) of one block.
        start: of its data, in bytes from the start of the file.
    """

    path: pathlib.Path
    shape: tuple[int, ...]
    kind: str
    block: tuple[int, int]
    start: int

    @property
    def row_bytes(self) -> int:
        """The bytes of one row along the last axis."""
        numbers, size = self.block
        return self.shape[-1] // numbers * size

    @property
    def rows(self) -> int:
        """The rows along the last axis."""
        return math.prod(self.shape[:-1])


@dataclasses.dataclass(frozen=True)
class GGUF:
    """The content of a GGUF file, or of all parts of a split one.

    Attributes:
        path: the file, or the first part.
        metadata: of the first part, by its keys; arrays of numbers are numpy arrays.
        tensors: by their names in the file.
    """

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def get(self, key: str, kind: type, default: object = None) -> Any:
        """A value of the metadata. UserError if it is of another kind (int, float, bool, str)."""
        value = self.metadata.get(key)
        if value is None:
            return default
        if kind is float and files.is_kind(value, int):
            value = float(value)
        if not files.is_kind(value, kind):
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
            raise UserError(
                f"{self.path}: {key} is {errors.shown(value)}, which is not {names[kind]}"
            )
        return value


def parts(path: pathlib.Path) -> list[pathlib.Path]:
    """The paths of all parts of a split file, given the first; else the path alone."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, number, count = match[1], int(match[2]), int(match[3])
    if number != 1:
        raise UserError(
            f"{path}: part {number} of {count} of a split file; "
            f"give the first, {stem}-00001-of-{match[3]}{SUFFIX}"
        )
    return [path.with_name(f"{stem}-{i:05}-of-{match[3]}{SUFFIX}") for i in range(1, count + 1)]


def read(path: pathlib.Path) -> GGUF:
    """Reads the header of a GGUF file, and of all its parts if it is the first of a split one.

    Raises:
        UserError: the file is damaged or truncated, a part is absent, or a block type is one that
            cannot be dequantised.
    """
    paths, tensors, metadata = parts(path), {}, {}
    absent = [part for part in paths if not part.exists()]
    if absent and len(paths) == 1:
        raise UserError(
            f"{path}: the GGUF file is not there any more; give the place that it is at"
        )
    if absent:
        raise UserError(
            f"{path}: {errors.counted(len(absent), 'parts')} of {len(paths)} missing beside it, "
            f"{', '.join(part.name for part in absent[:3])}; download them too"
        )
    for number, part in enumerate(paths):
        header = _read_one(part)
        count, own = header.get("split.count", int, 1), header.get("split.no", int, 0)
        if count > 1 and (count, own) != (len(paths), number):
            raise UserError(
                f"{part}: it says that it is part {own + 1} of {count}, which its name does not; "
                "give the files the names that they were published under"
            )
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise UserError(f"{part}: tensor {min(twice)} is in an earlier part too")
        tensors |= header.tensors
        metadata = metadata or header.metadata
    result = GGUF(path, metadata, tensors)
    count = result.get("split.tensors.count", int, len(tensors))
    if len(paths) > 1 and count != len(tensors):
        raise UserError(f"{path}: all parts hold {len(tensors)} tensors, not {count} as it says")
    return result


def _read_one(path: pathlib.Path) -> GGUF:
    files.check_real(path)
    with errors.naming(f"{path}: cannot be read"), open(path, "rb") as file:
        if file.read(4) != _MAGIC:
            raise UserError(f"{path}: not a GGUF file (it does not begin with GGUF)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path, content).read()


class _Reader:
    """Reads the values of a header one after the other."""

    def __init__(self, path, content):
        self.path, self.content, self.position = path, content, len(_MAGIC)

    def damaged(self, problem):
        return UserError(f"{self.path}: not a readable GGUF file ({problem}); download it again")

    def take(self, count):
        """The start of the next so many bytes, which are skipped."""
        start, stop = self.position, self.position + count
        if stop > len(self.content):
            raise self.damaged(f"its header ends after {len(self.content):,} bytes")
        self.position = stop
        return start

    def number(self, dtype):
        dtype = np.dtype(dtype)
        start = self.take(dtype.itemsize)
        return np.frombuffer(self.content[start : self.position], dtype)[0].item()

    def text(self, most=None):
        size = struct.unpack_from("<Q", self.content, self.take(8))[0]
        if most is not None and size > most:
            raise self.damaged(f"a name of {size:,} bytes")
        start = self.take(size)
        try:
            return self.content[start : start + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text is not UTF-8: {error}") from error

    def value(self, kind, key):
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            if _NUMBERS.get(kind) is None:
                raise self.damaged(f"{key} has a value of the unknown type {kind}")
            return self.number(_NUMBERS[kind])
        inner, count = struct.unpack_from("<IQ", self.content, self.take(12))
        if count > _MOST_ITEMS:
            raise self.damaged(f"{key} has {count:,} items, more than {_MOST_ITEMS:,}")
        if inner == _TEXT:
            return [self.text() for _ in range(count)]
        if _NUMBERS.get(inner) is None:
            raise self.damaged(f"{key} is a list of the unknown type {inner}")
        dtype = np.dtype(_NUMBERS[inner])
        start = self.take(count * dtype.itemsize)
        return np.frombuffer(self.content[start : self.position], dtype)

    def read(self):
        version = self.number("<u4")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in _VERSIONS
            why = " (the file is for big-endian machines)" if swapped else ""
            raise UserError(
                f"{self.path}: GGUF version {version}{why} is not read, versions 2 and 3 are; "
                "convert the model again"
            )
        tensor_count, key_count = struct.unpack_from("<QQ", self.content, self.take(16))
        metadata = {}
        for _ in range(key_count):
            key = self.text(_MOST_KEY_BYTES)
            if not key or key in metadata:
                raise self.damaged(f"the key {key!r:.80} is empty or there twice")
            metadata[key] = self.value(self.number("<u4"), key)
        infos = {}
        for _ in range(tensor_count):
            name, axes = self.text(_MOST_KEY_BYTES), self.number("<u4")
            if not name or name in infos or not 0 < axes <= _MOST_AXES:
                raise self.damaged(f"tensor {name!r:.80} is there twice, or has {axes} axes")
            shape = struct.unpack_from(f"<{axes}Q", self.content, self.take(8 * axes))
            infos[name] = shape[::-1], *struct.unpack_from("<IQ", self.content, self.take(12))
        header = GGUF(self.path, metadata, {})
        return dataclasses.replace(header, tensors=self.placed(header, infos))

    def placed(self, header, infos):
        """The tensors, whose data are all within the file and nowhere overlap."""
        alignment = header.get("general.alignment", int, 32)
        if not (8 <= alignment <= 2**20 and alignment & (alignment - 1) == 0):
            raise self.damaged(f"general.alignment is {alignment}")
        data = -(-self.position // alignment) * alignment
        tensors, ranges = {}, []
        for name, (shape, number, offset) in infos.items():
            kind, block = block_type(number)
            if kind is None or not block:
                raise UserError(
                    f"{self.path}: tensor {name} has blocks of type {kind or number}, "
                    "which cannot be dequantised here; take the model in another quantisation"
                )
            tensor = Tensor(self.path, shape, kind, block, data + offset)
            if min(shape) < 1 or shape[-1] % block[0] or offset % alignment:
                raise self.damaged(f"tensor {name} has shape {shape} in blocks of {block[0]}")
            stop = tensor.start + tensor.rows * tensor.row_bytes
            if stop > len(self.content):
                raise self.damaged(
                    f"it is truncated: tensor {name} ends at byte {stop:,} of {len(self.content):,}"
                )
            tensors[name] = tensor
            ranges.append((tensor.start, stop, name))
        ranges.sort()
        for (_, stop, name), (start, _, other) in itertools.pairwise(ranges):
            if start < stop:
                raise self.damaged(f"tensors {name} and {other} overlap")
        return tensors


@functools.cache
def block_type(number: int) -> tuple[str | None, tuple[int, int] | None]:
    """(name, (numbers, bytes) of a block) of a block type's number.

    None for the name if it is unknown, and for the sizes if the gguf package does not dequantise
    it.
    """
    import gguf  # here, since it imports sentencepiece, which most bases do without

    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        return None, None
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return kind.name, None
    return kind.name, (numbers, size)
