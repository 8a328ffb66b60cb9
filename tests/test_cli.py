"""The command line, end to end: pretrain, fine-tune, compress, restore, ask; and one clear error for each kind of bad input."""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, WORDS, write_jsonl

from icae_jax import lock
from icae_jax.cli import main as cli
from icae_jax.inference.loading import load
from icae_jax.runtime import platforms
from icae_jax.training import config_file, metrics
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import BaseConfig, TrainConfig

CONFIG, X500 = str(ROOT / "configs" / "icae.py"), str(ROOT / "configs" / "x500.py")
SMALL = {
    "steps": 4, "batch_size": 4, "dtype": "float32", "remat": "none", "eval_every": 4, "log_every": 2, "eval_examples": 12,
    "compression.k": 4, "lora.rank": 4, "optimizer.warmup_steps": 1, "data.context_lengths": "(16,)", "data.context_weights": "(1.0,)",
}  # fmt: skip


QUESTIONS = ("--question", "who ?", "--question", "where ?")


def sentence(rng, size):
    return " ".join(rng.choice(WORDS[8:], size=size))


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    contexts = [sentence(rng, 12) for _ in range(6)]
    qa = [
        {"context": c, "question": sentence(rng, 4), "answers": [sentence(rng, 2)]}
        for c in contexts
        for _ in range(2)
    ]
    return {
        "folder": folder,
        "base": str(tiny_base),
        "text": write_jsonl(folder / "text.jsonl", [{"text": sentence(rng, 46)} for _ in range(8)]),
        "qa": write_jsonl(folder / "qa.jsonl", qa),
        "contexts": write_jsonl(
            folder / "in.jsonl", [{"id": f"doc{i}", "text": c} for i, c in enumerate(contexts)]
        ),
    }


def flags(phase, files, workdir, config=CONFIG, **changes):
    data = files["text"] if phase == "pretrain" else files["qa"]
    values = SMALL | {
        "base": files["base"],
        "data.train": data,
        "data.eval": data,
        "data.cache_dir": str(files["folder"] / "cache"),
    }
    values |= changes
    return [
        "train",
        "--config",
        f"{config}:{phase}",
        "--workdir",
        str(workdir),
        *[f"--config.{k}={v}" for k, v in values.items()],
    ]


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
    """Breaks when what one verb writes another cannot read, ids and questions get mixed up, or an id that is a number is not found."""
    output = str(files["folder"] / "m.safetensors")
    assert (
        cli.main(
            [
                "compress",
                "--adapter",
                str(trained),
                "--input",
                files["contexts"],
                "--output",
                output,
                "--json",
            ]
        )
        == 0
    )
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
    """Breaks when of two rows with one text the first id is lost, rows of joined files share one, or two texts have one id."""
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
    compress = ["compress", "--adapter", str(trained), "--output", output, "--json", "--input"]
    assert (
        cli.main([*compress, f"{one},{two}"]) == 0
        and json.loads(capsys.readouterr().out)["texts"] == 5
    )
    memory, ids = load(str(trained)).load_memory(output)
    assert ids == ["a", "one.jsonl:1", "b", "two.jsonl:0", "two.jsonl:1"]
    np.testing.assert_array_equal(memory[[0]].slots, memory[[2]].slots)
    np.testing.assert_array_equal(memory.lengths, [4, 3, 4, 3, 4])
    write_jsonl(two, [{"id": "b", "text": "a bird"}])
    assert cli.main([*compress, f"{one},{two}"]) == 2
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


def test_key_value_memories_end_to_end(trained_x500, files, tmp_path, capsys):
    """Breaks when a verb takes one kind of memory alone, k is not the caller's, evaluation leaves a k out, or bytes are those of slots."""
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
    compress = [
        "compress",
        "--adapter",
        str(trained_x500),
        "--input",
        files["contexts"],
        "--output",
        output,
        "--json",
    ]
    for k in (4, 1):
        assert cli.main([*compress, "--k", str(k)]) == 0
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
    assert cli.main([*compress, "--k", "2"]) == 2
    assert "k is 2; this compressor was trained with 1, 4 memory tokens" in capsys.readouterr().err
    assert (
        cli.main([*compress, "--adapter", str(trained_x500.parent / "x500_pretrain"), "--k", "1"])
        == 2
    )
    assert "k is 1; this compressor was trained with 4 memory tokens" in capsys.readouterr().err


def test_an_adapter_from_before_the_newer_fields_loads(trained, files, tmp_path, capsys):
    """Breaks when an adapter that was written before k could be chosen is refused, or read otherwise."""
    shutil.copytree(trained / "adapter", tmp_path / "old")
    info = json.loads((tmp_path / "old" / "icae.json").read_text())
    for field in ("k_choices", "trigger"):
        del info["compression"][field]
    (tmp_path / "old" / "icae.json").write_text(json.dumps(info))
    restored = []
    for adapter in (trained, tmp_path / "old"):
        output = str(tmp_path / "m.safetensors")
        assert (
            cli.main(
                [
                    "compress",
                    "--adapter",
                    str(adapter),
                    "--input",
                    files["contexts"],
                    "--output",
                    output,
                ]
            )
            == 0
        )
        capsys.readouterr()
        assert cli.main(["restore", "--memory", output, "--max_new_tokens", "4"]) == 0
        restored.append(capsys.readouterr().out)
    assert restored[0] == restored[1] and restored[0].strip()


def test_a_memory_is_not_read_by_the_other_methods_adapter(
    trained, trained_x500, files, tmp_path, capsys
):
    output = str(tmp_path / "m.safetensors")
    assert (
        cli.main(
            [
                "compress",
                "--adapter",
                str(trained_x500),
                "--input",
                files["contexts"],
                "--output",
                output,
            ]
        )
        == 0
    )
    assert cli.main(["restore", "--memory", output, "--adapter", str(trained)]) == 2
    assert "was written with adapter" in capsys.readouterr().err


def test_bfloat16_from_compressing_to_asking(trained, trained_x500, files, tmp_path, capsys):
    """Breaks when a base that only fits in half precision cannot be used from the command line, or its memory is kept in float32."""
    for name, adapter in (("icae", trained), ("x500", trained_x500)):
        sizes = []
        for dtype in ("float32", "bfloat16"):
            memory, flag = str(tmp_path / f"{name}-{dtype}"), ["--base_dtype", dtype]
            assert (
                cli.main(
                    [
                        "compress",
                        "--adapter",
                        str(adapter),
                        "--input",
                        files["contexts"],
                        "--output",
                        memory,
                        "--json",
                        *flag,
                    ]
                )
                == 0
            )
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
    """Breaks when a verb that converts, exports or inspects is not reached, or does not take what training and compressing wrote."""
    memory = tmp_path / "m.safetensors"
    assert (
        cli.main(
            [
                "compress",
                "--adapter",
                str(trained),
                "--input",
                files["contexts"],
                "--output",
                str(memory),
            ]
        )
        == 0
    )
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


def test_module_and_help_list_the_verbs():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-m", "icae_jax", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    ).stdout
    assert all(any(line.split()[:1] == [verb] for line in out.splitlines()) for verb in cli.VERBS)
    assert cli.main([]) == 2 and cli.main(["nonsense"]) == 2


def test_dispatching_does_not_import_jax():
    """Breaks when a verb imports JAX before `main` has set what JAX reads when it is imported."""
    code = "import sys; import icae_jax.cli.main; print('jax' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert out.stdout == "False\n"


def test_old_spellings_work_and_say_so(monkeypatch, capsys):
    """Breaks when a command of the release before fails, or the new spelling is not told."""
    called = []
    for verb in ("train", "quickstart"):
        monkeypatch.setitem(cli.VERBS, verb, (lambda argv: called.append(argv) or 0, ""))
    assert cli.main(["train-base", "--workdir", "a-b", "--config.data.train=x-y"]) == 0
    assert "train-base is now train base" in capsys.readouterr().err
    assert cli.main(["quickstart", "--from-scratch"]) == 0
    assert "--from-scratch is now --from_scratch" in capsys.readouterr().err
    assert cli.main(["quickstart", "--held-out=3-4", "--a_b", "-x", "-1"]) == 0
    assert capsys.readouterr().err == ""
    assert called == [
        ["base", "--workdir", "a-b", "--config.data.train=x-y"],
        ["--from_scratch"],
        ["--held_out=3-4", "--a_b", "-x", "-1"],
    ]


def test_the_command_starts_over_once_with_huge_pages(monkeypatch, capsys):
    """Breaks when the command loses its arguments, starts over for ever, does so when called from Python, or overrides the user."""
    started = []
    monkeypatch.setattr(
        cli.os, "execv", lambda *call: started.append((call, os.environ["GLIBC_TUNABLES"]))
    )
    for verb in ("bench", "inspect"):
        monkeypatch.setitem(cli.VERBS, verb, (lambda argv: 0, ""))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "argv", ["icae", "bench", "train"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/icae", "bench", "train"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    assert cli.command() == 0 and not started
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert cli.main() == 0 and not started
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(cli.platforms, "check", lambda: None)
    assert cli.command() == 0 and not started
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(sys, "argv", ["icae", "inspect", "x"])
    assert cli.command() == 0 and not started
    monkeypatch.setattr(sys, "argv", ["icae", "bench", "train"])
    assert cli.command() == 0 and cli.command() == 0
    command = [sys.executable, "/bin/icae", "bench", "train"]
    assert started == [((sys.executable, command), "glibc.malloc.hugetlb=1")]


def test_an_accelerator_in_use_is_seen_without_jax(monkeypatch):
    """Breaks when a GPU without its plugin counts, or one that JAX will use does not."""
    point = type("Point", (), {"name": "xla_cuda13"})
    plugins, devices = [], []
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("JAX_PLATFORM_NAME", raising=False)
    monkeypatch.setattr(platforms.importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(platforms.glob, "glob", lambda pattern: devices)
    assert platforms.cpu_only()
    plugins.append(point)
    assert platforms.cpu_only()  # the plugin without a device
    devices.append("/dev/nvidia0")
    monkeypatch.setattr(platforms, "tpu_chips", lambda: [])
    assert not platforms.cpu_only()
    plugins.clear()
    assert platforms.cpu_only()  # the device without its plugin
    monkeypatch.setattr(platforms, "tpu_chips", lambda: devices)
    assert not platforms.cpu_only()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert platforms.cpu_only()


@pytest.mark.parametrize("argv", [["train", "--help"], ["help", "train", "base"]])
def test_help_of_training_lists_the_fields(argv, capsys):
    """Breaks when the help of training leaves a field of its configuration out."""
    with pytest.raises(SystemExit, match="0"):
        cli.main(argv)
    out = capsys.readouterr().out
    fields = config_file.default_fields(BaseConfig if argv[-1] == "base" else TrainConfig)
    assert all(f"--config.{field}=" in out for field in fields) and "exit codes:" in out


def test_a_trace_goes_into_a_folder(files, tmp_path, capsys):
    """Breaks when that the path is a file is found out steps later."""
    (tmp_path / "file").touch()
    assert (
        cli.main([*flags("pretrain", files, tmp_path / "w"), "--profile", str(tmp_path / "file")])
        == 2
    )
    assert (
        f"--profile {tmp_path / 'file'} is a file; give a folder" in capsys.readouterr().err
        and not (tmp_path / "w").exists()
    )


BAD = {
    "unknown field": (
        {"compresion.k": 4},
        r"compresion\.k is not a field .*; is compression\.k meant",
    ),
    "k of zero": ({"compression.k": 0}, r"compression\.k is 0"),
    "negative rate": ({"compression.rate": -1}, r"compression\.rate is -1"),
    "wrong type": ({"steps": "many"}, r"steps"),
    "negative seed": ({"seed": -1}, r"seed is -1; give a whole number from 0 on"),
    "huge seed": ({"seed": 10**20}, r"seed is 1.*0; give a whole number"),
    "a seed that is another's": (
        {"seed": 2**32},
        r"seed is 4294967296; give a whole number from 0 on, below 2\*\*32",
    ),
    "no such data": ({"data.train": "absent.jsonl"}, r"absent\.jsonl: no such file"),
    "no such base": ({"base": "absent"}, r"base 'absent' is not a folder"),
    "context too long": (
        {"data.context_lengths": "(1000,)"},
        r"context_lengths holds 1000, which needs \d+ positions .* base has 256",
    ),
    "unknown method": (
        {"compression.method": "lm"},
        r"compression\.method is 'lm'; choose from icae, x500",
    ),
    "layout of another method": (
        {"compression.method": "x500"},
        r"layout is 'servable', not one of method x500; choose from clean",
    ),
    "choices without k": (
        {"compression.k_choices": "(1,2)"},
        r"compression\.k_choices is \(1, 2\)",
    ),
    "unknown phase": ({"draw_k": "('tune',)"}, r"draw_k is 'tune'; choose pretrain or finetune"),
    "labels on masked padding": (
        {"objectives.pad_labels": True},
        r"objectives\.pad_labels is for compression\.layout reference",
    ),
    "qa in pretraining": ({"objectives.qa": 1.0}, r"objectives\.qa is 1\.0 in phase pretrain"),
    "unknown layout": ({"compression.layout": "odd"}, r"layout is 'odd'; choose from"),
    "unknown template": ({"objectives.template": "odd"}, r"objectives\.template is 'odd'"),
    "batch and accumulate": ({"accumulate": 3}, r"batch_size 4 is not a multiple of accumulate 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configuration_is_one_error_before_anything_is_written(name, files, tmp_path, capsys):
    changes, message = BAD[name]
    assert cli.main(flags("pretrain", files, tmp_path / "w", **changes)) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and err.startswith("icae train: ")
    assert re.search(message, err), err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("stray", ["steps=2", "config.steps=2", "more"])
def test_an_argument_that_is_no_flag_is_refused(stray, files, tmp_path, capsys):
    """Breaks when a forgotten dash trains something else than was asked for."""
    assert cli.main([*flags("pretrain", files, tmp_path / "w"), stray]) == 2
    assert (
        capsys.readouterr().err
        == f"icae train: '{stray}' is no flag; fields are written --config.FIELD=VALUE\n"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x\n", r"config\.py:1: NameError: name 'x' is not defined"),
        (
            "def get_config():\n    return 1 / 0\n",
            r"config\.py:2: ZeroDivisionError: division by zero",
        ),
        (
            "import absent_module\n",
            r"config\.py:1: ModuleNotFoundError: No module named 'absent_module'",
        ),
        (
            "def get_config():\n    raise ValueError('choose :a or :b')\n",
            r"config\.py:2: ValueError: choose :a or :b$",
        ),
        ("def get_config():\n    return 3\n", r"returns int, not a dict or ConfigDict"),
        ("(\n", r"'\(' was never closed"),
    ],
)
def test_what_is_wrong_in_a_configuration_file_is_the_users(text, told, tmp_path, capsys):
    """Breaks when a slip in the user's own file is a traceback, which launchers restart, or its message is lost."""
    (tmp_path / "config.py").write_text(text)
    assert (
        cli.main(
            ["train", "--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "w")]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert (
        err.startswith("icae train: --config: ") and err.count("\n") == 1 and re.search(told, err)
    ), err


def test_output_that_nobody_reads_ends_quietly(monkeypatch, capsys):
    """Breaks when `icae … | head` ends in a traceback, or a connection that broke somewhere else is taken for that."""

    def speaking(argv):
        print("x", flush=True)
        raise BrokenPipeError(32, "Broken pipe")  # where it is read

    monkeypatch.setitem(cli.VERBS, "inspect", (speaking, "speaks"))
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError):
            cli.main(["inspect"])
        os.close(reader)
        assert cli.main(["inspect"]) == 141
    assert capsys.readouterr().err == ""


DATA = {
    "malformed": ('{"text": "a cat"}\n{"text": \n', r"data\.jsonl:2: not valid JSON"),
    "no bytes": ("", r"data\.jsonl: the file is empty"),
    "empty": ("\n", r"no rows; the data set is empty"),
    "no tokens": (
        '{"text": "  "}\n',
        r"no rows; all were left out: 1 texts without tokens \(the first: .*data\.jsonl:1\)",
    ),
    "empty row": (
        '{"text": "a cat"}\n{"text": ""}\n',
        r"data\.jsonl:2: the text is empty; .* without data\.strict",
    ),
    "no fields": ('{"words": 1}\n', r"data\.jsonl:1: fields words; expected"),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_data_is_one_error(name, files, tmp_path, capsys):
    content, message = DATA[name]
    (tmp_path / "data.jsonl").write_text(content)
    assert (
        cli.main(
            flags(
                "pretrain",
                files,
                tmp_path / "w",
                **{"data.train": tmp_path / "data.jsonl", "data.strict": name == "empty row"},
            )
        )
        == 2
    )
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and re.search(message, err), err


def test_empty_rows_of_a_table_are_left_out(trained, files, tmp_path, capsys):
    """Breaks when one empty cell ends training or compressing, goes without a word, or passes where the user asks for strictness; or when a
    question without an answer keeps its text out of the memory."""
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
    assert f"data.train: left out 1 empty texts (the first: {table}:14)\n" in err
    assert f"data.train: left out 1 questions without an answer (the first: {table}:15)\n" in err
    compress = [
        "compress",
        "--adapter",
        str(trained),
        "--input",
        str(folder),
        "--output",
        str(tmp_path / "m.safetensors"),
        "--json",
    ]
    assert cli.main(compress) == 0
    out, err = capsys.readouterr()
    assert (
        json.loads(out)["texts"] == 7
        and f"--input {folder}: left out 1 empty texts (the first: {table}:14)\n" == err
    )
    assert (
        cli.main([*compress, "--strict"]) == 2
        and f"{table}:14: the text is empty" in capsys.readouterr().err
    )


def test_bad_paths_of_the_other_verbs(trained, files, tmp_path, capsys):
    output = str(tmp_path / "m.safetensors")
    good = ["compress", "--adapter", str(trained), "--input", files["contexts"], "--output", output]
    for flag, value, message in (
        ("--adapter", str(tmp_path), "has no icae.json, so it is no adapter"),
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
    """Breaks when another base of the same shapes is read with the adapter: that loads silently and talks garbage."""
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
    """Breaks when a wrong type in a workdir's config.json ends in a traceback in what reads its checkpoints."""
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
    """Breaks when two of a verb's processes write one folder at once: one that continues, or that takes long before it is renamed."""
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
