"""`icae evaluate`: all suites, continued runs, batch sizes, devices, processes, bad input."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY, WORDS, eight_devices, free_port, random_trained, write_jsonl
from suite_helpers import in_eights

from icae_jax.cli import main as cli
from icae_jax.compression.config import CompressionConfig
from icae_jax.evaluation import evaluate
from icae_jax.evaluation.suites import SUITES, common
from icae_jax.inference.devices import Devices
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets
from icae_jax.training import config_file
from icae_jax.training.checkpoint import Checkpoints
from icae_jax.training.config import TrainConfig
from icae_jax.training.workdir import check_workdir

ROWS = Devices.rows
METHODS = ("icae", "x500")
SMALL = {  # the flags with which a suite compiles little
    "autoencode": ["--k", "4", "--arms", "memory,shuffled memory"],
    "continue": [
        "--context_lengths",
        "8,16",
        "--continuation_tokens",
        "20",
        "--arms",
        "memory,full context,cut context,no context",
    ],
    "memorise": ["--k", "4", "--context_lengths", "12", "--arms", "normal text,random"],
    "qa": ["--k", "4", "--max_new_tokens", "8"],
    "ablate": ["--k", "4", "--max_new_tokens", "8", "--context_lengths", "12"],
    "span": ["--k", "4", "--spans", "1,2", "--context_lengths", "8"],
    "tokens": ["--k", "4", "--context_lengths", "12"],
}


@pytest.fixture(scope="module", autouse=True)
def _in_eights():
    """Batches of all sizes run through the same programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Devices, "rows", in_eights)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_base):
    """Paths: adapters of both methods, another one, a training workdir, texts of 5 sizes,
    questions.
    """
    folder = tmp_path_factory.mktemp("evaluate")
    base, rng = bases.load_base(tiny_base), np.random.default_rng(3)
    template = targets.make_template("plain", base.tokenizer)

    def adapter(method, seed):
        compression = CompressionConfig(method=method, k=4, rate=4, k_choices=(2, 4))
        return adapters.Adapter(
            compression,
            LoraConfig(4),
            template,
            random_trained(TINY, 4, seed),
            str(tiny_base),
            base.fingerprint,
        )

    for method in METHODS:
        adapters.save_adapter(folder / method, adapter(method, 0))
    adapters.save_adapter(folder / "other", adapter("icae", 5))
    workdir = folder / "workdir"
    adapters.save_adapter(workdir / "adapter", adapter("icae", 5))
    (workdir / "DONE").write_text("7\n")
    raw = {
        "base": str(tiny_base),
        "compression": {"k": 4, "rate": 4, "k_choices": [2, 4]},
        "lora": {"rank": 4},
    }
    raw |= {"phase": "finetune", "init_from": "scratch"}
    raw |= {
        "objectives": {"template": "plain", "ae": 0.0, "lm": 0.0, "qa": 1.0},
        "data": {"train": "x", "eval": "x"},
    }
    config = config_file.from_dict(TrainConfig, raw)
    for name, seed in (("workdir", 5), ("unfinished", 0)):  # the latter has no adapter/ yet
        with Checkpoints(folder / name) as kept:
            kept.save(6, {"trained": random_trained(TINY, 4, seed)})
        check_workdir(folder / name, config, {"base": base.fingerprint})

    def words(n):
        return " ".join(rng.choice(WORDS[8:], size=n))

    qa = [
        {"context": words(9 + i), "question": words(3), "answers": [words(1), words(2)]}
        for i in range(3)
    ]
    qa += [{**row, "question": words(4)} for row in qa[:2]]
    return {
        "folder": folder,
        "base": tiny_base,
        "texts": write_jsonl(
            folder / "texts.jsonl", [{"id": f"t{i}", "text": words(34 + i)} for i in range(5)]
        ),
        "short": write_jsonl(
            folder / "short.jsonl", [{"id": f"s{i}", "text": words(10 + i)} for i in range(5)]
        ),
        "qa": write_jsonl(folder / "qa.jsonl", qa),
    }


def argv(world, suite, out, method="icae", *more, data=None, **flags):
    data = data or {"qa": world["qa"], "ablate": f"{world['qa']},{world['texts']}"}.get(
        suite, world["texts"]
    )
    flags = {"suite": suite, "adapter": world["folder"] / method, "data": data, "out": out} | flags
    return [
        "evaluate",
        *[str(x) for name, value in flags.items() for x in (f"--{name}", value)],
        *SMALL.get(suite, ()),
        *map(str, more),
    ]


def strict(path):
    """A JSON file's content; an error where it holds NaN or Infinity."""
    return json.loads(
        path.read_text(encoding="utf-8"),
        parse_constant=lambda name: pytest.fail(f"{path} holds {name}"),
    )


def events(folder):
    """(tag, value, step) of TensorBoard's file: records of a length, its checksum, the data, and
    theirs.
    """
    from tensorboardX.proto.event_pb2 import Event

    (path,), found = folder.glob("events.out.*"), []
    data = path.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + size])
        found += [(v.tag, v.simple_value, event.step) for v in event.summary.value]
        data = data[16 + size :]
    return found


def alike(one, other):
    """The same examples with the same scores to 1e-5 and the same texts (but where two tokens
    tied), and the same summary.
    """
    assert [e["id"] for e in one["examples"]] == [e["id"] for e in other["examples"]]
    for a, b in zip(one["examples"], other["examples"], strict=True):
        for metric, arms in a["scores"].items():
            for arm, value in arms.items():
                assert a["ties"].get(arm) or b["scores"][metric][arm] == pytest.approx(
                    value, rel=1e-5, abs=1e-9
                )
        assert all(
            a["ties"].get(arm) or b["texts"][arm] == text for arm, text in a["texts"].items()
        )
    assert one["scores"].keys() == other["scores"].keys() and one["left_out"] == other["left_out"]
    if not any(tied["steps"] for tied in one["ties"].values()):
        for metric, arms in one["scores"].items():
            for arm, found in arms.items():
                assert list(other["scores"][metric][arm].values()) == pytest.approx(
                    list(found.values()), rel=1e-5, abs=1e-9
                )


# -------------------------------------------------------------------------------------- every suite


@pytest.mark.parametrize(
    ("suite", "method"),
    [(suite, "x500" if suite in ("qa", "span") else "icae") for suite in SUITES],
)
def test_every_suite_from_the_command_line(suite, method, world, tmp_path, capsys):
    """Breaks when a suite does not run to its end, or its results, page, table or events lack what
    others rely on.
    """
    more = ["--adapter", f"later={world['folder'] / 'other'}"] if suite == "ablate" else []
    more += ["--ladder", "2,4"] if suite == "qa" else []
    flags = {"adapter": f"early={world['folder'] / 'icae'}"} if suite == "ablate" else {"limit": 2}
    assert (
        cli.main(
            argv(
                world,
                suite,
                tmp_path / "out",
                method,
                *more,
                **flags | ({"limit": 2} if suite == "ablate" else {}),
            )
        )
        == 0
    )
    out = capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "report.html",
        "results.json",
        "tensorboard",
    ]
    result = strict(tmp_path / "out" / "results.json")

    base = bases.load_base(world["base"])
    known = (
        dict(zip(("early", "later"), ("icae", "other"), strict=True))
        if suite == "ablate"
        else {"adapter": method}
    )
    for name, folder in known.items():
        about = result["adapters"][name]
        assert (
            about["fingerprint"]
            == adapters.load_adapter(world["folder"] / folder, base).fingerprint
        )
        assert (
            about["method"] == method
            and about["k"] == [2, 4]
            and about["segment_tokens"] == 16
            and about["template"] == "plain"
        )
    assert result["base"] == {"path": str(world["base"]), "fingerprint": base.fingerprint}
    assert (
        result["suite"] == suite
        and result["seed"] == 0
        and result["left_out"] == {}
        and result["config"]["limit"] == 2
    )
    assert {f.name for f in dataclasses.fields(common.Options)} <= result[
        "config"
    ].keys() and result["config"]["base_dtype"] == "float32"
    assert {"icae_jax", "jax", "sacrebleu"} <= result["versions"].keys() and all(
        v == 2 for v in result["data"]["texts"].values()
    )

    assert set(result["scores"]) - {"retention"} <= set(SUITES[suite].METRICS) and result["scores"]
    examples = {(e["set"], e["id"]) for e in result["examples"]}
    assert len(examples) >= 2 and all(e["scores"] for e in result["examples"])
    for metric, arms in result["scores"].items():
        for arm, found in arms.items():
            assert set(found) == {"mean", "low", "high", "n"} and 1 <= found["n"] <= len(
                result["examples"]
            )
            own = [
                e["scores"][metric][arm]
                for e in result["examples"]
                if arm in e["scores"].get(metric, {})
            ]
            assert (
                metric == "retention"
                or min(own) - 1e-9 <= found["mean"] <= max(own) + 1e-9
                or metric == "bleu"
            )
            assert f"\n{arm} " in out or suite == "tokens"
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (
        "<svg" in html
        and "<table>" in html
        and not re.search(r"<link|src=|<script|href=\"http", html)
    )
    if any(e["texts"] for e in result["examples"]):
        assert "<h2>Examples" in html and "<ins>" in html and "<del>" in html
    first = next(iter(result["scores"].items()))
    assert (
        common.METRICS[first[0]].label in out
        and f"results   {tmp_path / 'out' / 'results.json'}" in out
    )
    told = {(tag, step): value for tag, value, step in events(tmp_path / "out" / "tensorboard")}
    for metric, arms in result["scores"].items():
        for arm, found in arms.items():
            assert told[
                f"{suite}/{metric}/{arm.replace(' ', '_').replace('=', '_')}", 0
            ] == pytest.approx(found["mean"], rel=1e-5)


def test_a_workdir_and_its_checkpoints_are_adapters(world, tmp_path, capsys):
    """Breaks when a workdir cannot be measured as it is, its base is not found, or TensorBoard
    does not get its step.
    """
    found = []
    for i, path in enumerate(("other", "workdir", "workdir/checkpoints/step_6")):
        out = tmp_path / str(i)
        assert cli.main(argv(world, "tokens", out, path, data=world["short"], limit=1)) == 0, (
            capsys.readouterr().err
        )
        found.append(strict(out / "results.json"))
        assert {step for *_, step in events(out / "tensorboard")} == {(0, 7, 6)[i]}
    assert all(r["examples"] == found[0]["examples"] for r in found)
    assert len({about["fingerprint"] for r in found for about in r["adapters"].values()}) == 1


# -------------------------------------------------------------------- the same whatever the machine


@pytest.fixture(scope="module")
def restored(world):
    """Suite autoencode over 5 short texts, 2 at a time: the results."""
    out = world["folder"] / "restored"
    assert cli.main(argv(world, "autoencode", out, data=world["short"], batch_size=2)) == 0
    return strict(out / "results.json")


def test_the_batch_size_changes_no_score(world, restored, tmp_path):
    """Breaks when a neighbour, padding or the room of a batch reaches a score or a text."""
    assert (
        cli.main(argv(world, "autoencode", tmp_path / "16", data=world["short"], batch_size=16))
        == 0
    )
    alike(restored, strict(tmp_path / "16" / "results.json"))
    for size in (1, 16):
        more = ["--arms", "memory", "--batch_size", size]
        assert cli.main(argv(world, "qa", tmp_path / f"qa{size}", "x500", *more)) == 0
    alike(*[strict(tmp_path / f"qa{size}" / "results.json") for size in (1, 16)])


CHILD = """
import json, sys
import conftest, jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))  # conftest asks for eight
from icae_jax.cli import main as cli
code = cli.main(json.loads(sys.argv[1]))
print("devices", jax.process_count(), jax.local_device_count())
sys.exit(code)
"""


def start(devices, command):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    line = [sys.executable, "-c", CHILD, json.dumps(command), str(devices)]
    return subprocess.Popen(
        line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(child):
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err[-3000:]
    return out, err


@pytest.mark.nightly
def test_devices_and_processes_change_no_score(world, restored, tmp_path, monkeypatch):
    """Breaks when 8 devices that shard the base, or 2 processes of 2 devices, measure an example
    twice, not at all, or otherwise than one device.

    Batches are no multiple of the devices, and one process has more batches than the other. Both
    measure a workdir without adapter/, so a reader of checkpoints that waits for the other process
    would hang.
    """
    short = {"data": world["short"]}
    joined = {"batch_size": 2, "coordinator": f"127.0.0.1:{free_port()}", "processes": 2}
    pair = [
        start(
            2,
            argv(
                world, "autoencode", tmp_path / "two", "unfinished", **short, **joined, process=at
            ),
        )
        for at in range(2)
    ]
    try:
        monkeypatch.setattr(Devices, "rows", ROWS)
        with eight_devices():
            assert (
                cli.main(
                    argv(
                        world,
                        "autoencode",
                        tmp_path / "eight",
                        **short,
                        batch_size=3,
                        mesh="fsdp=4,tensor=2",
                    )
                )
                == 0
            )
        first, second = [finish(child) for child in pair]
    finally:
        for child in pair:
            child.kill()
    assert "devices 2 2" in first[0] and "devices 2 2" in second[0]
    assert "AE loss" in first[0] and "AE loss" not in second[0] and "autoencode:" not in second[1]
    for name, devices in (("two", "2 x 2 cpu"), ("eight", "1 x 8 cpu")):
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [
            "report.html",
            "results.json",
            "tensorboard",
        ]
        result = strict(tmp_path / name / "results.json")
        assert result["devices"] == devices and result["identity"] == restored["identity"]
        alike(restored, result)


# ------------------------------------------------------------------------------ continuing, and not


@pytest.fixture
def asked(monkeypatch):
    """The ids of all examples that autoencode measures.

    `asked.stop`: raises after so many batches, like a kill.
    """

    class Asked(list):
        stop = None

    seen, measure = Asked(), SUITES["autoencode"].measure

    def spy(self, batch):
        if seen.stop is not None and len(seen) >= seen.stop:
            raise KeyboardInterrupt
        seen.append([e.id for e in batch])
        return measure(self, batch)

    monkeypatch.setattr(SUITES["autoencode"], "measure", spy)
    return seen


def test_a_killed_run_is_continued(world, restored, asked, tmp_path, capsys):
    """Breaks when the same command measures again what is done, gives other results, or a finished
    run computes anything.
    """
    command, progress = (
        argv(world, "autoencode", tmp_path, data=world["short"]),
        tmp_path / "progress.0.jsonl",
    )
    asked.stop = 2
    with pytest.raises(KeyboardInterrupt):
        cli.main([*command, "--batch_size", "2"])
    assert [p.name for p in tmp_path.iterdir()] == ["progress.0.jsonl"]
    lines = progress.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 4
    progress.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])  # killed within a line
    asked.stop, done = None, list(itertools.chain(*asked))[:3]
    asked.clear()
    assert cli.main([*command, "--batch_size", "16"]) == 0, "another batch size continues it"
    result = strict(tmp_path / "results.json")
    assert done + list(itertools.chain(*asked)) == [e["id"] for e in restored["examples"]]
    assert not progress.exists()
    alike(restored, result)
    first = capsys.readouterr().out

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    asked.clear()
    assert cli.main([*command, "--batch_size", "3"]) == 0 and not asked
    out, err = capsys.readouterr()
    assert f"{tmp_path} is done already" in err and out == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_another_run_in_the_same_folder_is_refused(world, restored, asked, tmp_path, capsys):
    """Breaks when results of two runs are mixed or overwritten, finished or not, or the difference
    is not named.
    """
    done, begun = tmp_path / "done", tmp_path / "begun"
    shutil.copytree(world["folder"] / "restored", done)
    asked.stop = 1
    with pytest.raises(KeyboardInterrupt):
        cli.main(argv(world, "autoencode", begun, data=world["short"], batch_size=2))
    asked.clear()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) >= 4
    names = (
        "seed is 0 there and 1 here",
        "config k is [4] there and [2] here",
        r"adapters adapter is '\w+' there and '\w+' here",
    )
    for out in (done, begun):
        changes = [
            {"seed": 1},
            {"k": 2},
            {"method": "other"},
            {"data": world["texts"]},
            {"limit": 2},
            {"suite": "memorise"},
        ]
        wanted = [
            *names,
            "the examples differ",
            "the examples differ",
            "suite is 'autoencode' there and 'memorise' here",
        ]
        for change, message in zip(changes, wanted, strict=True):
            values = {"suite": "autoencode", "method": "icae", "data": world["short"]} | change
            more = (
                ["--k", values.pop("k")] if "k" in values else []
            )  # behind the small one, so that it holds
            assert (
                cli.main(
                    argv(world, values.pop("suite"), out, values.pop("method"), *more, **values)
                )
                == 2
            )
            err = capsys.readouterr().err.strip().splitlines()[-1]
            assert "belongs to another run: " in err and "give another --out" in err
            assert message in err or re.search(message, err), err
    assert (
        not asked
        and {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    )


def test_files_of_the_same_content_are_the_same_run(world, restored, asked, tmp_path, capsys):
    """Breaks when a run is identified by the order of lines or the folder of its files."""
    lines = (world["folder"] / "short.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "short.jsonl").write_text("".join(lines[::-1]))
    shutil.copytree(world["folder"] / "restored", tmp_path / "out")
    assert (
        cli.main(argv(world, "autoencode", tmp_path / "out", data=tmp_path / "short.jsonl")) == 0
        and not asked
    )
    assert "is done already" in capsys.readouterr().err


def test_what_is_left_out_is_said(world, restored, tmp_path, capsys):
    """Breaks when an empty row ends an evaluation, is left out silently, or changes the others'
    scores.
    """
    rows = [json.loads(line) for line in (world["folder"] / "short.jsonl").read_text().splitlines()]
    holes = write_jsonl(
        tmp_path / "short.jsonl",
        [{"text": " "}, *rows, {"context": None, "question": "q", "answers": []}],
    )
    assert cli.main(argv(world, "autoencode", tmp_path / "out", data=holes)) == 0
    assert f"left out 2 empty texts (the first: {holes}:1)" in capsys.readouterr().err
    result = strict(tmp_path / "out" / evaluate.RESULTS)
    assert result["left_out"][f"empty texts (the first: {holes}:1)"] == 2
    alike(restored, result | {"left_out": {}})


# ------------------------------------------------------------------------------------------- errors

EARLY = {  # before the base is loaded
    "missing data": ({"data": "absent.jsonl"}, "data file absent.jsonl: no such file"),
    "empty data": ({"data": "EMPTY"}, r"--data \S+empty\.jsonl: no rows; the data set is empty"),
    "empty rows": (
        {"data": "HOLES", "more": ["--strict"]},
        r"holes\.jsonl:2: the text is empty; .* without --strict",
    ),
    "no answer at all": (
        {"no_answer": " "},
        "--no_answer is ' '; give words such as 'unanswerable'",
    ),
    "limit": ({"limit": -1}, "--limit is -1; give how many texts"),
    "seed": ({"seed": -1}, "--seed is -1; give a whole number from 0 on"),
    "context lengths": (
        {"context_lengths": 0},
        r"--context_lengths is \(0,\); give different whole numbers from 1 on",
    ),
    "batch size": ({"batch_size": 0}, "--batch_size is 0; it must be at least 1"),
    "two adapters": (
        {"adapter": "icae", "more": ["--adapter", "b=other"]},
        "--adapter is given 2 times; suite autoencode takes one",
    ),
    "one name twice": (
        {"adapter": "a=icae", "suite": "ablate", "more": ["--adapter", "a=other"]},
        "--adapter a is given twice",
    ),
    "out is a file": ({"out": "EMPTY"}, r"--out \S+empty\.jsonl is a file; give a folder"),
    "no such adapter": ({"adapter": "absent"}, "--adapter .*absent: no such file or folder"),
    "no adapter": ({"adapter": "."}, "--adapter .* holds no trained compressor"),
    "two sets of a name": (
        {"data": "x=SHORT,x=TEXTS"},
        "two sources have one name; give names, as in NAME=FILE,NAME=FILE",
    ),
    "base of the adapter is gone": (
        {"adapter": "gone"},
        "names its base as /gone/base, which is not a folder; give .* --base",
    ),
}
LATE = {
    "k": ({"more": ["--k", "3"]}, "k is 3; this compressor was trained with 2, 4 memory tokens"),
    "arms": (
        {"more": ["--arms", "memory,bert"]},
        "--arms 'bert' is no arm of suite autoencode; choose from .*memory, memory k=2",
    ),
    "no usable text": (
        {"more": ["--context_lengths", "99"]},
        r"--data has no text for --suite autoencode: 5 texts shorter than .* 99",
    ),
    "no question": (
        {"suite": "qa"},
        "--data has no text for --suite qa: 5 texts without a question",
    ),
    "one adapter for ablate": (
        {"suite": "ablate"},
        "--adapter is given once; suite ablate compares several",
    ),
    "another base": (
        {"base": "OTHER"},
        "was trained on a base with fingerprint .* give the right base",
    ),
}


@pytest.mark.parametrize("name", [*EARLY, *LATE])
def test_bad_input_is_one_error_and_nothing_is_written(name, world, tmp_path, monkeypatch, capsys):
    """Breaks when a mistake is found late, leaves a folder behind, or its error names no remedy."""
    flags, message = (EARLY | LATE)[name]
    folder = world["folder"]
    (tmp_path / "empty.jsonl").write_text("\n")
    write_jsonl(tmp_path / "holes.jsonl", [{"text": "the cat"}, {"text": ""}])
    if name == "base of the adapter is gone":
        shutil.copytree(folder / "icae", folder / "gone", dirs_exist_ok=True)
        path = folder / "gone" / "encoder" / "adapter_config.json"
        path.write_text(path.read_text().replace(str(world["base"].resolve()), "/gone/base"))
    if name == "another base":
        params = {**bases.load_base(world["base"]).params}
        params["norm"] = {"scale": params["norm"]["scale"] * 1.5}
        bases.save_base(
            tmp_path / "OTHER",
            TINY,
            params,
            tokenizers.load_tokenizer(world["base"]),
            dtype="float32",
        )
    if name in EARLY:
        monkeypatch.setattr(
            evaluate, "load_base", lambda *a, **kw: pytest.fail("the base was loaded")
        )
    places = {
        "EMPTY": tmp_path / "empty.jsonl",
        "SHORT": world["short"],
        "TEXTS": world["texts"],
        "OTHER": tmp_path / "OTHER",
    }
    places["HOLES"] = tmp_path / "holes.jsonl"

    def full(flag, value):
        for word, path in places.items():
            value = re.sub(rf"\b{word}\b", str(path), str(value))
        return re.sub(r"^(\w+=)?(.*)$", rf"\g<1>{folder}/\2", value) if flag == "adapter" else value

    flags = {
        "suite": "autoencode",
        "out": tmp_path / "out",
        "data": world["short"],
        "adapter": "icae",
    } | flags
    more = [full("adapter", x) if "=" in x else x for x in flags.get("more", [])]
    command = [
        x
        for flag, value in flags.items()
        if flag != "more"
        for x in (f"--{flag}", full(flag, value))
    ]
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["evaluate", *command, *more]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err), err
    lines = err.strip().splitlines()
    assert lines[-1].startswith("icae evaluate: ") and (name in LATE or len(lines) == 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_choices_are_named(world, tmp_path, capsys):
    """Breaks when a suite or template that there is not ends in a traceback."""
    for flag, value in (
        ("--suite", "bert"),
        ("--plain_template", "odd"),
        ("--k", "two"),
        ("--base_dtype", "int4"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main([*argv(world, "autoencode", tmp_path / "out"), flag, value])
        err = capsys.readouterr().err
        assert end.value.code == 2 and flag in err and value in err
    assert not (tmp_path / "out").exists()


def test_a_broken_adapter_leaves_no_results(world, tmp_path, capsys):
    """Breaks when NaN passes for a score."""
    base = bases.load_base(world["base"])
    broken = adapters.load_adapter(world["folder"] / "icae", base)
    broken.trained["lora"] = jax.tree.map(
        lambda x: jnp.full_like(x, 1e38), broken.trained["lora"]
    )  # finite, but not their product
    adapters.save_adapter(tmp_path / "broken", broken)
    flags = {"adapter": tmp_path / "broken", "data": world["short"], "batch_size": 2}
    assert cli.main(argv(world, "autoencode", tmp_path / "out", **flags)) == 2
    err = capsys.readouterr().err
    assert re.search(
        r"ae_loss of memory is not finite on example s\d: the adapter or --base_dtype is broken",
        err,
    )
    assert not (tmp_path / "out" / "results.json").exists()
