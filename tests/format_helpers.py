"""The same three rows in several forms, and files of them."""

import json

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet

from icae_jax.data import sources
from icae_jax.data.builders import builder
from icae_jax.data.builders.inputs import Request
from icae_jax.workflows.prepare import prepare

TEXTS = ["one é", 'two, "quoted"\nover lines', "three 😀"]
ROWS = [{"text": text, "id": f"r{i}"} for i, text in enumerate(TEXTS)]
TABLE = {"text": TEXTS, "id": ["r0", "r1", "r2"]}
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'id,text\r\nr0,one é\r\nr1,"two, ""quoted""\nover lines"\r\n\r\nr2,three 😀\r\n'


def arrow_stream(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def parquet(table, **kw):
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink, **kw)
    return sink.getvalue().to_pybytes()


def feather(table, **kw):
    sink = pa.BufferOutputStream()
    pa.feather.write_feather(table, sink, **kw)
    return sink.getvalue().to_pybytes()


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def prepared(folder, path, **request):
    """The rows of a set prepared from a file."""
    prepare(builder("json_text"), Request(paths=(path,), **request), folder / "sets", processes=1)
    return sources.read_rows("tfds:json_text:train", str(folder / "sets"))
