"""Opening files that may be compressed, by their name: .gz, .zst, or plain."""

import gzip
import hashlib
import io
import pathlib
import zlib

import zstandard

from icae_jax.errors import UserError

READ_ERRORS = (OSError, EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError)  # all that reading such a file may raise
COMPRESSED = (".gz", ".zst")
CHUNK = 1 << 17  # bytes


class _ZstdFile(io.RawIOBase):
    """The content of a .zst file, frame after frame. Unlike zstandard's own reader it notices a file that ends within a frame."""

    def __init__(self, path):
        super().__init__()
        self._file = open(path, "rb")  # noqa: SIM115 - `close` closes it
        self._frame, self._packed, self._ready = None, b"", memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._ready:
            self._packed = self._packed or self._file.read(CHUNK)
            if not self._packed:
                if self._frame:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            # Corpora are packed with windows (zstd --long) that the library refuses unless it is told that they may be this large.
            self._frame = self._frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self):
        self._file.close()
        super().close()


def open_bytes(path):
    """A binary reader of a file's content, unpacked where its name ends in .gz or .zst. Reading may raise any of `READ_ERRORS`."""
    suffix = pathlib.Path(path).suffix
    if suffix == ".gz":
        return gzip.open(path, "rb")
    return io.BufferedReader(_ZstdFile(path), CHUNK) if suffix == ".zst" else open(path, "rb")


def open_text(path):
    """The same as UTF-8 text."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8")


def unreadable(path, error):
    """The UserError to raise for one of `READ_ERRORS`."""
    return UserError(f"data file {path}: cannot be read ({getattr(error, 'strerror', None) or error})")


def ends(path, size):
    """sha256 of a file's first and last MiB: tells files of one name and size apart without reading gigabytes."""
    with open(path, "rb") as f:
        digest = hashlib.sha256(f.read(1 << 20))
        f.seek(max(0, size - (1 << 20)))
        digest.update(f.read())
    return digest.hexdigest()
