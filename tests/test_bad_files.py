"""Malformed rows, and files that are not data: what is said of them."""

import bz2
import gzip
import lzma
import pickle

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from format_helpers import LINES, TABLE, arrow_stream, parquet, prepared, write

from icae_jax.data import sources
from icae_jax.errors import UserError

MALFORMED = {  # a file's name, its content, what is said of it behind its path
    "cut array": (
        "a.json",
        '[\n{"text": "a"}\n',
        r":3: not valid JSON \(the file ends within an array\)",
    ),
    "cut within a row": (
        "a.json",
        '[\n{"text": "a"},\n{"text": "b',
        r":3: not valid JSON \(Unterminated",
    ),
    "comma too many": ("a.json", '[{"text": "a"},\n]', ":2: not valid JSON"),
    "comma missing": (
        "a.json",
        '[{"text": "a"}\n{"text": "b"}]',
        ":2: not valid JSON .'{', expected , or ]",
    ),
    "malformed first line": (
        "a.jsonl",
        '{"text": \n{"text": "b"}\n',
        r":1: not valid JSON .*; nor is there an object over several lines",
    ),
    "cut last line": ("a.jsonl", '{"text": "a"}\n{"text": "b', ":2: not valid JSON"),
    "malformed over lines": (
        "a.json",
        '{\n"text": "a",\n"id" 3}',
        ":1: not valid JSON .*a.json:3: not valid JSON .Expecting ':'",
    ),
    "field twice": (
        "a.jsonl",
        '{"text": "a", "text": "b"}',
        ":1: field 'text' stands in one object twice, with two values; remove one$",
    ),
    "field twice in an array": (
        "a.json",
        '[\n{"text": "a", "text": "b"}]',
        ":2: field 'text' stands in one object twice",
    ),
    "number of too many digits": (
        "a.json",
        f'[{{"n": {"1" * 5000}}}]',
        ":1: not valid JSON .*digits",
    ),
    "nested": ("a.json", "[" * 100 + "]" * 100, ":1: a JSON list, expected an object"),
    "number": ("a.jsonl", '{"text": "a"}\n3\n', ":2: a JSON int, expected an object"),
    "too many cells": (
        "a.csv",
        "id,text\n1,a\n2,b,c\n",
        ":3: 3 cells, but the first line names 2 columns: id, text",
    ),
    "too few cells": ("a.csv", "id,text\n1\n", ":2: 1 cell, but"),
    "open quote": ("a.csv", 'id,text\n1,"a\n2,b\n', ":2: not valid csv .*quote a cell"),
    "stray quote": ("a.tsv", 'id\ttext\n1\t"a" b\n', ":2: not valid csv"),
    "lines of an old Mac": (
        "a.csv",
        "id,text\r1,a\r",
        r":1: not valid csv .a line ends with .r alone.; save it",
    ),
    "no header": ("a.csv", "the cat,sat\n", ":1: columns the cat, sat; expected text"),
    "column twice": ("a.csv", "text,text\n", ":1: two columns are named 'text'"),
    "other encoding": (
        "a.jsonl",
        '{"text": "a"}\n{"text": "é"}\n'.encode("latin-1"),
        ":2: not UTF-8",
    ),
    "array of another encoding": (
        "a.json",
        '[{"text": "a"},\n{"text": "é"}]'.encode("latin-1"),
        ":2: not UTF-8",
    ),
    "csv of another encoding": ("a.csv", "text\né\n".encode("latin-1"), ":2: not UTF-8"),
    "bytes that are no text": (
        "a.parquet",
        parquet(pa.table({"text": [b"a", b"\xff"]})),
        " row 1: not UTF-8",
    ),
    "number as text": (
        "a.parquet",
        parquet(pa.table({"text": [3]})),
        " row 0: text is int, expected text; write a number in quotes",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_rows_are_named(tmp_path, name):
    """Breaks when an error in a file gives a traceback, names another place, or passes in some
    reader.
    """
    file, content, message = MALFORMED[name]
    path = write(tmp_path, file, content)
    for read in (sources.read_rows, lambda path: prepared(tmp_path, path)):
        with pytest.raises(UserError, match=f"^{path}{message}") as error:
            list(read(path))
        assert "\n" not in str(error.value)


def damaged_offsets():
    """An Arrow stream in which the end of a text is beyond the end of the file."""
    content = bytearray(arrow_stream(pa.table({"text": ["a" * 100] * 2})))
    at = content.index((100).to_bytes(4, "little") + (200).to_bytes(4, "little"))
    content[at : at + 4] = (1 << 30).to_bytes(4, "little")
    return bytes(content)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid x"
WHOLE = parquet(pa.table({"text": ["x" * i for i in range(3000)]}), row_group_size=100)
NOT_DATA = {  # a file's name, its content, what is said of it
    "pdf": ("a.pdf", b"%PDF", r"\.pdf is no format that is read; expected JSON .*renamed to \.txt"),
    "docx": ("a.docx", b"PK\x03\x04", r"\.docx is no format"),
    "zip": ("a.zip", b"PK\x03\x04", r"\.zip is no format"),
    "pickle": ("a.pkl", pickle.dumps([1]), r"\.pkl is no format"),
    "safetensors": ("a.safetensors", b"", r"\.safetensors is no format"),
    "pdf by another name": ("a.txt", b"%PDF-1.7", "a PDF document"),
    "pickle by another name": ("a", pickle.dumps([1]), "a Python pickle"),
    "safetensors by another name": (
        "a.txt",
        (99).to_bytes(8, "little") + b'{"a": 1}',
        "a safetensors file",
    ),
    "gguf": ("a", b"GGUF\x03\x00", "a GGUF file"),
    "image": ("a.md", b"\x89PNG\r\n", "an image"),
    "program": ("a", b"\x7fELF\x02", "a program"),
    "packed under another name": ("a.jsonl", gzip.compress(b"x"), r"packed by gzip .name it \.gz"),
    "parquet under another name": ("a.json", WHOLE, r"a Parquet file .name it \.parquet"),
    "text under another name": ("a.parquet", b"text\na\n", "text, not what its name says"),
    "parquet for arrow": ("a.arrow", WHOLE, "a Parquet file"),
    "zero bytes": ("a.csv", b"text\na\0b", r"no text .it holds zero bytes"),
    "late zero bytes": (
        "a.txt",
        b"a" * 300_000 + b"\0",
        "no text: it holds zero bytes, the first at character 300,000",
    ),
    "utf-16 without a mark": (
        "a.txt",
        "ab".encode("utf-16-le"),
        r"no text .it holds zero bytes; UTF-16 needs its byte order mark",
    ),
    "pointer": ("a.jsonl", POINTER, "a Git LFS pointer"),
    "pointer for a table": ("a.parquet", POINTER, "a Git LFS pointer"),
    "pointer for a packed file": ("a.jsonl.zst", POINTER, "a Git LFS pointer"),
    "page": ("a.csv", b"<!DOCTYPE html>", "a page of HTML"),
    "packed page": ("a.csv.gz", gzip.compress(b"<html>"), "a page of HTML"),
    "empty": ("a.jsonl", b"", "the file is empty"),
    "empty table": ("a.parquet", b"", "the file is empty"),
    "cut parquet": ("a.parquet", WHOLE[:-50], "cannot be read .*is it complete"),
    "damaged parquet": (
        "a.parquet",
        WHOLE[:3000] + b"\xff" * 2000 + WHOLE[5000:],
        "cannot be read .*is it complete",
    ),
    "cut arrow": (
        "a.arrow",
        arrow_stream(pa.table(TABLE))[:-60],
        "cannot be read .*is it complete",
    ),
    "damaged arrow": ("a.arrow", damaged_offsets(), "cannot be read .*is it complete"),
    "cut bz2": ("a.jsonl.bz2", bz2.compress(LINES.encode())[:-5], "cannot be read .*ended before"),
    "cut xz": ("a.jsonl.xz", lzma.compress(LINES.encode())[:-5], "cannot be read .*ended before"),
    "no bz2": ("a.jsonl.bz2", LINES.encode(), "cannot be read"),
    "no xz": ("a.jsonl.xz", LINES.encode(), "cannot be read"),
    "cut utf-16": ("a.jsonl", LINES.encode("utf-16")[:-1], "cannot be read .*truncated data"),
    "other encoding": ("a.txt", "ab\né".encode("latin-1"), "cannot be read .line 2 is not UTF-8"),
    "packed table": ("a.parquet.gz", gzip.compress(WHOLE), "such a table is packed by itself"),
    "other columns": (
        "a.parquet",
        parquet(pa.table({"words": ["a"]})),
        "columns words; expected text",
    ),
}


@pytest.mark.parametrize("name", NOT_DATA)
def test_what_is_no_data_is_named(tmp_path, name):
    """Breaks when an unknown, damaged or misnamed file is read as text, gives a library's message
    or a traceback, or passes.
    """
    file, content, message = NOT_DATA[name]
    path = write(tmp_path, file, content)
    with pytest.raises(UserError, match=f"^data file {path}: {message}") as error:
        list(sources.read_rows(path))
    assert "\n" not in str(error.value)
