"""Reading texts and questions: every form of row, and errors that name file and line."""

import gzip
import json
import re

import pytest
import zstandard
from conftest import write_jsonl

from icae_jax.data import sources
from icae_jax.data.builders import builder
from icae_jax.data.builders.inputs import Request
from icae_jax.prepare import prepare

QUESTION = {"context": "c", "question": "q"}


@pytest.mark.parametrize(
    ("raw", "row"),
    [
        ({"text": "t"}, ("t", None, None, "w", "0", "")),
        ({"text": "t", "id": 7}, ("t", None, None, "w", "7", "")),
        ({"text": "t", "id": "", "subset": "s"}, ("t", None, None, "w", "0", "s")),
        ({"input": "c", "prompt": "q", "answer": "a"}, ("c", "q", ("a",), "w", "0", "")),
        (QUESTION | {"answers": ["a", "b"], "id": "x", "subset": "s"}, ("c", "q", ("a", "b"), "w", "x", "s")),
        (QUESTION | {"answers": {"text": ["a", "b"], "answer_start": [3]}}, ("c", "q", ("a", "b"), "w", "0", "")),
        (QUESTION | {"answer": "a"}, ("c", "q", ("a",), "w", "0", "")),
    ],
)
def test_rows_of_every_form(raw, row):
    """Breaks when a documented form is not read, or a field lands in another's place."""
    assert sources.parse_row(raw, "w", "0") == row
    assert sources.parse_row(raw, "w", "0").answer == (row[2] and "a")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1], "a JSON list, expected an object"),
        ({}, "fields none; expected text"),
        ({"context": "c"}, "fields context; expected text"),
        ({"text": 3}, "text is int, expected text"),
        ({"input": "c", "prompt": None, "answer": "a"}, "prompt is NoneType, expected text"),
        (QUESTION | {"answers": []}, "answers is \\[\\], expected a list"),
        (QUESTION | {"answers": ["a", 3]}, "answers is \\['a', 3\\], expected a list"),
    ],
)
def test_bad_rows_name_place_and_field(raw, message):
    """Breaks when a bad row is skipped, or its error does not say where it stands and what is wrong."""
    with pytest.raises(ValueError, match=f"^a.jsonl:3: {message}"):
        sources.parse_row(raw, "a.jsonl:3", "2")


def test_json_lines_plain_text_and_several_paths(tmp_path):
    """Breaks when gz, blank lines, plain text or comma-joined paths are read otherwise, or line numbers skip blank lines."""
    one = tmp_path / "one.jsonl.gz"
    with gzip.open(one, "wt") as f:
        f.write('{"text": "first"}\n\n{"text": "third"}\n')
    two = tmp_path / "two.txt"
    two.write_text("a whole\nfile, œ\n", encoding="utf-8")
    rows = list(sources.read_rows(f"{one}, {two}"))
    assert [r.text for r in rows] == ["first", "third", "a whole\nfile, œ\n"]
    assert [r.where for r in rows] == [f"{one}:1", f"{one}:3", str(two)]
    assert [r.id for r in rows] == ["0", "2", "two.txt"]


def test_zst_is_read_as_gz_is(tmp_path):
    """Breaks when a .zst of one frame or many, of a wide window, or without its size in front ends early, or its lines are misnumbered."""
    lines = [json.dumps({"text": f"text {i} œ"}) for i in range(9)]
    params = zstandard.ZstdCompressionParameters(window_log=28)

    def wide(content):
        packer = zstandard.ZstdCompressor(compression_params=params).compressobj()
        return packer.compress(content) + packer.flush()

    path = tmp_path / "a.jsonl.zst"
    cut = ["\n".join(lines[:4])[:-2], "\n".join(lines[:4])[-2:] + "\n\n", "\n".join(lines[4:])]  # the first frame ends within a line
    path.write_bytes(b"".join(pack(part.encode()) for pack, part in zip((zstandard.compress, wide, wide), cut, strict=True)))
    rows = list(sources.read_rows(str(path)))
    assert [r.text for r in rows] == [f"text {i} œ" for i in range(9)] and rows[8].where == f"{path}:10"
    (tmp_path / "b.txt.zst").write_bytes(wide("a whole\nfile, œ\n".encode() * 9999))
    assert next(sources.read_rows(f"{tmp_path}/b.txt.zst")).text == "a whole\nfile, œ\n" * 9999


def test_malformed_json_names_file_and_line(tmp_path):
    """Breaks when the line is miscounted, or reading goes on past it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": "cut')
    rows = sources.read_rows(str(path))
    assert next(rows).text == "fine"
    with pytest.raises(ValueError, match=f"^{path}:3: not valid JSON"):
        next(rows)


def truncated_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps({"text": str(i) * 50}) for i in range(500)).encode())[:-20])
    return path


def truncated_zst(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    content = "\n".join(json.dumps({"text": str(i) * 50}) for i in range(500)).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(content)[:-20])
    return path


def not_zst(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_text('{"text": "plain"}')
    return path


def not_gzip(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_text("plain")
    return path


def not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    return path


@pytest.mark.parametrize("make", [truncated_gzip, truncated_zst, not_gzip, not_zst, not_utf8, lambda tmp_path: tmp_path / "absent.jsonl"])
def test_unreadable_files_are_named(make, tmp_path):
    """Breaks when a broken file ends quietly (a truncated gz would train on half the data) or with a traceback."""
    path = make(tmp_path)
    with pytest.raises(ValueError, match=f"^data file {path}: cannot be read"):
        list(sources.read_rows(str(path)))


def test_missing_and_empty_sources(tmp_path):
    """Breaks when a missing file is noticed late, or an empty source passes."""
    with pytest.raises(ValueError, match=f"data file {tmp_path}/no.jsonl: no such file"):
        sources.identity(f"{tmp_path}/no.jsonl")
    with pytest.raises(ValueError, match="the data source is empty"):
        sources.split_source(" , ")
    for read in (sources.identity, lambda *args: list(sources.read_rows(*args))):
        with pytest.raises(ValueError, match=r"tfds:nothing:train: cannot be read as a prepared TFDS set in data.tfds_dir"):
            read("tfds:nothing:train", str(tmp_path))


def test_identity_follows_the_file(tmp_path):
    """Breaks when a rewritten file counts as the same data."""
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "one"}])
    before = sources.identity(str(path))
    assert before == sources.identity(str(path))
    write_jsonl(path, [{"text": "other"}])
    assert before != sources.identity(str(path))


BUILDER = """
import numpy as np
import tensorflow_datasets as tfds


class TinyQa(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"id": tfds.features.Text(), "context": tfds.features.Text(), "question": tfds.features.Text()}
        answers = tfds.features.Sequence({"text": tfds.features.Text(), "answer_start": np.int32})
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features | {"answers": answers}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(2), "validation": self._generate_examples(1)}

    def _generate_examples(self, count):
        for i in range(count):
            answers = {"text": [f"answer {i}", "another"], "answer_start": [0, 3]}
            yield i, {"id": f"row{i}", "context": "the œ text", "question": f"question {i}", "answers": answers}
"""


def test_prepared_tfds_set(tmp_path, monkeypatch):
    """Breaks when a prepared TFDS set's bytes and arrays are not turned into texts, or the split is ignored."""
    pytest.importorskip("tensorflow_datasets")
    package = tmp_path / "tiny_qa"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tiny_qa_dataset_builder.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(tmp_path)
    from tiny_qa import tiny_qa_dataset_builder

    tiny_qa_dataset_builder.TinyQa(data_dir=tmp_path / "sets", file_format="array_record").download_and_prepare()
    rows = list(sources.read_rows("tfds:tiny_qa:train", str(tmp_path / "sets")))
    assert sorted(r[:3] for r in rows) == [("the œ text", f"question {i}", (f"answer {i}", "another")) for i in range(2)]
    assert {r.id for r in rows} == {"row0", "row1"} and rows[1].where == "tfds:tiny_qa:train row 1"
    assert len(list(sources.read_rows("tfds:tiny_qa:validation", str(tmp_path / "sets")))) == 1
    with pytest.raises(ValueError, match="tfds:tiny_qa:other: cannot be read as a prepared TFDS set"):
        list(sources.read_rows("tfds:tiny_qa:other", str(tmp_path / "sets")))
    with pytest.raises(ValueError, match=r"tfds:tiny_qa:2024-01: the set has no months; its splits are .*validation"):
        list(sources.read_rows("tfds:tiny_qa:2024-01", str(tmp_path / "sets")))


def months(folder, texts=("2401", "2402", "2411")):
    """A set with a split for each of some months, prepared in folder; what it reads by its name."""
    folder.mkdir(exist_ok=True)
    path = write_jsonl(folder / "abstracts.jsonl", [{"id": f"{m}.0000{n}", "text": f"{m} {n}"} for m in texts for n in range(2)])
    prepare(builder("arxiv_abstracts"), Request(paths=(path,)), folder / "sets", processes=1)
    return str(folder / "sets")


def test_months_of_a_set(tmp_path):
    """Breaks when a range loses an end, or takes a month from beyond it: text that should be held out would be trained on."""
    tfds_dir = months(tmp_path)

    def read(split):
        return [row.text for row in sources.read_rows(f"tfds:arxiv_abstracts:{split}", tfds_dir)]

    every = ["2401 0", "2401 1", "2402 0", "2402 1", "2411 0", "2411 1"]
    assert read("..") == every and read("2024_02") == read("2024-02") == every[2:4]
    assert read("..2024-02") == read("2024-01..2024-10") == every[:4] and read("2024-02..") == every[2:]
    rows = list(sources.read_rows("tfds:arxiv_abstracts:2024-02..2024-11", tfds_dir))
    assert rows[2].where == "tfds:arxiv_abstracts:2024_11 row 0" and rows[2].id == "2411.00000"
    for split, message in (
        ("2024-03..2024-10", "no month of the set is in this range; it has 3, from 2024-01 to 2024-11"),
        ("2024-11..2024-01", "no month of the set is in this range"),
        ("2024-12", "no month of the set is in this range"),
        ("2024-012024-02", "two months without .. between them"),
    ):
        with pytest.raises(ValueError, match=f"^tfds:arxiv_abstracts:{split}: {re.escape(message)}"):
            read(split)


def test_identity_of_a_prepared_set_is_its_content(tmp_path):
    """Breaks when a set that was prepared anew passes for the old one, or a moved folder counts as other data (no run could resume)."""
    one, same, other = months(tmp_path / "one"), months(tmp_path / "same"), months(tmp_path / "other", ("2401", "2402", "2412"))
    kept = sources.identity("tfds:arxiv_abstracts:..2024-02", one)
    assert kept == sources.identity("tfds:arxiv_abstracts:..2024-02", same) and json.dumps(kept)
    assert kept != sources.identity("tfds:arxiv_abstracts:..2024-02", other)
    assert kept != sources.identity("tfds:arxiv_abstracts:2024-02", one)
