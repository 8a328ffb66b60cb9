"""The data sets' builders on small files in the published form: what is read and refused, and what
stays behind.
"""

import os
import pathlib
import subprocess
import sys
import time

import pytest
from builder_helpers import made, nothing_left, rows, write
from conftest import ROOT, shared

from icae_jax.data import builders, sources
from icae_jax.data.builders import shards
from icae_jax.data.builders.inputs import Request
from icae_jax.data.builders.mrqa import mrqa_dataset_builder as mrqa
from icae_jax.workflows.prepare import prepare

# ---------------------------------------------------------------------------------------------- PwC

PWC = [
    {"input": f"context {i} œ\nsecond line", "prompt": f"prompt {i}", "answer": f"answer {i}"}
    for i in range(5)
]


def test_pwc(tmp_path):
    """Breaks when fields are mixed up, a split is read from the other's file, or rows change their
    order.
    """
    write(tmp_path / "in/PwC_train.jsonl", PWC)
    write(tmp_path / "in/deep/PwC_test.jsonl.zst", PWC[:2])
    builder = made(tmp_path, "pwc", tmp_path / "in")
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 5,
        "test": 2,
    }
    got = [row[:3] for row in rows(tmp_path, "tfds:pwc:train")]
    assert got == [
        (f"context {i} œ\nsecond line", f"prompt {i}", (f"answer {i}",)) for i in range(5)
    ]
    assert [row.id for row in rows(tmp_path, "tfds:pwc:test")] == ["0", "1"]


def test_links_go_by_their_own_names(tmp_path):
    """Breaks when the hub's cache, whose files are links to nameless files, counts as empty."""
    (tmp_path / "in").mkdir()
    os.rename(write(tmp_path / "x.jsonl", PWC), tmp_path / "0f3a")
    (tmp_path / "in/PwC_train.jsonl").symlink_to(tmp_path / "0f3a")
    assert (
        made(tmp_path, "pwc", tmp_path / "in", only=("train",)).info.splits["train"].num_examples
        == 5
    )


def test_absent_files_are_named_with_where_they_are_found(tmp_path):
    """Breaks when half a set is prepared unasked, or the user is not told what to fetch or how to
    do without.
    """
    train = write(tmp_path / "PwC_train.jsonl.gz", PWC)
    with pytest.raises(
        ValueError,
        match=r"1 file missing.*--only train\n  PwC_test\.jsonl .*hub data set sggetao/PwC",
    ):
        made(tmp_path, "pwc", train)
    assert not (tmp_path / "sets").exists()
    assert list(made(tmp_path, "pwc", train, only=("train",)).info.splits) == ["train"]
    with pytest.raises(
        ValueError, match="--only valid: not a part of this set; its parts are train, test"
    ):
        made(tmp_path, "pwc", train, only=("valid",))
    with pytest.raises(ValueError, match=r"--from .*/nowhere: no such file or folder"):
        made(tmp_path, "pwc", tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"data file .*/notes\.pdf: \.pdf is no format that is read"
    ):
        made(tmp_path, "pwc", write(tmp_path / "notes.pdf", ["x"]))
    with pytest.raises(ValueError, match="--from is not given"):
        made(tmp_path, "pwc")
    again = write(tmp_path / "copy/PwC_train.jsonl", PWC)
    with pytest.raises(
        ValueError, match=r"both .*PwC_train\.jsonl\.gz and .*copy/PwC_train\.jsonl are PwC_train"
    ):
        made(tmp_path, "pwc", train, again, only=("train",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "c", "prompt', "not valid JSON"),
        ([1], "a JSON list, expected an object"),
        ({"input": "c", "prompt": "p"}, "no field answer; the fields are input, prompt"),
        ({"input": "c", "prompt": 3, "answer": "a"}, "prompt is int, expected text"),
        ('{"input": "\\ud800", "prompt": "p", "answer": "a"}', "surrogates not allowed"),
    ],
)
@pytest.mark.parametrize("name", ["PwC_train.jsonl", "PwC_train.jsonl.gz"])
def test_a_bad_line_is_named_and_nothing_is_left(tmp_path, monkeypatch, line, message, name):
    """Breaks when a bad line passes or is misnumbered in a later part of the file, or half a set
    stays behind.
    """
    monkeypatch.setattr(shards, "PART", 100)
    path = write(tmp_path / name, [*PWC, "", line, PWC[0]])
    with pytest.raises(ValueError, match=rf"^{path}:7: .*{message}"):
        made(tmp_path, "pwc", path, only=("train",))
    assert nothing_left(tmp_path, "pwc")


def test_a_truncated_file_is_named(tmp_path):
    """Breaks when a truncated download is prepared as if it were complete."""
    for name in ("PwC_train.jsonl.gz", "PwC_train.jsonl.zst"):
        path = write(
            tmp_path / name,
            [{"input": os.urandom(99).hex(), "prompt": "p", "answer": "a"} for _ in range(2000)],
        )
        os.truncate(path, os.path.getsize(path) - 50)
        with pytest.raises(ValueError, match=f"data file {path}: cannot be read"):
            made(tmp_path, "pwc", path, only=("train",))
        assert nothing_left(tmp_path, "pwc")
        os.remove(path)


# --------------------------------------------------------------------------------------------- MRQA


def mrqa_file(dataset, split, contexts=2, questions=2):
    """A file of the shared task: the header, then contexts with their questions."""
    yield {"header": {"dataset": dataset, "mrqa_split": split}}
    for c in range(contexts):
        qas = [
            {
                "qid": f"{dataset}{split}{c}{q}",
                "id": "the original's",
                "question": f"question {q}?",
                "question_tokens": [["question", 0], [str(q), 9], ["?", 10]],
                "answers": [f"answer {q}", "another"],
                "detected_answers": [
                    {"text": f"answer {q}", "char_spans": [[6, 13]], "token_spans": [[1, 2]]}
                ],
            }
            for q in range(questions)
        ]
        yield {
            "id": "",
            "context": f"[PAR] {dataset} {split} {c} [SEP] œ",
            "qas": qas,
            "context_tokens": [["[PAR]", 0]],
        }


def test_mrqa(tmp_path):
    """Breaks when a split takes another's files (they have the same names), the header counts as a
    row, or a subset, an answer or a marker is lost.
    """
    assert len(mrqa.FILES) == 18
    for part in mrqa.FILES:
        folder = "train" if part.split == "train" else "dev"
        name = part.names[-1]  # the shorter names of the task's own scripts
        write(tmp_path / f"in/{folder}/{name}.jsonl.gz", mrqa_file(part.subset, folder))
    builder = made(tmp_path, "mrqa", tmp_path / "in")
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 24,
        "validation": 24,
        "test": 24,
    }
    got = rows(tmp_path, "tfds:mrqa:validation")
    assert sorted({row.subset for row in got}) == [
        "HotpotQA", "NaturalQuestionsShort", "NewsQA", "SQuAD", "SearchQA", "TriviaQA-web",
    ]  # fmt: skip
    assert (
        got[1][:3] == ("[PAR] SQuAD dev 0 [SEP] œ", "question 1?", ("answer 1", "another"))
        and got[1].id == "SQuADdev01"
    )
    assert all("train" in row.text for row in rows(tmp_path, "tfds:mrqa:train"))
    assert {row.subset for row in rows(tmp_path, "tfds:mrqa:test")} >= {
        "BioASQ",
        "DuoRC.ParaphraseRC",
        "TextbookQA",
    }


def test_only_some_subsets_of_mrqa(tmp_path):
    """Breaks when not all absent subsets are named with their addresses, or choosing some takes
    others.
    """
    for folder in ("train", "dev"):
        write(tmp_path / f"in/{folder}/SQuAD.jsonl.gz", mrqa_file("SQuAD", folder))
    write(tmp_path / "in/dev/RACE.jsonl", mrqa_file("RACE", "dev"))
    with pytest.raises(
        ValueError, match=r"15 files missing; .*--only train/SQuAD,validation/SQuAD,test/RACE"
    ) as error:
        made(tmp_path, "mrqa", tmp_path / "in")
    for line in (
        "  train/TriviaQA-web.jsonl (or .jsonl.gz, .jsonl.zst): https://s3.us-east-2.amazonaws.com/mrqa/release/v2/train/TriviaQA-web.jsonl.gz",
        "  dev/NewsQA.jsonl (or .jsonl.gz, .jsonl.zst): https://s3.us-east-2.amazonaws.com/mrqa/release/v2/dev/NewsQA.jsonl.gz",
        "  BioASQ.jsonl (or .jsonl.gz, .jsonl.zst): https://s3.us-east-2.amazonaws.com/mrqa/release/v2/dev/BioASQ.jsonl.gz",
    ):
        assert line in str(error.value).splitlines()
    both = made(tmp_path, "mrqa", tmp_path / "in", only=("SQuAD",), label="squad")
    assert (
        list(both.info.splits) == ["train", "validation"]
        and len(rows(tmp_path, "tfds:mrqa/squad:train")) == 4
    )
    one = made(tmp_path, "mrqa", tmp_path / "in", only=("train/SQuAD", "test/RACE"), label="some")
    assert (
        set(one.info.splits) == {"test", "train"}
        and rows(tmp_path, "tfds:mrqa/some:test")[0].subset == "RACE"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qas": None}, "qas is None, expected a list of questions"),
        ({"qas": ["q"]}, "qas holds 'q', expected an object"),
        ({"qas": [{"qid": "1", "question": "q"}]}, "answers is missing in a question of qas"),
        (
            {"qas": [{"qid": "1", "question": "q", "answers": ["a", 3]}]},
            "answers is \\['a', 3\\], expected a list of texts",
        ),
        ({"qas": [{"question": "q", "answers": ["a"]}]}, "no field qid"),
        ({"context": 3}, "context is int, expected text"),
    ],
)
def test_bad_rows_of_mrqa_are_named(tmp_path, change, message):
    """Breaks when a malformed question is skipped, or its line misnamed (the header is line 1)."""
    header, row = mrqa_file("SQuAD", "train", contexts=1)
    path = write(tmp_path / "train/SQuAD.jsonl.gz", [header, row | change])
    with pytest.raises(ValueError, match=f"^{path}:2: {message}"):
        made(tmp_path, "mrqa", path, only=("train/SQuAD",))


# ------------------------------------------------------------------------------------------ ArxivQA


def test_arxivqa(tmp_path):
    """Breaks when a file of that form is not read, or the user is not told that the set is not
    public.
    """
    row = {"context": "c", "question": "q", "answer": "a"}
    for split in ("train", "validation", "test"):
        write(tmp_path / f"in/{split}.jsonl", [row | {"question": split}])
    made(tmp_path, "arxivqa", tmp_path / "in")
    assert [rows(tmp_path, f"tfds:arxivqa:{s}")[0][:3] for s in ("test", "train")] == [
        ("c", s, ("a",)) for s in ("test", "train")
    ]
    with pytest.raises(
        ValueError,
        match=r"missing; (.|\n)*train\.jsonl .*: not public(.|\n)*any file of lines with context,",
    ):
        made(tmp_path, "arxivqa", write(tmp_path / "other.jsonl", [row]))


# ---------------------------------------------------------------------------------------- json_text


def test_json_text(tmp_path):
    """Breaks when a packing, the field, an id or a split's name is ignored, or empty texts are kept
    or not reported.
    """
    write(tmp_path / "in/a.jsonl.zst", [{"content": "one", "id": 7}, {"content": " \n", "id": 8}])
    write(tmp_path / "in/b.json.gz", [{"content": "two", "meta": {"pile_set_name": "x"}}])
    write(tmp_path / "in/c.jsonl", [{"content": "three"}])
    patterns = (
        ("train", f"{tmp_path}/in/[ab].*"),
        ("train", f"{tmp_path}/in/b.*"),
        ("held_out", f"{tmp_path}/in/c.jsonl"),
    )
    builder = made(tmp_path, "json_text", patterns=patterns, field="content")
    assert [(row.text, row.id) for row in rows(tmp_path, "tfds:json_text:train")] == [
        ("one", "7"),
        ("two", "1"),
    ]
    assert [row.text for row in rows(tmp_path, "tfds:json_text:held_out")] == ["three"]
    assert builder.info.metadata["noted"] == {"empty texts left out": 1}
    with pytest.raises(
        ValueError, match=r"b\.json\.gz:1: no field text; the fields are content, meta"
    ):
        made(tmp_path, "json_text", tmp_path / "in/b.json.gz", label="other")
    with pytest.raises(
        ValueError,
        match=r"no examples for split 'train': left out 1 empty text \(the first: .*\.jsonl:1\)",
    ):
        made(tmp_path, "json_text", write(tmp_path / "empty.jsonl", [{"text": ""}]), label="other")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ((("all", "*"),), "--split all=.*: a split's name is letters, digits and _, and not all"),
        ((("a-b", "*"),), "--split a-b=.*: a split's name"),
        ((("train", "/nowhere/*.jsonl"),), r"--split train=/nowhere/\*\.jsonl: no such file"),
        ((), "either --from .* or --split"),
    ],
)
def test_bad_splits_are_named(tmp_path, patterns, message):
    """Breaks when a split of a bad name or without files is noticed only while writing."""
    with pytest.raises(ValueError, match=message):
        made(tmp_path, "json_text", patterns=patterns)


def test_json_text_on_real_texts(tmp_path):
    """Breaks when real texts are lost or changed on their way through shards."""
    path = shared("data/arxiv/valid.jsonl.gz")
    made(tmp_path, "json_text", path)
    want = [(row.id, row.text) for row in sources.read_rows(str(path))]
    assert [(row.id, row.text) for row in rows(tmp_path, "tfds:json_text:train")] == want


def test_parts_and_shards(tmp_path, monkeypatch):
    """Breaks when a line is lost, doubled or moved at a boundary of parts or shards."""
    texts = [f"text {i} " + "œ" * (7 * i % 40) for i in range(200)]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    monkeypatch.setattr(shards, "SHARD", 300)
    for part in (*range(60, 90), 1 << 20):  # every way a boundary can fall in a line
        monkeypatch.setattr(shards, "PART", part)
        got = [
            raw["text"]
            for p in shards.parts_of(path)
            for raw in shards.objects(p, lambda raw, where: [raw])
        ]
        assert got == texts
    monkeypatch.setattr(shards, "PART", 2000)
    builder = made(tmp_path, "json_text", path)
    assert builder.info.splits["train"].num_shards > len(shards.parts_of(path)) > 3
    assert [row.text for row in rows(tmp_path, "tfds:json_text:train")] == texts


# --------------------------------------------------------------------------------- again, or killed


def test_preparing_again(tmp_path):
    """Breaks when a prepared set is made again, a set of other files passes for it, or the remedy
    does not work.
    """
    path = write(tmp_path / "a.jsonl", [{"text": "one"}])
    first = prepare(builders.builder("json_text"), Request(paths=(path,)), tmp_path / "sets")
    info = tmp_path / "sets/json_text/1.0.0/dataset_info.json"
    stamp = info.stat().st_mtime_ns
    again = prepare(builders.builder("json_text"), Request(paths=(path,)), tmp_path / "sets")
    assert (first[1], again[1]) == (True, False) and list(again[0].info.splits) == ["train"]
    assert info.stat().st_mtime_ns == stamp
    for changed in ({"field": "id"}, {"paths": (write(tmp_path / "b.jsonl", [{"text": "two"}]),)}):
        with pytest.raises(
            ValueError,
            match=r"json_text/1\.0\.0 was prepared from other files or with other .*--name",
        ):
            prepare(
                builders.builder("json_text"),
                Request(**{"paths": (path,)} | changed),
                tmp_path / "sets",
            )
    write(tmp_path / "a.jsonl", [{"text": "six"}])  # as long as before
    with pytest.raises(ValueError, match="other files"):
        made(tmp_path, "json_text", path)
    made(tmp_path, "json_text", path, label="second")
    assert [
        row.text for row in rows(tmp_path, "tfds:json_text:train, tfds:json_text/second:train")
    ] == ["one", "six"]


def test_what_a_killed_preparation_leaves_is_no_set(tmp_path):
    """Breaks when an unfinished folder is read, blocks another try, or is never removed."""
    folder = tmp_path / "sets/json_text/incomplete.ABC123_1.0.0"
    folder.mkdir(parents=True)
    (folder / "json_text-train.array_record-00000-of-00001").write_bytes(b"half")
    with pytest.raises(
        ValueError, match="tfds:json_text:train: cannot be read as a prepared TFDS set"
    ):
        rows(tmp_path, "tfds:json_text:train")
    builder = made(tmp_path, "json_text", write(tmp_path / "a.jsonl", [{"text": "one"}]))
    assert len(rows(tmp_path, "tfds:json_text:train")) == 1 and [
        p.name for p in builder.left_overs()
    ] == [folder.name]


def test_a_dying_process_is_an_error():
    """Breaks when a process killed by the system leaves the others waiting forever, or gives a
    traceback.
    """
    with pytest.raises(ValueError, match=r"a process died while testing .*fewer --processes"):
        shards.run(os._exit, [(1,), (1,)], 2, "testing")


def report_and_wait(path):
    """Work that reports its process and takes long."""
    with open(f"{path}.new", "w") as f:
        f.write(str(os.getpid()))
    os.rename(f"{path}.new", path)
    time.sleep(60)


def wait_for(condition):
    for _ in range(1200):
        if condition():
            return True
        time.sleep(0.1)
    return False


def ended(pid):
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.nightly
@pytest.mark.skipif(
    not os.path.exists("/proc/self/stat"), reason="needs /proc to see processes end"
)
def test_processes_end_with_a_killed_parent(tmp_path):
    """Breaks when killing a preparation leaves its processes running forever."""
    code = (
        "from icae_jax.data.builders import shards; import test_builders; "
        f"jobs = [({str(tmp_path / 'a')!r},), ({str(tmp_path / 'b')!r},)]; "
        "shards.run(test_builders.report_and_wait, jobs, 2, 'testing')"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=env)
    try:
        assert wait_for(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
    finally:
        parent.kill()
        parent.wait()
    pids = [int((tmp_path / name).read_text()) for name in "ab"]
    assert wait_for(lambda: all(map(ended, pids)))


def test_an_unknown_set_is_named():
    with pytest.raises(
        ValueError, match="'pile' is not a set that can be prepared; choose from pwc, mrqa"
    ):
        builders.builder("pile")
