"""The command line before anything runs: help, spellings, the restart, and bad configurations."""

import os
import re
import subprocess
import sys

import pytest
from cli_helpers import flags, make_files
from conftest import ROOT

from icae_jax import __version__
from icae_jax.cli import main as cli
from icae_jax.runtime import platforms
from icae_jax.training import config_file
from icae_jax.training.config import BaseConfig, TrainConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_base):
    return make_files(tmp_path_factory.mktemp("cli"), tiny_base)


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


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["convert", "adapter", "--from", "x"], "icae convert adapter"),
        (["train", "base", "--config", "x"], "icae train base"),
        (["train", "--config", "base"], "icae train"),
        (["ask", "base"], "icae ask"),
        (["bench"], "icae bench"),
    ],
)
def test_an_error_names_the_command(argv, name):
    """Breaks when the kind of a verb is left out, or an argument is taken for one."""
    assert cli.command_name(argv) == name


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
    """Breaks when the command loses its arguments, or restarts for ever, for another verb, beside
    an accelerator, when called from Python, or against the user's setting."""
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
        r"compression\.method is 'lm'; choose from icae, pooled, sac, x500",
    ),
    "layout of another method": (
        {"compression.method": "x500", "compression.layout": "servable"},
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
    "unknown layout": (
        {"compression.layout": "odd"},
        r"layout is 'odd', not one of method icae; choose from",
    ),
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
        == f"icae train: unknown argument '{stray}'; fields are set by --config.FIELD=VALUE\n"
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
    """Breaks when a slip in the user's file is a traceback, which launchers restart."""
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
    """Breaks when `icae … | head` ends in a traceback, or another broken connection is taken for
    that."""

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
        r"no rows; all were left out: 1 text without tokens \(the first: .*data\.jsonl:1\)",
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
