"""Whatever a data file holds: rows of texts, or a `UserError`; never another exception."""

import json

import pyarrow as pa
import pyarrow.parquet
from fuzzing import READ, VALUES, changed, examples
from hypothesis import strategies as st

from icae_jax.data import sources
from icae_jax.errors import UserError

ROW = {"text": "the cat", "id": "a", "subset": "s"}
QUESTION = {"context": "the cat", "question": "who ?", "answers": ["the cat"], "id": 3}
FIELDS = (
    "input",
    "prompt",
    "answer",
    "instruction",
    "output",
    "messages",
    "title",
    "is_impossible",
)
CONTENT = st.one_of(
    st.lists(changed(ROW, FIELDS) | changed(QUESTION, FIELDS) | VALUES, max_size=3).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()
    ),
    st.lists(changed(QUESTION, FIELDS) | VALUES, max_size=3).map(
        lambda rows: json.dumps(rows, indent=1).encode()
    ),
    st.lists(changed(QUESTION, FIELDS), max_size=2).map(
        lambda qas: json.dumps(
            {
                "version": "v2.0",
                "data": [{"title": "t", "paragraphs": [{"context": "the cat", "qas": qas}]}],
            }
        ).encode()
    ),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(["utf-8-sig", "utf-16", "utf-16-le", "latin-1"]).map(
        lambda code: 'text,id\n"thé, cat",1\n'.encode(code)
    ),
    st.binary(max_size=60),
)
SUFFIXES = [
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".txt",
    ".parquet",
    ".arrow",
    ".jsonl.gz",
    ".json.zst",
    ".csv.xz",
    ".txt.bz2",
    "",
    ".pdf",
]


@examples(content=CONTENT, suffix=st.sampled_from(SUFFIXES))
def test_any_rows(fixture, content, suffix):
    """Breaks when some data file gives a traceback, or a row that cannot be written."""
    path = fixture("tmp_path_factory").getbasetemp() / f"rows{suffix}"
    path.write_bytes(content)
    check_rows(path)


def check_rows(path):
    """A data file gives rows of texts that can be written, or a one-line error that names it."""
    try:
        rows = list(sources.read_rows(str(path)))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    READ.extend(rows)
    for row in rows:
        texts = [
            row.text,
            row.id,
            row.subset,
            *([] if row.question is None else [row.question, *row.answers]),
        ]
        assert all(isinstance(text, str) and text.encode() is not None for text in texts)


NUMBERS = st.integers(-(2**31), 2**31 - 1)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.text(max_size=3)}
)
TIMES = (
    pa.date32(),
    pa.timestamp("ns"),
    pa.timestamp("us", "UTC"),
    pa.timestamp("s"),
    pa.duration("s"),
)
WORDS = st.lists(st.text(max_size=3), max_size=2)
COLUMNS = {  # types of Arrow, and the values of a column of each
    pa.string(): st.text(max_size=6),
    pa.large_string(): st.text(max_size=6),
    pa.binary(): st.binary(max_size=6),
    pa.int64(): NUMBERS,
    pa.float64(): st.floats(),
    pa.bool_(): st.booleans(),
    pa.list_(pa.string()): WORDS,
    pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})): st.lists(
        MESSAGES, max_size=3
    ),
    pa.struct({"text": pa.list_(pa.string())}): st.fixed_dictionaries({"text": WORDS}),
    **dict.fromkeys(TIMES, NUMBERS),
    pa.list_(pa.date32()): st.lists(NUMBERS, max_size=2),
    pa.struct({"t": pa.timestamp("ns")}): st.fixed_dictionaries({"t": NUMBERS}),
}


FIELDS_OF_TABLES = (
    ("text", "id"),
    ("context", "question", "answers", "id"),
    ("messages", "system"),
    ("context", "qas"),
)


@st.composite
def tables(draw):
    """(bytes, suffix) of a Parquet or Arrow table: known fields of any type, some bytes damaged."""
    columns = {}
    for name in draw(st.sampled_from(FIELDS_OF_TABLES)):
        kind = draw(st.sampled_from([pa.string(), *COLUMNS]))
        columns[name] = pa.array(
            draw(st.lists(st.none() | COLUMNS[kind], min_size=2, max_size=2)), kind
        )
    sink, table = pa.BufferOutputStream(), pa.table(columns)
    suffix = draw(st.sampled_from([".parquet", ".arrow"]))
    if suffix == ".parquet":
        pa.parquet.write_table(table, sink)
    else:
        new_writer = draw(st.sampled_from([pa.ipc.new_file, pa.ipc.new_stream]))
        with new_writer(sink, table.schema) as writer:
            writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    changes = draw(
        st.dictionaries(st.integers(0, len(content) - 1), st.integers(0, 255), max_size=3)
    )
    return bytes(changes.get(i, byte) for i, byte in enumerate(content)), suffix


@examples(table=tables())
def test_any_table(fixture, table):
    """Breaks when a column or value of an unexpected type, or a damaged byte, gives a traceback."""
    content, suffix = table
    path = fixture("tmp_path_factory").getbasetemp() / f"table{suffix}"
    path.write_bytes(content)
    check_rows(path)
