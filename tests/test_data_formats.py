"""Files of all formats and encodings become rows in bounded memory; other files are named."""

import bz2
import gzip
import json
import lzma
import pathlib

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from format_helpers import CSV, LINES, ROWS, TABLE, arrow_stream, feather, parquet, prepared, write

from icae_jax.data import formats, json_rows, sources, tables
from icae_jax.data.rows import Sieve
from icae_jax.errors import UserError

WRITTEN = {  # the same rows, as (a file's name, its bytes, where the second row stands)
    "lines": ("a.jsonl", LINES.encode(), ":2"),
    "array": ("a.json", json.dumps(ROWS).encode(), ":1"),
    "pretty array": ("a.json", json.dumps(ROWS, indent=1, ensure_ascii=False).encode(), ":6"),
    "array named lines": ("a.jsonl", b"\n\n" + json.dumps(ROWS, indent=2).encode() + b"\n", ":8"),
    "array a line": ("a.ndjson", "".join(json.dumps([row]) + "\n" for row in ROWS).encode(), ":2"),
    "objects over lines": (
        "a.json",
        "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
        ":5",
    ),
    "wrapped": (
        "a.json",
        json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
        ":1: item 2",
    ),
    "mark": ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode(), ":2"),
    "utf-16": ("a.jsonl", LINES.replace("\n", "\r\n").encode("utf-16"), ":2"),
    "utf-16 big": (
        "a.json",
        b"\xfe\xff" + json.dumps(ROWS, indent=1, ensure_ascii=False).encode("utf-16-be"),
        ":6",
    ),
    "utf-32": ("a.csv", CSV.encode("utf-32"), ":3"),
    "csv": ("a.csv", CSV.encode(), ":3"),
    "csv of a mark": ("a.csv", b"\xef\xbb\xbf" + CSV.encode(), ":3"),
    "csv of semicolons": (
        "a.csv",
        'id;text\nr0;one é\nr1;"two, ""quoted""\nover lines"\nr2;three 😀'.encode(),
        ":3",
    ),
    "csv of semicolons, commas within": (
        "a.csv",
        (
            '"id";"note, more";text\nr0;;one é\nr1;;"two, ""quoted""\nover lines"\nr2;;three 😀'
        ).encode(),
        ":3",
    ),
    "csv of bars": (
        "a.csv",
        'id|text\nr0|one é\nr1|"two, ""quoted""\nover lines"\nr2|three 😀'.encode(),
        ":3",
    ),
    "tsv": (
        "a.tsv",
        'id\ttext\nr0\tone é\nr1\t"two, ""quoted""\nover lines"\nr2\tthree 😀\n'.encode(),
        ":3",
    ),
    "parquet": ("a.parquet", parquet(pa.table(TABLE), row_group_size=2), " row 1"),
    "parquet of dictionaries": (
        "a.parquet",
        parquet(pa.table({k: pa.array(v).dictionary_encode() for k, v in TABLE.items()})),
        " row 1",
    ),
    "parquet of large texts": (
        "a.parquet",
        parquet(pa.table({k: pa.array(v, pa.large_string()) for k, v in TABLE.items()})),
        " row 1",
    ),
    "parquet of bytes": (
        "a.parquet",
        parquet(pa.table({k: pa.array([x.encode() for x in v]) for k, v in TABLE.items()})),
        " row 1",
    ),
    "arrow stream": ("a.arrow", arrow_stream(pa.table(TABLE)), " row 1"),
    "arrow file": ("a.feather", feather(pa.table(TABLE), chunksize=2), " row 1"),
    "gz": ("a.csv.gz", gzip.compress(CSV.encode()), ":3"),
    "zst": ("A.JSON.ZST", zstandard.compress(json.dumps(ROWS).encode()), ":1"),
    "bz2": ("a.jsonl.bz2", bz2.compress(LINES.encode()), ":2"),
    "xz": ("a.jsonl.xz", lzma.compress(LINES.encode()), ":2"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_one_reader_of_every_format(tmp_path, name):
    """Breaks when a format, packing or encoding is not read, is taken for text, or is read
    differently by another verb; or when a row's place is not where it begins.
    """
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
    """Breaks when a value, escape or character that crosses a block boundary is refused or cut."""
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    values = [{"text": 'é😀"\\', "n": [12, -1.5e3, True, None]}, 1234567, "x", {"a": {}}, []]
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
    """Breaks when a whole array, table or row group is in memory at once instead of a few rows."""
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
    """Breaks when the length of a row is unbounded in some format, or its place is not named."""
    texts = ["fine", "x" * 400_000]
    content = {
        "a.json": json.dumps([{"text": text} for text in texts], indent=1),
        "a.csv": 'text\nfine\n"' + "x\n" * 200_000 + '"\n',
        "a.parquet": parquet(pa.table({"text": texts})),
        "a.arrow": arrow_stream(pa.table({"text": texts})),
    }
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
    """Breaks when SQuAD as the hub stores it (a column of structs, some empty or null) is not
    read.
    """
    table = pa.table(
        {"context": ["c"] * 3, "question": ["q"] * 3, "answers": answers, "image": [b"\xff"] * 3}
    )
    path = write(tmp_path, "a.parquet", parquet(table))
    sieve = Sieve()
    assert [row.answers for row in sources.read_rows(path, sieve=sieve)] == want
    assert sieve.left_out == {"questions without an answer": (2, f"{path} row 1")}


def test_cells_of_a_csv_are_texts(tmp_path):
    """Breaks when a year becomes a number, a list of answers a text, or an empty cell ends
    the run.
    """
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
    """Breaks when a time as id that Python cannot represent gives a traceback."""
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


def test_names_without_a_suffix_are_texts(tmp_path, capsys):
    """Breaks when a text is refused for a dot in its name, or JSON lines silently pass for text."""
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
    """Breaks when a byte order mark is read as text, or cached tokens of an earlier version, which
    did so, are used.
    """
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
    """Breaks when preparing splits a file whose lines are not rows, or reads plain JSON lines in
    one process only.
    """
    path = write(tmp_path, name, IN_PARTS[name])
    assert formats.is_json_lines(path) == (name == "a.jsonl")
    assert not formats.is_json_lines(
        write(tmp_path, f"{name}.gz", gzip.compress(pathlib.Path(path).read_bytes()))
    )
