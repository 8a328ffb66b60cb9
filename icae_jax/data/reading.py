"""Reading files, here or in object storage, that may be compressed (by their name): a bounded number of bytes at a time.

Text comes as UTF-8 without a byte order mark, whatever the mark says that it is in.
"""

import bz2
import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from icae_jax import errors, files
from icae_jax.errors import UserError

CHUNK = 1 << 17  # bytes
MAX_ROW_BYTES = (
    64 << 20
)  # of one line, or of a text file, unpacked: a file of kilobytes may hold gigabytes without a line's end
_SKIPPED = 0x184D2A50  # the first of the 16 numbers that begin a frame to be skipped (RFC 8878)
_REPEATED = 1  # a block of one byte, repeated


class _ZstdFile(io.RawIOBase):
    """The content of a .zst file. Unlike zstandard's own reader it notices a file that ends within a frame.

    A frame is handed to the library block by block, each of which unpacks to 128 KiB at most: the library unpacks all that it is given.
    """

    def __init__(self, file):
        super().__init__()
        self._file = file
        self._blocks, self._ready = self._unpack(), memoryview(b"")

    def readable(self):
        return True

    def _take(self, count):
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError("the file ends within a compressed frame")
        return data

    def _unpack(self):
        while head := self._file.read(4):
            if int.from_bytes(head, "little") & ~0xF == _SKIPPED:
                self._skip(int.from_bytes(self._take(4), "little"))
            else:
                yield from self._frame(head)

    def _skip(self, count):
        while count:
            count -= len(self._take(min(count, CHUNK)))

    def _frame(self, head):
        start = self._file.tell() - len(head)
        head += self._file.read(14)  # the longest header takes 18 bytes
        size = zstandard.frame_header_size(head)
        has_checksum = zstandard.get_frame_parameters(head).has_checksum
        self._file.seek(start + size)
        # Corpora are packed with windows (zstd --long) that the library refuses unless it is told that they may be this large.
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        frame.decompress(head[:size])
        last = False
        while not last:
            header = self._take(3)
            number = int.from_bytes(header, "little")
            last, kind, size = number & 1, number >> 1 & 3, number >> 3
            yield frame.decompress(header + self._take(1 if kind == _REPEATED else size))
        if has_checksum:
            frame.decompress(self._take(4))

    def readinto(self, buffer):
        while not self._ready:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._ready = memoryview(block)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


_UNPACKERS = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": _ZstdFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
COMPRESSED = tuple(_UNPACKERS)


class _Recoded(io.RawIOBase):
    """Text of another encoding as UTF-8."""

    def __init__(self, file, encoding):
        super().__init__()
        self._file, self._decoder, self._ready = file, codecs.getincrementaldecoder(encoding)(), b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._ready:
            block = self._file.read(CHUNK)
            self._ready = self._decoder.decode(block, not block).encode()
            if not block:
                break
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


# How text says what it is in. UTF-32's marks begin as UTF-16's do.
_MARKS = (
    (codecs.BOM_UTF8, None), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip

# How files begin that hold no text, and what they are.
_BEGINNINGS = (
    (b"PAR1", "a Parquet file (name it .parquet)"), (b"ARROW1", "an Arrow file (name it .arrow)"),
    (b"FEA1", "a Feather file of version 1 (write it anew)"), (b"PK\x03\x04", "a zip archive (.docx, .xlsx, .npz and .pt are too)"),
    (b"\x1f\x8b", "packed by gzip (name it .gz)"), (b"\x28\xb5\x2f\xfd", "packed by zstd (name it .zst)"),
    (b"BZh", "packed by bzip2 (name it .bz2)"), (b"\xfd7zXZ", "packed by xz (name it .xz)"), (b"%PDF", "a PDF document"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"), (b"{\\rtf", "an RTF document"), (b"GGUF", "a GGUF file"), (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"), (b"GIF8", "an image"), (b"\x7fELF", "a program"), (b"SQLite format 3", "an SQLite database"),
    (b"\x89HDF", "an HDF5 file"), *((bytes([0x80, protocol]), "a Python pickle") for protocol in range(2, 6)),
)  # fmt: skip


def packing(path: str | os.PathLike) -> str:
    """The suffix that says how a file is packed, "" for none."""
    suffix = pathlib.PurePath(path).suffix.lower()
    return suffix if suffix in COMPRESSED else ""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL, such as gs://…"""
    return "://" in str(path)


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A file's bytes as they lie, here or where its URL says."""
    if is_remote(path):
        from etils import epath

        return epath.Path(path).open("rb")
    return open(path, "rb")


def binary_kind(start: bytes) -> str:
    """What a file is that holds no text, by its first bytes; "" for text."""
    if len(start) > 9 and start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 1 << 30:
        return "a safetensors file"
    if start[257:262] == b"ustar":
        return "a tar archive"
    known = next((what for beginning, what in _BEGINNINGS if start.startswith(beginning)), "")
    return known or (
        "no text (it holds zero bytes; UTF-16 needs its byte order mark)" if b"\0" in start else ""
    )


def check_start(start: bytes, path: str | os.PathLike) -> None:
    """UserError where something else stands in a data file's place, by its first bytes."""
    if stands_there := files.placeholder(start[:64]):
        raise UserError(f"data file {path}: {stands_there}")


@contextlib.contextmanager
def open_bytes(path: str | os.PathLike) -> Iterator[io.BufferedReader]:
    """A binary reader of a file's content, unpacked as its name says. To be used within `naming`. UserError for a placeholder."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(io.BufferedReader(stack.enter_context(open_file(path)), CHUNK))
        check_start(file.peek(CHUNK), path)
        if packed := packing(path):
            file = io.BufferedReader(stack.enter_context(_UNPACKERS[packed](file)), CHUNK)
        yield file


@contextlib.contextmanager
def open_text(path: str | os.PathLike) -> Iterator[io.BufferedReader]:
    """The same of a text in any encoding that has a byte order mark, as UTF-8 without it. UserError where a file holds no text."""
    with open_bytes(path) as file:
        for mark, encoding in _MARKS:
            if file.peek(CHUNK).startswith(mark):
                if encoding is None:
                    file.read(len(mark))
                else:
                    file = io.BufferedReader(_Recoded(file, encoding), CHUNK)
                break
        start = file.peek(CHUNK)
        if start:
            check_start(start, path)
        if kind := binary_kind(start):
            raise UserError(f"data file {path}: {kind}; its name says text")
        yield file


def has_mark(path: str | os.PathLike) -> bool:
    """Whether a text begins with the byte order mark of UTF-8."""
    with naming(path), open_bytes(path) as file:
        return file.peek(CHUNK).startswith(codecs.BOM_UTF8)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Turns what is wrong with a file's name or content into a `UserError` that names it. A network's faults pass as they are."""
    what = f"data file {path}: cannot be read"
    try:
        with errors.naming(what):
            yield
    except (EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError, lzma.LZMAError) as error:
        remedy = (
            "save it as UTF-8"
            if isinstance(error, UnicodeDecodeError)
            else "copy or download it again"
        )
        raise UserError(f"{what} ({error}); {remedy}") from error
    except UserError:
        raise
    except Exception as error:
        packed_wrongly = (
            isinstance(error, OSError)
            and error.errno is None
            and packing(path)
            and not errors.transient(error)
        )
        if packed_wrongly and not is_remote(path):  # as gzip and bzip2 say it
            raise UserError(f"{what} ({error})") from error
        if not is_remote(path) or not errors.answered_no(error):
            raise
        remedy = (
            " (pip install gcsfs for gs://, s3fs for s3://)"
            if isinstance(error, ImportError)
            else ""
        )
        raise UserError(
            f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:300]}){remedy}"
        ) from error


def check_size(size: int, where: str, most: int) -> None:
    """UserError where a row, a line or a text is longer than `most` bytes."""
    if size > most:
        raise UserError(
            f"{where}: longer than {most:,} bytes, the most that one line or text may hold; split it (in training, data.max_row_bytes can "
            "be raised instead)"
        )


def numbered_lines(
    f: BinaryIO, path: str | os.PathLike, most: int = MAX_ROW_BYTES, first: int = 1
) -> Iterator[tuple[int, bytes]]:
    """Yields (its number, a line) of an open file. UserError as for `check_size`. first: the next line's number."""
    for number in itertools.count(first):
        line = f.readline(most + 1)
        if not line:
            return
        check_size(len(line), f"{path}:{number}", most)
        yield number, line


def read_text(path: str | os.PathLike, most: int = MAX_ROW_BYTES) -> str:
    """A whole file as text, its lines ended by \\n alone. UserError as for `naming`, `open_text` and `check_size`."""
    with naming(path), open_text(path) as f:
        data = f.read(most + 1)
        check_size(len(data), str(path), most)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"data file {path}: cannot be read (line {line} is not UTF-8: {error}); save it as UTF-8"
            ) from error
        if "\0" in text:
            raise UserError(
                f"data file {path}: no text: it holds zero bytes, the first at character {text.index(chr(0)):,}"
            )
        return text.replace("\r\n", "\n").replace("\r", "\n")


# ------------------------------------------------------------------------------------------------------------ identity

WHOLE = 256 << 20  # bytes up to which all of a file is hashed
BLOCK = 1 << 20
BLOCKS = 256  # hashed of a larger file, at equal distances, its first and its last bytes among them


def stamp(path: str | os.PathLike) -> tuple[int, int]:
    """(size, time of change in ns) of a file; the time is 0 where a storage does not tell it."""
    if is_remote(path):
        from etils import epath

        there = epath.Path(path).stat()
        return there.length, int(there.mtime or 0) * 1_000_000_000
    there = os.stat(path)
    return there.st_size, there.st_mtime_ns


def content_hash(path: str | os.PathLike) -> str:
    """sha256 of a file's bytes and size; of a file larger than `WHOLE` that of `BLOCKS` blocks spread over it."""
    size, _ = stamp(path)
    digest = hashlib.sha256(f"{size} ".encode())
    with open_file(path) as f:
        if size <= WHOLE:
            while block := f.read(BLOCK):
                digest.update(block)
        else:
            for i in range(BLOCKS):
                f.seek(i * (size - BLOCK) // (BLOCKS - 1))
                digest.update(f.read(BLOCK))
    return digest.hexdigest()


def ends(path, size):
    """sha256 of a file's first and last MiB: tells files of one name and size apart without reading gigabytes."""
    with open_file(path) as f:
        digest = hashlib.sha256(f.read(1 << 20))
        f.seek(max(0, size - (1 << 20)))
        digest.update(f.read())
    return digest.hexdigest()
