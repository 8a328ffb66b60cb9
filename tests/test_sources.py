"""Reading texts and questions: every form of row, and errors that name file and line."""

import errno
import gzip
import json
import os
import random
import re
import shutil

import pytest
import zstandard
from conftest import write_jsonl

from icae_jax import errors
from icae_jax.data import places, reading, sources, unpacking
from icae_jax.data.builders import builder, shards
from icae_jax.data.builders.inputs import Request
from icae_jax.data.rows import Row
from icae_jax.errors import UserError
from icae_jax.workflows.prepare import prepare


def test_json_lines_plain_text_and_several_paths(tmp_path):
    """Breaks when gz, blank lines, plain text or comma-joined paths are misread, or line numbers
    skip blank lines.
    """
    one = tmp_path / "one.jsonl.gz"
    with gzip.open(one, "wt") as f:
        f.write('{"text": "first"}\n\n{"text": "third"}\n')
    two = tmp_path / "two.txt"
    two.write_text("a whole\nfile, œ\n", encoding="utf-8")
    rows = list(sources.read_rows(f"{one}, {two}"))
    assert [r.text for r in rows] == ["first", "third", "a whole\nfile, œ\n"]
    assert [r.where for r in rows] == [f"{one}:1", f"{one}:3", str(two)]
    assert [r.id for r in rows] == ["one.jsonl.gz:0", "one.jsonl.gz:2", "two.txt"]
    assert [r.id for r in sources.read_rows(str(one))] == ["0", "2"] and not any(
        r.own_id for r in rows
    )


def test_default_ids_of_joined_files_differ(tmp_path):
    """Breaks when rows of two files get one id, so that one of them cannot be asked for, even if
    the files have the same name.
    """
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(
            tmp_path / folder / "x.jsonl", [{"text": folder}, {"text": folder * 2, "id": "own"}]
        )
    rows = list(sources.read_rows(f"{tmp_path}/a/x.jsonl,{tmp_path}/b/x.jsonl"))
    assert [r.id for r in rows] == ["a/x.jsonl:0", "own", "b/x.jsonl:0", "own"] and [
        r.own_id for r in rows
    ] == [False, True] * 2


def row(text, where, own=None, question=None):
    return Row(text, question, question and ("a",), where, own or where, "", own is not None)


def test_no_id_is_lost_or_stands_for_two_texts():
    """Breaks when one of two rows of a text loses its id, a context with many questions becomes
    many memories, a row's number takes another row's own id, or one id names two texts.
    """
    rows = [
        row("x", "0"),
        row("y", "1", "a"),
        row("y", "2", "b"),
        row("z", "3", "0"),
        row("y", "4"),
        row("y", "5", "a"),
        row("x", "6"),
    ]
    assert {name: r.text for name, r in sources.with_ids(rows).items()} == {
        "0#2": "x",
        "a": "y",
        "b": "y",
        "0": "z",
    }
    asked = [row("c", str(i), question=f"q{i}") for i in range(5)]
    assert list(sources.with_ids(asked)) == ["0"]
    with pytest.raises(UserError, match=r"^7: id 'a' is that of another text too \(1\)"):
        sources.with_ids([*rows, row("other", "7", "a")])


def test_zst_is_read_as_gz_is(tmp_path):
    """Breaks when a .zst with one or many frames, a wide window or an unknown size ends early, or
    its lines are misnumbered.
    """
    lines = [json.dumps({"text": f"text {i} œ"}) for i in range(9)]
    params = zstandard.ZstdCompressionParameters(window_log=28)

    def wide(content):
        packer = zstandard.ZstdCompressor(compression_params=params).compressobj()
        return packer.compress(content) + packer.flush()

    path = tmp_path / "a.jsonl.zst"
    cut = [
        "\n".join(lines[:4])[:-2],
        "\n".join(lines[:4])[-2:] + "\n\n",
        "\n".join(lines[4:]),
    ]  # the first frame ends within a line
    path.write_bytes(
        b"".join(
            pack(part.encode())
            for pack, part in zip((zstandard.compress, wide, wide), cut, strict=True)
        )
    )
    rows = list(sources.read_rows(str(path)))
    assert [r.text for r in rows] == [f"text {i} œ" for i in range(9)] and rows[
        8
    ].where == f"{path}:10"
    (tmp_path / "b.txt.zst").write_bytes(wide("a whole\nfile, œ\n".encode() * 9999))
    assert next(sources.read_rows(f"{tmp_path}/b.txt.zst")).text == "a whole\nfile, œ\n" * 9999


def handed_out(monkeypatch):
    """A list of the sizes of the blocks that .zst files are unpacked into."""
    sizes, readinto = [], unpacking.ZstdFile.readinto

    def counted(self, buffer):
        count = readinto(self, buffer)
        sizes.append(count + len(self._ready))
        return count

    monkeypatch.setattr(unpacking.ZstdFile, "readinto", counted)
    return sizes


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_is_bounded(tmp_path, monkeypatch, name, suffix):
    """Breaks when a small packed file without line ends becomes gigabytes in memory (more than the
    bound and one block is unpacked); or when the error lacks file, line, bound or setting, or a
    line of exactly the bound is refused.
    """
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / (name + suffix)
    fine = b'{"text": "fine"}\n'
    path.write_bytes(pack((fine if name == "a.jsonl" else b"") + b'{"text": "' + b"a" * (32 << 20)))
    sizes = handed_out(monkeypatch)
    rows = sources.read_rows(str(path), max_row_bytes=100_000)
    where = f"{path}:2" if name == "a.jsonl" else str(path)
    if name == "a.jsonl":
        assert next(rows).text == "fine"
    with pytest.raises(
        UserError,
        match=f"^{where}: longer than 100,000 bytes, .*; split it \\(in training, data.max_row",
    ):
        next(rows)
    assert (suffix == ".zst") == bool(sizes) and sum(sizes) <= 100_000 + 2 * unpacking.CHUNK + len(
        fine
    )
    path.write_bytes(pack(fine))
    assert [len(row.text) for row in sources.read_rows(str(path), max_row_bytes=len(fine))]


def test_builders_bound_a_line_too(tmp_path, monkeypatch):
    """Breaks when preparing a set reads lines of any length, or takes the end of a line for a line
    where a part begins inside it.
    """
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"b" * 3_000_000 + b'"}\n{"a": 2}\n')
    with pytest.raises(UserError, match=f"^{path}:2: longer than 1,000 bytes"):
        list(shards.objects(shards.Part(str(path)), lambda raw, where: [raw]))
    assert list(shards.objects(shards.Part(str(path), 500), lambda raw, where: [raw])) == [{"a": 2}]


def test_frames_that_tools_write(tmp_path):
    """Breaks when skippable frames (pzstd), checksums, RLE blocks or raw blocks are misread."""
    checked = zstandard.ZstdCompressor(write_checksum=True)
    noise = json.dumps({"text": random.Random(0).randbytes(300_000).hex()}).encode() + b"\n"
    path = tmp_path / "a.jsonl.zst"
    skipped = (0x184D2A53).to_bytes(4, "little") + (200_000).to_bytes(4, "little") + b"x" * 200_000
    repeated = b'{"text": "' + b"a" * 1_000_000 + b'"}\n'
    path.write_bytes(
        skipped
        + checked.compress(noise)
        + skipped
        + checked.compress(b"")
        + zstandard.compress(repeated)
    )
    assert [len(row.text) for row in sources.read_rows(str(path))] == [600_000, 1_000_000]
    path.write_bytes(path.read_bytes() + skipped[:-1])
    with pytest.raises(UserError, match="ends within a compressed frame"):
        list(sources.read_rows(str(path)))


def test_ends_of_lines_in_a_text(tmp_path):
    """Breaks when a text's line ends, which depend on the system, change its tokens."""
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert next(sources.read_rows(str(tmp_path / "a.txt"))).text == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "I/O error"),
        OSError(errno.ESTALE, "stale"),
        ConnectionResetError("reset"),
    ],
)
def test_faults_that_pass_are_no_bad_input(tmp_path, monkeypatch, error):
    """Breaks when a transient fault of a network file system ends a run for good (exit code 2), or
    is not retried.
    """
    path, tried = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}]), []

    def open_bytes(path):
        tried.append(path)
        raise error

    monkeypatch.setattr(reading, "open_bytes", open_bytes)
    monkeypatch.setattr(errors, "FIRST_DELAY", 0.0)
    with pytest.raises(type(error)) as raised:
        sources.read_all(path)
    assert raised.value is error and len(tried) == errors.TRIES


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"text": "half \ud83d"}, "text"),
        ({"context": "half \ud83d", "question": "q", "answer": "a"}, "context"),
        ({"context": "c", "question": "\udc00", "answer": "a"}, "question"),
        ({"context": "c", "question": "q", "answers": ["a", "\ud83d"]}, "answers"),
        ({"input": "c", "prompt": "\ud83d", "answer": "a"}, "prompt"),
        ({"text": "t", "id": "\ud83d"}, "id"),
        ({"text": "t", "subset": "\ud83d"}, "subset"),
    ],
)
def test_half_a_surrogate_pair_is_refused(tmp_path, raw, field):
    """Breaks when half a surrogate pair, which JSON can spell, reaches the tokenizer or a file."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "whole \\ud83d\\ude00"}\n' + json.dumps(raw))
    rows = sources.read_rows(str(path))
    assert next(rows).text == "whole 😀"
    with pytest.raises(UserError, match=f"^{path}:2: {field} is not valid text"):
        next(rows)


def test_deep_json_names_file_and_line(tmp_path):
    """Breaks when a line of brackets raises RecursionError."""
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 1_000_000)
    for read in (
        lambda: list(sources.read_rows(str(path))),
        lambda: list(shards.objects(shards.Part(str(path)), lambda value, where: [])),
    ):
        with pytest.raises(UserError, match=f"^{path}:1: not valid JSON"):
            read()


def test_malformed_json_names_file_and_line(tmp_path):
    """Breaks when the line is miscounted, or reading goes on after it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": "cut')
    rows = sources.read_rows(str(path))
    assert next(rows).text == "fine"
    with pytest.raises(ValueError, match=f"^{path}:3: not valid JSON"):
        next(rows)


def truncated_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(
        gzip.compress("\n".join(json.dumps({"text": str(i) * 50}) for i in range(500)).encode())[
            :-20
        ]
    )
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


@pytest.mark.parametrize(
    "make",
    [truncated_gzip, truncated_zst, not_gzip, not_zst, lambda tmp_path: tmp_path / "absent.jsonl"],
)
def test_unreadable_files_are_named(make, tmp_path):
    """Breaks when a damaged file gives a traceback or ends silently (half the data would be trained
    on).
    """
    path = make(tmp_path)
    with pytest.raises(ValueError, match=f"^data file {path}: cannot be read"):
        list(sources.read_rows(str(path)))


def test_missing_and_empty_sources(tmp_path):
    """Breaks when a missing file is noticed late, or an empty source passes."""
    with pytest.raises(ValueError, match=f"data file {tmp_path}/no.jsonl: no such file"):
        sources.identity(f"{tmp_path}/no.jsonl")
    with pytest.raises(ValueError, match="the data source is empty"):
        places.split_source(" , ")
    for read in (sources.identity, lambda *args: list(sources.read_rows(*args))):
        with pytest.raises(
            ValueError,
            match=r"tfds:nothing:train: cannot be read as a prepared TFDS set in data.tfds_dir",
        ):
            read("tfds:nothing:train", str(tmp_path))


def test_identity_is_the_content_of_files(tmp_path):
    """Breaks when `touch`, a copy or another folder changes the identity of data (the same command
    could not continue its run), or other content or another format does not.
    """
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "one"}])
    before = sources.identity(str(path))
    os.utime(path, ns=(1, 1))
    (tmp_path / "copies").mkdir()
    copy = str(shutil.copy(path, tmp_path / "copies" / "b.json"))
    assert before == sources.identity(str(path)) == sources.identity(copy) and json.dumps(before)
    as_text = str(shutil.copy(path, tmp_path / "a.txt"))
    write_jsonl(path, [{"text": "two"}])
    assert (
        len(
            {
                json.dumps(x)
                for x in (before, sources.identity(str(path)), sources.identity(as_text))
            }
        )
        == 3
    )


def test_identity_of_a_large_file_is_sampled(tmp_path, monkeypatch):
    """Breaks when a large file is read whole at each start, or its first bytes, last bytes or size
    do not count.
    """
    monkeypatch.setattr(reading, "WHOLE", 100)
    monkeypatch.setattr(reading, "BLOCK", 10)
    monkeypatch.setattr(reading, "BLOCKS", 5)
    path, content = tmp_path / "a", bytes(range(200))

    def hashed(data):
        path.write_bytes(data)
        return reading.content_hash(path)

    def changed(at):
        return hashed(content[:at] + b"\xff" + content[at + 1 :]) != hashed(content)

    assert changed(0) and changed(9) and changed(199) and changed(190) and changed(100)
    assert not changed(20) and hashed(content[:20] + content) != hashed(content)
    monkeypatch.setattr(reading, "WHOLE", 200)
    assert all(changed(at) for at in range(200))


BUILDER = """
import numpy as np
import tensorflow_datasets as tfds


class TinyQa(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {name: tfds.features.Text() for name in ("id", "context", "question")}
        answer = {"text": tfds.features.Text(), "answer_start": np.int32}
        features["answers"] = tfds.features.Sequence(answer)
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(2), "validation": self._generate_examples(1)}

    def _generate_examples(self, count):
        for i in range(count):
            answers = {"text": [f"answer {i}", "another"], "answer_start": [0, 3]}
            row = {"id": f"row{i}", "context": "the œ text", "question": f"question {i}"}
            yield i, row | {"answers": answers}
"""


def test_prepared_tfds_set(tmp_path, monkeypatch):
    """Breaks when bytes and arrays of a prepared TFDS set do not become texts, or the split is
    ignored.
    """
    pytest.importorskip("tensorflow_datasets")
    package = tmp_path / "tiny_qa"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tiny_qa_dataset_builder.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(tmp_path)
    from tiny_qa import tiny_qa_dataset_builder

    tiny_qa_dataset_builder.TinyQa(
        data_dir=tmp_path / "sets", file_format="array_record"
    ).download_and_prepare()
    rows = list(sources.read_rows("tfds:tiny_qa:train", str(tmp_path / "sets")))
    assert sorted(r[:3] for r in rows) == [
        ("the œ text", f"question {i}", (f"answer {i}", "another")) for i in range(2)
    ]
    assert {r.id for r in rows} == {"row0", "row1"} and rows[1].where == "tfds:tiny_qa:train row 1"
    assert len(list(sources.read_rows("tfds:tiny_qa:validation", str(tmp_path / "sets")))) == 1
    with pytest.raises(
        ValueError, match="tfds:tiny_qa:other: cannot be read as a prepared TFDS set"
    ):
        list(sources.read_rows("tfds:tiny_qa:other", str(tmp_path / "sets")))
    with pytest.raises(
        ValueError,
        match=r"tfds:tiny_qa:2024-01: the set has no months; its splits are .*validation",
    ):
        list(sources.read_rows("tfds:tiny_qa:2024-01", str(tmp_path / "sets")))


def months(folder, texts=("2401", "2402", "2411")):
    """A set with splits for some months, prepared in a folder; returns a function that reads it by
    name.
    """
    folder.mkdir(exist_ok=True)
    path = write_jsonl(
        folder / "abstracts.jsonl",
        [{"id": f"{m}.0000{n}", "text": f"{m} {n}"} for m in texts for n in range(2)],
    )
    prepare(builder("arxiv_abstracts"), Request(paths=(path,)), folder / "sets", processes=1)
    return str(folder / "sets")


def test_months_of_a_set(tmp_path):
    """Breaks when a range loses an end or includes a month beyond it: held-out text would be
    trained on.
    """
    tfds_dir = months(tmp_path)

    def read(split):
        return [row.text for row in sources.read_rows(f"tfds:arxiv_abstracts:{split}", tfds_dir)]

    every = ["2401 0", "2401 1", "2402 0", "2402 1", "2411 0", "2411 1"]
    assert read("..") == every and read("2024_02") == read("2024-02") == every[2:4]
    assert (
        read("..2024-02") == read("2024-01..2024-10") == every[:4]
        and read("2024-02..") == every[2:]
    )
    rows = list(sources.read_rows("tfds:arxiv_abstracts:2024-02..2024-11", tfds_dir))
    assert rows[2].where == "tfds:arxiv_abstracts:2024_11 row 0" and rows[2].id == "2411.00000"
    for split, message in (
        (
            "2024-03..2024-10",
            "no month of the set is in this range; it has 3, from 2024-01 to 2024-11",
        ),
        ("2024-11..2024-01", "no month of the set is in this range"),
        ("2024-12", "no month of the set is in this range"),
        ("2024-012024-02", "two months without .. between them"),
    ):
        with pytest.raises(
            ValueError, match=f"^tfds:arxiv_abstracts:{split}: {re.escape(message)}"
        ):
            read(split)


def test_identity_of_a_prepared_set_is_its_content(tmp_path):
    """Breaks when a set that was prepared again from other files keeps its identity, or a moved
    folder changes it (no run could resume).
    """
    one, same, other = (
        months(tmp_path / "one"),
        months(tmp_path / "same"),
        months(tmp_path / "other", ("2401", "2402", "2412")),
    )
    kept = sources.identity("tfds:arxiv_abstracts:..2024-02", one)
    assert kept == sources.identity("tfds:arxiv_abstracts:..2024-02", same) and json.dumps(kept)
    assert kept != sources.identity("tfds:arxiv_abstracts:..2024-02", other)
    assert kept != sources.identity("tfds:arxiv_abstracts:2024-02", one)
