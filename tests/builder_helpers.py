"""Small data files, and the sets prepared from them."""

import gzip
import json

import zstandard

from icae_jax.data import builders, sources
from icae_jax.data.builders.inputs import Request
from icae_jax.workflows.prepare import prepare


def write(path, lines):
    """Writes lines (objects as JSON, text as it is), packed as the name says, and returns the path
    as text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = "".join(
        (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines
    ).encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(
        path.suffix, bytes
    )
    path.write_bytes(pack(raw))
    return str(path)


def made(tmp_path, name, *paths, processes=1, label="", **request):
    """A set prepared in tmp_path/sets."""
    request = Request(paths=tuple(map(str, paths)), **request)
    return prepare(builders.builder(name), request, tmp_path / "sets", label, processes)[0]


def rows(tmp_path, source):
    return list(sources.read_rows(source, str(tmp_path / "sets")))


def nothing_left(tmp_path, name):
    """Whether a failed preparation left no trace of the set."""
    return not list((tmp_path / "sets").glob(f"{name}/*"))
