"""Readers of packed files, and of text that is not UTF-8, a bounded number of bytes at a time."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import pathlib
from typing import BinaryIO

import zstandard

CHUNK = 1 << 17  # bytes
_SKIPPABLE = 0x184D2A50  # the first of 16 magic numbers of skippable frames (RFC 8878)
_RLE = 1  # the type of a zstd block that is one repeated byte


class _Reader(io.RawIOBase):
    """A raw reader of a file whose content comes in blocks, from `_blocks()`."""

    def __init__(self, file):
        super().__init__()
        self._file = file
        self._remaining, self._ready = self._blocks(), memoryview(b"")

    def _blocks(self):
        raise NotImplementedError

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._ready:
            block = next(self._remaining, None)
            if block is None:
                return 0
            self._ready = memoryview(block)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


class ZstdFile(_Reader):
    """The content of a .zst file. Unlike zstandard's own reader it notices a truncated frame.

    The library unpacks all that it is given, so it is given one block at a time, which unpacks to
    128 KiB at most.
    """

    def _take(self, count):
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError("the file ends within a compressed frame")
        return data

    def _blocks(self):
        while magic := self._file.read(4):
            if int.from_bytes(magic, "little") & ~0xF == _SKIPPABLE:
                self._skip(int.from_bytes(self._take(4), "little"))
            else:
                yield from self._frame(magic)

    def _skip(self, count):
        while count:
            count -= len(self._take(min(count, CHUNK)))

    def _frame(self, magic):
        start = self._file.tell() - len(magic)
        header = magic + self._file.read(14)  # the longest header takes 18 bytes
        size = zstandard.frame_header_size(header)
        has_checksum = zstandard.get_frame_parameters(header).has_checksum
        self._file.seek(start + size)
        # Corpora are packed with large windows (zstd --long), which the library refuses by default.
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        frame.decompress(header[:size])
        last = False
        while not last:
            block_header = self._take(3)
            number = int.from_bytes(block_header, "little")
            last, kind, size = number & 1, number >> 1 & 3, number >> 3
            yield frame.decompress(block_header + self._take(1 if kind == _RLE else size))
        if has_checksum:
            frame.decompress(self._take(4))


class Recoded(_Reader):
    """Text of another encoding as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str):
        self._decoder = codecs.getincrementaldecoder(encoding)()
        super().__init__(file)

    def _blocks(self):
        while block := self._file.read(CHUNK):
            yield self._decoder.decode(block).encode()
        yield self._decoder.decode(b"", final=True).encode()


UNPACKERS = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": ZstdFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
COMPRESSED = tuple(UNPACKERS)


def packing(path: str | os.PathLike) -> str:
    """The suffix that says how a file is packed, "" for none."""
    suffix = pathlib.PurePath(path).suffix.lower()
    return suffix if suffix in COMPRESSED else ""
