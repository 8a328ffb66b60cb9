"""Reading files, local or in object storage, perhaps packed, a bounded number of bytes at a time.

Text comes as UTF-8 without a byte order mark, whatever encoding its mark names.
"""

import codecs
import contextlib
import hashlib
import io
import itertools
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from icae_jax import errors, files
from icae_jax.data.unpacking import CHUNK, UNPACKERS, Recoded, packing
from icae_jax.errors import UserError

# Most bytes of one line, or of a text file, unpacked: a packed file of kilobytes may hold gigabytes
# without the end of a line.
MAX_ROW_BYTES = 64 << 20

# Byte order marks and the encodings they name. UTF-32's marks begin as UTF-16's do.
_MARKS = (
    (codecs.BOM_UTF8, None),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

# The first bytes of files that are not text, and what such files are.
_BEGINNINGS = {
    b"PAR1": "a Parquet file (name it .parquet)",
    b"ARROW1": "an Arrow file (name it .arrow)",
    b"FEA1": "a Feather file of version 1 (write it anew)",
    b"PK\x03\x04": "a zip archive (.docx, .xlsx, .npz and .pt are too)",
    b"\x1f\x8b": "packed by gzip (name it .gz)",
    b"\x28\xb5\x2f\xfd": "packed by zstd (name it .zst)",
    b"BZh": "packed by bzip2 (name it .bz2)",
    b"\xfd7zXZ": "packed by xz (name it .xz)",
    b"%PDF": "a PDF document",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"{\\rtf": "an RTF document",
    b"GGUF": "a GGUF file",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x7fELF": "a program",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    **{bytes([0x80, protocol]): "a Python pickle" for protocol in range(2, 6)},
}


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL, such as gs://…."""
    return "://" in str(path)


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A file's bytes as stored, local or at its URL."""
    if is_remote(path):
        from etils import epath

        return epath.Path(path).open("rb")
    return open(path, "rb")


def binary_kind(start: bytes) -> str:
    """What a file that is not text is, by its first bytes; "" for text."""
    if len(start) > 9 and start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 1 << 30:
        return "a safetensors file"
    if start[257:262] == b"ustar":
        return "a tar archive"
    for beginning, kind in _BEGINNINGS.items():
        if start.startswith(beginning):
            return kind
    if b"\0" in start:
        return "no text (it holds zero bytes; UTF-16 needs its byte order mark)"
    return ""


def check_start(start: bytes, path: str | os.PathLike) -> None:
    """UserError if a file's first bytes are those of a placeholder, such as a Git LFS pointer."""
    if placeholder := files.placeholder(start[:64]):
        raise UserError(f"data file {path}: {placeholder}")


@contextlib.contextmanager
def open_bytes(path: str | os.PathLike) -> Iterator[io.BufferedReader]:
    """A binary reader of a file's content, unpacked as its name says; for use within `naming`.

    UserError for a placeholder.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(io.BufferedReader(stack.enter_context(open_file(path)), CHUNK))
        check_start(file.peek(CHUNK), path)
        if suffix := packing(path):
            file = io.BufferedReader(stack.enter_context(UNPACKERS[suffix](file)), CHUNK)
        yield file


@contextlib.contextmanager
def open_text(path: str | os.PathLike) -> Iterator[io.BufferedReader]:
    """`open_bytes` for text: UTF-8 without a byte order mark, whatever encoding its mark names.

    UserError if a file is not text.
    """
    with open_bytes(path) as file:
        for mark, encoding in _MARKS:
            if file.peek(CHUNK).startswith(mark):
                if encoding is None:
                    file.read(len(mark))
                else:
                    file = io.BufferedReader(Recoded(file, encoding), CHUNK)
                break
        start = file.peek(CHUNK)
        if start:
            check_start(start, path)
        if kind := binary_kind(start):
            raise UserError(f"data file {path}: {kind}; its name says text")
        yield file


def has_mark(path: str | os.PathLike) -> bool:
    """Whether a file begins with the byte order mark of UTF-8."""
    with naming(path), open_bytes(path) as file:
        return file.peek(CHUNK).startswith(codecs.BOM_UTF8)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Turns errors in a file's name or content into a `UserError` that names the file.

    Faults of a network pass unchanged.
    """
    what = f"data file {path}: cannot be read"
    try:
        with errors.naming(what):
            yield
    except UnicodeDecodeError as error:
        raise UserError(f"{what} ({error}); save it as UTF-8") from error
    except (EOFError, zlib.error, zstandard.ZstdError, lzma.LZMAError) as error:
        raise UserError(f"{what} ({error}); copy or download it again") from error
    except UserError:
        raise
    except Exception as error:
        # gzip and bzip2 raise an OSError without a number for a damaged file.
        damaged = isinstance(error, OSError) and error.errno is None and packing(path)
        if damaged and not errors.transient(error) and not is_remote(path):
            raise UserError(f"{what} ({error})") from error
        if not is_remote(path) or not errors.answered_no(error):
            raise
        remedy = ""
        if isinstance(error, ImportError):
            remedy = " (pip install gcsfs for gs://, s3fs for s3://)"
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{what} ({type(error).__name__}: {reason}){remedy}") from error


def check_size(size: int, where: str, most: int) -> None:
    """UserError if a row, a line or a text is longer than `most` bytes."""
    if size > most:
        raise UserError(
            f"{where}: longer than {most:,} bytes, the most that one line or text may hold; split "
            "it (in training, data.max_row_bytes can be raised instead)"
        )


def numbered_lines(
    f: io.BufferedReader, path: str | os.PathLike, most: int = MAX_ROW_BYTES, first: int = 1
) -> Iterator[tuple[int, bytes]]:
    """Yields (number, line) of an open file, whose next line has number `first`.

    UserError as for `check_size`.
    """
    for number in itertools.count(first):
        line = f.readline(most + 1)
        if not line:
            return
        check_size(len(line), f"{path}:{number}", most)
        yield number, line


def read_text(path: str | os.PathLike, most: int = MAX_ROW_BYTES) -> str:
    """A whole file as text, with lines that end in a line feed alone.

    UserError as for `naming`, `open_text` and `check_size`.
    """
    with naming(path), open_text(path) as f:
        data = f.read(most + 1)
        check_size(len(data), str(path), most)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"data file {path}: cannot be read (line {line} is not UTF-8: {error}); "
                "save it as UTF-8"
            ) from error
        if "\0" in text:
            raise UserError(
                f"data file {path}: no text: it holds zero bytes, the first at character "
                f"{text.index(chr(0)):,}"
            )
        return text.replace("\r\n", "\n").replace("\r", "\n")


# ----------------------------------------------------------------------------------------- identity

WHOLE = 256 << 20  # files of up to this many bytes are hashed whole
BLOCK = 1 << 20
BLOCKS = 256  # blocks hashed of a larger file: evenly spaced, the first and the last included


def stamp(path: str | os.PathLike) -> tuple[int, int]:
    """(size, modification time in ns) of a file; the time is 0 if the storage has none."""
    if is_remote(path):
        from etils import epath

        status = epath.Path(path).stat()
        return status.length, int(status.mtime or 0) * 1_000_000_000
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def content_hash(path: str | os.PathLike) -> str:
    """sha256 of a file's size and bytes; of one larger than `WHOLE`, of `BLOCKS` blocks."""
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


def ends_hash(path: str | os.PathLike, size: int) -> str:
    """sha256 of a file's first and last MiB, to tell files of one name and size apart."""
    with open_file(path) as f:
        digest = hashlib.sha256(f.read(1 << 20))
        f.seek(max(0, size - (1 << 20)))
        digest.update(f.read())
    return digest.hexdigest()
