"""Files of every format and encoding become rows, in bounded memory; what is no data is named."""

import bz2
import gzip
import json
import lzma
import pathlib
import pickle

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from icae_jax.data import formats, json_rows, sources, tables
from icae_jax.data.builders import builder
from icae_jax.data.builders.inputs import Request
from icae_jax.data.rows import Sieve
from icae_jax.errors import UserError
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


WRITTEN = {  # the same rows, as (a file's name, its bytes, where the second row stands)
    "lines": ("a.jsonl", LINES.encode(), ":2"),
    "array": ("a.json", json.dumps(ROWS).encode(), ":1"),
    "pretty array": ("a.json", json.dumps(ROWS, indent=1, ensure_ascii=False).encode(), ":6"),
    "array named lines": ("a.jsonl", b"\n\n" + json.dumps(ROWS, indent=2).encode() + b"\n", ":8"),
    "array a line": ("a.ndjson", "".join(json.dumps([row]) + "\n" for row in ROWS).encode(), ":2"),
    "objects over lines": ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(), ":5"),
    "wrapped": ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=1).encode(), ":1: item 2"),
    "mark": ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode(), ":2"),
    "utf-16": ("a.jsonl", LINES.replace("\n", "\r\n").encode("utf-16"), ":2"),
    "utf-16 big": ("a.json", b"\xfe\xff" + json.dumps(ROWS, indent=1, ensure_ascii=False).encode("utf-16-be"), ":6"),
    "utf-32": ("a.csv", CSV.encode("utf-32"), ":3"),
    "csv": ("a.csv", CSV.encode(), ":3"),
    "csv of a mark": ("a.csv", b"\xef\xbb\xbf" + CSV.encode(), ":3"),
    "csv of semicolons": ("a.csv", 'id;text\nr0;one é\nr1;"two, ""quoted""\nover lines"\nr2;three 😀'.encode(), ":3"),
    "csv of semicolons, commas within": (
        "a.csv", '"id";"note, more";text\nr0;;one é\nr1;;"two, ""quoted""\nover lines"\nr2;;three 😀'.encode(), ":3"
    ),
    "csv of bars": ("a.csv", 'id|text\nr0|one é\nr1|"two, ""quoted""\nover lines"\nr2|three 😀'.encode(), ":3"),
    "tsv": ("a.tsv", 'id\ttext\nr0\tone é\nr1\t"two, ""quoted""\nover lines"\nr2\tthree 😀\n'.encode(), ":3"),
    "parquet": ("a.parquet", parquet(pa.table(TABLE), row_group_size=2), " row 1"),
    "parquet of dictionaries": ("a.parquet", parquet(pa.table({k: pa.array(v).dictionary_encode() for k, v in TABLE.items()})), " row 1"),
    "parquet of large texts": ("a.parquet", parquet(pa.table({k: pa.array(v, pa.large_string()) for k, v in TABLE.items()})), " row 1"),
    "parquet of bytes": ("a.parquet", parquet(pa.table({k: pa.array([x.encode() for x in v]) for k, v in TABLE.items()})), " row 1"),
    "arrow stream": ("a.arrow", arrow_stream(pa.table(TABLE)), " row 1"),
    "arrow file": ("a.feather", feather(pa.table(TABLE), chunksize=2), " row 1"),
    "gz": ("a.csv.gz", gzip.compress(CSV.encode()), ":3"),
    "zst": ("A.JSON.ZST", zstandard.compress(json.dumps(ROWS).encode()), ":1"),
    "bz2": ("a.jsonl.bz2", bz2.compress(LINES.encode()), ":2"),
    "xz": ("a.jsonl.xz", lzma.compress(LINES.encode()), ":2"),
}  # fmt: skip


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def prepared(folder, path, **request):
    """The rows of a set that is prepared of a file."""
    prepare(builder("json_text"), Request(paths=(path,), **request), folder / "sets", processes=1)
    return sources.read_rows("tfds:json_text:train", str(folder / "sets"))


@pytest.mark.parametrize("name", WRITTEN)
def test_one_reader_of_every_format(tmp_path, name):
    """Breaks when a format, packing or encoding is not read, is taken for prose, or is read otherwise by another verb; or a row's place
    is not that of its beginning."""
    file, content, where = WRITTEN[name]
    path = write(tmp_path, file, content)
    made = list(sources.read_rows(path))
    assert [(row.text, row.id) for row in made] == [(row["text"], row["id"]) for row in ROWS]
    assert made[1].where == path + where
    assert [(row.text, row.id) for row in prepared(tmp_path, path)] == [
        (row["text"], row["id"]) for row in ROWS
    ]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_json_at_the_seams_of_pieces(tmp_path, monkeypatch, chunk):
    """Breaks when a text, number, literal, escape or character that a piece of the file ends within is malformed, or cut short."""
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    values = [{"text": "é😀\"\\", "n": [12, -1.5e3, True, None]}, 1234567, "x", {"a": {}}, []]  # fmt: skip
    for text in (
        json.dumps(values),
        json.dumps(values, indent=1, ensure_ascii=False),
        f"  {json.dumps(values)}\n{json.dumps(values)}",
    ):
        path = write(tmp_path, "a.json", text.encode())
        with open(path, "rb") as raw:
            made = [value for value, _, _ in json_rows._values(json_rows._Text(raw, path, 1000, 1))]
        assert made == values * text.count("1234567")


def test_memory_holds_a_row_at_a_time(tmp_path, monkeypatch):
    """Breaks when a whole array, table or group of rows is held at once: the most that is held is a few rows, whatever the file's size."""
    monkeypatch.setattr(json_rows, "CHUNK", 1000)
    monkeypatch.setattr(tables, "BATCH_BYTES", 2000)
    held, append = [], json_rows._Text._append
    monkeypatch.setattr(
        json_rows._Text,
        "_append",
        lambda self, *args: (append(self, *args), held.append(len(self.buffer)))[0],
    )
    rows = [{"text": f"{i} " + "x" * 700} for i in range(300)]
    array = write(tmp_path, "a.json", json.dumps(rows))
    assert sum(1 for _ in sources.read_rows(array)) == 300 and max(held) < 4000
    table = write(
        tmp_path,
        "a.parquet",
        parquet(pa.table({"text": [row["text"] for row in rows]}), use_dictionary=False),
    )
    sizes, of_batches = [], tables._rows

    def counted(batches, *args):
        return of_batches((sizes.append(batch.num_rows) or batch for batch in batches), *args)

    monkeypatch.setattr(tables, "_rows", counted)
    assert sum(1 for _ in sources.read_rows(table)) == 300 and max(sizes) <= 4


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet", "a.arrow"])
def test_a_row_of_every_format_is_bounded(tmp_path, name):
    """Breaks when one row of an array or table may be of any length, or its place goes unsaid."""
    texts = ["fine", "x" * 400_000]
    content = {
        "a.json": json.dumps([{"text": text} for text in texts], indent=1),
        "a.csv": "text\nfine\n\"" + "x\n" * 200_000 + "\"\n",
        "a.parquet": parquet(pa.table({"text": texts})),
        "a.arrow": arrow_stream(pa.table({"text": texts})),
    }  # fmt: skip
    path = write(tmp_path, name, content[name])
    rows = sources.read_rows(path, max_row_bytes=100_000)
    assert next(rows).text == "fine"
    where = {"a.json": ":5", "a.csv": ":3"}.get(name, " row 1")
    with pytest.raises(UserError, match=f"^{path}{where}: longer than 100,000 bytes"):
        next(rows)


SQUAD_ANSWERS = pa.array(
    [{"text": ["a", "b"], "answer_start": [1, 2]}, {"text": [], "answer_start": []}, None],
    pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int32()))]),
)


@pytest.mark.parametrize(
    ("answers", "want"),
    [
        (SQUAD_ANSWERS, [("a", "b"), (), ()]),
        (pa.array([["a", "b"], [], None]), [("a", "b"), (), ()]),
        (pa.array([["a", "b"], [], None]).cast(pa.list_(pa.large_string())), [("a", "b"), (), ()]),
        (pa.array(["a", "", None]), [("a",), (), ()]),
    ],
)
def test_answers_in_columns_of_every_type(tmp_path, answers, want):
    """Breaks when SQuAD as the hub has it (a column of structs, some empty or null) is not read, or ends a run."""
    table = pa.table(
        {"context": ["c"] * 3, "question": ["q"] * 3, "answers": answers, "image": [b"\xff"] * 3}
    )
    path = write(tmp_path, "a.parquet", parquet(table))
    sieve = Sieve()
    assert [row.answers for row in sources.read_rows(path, sieve=sieve)] == want
    assert sieve.left_out == {"questions without an answer": (2, f"{path} row 1")}


def test_cells_of_a_csv_are_texts(tmp_path):
    """Breaks when a year becomes a number or a list of answers a text with brackets, or an empty cell ends the run."""
    path = write(
        tmp_path, "a.csv", 'context,question,answers,\nc,q,1984,\nc,q,"[""a"", ""b""]",\nc,q,,\n'
    )
    assert [row.answers for row in sources.read_rows(path)] == [("1984",), ("a", "b"), ()]
    write(tmp_path, "a.csv", "context,question,answers\nc,q,\"{'text': array(['a'])}\"\n")
    with pytest.raises(UserError, match=f"^{path}:2: answers is .*neither a text nor JSON"):
        list(sources.read_rows(path))


@pytest.mark.parametrize(
    ("kind", "value", "want"),
    [
        (pa.timestamp("ns"), 1, "1970-01-01 00:00:00.000000001"),
        (pa.timestamp("us"), 1 << 60, "<value out of range: 1152921504606846976>"),
        (pa.date32(), 1, "1970-01-02"),
        (pa.duration("s"), 1 << 60, "1152921504606846976"),
    ],
)
def test_times_as_ids(tmp_path, kind, value, want):
    """Breaks when an id that is a time which Python cannot hold ends in a traceback."""
    path = write(
        tmp_path, "a.parquet", parquet(pa.table({"text": ["a"], "id": pa.array([value], kind)}))
    )
    assert [row.id for row in sources.read_rows(path)] == [want]
    nested = pa.table(
        {
            "context": ["c"],
            "question": ["q"],
            "answers": [{"text": ["a"]}],
            "id": pa.array([[value]], pa.list_(kind)),
        }
    )
    write(tmp_path, "a.parquet", parquet(nested))
    try:
        assert len(list(sources.read_rows(path))) == 1
    except UserError as error:
        assert str(error).startswith(f"{path} row 0 or one of the next")


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
    """Breaks when what is wrong with a file ends in a traceback, in another place than it stands, or passes; in one reader or another."""
    file, content, message = MALFORMED[name]
    path = write(tmp_path, file, content)
    for read in (sources.read_rows, lambda path: prepared(tmp_path, path)):
        with pytest.raises(UserError, match=f"^{path}{message}") as error:
            list(read(path))
        assert "\n" not in str(error.value)


def damaged_offsets():
    """An Arrow stream that says that a text is longer than the file."""
    content = bytearray(arrow_stream(pa.table({"text": ["a" * 100] * 2})))
    at = content.index((100).to_bytes(4, "little") + (200).to_bytes(4, "little"))
    content[at : at + 4] = (1 << 30).to_bytes(4, "little")
    return bytes(content)


WHOLE = parquet(pa.table({"text": ["x" * i for i in range(3000)]}), row_group_size=100)
NOT_DATA = {  # a file's name, its content, what is said of it
    "pdf": ("a.pdf", b"%PDF", r"\.pdf is no format that is read; expected JSON .*renamed to \.txt"),
    "docx": ("a.docx", b"PK\x03\x04", r"\.docx is no format"),
    "zip": ("a.zip", b"PK\x03\x04", r"\.zip is no format"),
    "pickle": ("a.pkl", pickle.dumps([1]), r"\.pkl is no format"),
    "safetensors": ("a.safetensors", b"", r"\.safetensors is no format"),
    "pdf by another name": ("a.txt", b"%PDF-1.7", "a PDF document"),
    "pickle by another name": ("a", pickle.dumps([1]), "a Python pickle"),
    "safetensors by another name": ("a.txt", (99).to_bytes(8, "little") + b'{"a": 1}', "a safetensors file"),
    "gguf": ("a", b"GGUF\x03\x00", "a GGUF file"),
    "image": ("a.md", b"\x89PNG\r\n", "an image"),
    "program": ("a", b"\x7fELF\x02", "a program"),
    "packed under another name": ("a.jsonl", gzip.compress(b"x"), r"packed by gzip .name it \.gz"),
    "parquet under another name": ("a.json", WHOLE, r"a Parquet file .name it \.parquet"),
    "text under another name": ("a.parquet", b"text\na\n", "text, not what its name says"),
    "parquet for arrow": ("a.arrow", WHOLE, "a Parquet file"),
    "zero bytes": ("a.csv", b"text\na\0b", r"no text .it holds zero bytes"),
    "late zero bytes": ("a.txt", b"a" * 300_000 + b"\0", "no text: it holds zero bytes, the first at character 300,000"),
    "utf-16 without a mark": ("a.txt", "ab".encode("utf-16-le"), r"no text .it holds zero bytes; UTF-16 needs its byte order mark"),
    "pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x", "a Git LFS pointer"),
    "pointer for a table": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid x", "a Git LFS pointer"),
    "pointer for a packed file": ("a.jsonl.zst", b"version https://git-lfs.github.com/spec/v1\noid x", "a Git LFS pointer"),
    "page": ("a.csv", b"<!DOCTYPE html>", "a page of HTML"),
    "packed page": ("a.csv.gz", gzip.compress(b"<html>"), "a page of HTML"),
    "empty": ("a.jsonl", b"", "the file is empty"),
    "empty table": ("a.parquet", b"", "the file is empty"),
    "cut parquet": ("a.parquet", WHOLE[:-50], "cannot be read .*is it complete"),
    "damaged parquet": ("a.parquet", WHOLE[:3000] + b"\xff" * 2000 + WHOLE[5000:], "cannot be read .*is it complete"),
    "cut arrow": ("a.arrow", arrow_stream(pa.table(TABLE))[:-60], "cannot be read .*is it complete"),
    "damaged arrow": ("a.arrow", damaged_offsets(), "cannot be read .*is it complete"),
    "cut bz2": ("a.jsonl.bz2", bz2.compress(LINES.encode())[:-5], "cannot be read .*ended before"),
    "cut xz": ("a.jsonl.xz", lzma.compress(LINES.encode())[:-5], "cannot be read .*ended before"),
    "no bz2": ("a.jsonl.bz2", LINES.encode(), "cannot be read"),
    "no xz": ("a.jsonl.xz", LINES.encode(), "cannot be read"),
    "cut utf-16": ("a.jsonl", LINES.encode("utf-16")[:-1], "cannot be read .*truncated data"),
    "other encoding": ("a.txt", "ab\né".encode("latin-1"), "cannot be read .line 2 is not UTF-8"),
    "packed table": ("a.parquet.gz", gzip.compress(WHOLE), "such a table is packed by itself"),
    "other columns": ("a.parquet", parquet(pa.table({"words": ["a"]})), "columns words; expected text"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_DATA)
def test_what_is_no_data_is_named(tmp_path, name):
    """Breaks when an unknown, damaged or misnamed file is read as prose, ends in a library's own words or a traceback, or passes."""
    file, content, message = NOT_DATA[name]
    path = write(tmp_path, file, content)
    with pytest.raises(UserError, match=f"^data file {path}: {message}") as error:
        list(sources.read_rows(path))
    assert "\n" not in str(error.value)


def test_names_without_a_suffix_are_texts(tmp_path, capsys):
    """Breaks when a text is refused for a point in its name, or JSON lines pass for prose without a word."""
    for name in ("notes", "Dr. Smith", "chapter.1", "a.md", "a.TXT"):
        assert formats.kind(name) == formats.TEXT
    assert (
        next(sources.read_rows(write(tmp_path, "notes", "a text"))).text == "a text"
        and not capsys.readouterr().err
    )
    assert next(sources.read_rows(write(tmp_path, "a.txt", LINES))).text == LINES
    assert (
        "a.txt: read as one text, though its lines are JSON; name it .jsonl"
        in capsys.readouterr().err
    )


def test_a_mark_is_no_part_of_a_text_and_makes_other_data_of_it(tmp_path):
    """Breaks when a text begins with an invisible character, or the tokens that were made of it so are found for it again."""
    path = write(tmp_path, "a.txt", b"\xef\xbb\xbfa text")
    assert next(sources.read_rows(path)).text == "a text" and sources.identity(path)[0][0] != "text"


IN_PARTS = {
    "a.jsonl": LINES,
    "b.jsonl": json.dumps(ROWS, indent=1),
    "c.json": LINES.encode("utf-16"),
    "d.jsonl": b"\xef\xbb\xbf{}\n",
}
IN_PARTS |= {"e.json": json.dumps({"data": ROWS}), "f.json": "{"}


@pytest.mark.parametrize("name", IN_PARTS)
def test_which_files_are_read_in_parts(tmp_path, name):
    """Breaks when preparing cuts a file between lines that are no rows by themselves, or reads plain JSON lines in one process alone."""
    path = write(tmp_path, name, IN_PARTS[name])
    assert formats.is_json_lines(path) == (name == "a.jsonl")
    assert not formats.is_json_lines(
        write(tmp_path, f"{name}.gz", gzip.compress(pathlib.Path(path).read_bytes()))
    )
