"""The command line, end to end: pretrain, fine-tune, compress, restore, ask; and bad input."""

import csv
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from cli_helpers import CONFIG, X500, compress, flags, make_files
from conftest import write_jsonl

from icae_jax import lock
from icae_jax.cli import main as cli
from icae_jax.inference.loading import load
from icae_jax.training import config_file, metrics
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import TrainConfig

QUESTIONS = ("--question", "who ?", "--question", "where ?")


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_base):
    return make_files(tmp_path_factory.mktemp("cli"), tiny_base)


@pytest.fixture(scope="module")
def trained(files):
    """The workdir of a fine-tuned compressor, made by the command line from a pretrained one."""
    pretrain, finetune = files["folder"] / "pretrain", files["folder"] / "finetune"
    assert cli.main(flags("pretrain", files, pretrain)) == 0
    assert cli.main(flags("finetune", files, finetune, init_from=pretrain, eval_examples=0)) == 0
    return finetune


@pytest.mark.slow
def test_both_phases_ran(trained):
    lines = metrics.read_lines(trained.parent / "pretrain" / "metrics.jsonl")
    assert (
        {"ae", "lm"} == set(lines[-1]["eval"]["memory"]) == set(lines[-1]["eval"]["wrong_memory"])
    )
    assert {"qa"} == set(metrics.read_lines(trained / "metrics.jsonl")[-1]["train"])
    assert (trained / "DONE").exists() and (trained / "adapter" / "icae.json").exists()


def test_compress_restore_ask(trained, files, capsys):
    """Breaks when one verb cannot read what another wrote, ids or questions get mixed up, or an id
    that is a number is not found."""
    output = str(files["folder"] / "m.safetensors")
    assert cli.main(compress(trained, files, output, "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (
        summary["texts"] == 6
        and summary["context_tokens"] == 6 * 13
        and summary["memory_tokens"] == 6 * 4
    )
    assert summary["ratio"] == pytest.approx(13 / 4) and summary["bytes"] == 6 * 4 * 32 * 4

    assert cli.main(["restore", "--memory", output, "--max_new_tokens", "4", "--json"]) == 0
    restored = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["id"] for r in restored] == [f"doc{i}" for i in range(6)] and all(
        "text" in r for r in restored
    )

    ask = [
        "ask",
        "--memory",
        output,
        *QUESTIONS,
        "--max_new_tokens",
        "4",
        "--batch_size",
        "1",
        "--json",
    ]
    assert cli.main(ask) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(a["id"], a["question"]) for a in answers] == [
        (f"doc{i}", q) for i in range(6) for q in ("who ?", "where ?")
    ]
    assert all(a["k"] == a["tokens_read"] == 4 and a["mean_log_prob"] < 0 for a in answers)
    assert cli.main([*ask, "--id", "doc3"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == answers[6:8]
    assert (
        cli.main([*ask, "--id", "doc9"]) == 2
        and "the memory holds doc0, doc1" in capsys.readouterr().err
    )
    compressor = load(str(trained))
    compressor.save(output, compressor.load_memory(output)[0], ids=[1, 2, 3, 4, 5, 6])
    assert cli.main([*ask, "--id", "4"]) == 0
    answered = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["id"] for a in answered] == [4, 4] and [a["answer"] for a in answered] == [
        a["answer"] for a in answers[6:8]
    ]
    assert cli.main([*ask, "--id", "9"]) == 2 and "the memory holds 1, 2" in capsys.readouterr().err


def test_compress_loses_no_id(trained, files, tmp_path, capsys):
    """Breaks when the first of two ids of a text is lost, rows of joined files share an id, or two
    texts may have the same."""
    one, two, output = (
        tmp_path / "one.jsonl",
        tmp_path / "two.jsonl",
        str(tmp_path / "m.safetensors"),
    )
    write_jsonl(
        one,
        [{"id": "a", "text": "the cat sat"}, {"text": "a dog"}, {"id": "b", "text": "the cat sat"}],
    )
    write_jsonl(two, [{"text": "a bird"}, {"text": "a fish ran"}])
    command = ["compress", "--adapter", str(trained), "--output", output, "--json", "--input"]
    assert (
        cli.main([*command, f"{one},{two}"]) == 0
        and json.loads(capsys.readouterr().out)["texts"] == 5
    )
    memory, ids = load(str(trained)).load_memory(output)
    assert ids == ["a", "one.jsonl:1", "b", "two.jsonl:0", "two.jsonl:1"]
    np.testing.assert_array_equal(memory[[0]].slots, memory[[2]].slots)
    np.testing.assert_array_equal(memory.lengths, [4, 3, 4, 3, 4])
    write_jsonl(two, [{"id": "b", "text": "a bird"}])
    assert cli.main([*command, f"{one},{two}"]) == 2
    assert f"{two}:1: id 'b' is that of another text too ({one}:3)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained_x500(files):
    """The same by configs/x500.py: 4 tokens in pretraining, of no step, 1 or 4 in fine-tuning."""
    pretrain, finetune = files["folder"] / "x500_pretrain", files["folder"] / "x500_finetune"
    few = {"compression.rate": 4.0, "compression.k_choices": "(1,4)", "config": X500}
    argv = flags("pretrain-4", files, pretrain, **few)
    config = config_file.load(TrainConfig, argv[2], config_file.overrides(argv[5:]))
    task = CompressorTask(config)
    task.export(pretrain, task.init())
    assert (
        cli.main(flags("finetune-4", files, finetune, init_from=pretrain, **few | {"steps": 6}))
        == 0
    )
    return finetune


@pytest.mark.nightly
def test_key_value_memories_end_to_end(trained_x500, files, tmp_path, capsys):
    """Breaks when a verb takes only one kind of memory, k is not the caller's, evaluation leaves
    out a k, or bytes are those of slots."""
    last = metrics.read_lines(trained_x500 / "metrics.jsonl")
    assert set(last[-1]["eval"]["memory"]) == {"qa"} and set(last[-1]["eval"]) == {
        "memory",
        "wrong_memory",
        "memory_k1",
        "wrong_memory_k1",
    }
    assert last[-1]["eval_loss"] == pytest.approx(
        (last[-1]["eval"]["memory"]["qa"] + last[-1]["eval"]["memory_k1"]["qa"]) / 2
    )
    assert {line["k"] for line in last if "train" in line} == {1, 4}

    output = str(tmp_path / "m.safetensors")
    command = compress(trained_x500, files, output, "--json")
    for k in (4, 1):
        assert cli.main([*command, "--k", str(k)]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert (
            summary["memory_tokens"] == 6 * k
            and summary["bytes"] == 6 * k * 2 * 2 * 2 * 8 * 4
            and summary["ratio"] == 12 / k
        )
    assert (
        cli.main(
            ["ask", "--memory", output, "--question", "who ?", "--max_new_tokens", "4", "--json"]
        )
        == 0
    )  # of one token
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert cli.main([*command, "--k", "2"]) == 2
    assert "k is 2; this compressor was trained with 1, 4 memory tokens" in capsys.readouterr().err
    assert (
        cli.main([*command, "--adapter", str(trained_x500.parent / "x500_pretrain"), "--k", "1"])
        == 2
    )
    assert "k is 1; this compressor was trained with 4 memory tokens" in capsys.readouterr().err


def test_an_adapter_from_before_the_newer_fields_loads(trained, files, tmp_path, capsys):
    """Breaks when an adapter from before k could be chosen is refused, or read otherwise."""
    shutil.copytree(trained / "adapter", tmp_path / "old")
    info = json.loads((tmp_path / "old" / "icae.json").read_text())
    for field in ("k_choices", "trigger"):
        del info["compression"][field]
    (tmp_path / "old" / "icae.json").write_text(json.dumps(info))
    restored = []
    for adapter in (trained, tmp_path / "old"):
        output = str(tmp_path / "m.safetensors")
        assert cli.main(compress(adapter, files, output)) == 0
        capsys.readouterr()
        assert cli.main(["restore", "--memory", output, "--max_new_tokens", "4"]) == 0
        restored.append(capsys.readouterr().out)
    assert restored[0] == restored[1] and restored[0].strip()


@pytest.mark.nightly
def test_a_memory_is_not_read_by_the_other_methods_adapter(
    trained, trained_x500, files, tmp_path, capsys
):
    output = str(tmp_path / "m.safetensors")
    assert cli.main(compress(trained_x500, files, output)) == 0
    assert cli.main(["restore", "--memory", output, "--adapter", str(trained)]) == 2
    assert "was written with adapter" in capsys.readouterr().err


@pytest.mark.nightly
def test_bfloat16_from_compressing_to_asking(trained, trained_x500, files, tmp_path, capsys):
    """Breaks when a base that only fits in half precision cannot be used, or gives float32."""
    for name, adapter in (("icae", trained), ("x500", trained_x500)):
        sizes = []
        for dtype in ("float32", "bfloat16"):
            memory, flag = str(tmp_path / f"{name}-{dtype}"), ["--base_dtype", dtype]
            assert cli.main(compress(adapter, files, memory, "--json", *flag)) == 0
            sizes.append(json.loads(capsys.readouterr().out)["bytes"])
            ask = [
                "ask",
                "--memory",
                memory,
                *QUESTIONS,
                "--max_new_tokens",
                "4",
                "--batch_size",
                "1",
                "--json",
                *flag,
            ]
            assert cli.main(ask) == 0 and len(capsys.readouterr().out.splitlines()) == 12
            if (name, dtype) != ("x500", "bfloat16"):  # both methods, and both precisions
                restore = ["restore", "--memory", memory, "--max_new_tokens", "4", "--json", *flag]
                assert cli.main(restore) == 0 and len(capsys.readouterr().out.splitlines()) == 6
            assert (
                cli.main(
                    ["export", "hf-cache", "--memory", memory, "--to", f"{memory}-cache", *flag]
                )
                == 0
            )
            capsys.readouterr()
        assert sizes[0] == 2 * sizes[1]


def test_what_was_trained_goes_out_again(trained, files, tmp_path, capsys):
    """Breaks when a verb that converts, exports or inspects is not reached, or refuses what was
    trained and compressed."""
    memory = tmp_path / "m.safetensors"
    assert cli.main(compress(trained, files, memory)) == 0
    assert (
        cli.main(["export", "hf-cache", "--memory", str(memory), "--to", str(tmp_path / "cache")])
        == 0
    )
    assert (tmp_path / "cache" / "cache.safetensors").exists()
    assert (
        cli.main(
            [
                "convert",
                "base",
                "--from",
                files["base"],
                "--to",
                str(tmp_path / "base"),
                "--format",
                "orbax",
            ]
        )
        == 0
    )
    adapter = [
        "convert",
        "adapter",
        "--from",
        str(trained / "checkpoints"),
        "--to",
        str(tmp_path / "peft"),
        "--format",
        "peft",
    ]
    assert cli.main([*adapter, "--base", str(tmp_path / "base"), "--text", files["contexts"]]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "peft"), "--base", str(tmp_path / "base")]) == 0
    out = capsys.readouterr().out
    assert "adapter folder in PEFT's form" in out and "fits " in out
    for argv in (["convert"], ["convert", "gguf"], ["convert", "--help"]):
        assert cli.main(argv) == (0 if "--help" in argv else 2)
        out, err = capsys.readouterr()
        assert "usage: icae convert KIND" in (out if "--help" in argv else err)


def test_empty_rows_of_a_table_are_left_out(trained, files, tmp_path, capsys):
    """Breaks when an empty cell ends training or compressing, is not mentioned, or passes although
    the user is strict; or when a question without an answer keeps its text out of the memory."""
    rows = [json.loads(line) for line in pathlib.Path(files["qa"]).read_text().splitlines()]
    folder, table = tmp_path / "qa", tmp_path / "qa" / "data.csv"
    folder.mkdir()
    with open(table, "w", newline="") as f:
        cells = [[row["context"], row["question"], *row["answers"]] for row in rows]
        csv.writer(f).writerows(
            [["context", "question", "answer"], *cells, ["", "who", "cat"], ["a dog", "who", ""]]
        )
    assert (
        cli.main(
            flags(
                "finetune",
                files,
                tmp_path / "w",
                init_from="scratch",
                eval_examples=0,
                **{"data.train": folder},
            )
        )
        == 0
    )
    err = capsys.readouterr().err
    assert f"data.train: left out 1 empty text (the first: {table}:14)\n" in err
    assert f"data.train: left out 1 question without an answer (the first: {table}:15)\n" in err
    command = [
        "compress",
        "--adapter",
        str(trained),
        "--input",
        str(folder),
        "--output",
        str(tmp_path / "m.safetensors"),
        "--json",
    ]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert (
        json.loads(out)["texts"] == 7
        and f"--input {folder}: left out 1 empty text (the first: {table}:14)\n" == err
    )
    assert (
        cli.main([*command, "--strict"]) == 2
        and f"{table}:14: the text is empty" in capsys.readouterr().err
    )


def test_bad_paths_of_the_other_verbs(trained, files, tmp_path, capsys):
    output = str(tmp_path / "m.safetensors")
    good = compress(trained, files, output)
    for flag, value, message in (
        ("--adapter", str(tmp_path), "holds no trained compressor (adapter folder, training"),
        ("--input", "absent.jsonl", "absent.jsonl: no such file"),
        ("--output", str(tmp_path / "no" / "m"), "absent or cannot be written"),
        ("--base", "absent", "not a folder"),
    ):
        assert cli.main([*good, flag, value]) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.strip().splitlines()) == 1
    assert (
        cli.main(["restore", "--memory", "absent"]) == 2
        and "absent: no such file" in capsys.readouterr().err
    )
    assert (
        cli.main(["train", "--workdir", "w"]) == 2
        and "--config is not given" in capsys.readouterr().err
    )
    assert (
        cli.main(["train", "--config", "absent.py", "--workdir", "w"]) == 2
        and "absent.py: no such file" in capsys.readouterr().err
    )
    assert (
        cli.main(["train", "--config", CONFIG]) == 2
        and "--workdir is not given" in capsys.readouterr().err
    )


def test_a_wrong_base_is_refused(trained, files, tmp_path, tiny_params, tiny_tokenizer, capsys):
    """Breaks when another base of the same shapes is taken: that would load and talk garbage."""
    from conftest import TINY

    from icae_jax.interop.hub import base as bases

    other = tiny_params | {"norm": {"scale": tiny_params["norm"]["scale"] * 1.5}}
    bases.save_base(tmp_path / "other", TINY, other, tiny_tokenizer, dtype="float32")
    argv = [
        "compress",
        "--adapter",
        str(trained),
        "--base",
        str(tmp_path / "other"),
        "--input",
        files["contexts"],
    ]
    assert cli.main([*argv, "--output", str(tmp_path / "m")]) == 2
    err = capsys.readouterr().err
    assert (
        "was trained on a base with fingerprint" in err
        and str(files["base"]) in err
        and "other" in err
    )
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("lora.rank", "4", "config.json: config.lora.rank is '4'; expected int"),
        ("compression.k", None, "config.json: config.compression.k is None; expected int"),
        ("lora", 4, "config.json: lora is 4, and there are fields lora.…"),
        ("identity.base", 7, "config.json: identity.base is 7; expected a fingerprint"),
    ],
)
def test_a_run_s_file_that_was_edited_is_told_by_its_readers(
    field, value, said, trained, files, tmp_path, capsys
):
    """Breaks when a wrong type in a workdir's config.json ends in a traceback."""
    shutil.copytree(trained / "checkpoints", tmp_path / "w" / "checkpoints")
    raw = json.loads((trained / "config.json").read_text())
    (tmp_path / "w" / "config.json").write_text(json.dumps(raw | {field: value}))
    convert = [
        "convert",
        "adapter",
        "--from",
        str(tmp_path / "w"),
        "--base",
        files["base"],
        "--to",
        str(tmp_path / "to"),
    ]
    assert cli.main(convert) == 2 and said in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "w")]) == (2 if field == "identity.base" else 0)


@pytest.mark.parametrize("verb", ["sweep", "evaluate", "prepare", "quickstart"])
def test_each_verb_that_writes_a_folder_is_alone_there(verb, files, tmp_path, capsys, request):
    """Breaks when two of a verb's processes write one folder at once."""
    folder = tmp_path / "there"
    text = write_jsonl(tmp_path / "t.jsonl", [{"text": "the cat"}])
    command = {
        "sweep": ["--config", f"{CONFIG}:pretrain", "--sweep", "rank", "--workdir", str(folder)],
        "prepare": ["json_text", "--split", f"train={text}", "--tfds_dir", str(tmp_path / "sets")],
        "quickstart": ["--workdir", str(folder)],
    }.get(verb)
    if verb == "sweep":
        given = {"base": files["base"], "data.train": text, "data.eval": text}
        command += [f"--config.{name}={value}" for name, value in given.items()]
    elif verb == "evaluate":
        trained = request.getfixturevalue("trained")
        command = [
            "--suite",
            "autoencode",
            "--adapter",
            str(trained),
            "--data",
            files["contexts"],
            "--limit",
            "1",
            "--out",
            str(folder),
        ]
    elif verb == "prepare":
        folder = tmp_path / "sets" / "json_text"
    with lock.only_writer(folder, "--workdir"):
        assert cli.main([verb, *command]) == 2
    err = capsys.readouterr().err
    assert f" {folder} is in use: process {os.getpid()} on " in err and "give another --" in err
    assert os.listdir(folder) == []
