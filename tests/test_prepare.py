"""The command line of `icae prepare`: prepare, then read what it said to read."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, write_jsonl

from icae_jax.cli import main as cli
from icae_jax.data import sources


@pytest.fixture
def corpus(tmp_path):
    write_jsonl(
        tmp_path / "a.jsonl", [{"text": "the cat", "id": "x"}, {"text": ""}, {"text": "the dog"}]
    )
    return str(tmp_path / "a.jsonl")


def printed_sources(text, tfds_dir):
    """`{source: rows}` of the lines that say what to train on."""
    found = re.findall(r"--config\.data\.train=(\S+) --config\.data\.tfds_dir=(\S+) ", text)
    assert found and all(folder == tfds_dir for _, folder in found)
    return {source: list(sources.read_rows(source, tfds_dir)) for source, _ in found}


def test_prepare_then_read(corpus, tmp_path, capsys):
    """Breaks when a printed source does not read, counts are wrong, or a set is prepared twice."""
    sets = str(tmp_path / "sets")
    assert (
        cli.main(["prepare", "json_text", "--from", corpus, "--tfds_dir", sets, "--processes", "1"])
        == 0
    )
    first = capsys.readouterr().out
    assert f"{sets}/json_text/1.0.0: prepared\n" in first and "  1 empty text left out\n" in first
    assert re.search(r"^  train +2 examples in 1 shard$", first, re.M) and "# 2 examples" in first
    assert [(r.text, r.id) for r in printed_sources(first, sets)["tfds:json_text:train"]] == [
        ("the cat", "x"),
        ("the dog", "1"),
    ]
    assert cli.main(["prepare", "json_text", "--from", corpus, "--tfds_dir", sets]) == 0
    again = capsys.readouterr().out
    assert again == first.replace("1.0.0: prepared", "1.0.0: already prepared, of these files")
    assert sorted(p.name for p in (tmp_path / "sets").iterdir()) == ["json_text"], (
        "no folder for downloads"
    )
    assert not {"tensorflow", "apache_beam"} & set(sys.modules)


def test_the_result_as_json(corpus, tmp_path, capsys):
    """Breaks when --json prints anything but one object, or lacks the sources to train on."""
    command = ["prepare", "json_text", "--from", corpus, "--tfds_dir", str(tmp_path / "sets")]
    assert cli.main([*command, "--processes", "1", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["prepared_now"] and about["sources"] == {"tfds:json_text:train": 2}
    assert about["splits"] == {"train": {"examples": 2, "shards": 1}} and not about["months"]
    assert about["noted"] == {"empty texts left out": 1}


def test_another_source_into_the_same_place(corpus, tmp_path, capsys):
    """Breaks when a set is replaced by or kept for other files, or --name does not help."""
    sets = str(tmp_path / "sets")
    common = ["prepare", "json_text", "--tfds_dir", sets, "--processes", "1"]
    assert cli.main([*common, "--from", corpus]) == 0
    other = ["--split", f"train={corpus}", "--split", f"valid={corpus}"]
    capsys.readouterr()
    assert cli.main([*common, *other]) == 2
    assert (
        "was prepared from other files or with other options; "
        "give this one a name of its own with --name" in capsys.readouterr().err
    )
    assert cli.main([*common, *other, "--name", "twice"]) == 0
    found = printed_sources(capsys.readouterr().out, sets)
    assert {source: len(rows) for source, rows in found.items()} == {
        "tfds:json_text/twice:train": 2,
        "tfds:json_text/twice:valid": 2,
    }


def test_what_is_left_out_is_said(tmp_path, capsys):
    """Breaks when an unanswerable question is kept, is left out silently, or passes --strict.

    Also when strictness makes another set of the same files, or what was left out is forgotten.
    """
    rows = [{"input": "c", "prompt": f"q{i}", "answer": "" if i == 1 else "a"} for i in range(3)]
    path, sets = (
        write_jsonl(
            tmp_path / "PwC_train.jsonl", [*rows, {"input": None, "prompt": "q", "answer": "a"}]
        ),
        str(tmp_path / "sets"),
    )
    command = [
        "prepare",
        "pwc",
        "--from",
        path,
        "--only",
        "train",
        "--tfds_dir",
        sets,
        "--processes",
        "1",
    ]
    strict = (
        f"icae prepare: {path}:2: the question has no answer; mend or remove it, "
        "or leave such rows out, without --strict\n"
    )
    assert cli.main([*command, "--strict"]) == 2 and capsys.readouterr().err == strict
    for _ in range(2):
        assert cli.main(command) == 0
        out, err = capsys.readouterr()
        assert "  1 question without an answer left out\n" in out and re.search(
            r"train +2 examples", out
        )
        assert (
            f"left out 1 question without an answer (the first: {path}:2); "
            f"1 empty text (the first: {path}:4)\n" in err
        )
    assert cli.main([*command, "--strict"]) == 2 and capsys.readouterr().err == strict


def test_months_are_offered_as_a_range(tmp_path, capsys):
    """Breaks when hundreds of months are listed one by one, or their range does not read."""
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"id": f"24{m:02d}.00001", "text": f"month {m}"} for m in (1, 2, 5)]
    )
    sets = str(tmp_path / "sets")
    assert cli.main(["prepare", "arxiv_abstracts", "--from", path, "--tfds_dir", sets]) == 0
    found = printed_sources(capsys.readouterr().out, sets)
    assert [row.text for row in found["tfds:arxiv_abstracts:2024-01..2024-05"]] == [
        "month 1",
        "month 2",
        "month 5",
    ] and len(found) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pile"], "'pile' is not a set that can be prepared; choose from pwc"),
        (["pwc"], "--from is not given"),
        (
            ["pwc", "--from", "CORPUS", "--field", "x"],
            "--field: pwc does not take it; it takes --from, --only",
        ),
        (
            ["json_text", "--from", "CORPUS", "--only", "train"],
            "--only: json_text does not take it; it takes --from, --split, --field",
        ),
        (["json_text", "--split", "train"], "--split train: give NAME=GLOB"),
        (["json_text", "--from", "CORPUS", "--name", "a/b"], "--name is 'a/b'; give letters"),
        (
            ["json_text", "--from", "CORPUS", "--processes", "0"],
            "--processes is 0; it must be positive",
        ),
        (
            ["json_text", "--from", "CORPUS", "--tfds_dir", "gs://bucket/sets"],
            "--tfds_dir gs://bucket/sets: sets are prepared in a local",
        ),
        (["arxivqa", "--from", "CORPUS"], "not public"),
    ],
)
def test_bad_flags_are_named_before_anything_is_written(
    corpus, tmp_path, monkeypatch, capsys, argv, message
):
    """Breaks when a useless flag is taken, or a bad one is found after a folder was made."""
    monkeypatch.chdir(tmp_path)
    argv = [corpus if a == "CORPUS" else a for a in argv]
    assert cli.main(["prepare", "--tfds_dir", "sets", *argv]) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_help_says_what_each_set_is_made_of(capsys):
    """Breaks when a set is missing from the help, or importing one fails."""
    with pytest.raises(SystemExit) as end:
        cli.main(["prepare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        end.value.code == 0
        and "mrqa, of train/NAME.jsonl.gz and dev/NAME.jsonl.gz" in text
        and "Cornell-University/arxiv" in text
    )


def test_as_a_command_in_two_processes(tmp_path):
    """Breaks when several processes need a `__main__` guard, or write anything to stderr."""
    lines = "".join(
        json.dumps({"id": f"240{m}.0000{n}", "text": f"{m} {n}"}) + "\n"
        for m in (1, 2)
        for n in range(9)
    )
    (tmp_path / "b.json").write_text(lines)
    (tmp_path / "a.jsonl").write_text(lines.replace("240", "230"))
    argv = [
        "prepare",
        "arxiv_abstracts",
        "--from",
        "a.jsonl",
        "b.json",
        "--tfds_dir",
        "sets",
        "--processes",
        "2",
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "icae_jax", *argv],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "") and "36 examples" in done.stdout
    assert (
        len(list(sources.read_rows("tfds:arxiv_abstracts:..2023-02", str(tmp_path / "sets")))) == 18
    )
