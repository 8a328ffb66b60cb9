"""Reading files that may be compressed, by their name (.gz, .zst, or plain), a bounded number of bytes at a time."""

import contextlib
import gzip
import hashlib
import io
import itertools
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from icae_jax import errors
from icae_jax.errors import UserError

COMPRESSED = (".gz", ".zst")
CHUNK = 1 << 17  # bytes
MAX_ROW_BYTES = 64 << 20  # of one line, or of a text file, unpacked: a file of kilobytes may hold gigabytes without a line's end
_SKIPPED = 0x184D2A50  # the first of the 16 numbers that begin a frame to be skipped (RFC 8878)
_REPEATED = 1  # a block of one byte, repeated


class _ZstdFile(io.RawIOBase):
    """The content of a .zst file. Unlike zstandard's own reader it notices a file that ends within a frame.

    A frame is handed to the library block by block, each of which unpacks to 128 KiB at most: the library unpacks all that it is given.
    """

    def __init__(self, path):
        super().__init__()
        self._file = open(path, "rb")  # noqa: SIM115 - `close` closes it
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

    def close(self):
        self._file.close()
        super().close()


def open_bytes(path) -> BinaryIO:
    """A binary reader of a file's content, unpacked where its name ends in .gz or .zst. To be used within `naming`."""
    suffix = pathlib.Path(path).suffix
    if suffix == ".gz":
        return gzip.open(path, "rb")
    return io.BufferedReader(_ZstdFile(path), CHUNK) if suffix == ".zst" else open(path, "rb")


@contextlib.contextmanager
def naming(path) -> Iterator[None]:
    """Turns what is wrong with a file's name or content into a `UserError` that names it. A network's faults pass as they are."""
    what = f"data file {path}: cannot be read"
    try:
        with errors.naming(what):
            yield
    except (EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise UserError(f"{what} ({error})") from error


def bounded(data: bytes, where: str, most: int) -> bytes:
    """The bytes of a line or text that was read up to `most` + 1 of them. UserError where it is longer than `most`."""
    if len(data) > most:
        raise UserError(
            f"{where}: longer than {most:,} bytes, the most that one line or text may hold; split it (in training, data.max_row_bytes can "
            "be raised instead)"
        )
    return data


def read_lines(path, most: int = MAX_ROW_BYTES) -> Iterator[bytes]:
    """Yields a file's lines. UserError as for `naming` and `bounded`."""
    with naming(path), open_bytes(path) as f:
        for number in itertools.count(1):
            line = f.readline(most + 1)
            if not line:
                return
            yield bounded(line, f"{path}:{number}", most)


def read_text(path, most: int = MAX_ROW_BYTES) -> str:
    """A whole file as UTF-8 text, its lines ended by \\n alone. UserError as for `naming` and `bounded`."""
    with naming(path), open_bytes(path) as f:
        return bounded(f.read(most + 1), str(path), most).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


# ------------------------------------------------------------------------------------------------------------ identity

WHOLE = 256 << 20  # bytes up to which all of a file is hashed
BLOCK = 1 << 20
BLOCKS = 256  # hashed of a larger file, at equal distances, its first and its last bytes among them


def content_hash(path) -> str:
    """sha256 of a file's bytes and size; of a file larger than `WHOLE` that of `BLOCKS` blocks spread over it."""
    size = os.stat(path).st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with open(path, "rb") as f:
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
    with open(path, "rb") as f:
        digest = hashlib.sha256(f.read(1 << 20))
        f.seek(max(0, size - (1 << 20)))
        digest.update(f.read())
    return digest.hexdigest()
