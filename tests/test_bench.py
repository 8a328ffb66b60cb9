"""`icae bench train`: bad input, what it tells of a real step, and how reports are compared."""

import dataclasses
import json
import math
import re
import shutil

import jax
import pytest
from conftest import ROOT, TINY, eight_devices, same

from icae_jax.cli import main as cli
from icae_jax.errors import UserError
from icae_jax.models import llama, schemes
from icae_jax.performance import bench, bench_bases, bench_report, programs, steps, worker
from icae_jax.runtime import sharding
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict


def command(folder, *more, phase="pretrain", **changes):
    values = {
        "base": folder,
        "compression.k": 4,
        "data.context_lengths": "(16,)",
        "data.context_weights": "()",
        "batch_size": 4,
    }
    values |= {
        "lora.rank": 4,
        "data.max_target_tokens": 12,
        "dtype": "float32",
        "remat": "none",
    } | changes
    config = [f"--config.{name}={value}" for name, value in values.items() if value is not None]
    return ["bench", "train", "--config", f"{ROOT / 'configs' / 'icae.py'}:{phase}", *config, *more]


def counted(spec, mesh):
    """In the place of `steps.xla_flops`, which has its own tests."""
    return (1.25 + 0.5 * bool(spec.config.quantize)) * programs.least(spec) * mesh.size


@pytest.fixture(scope="module")
def saved(tiny_base, tmp_path_factory):
    """(the file that one real measurement wrote, what it printed)."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "matmul_rate", lambda dtype: 1e12)
        patch.setattr(steps, "xla_flops", counted)
        told = []
        patch.setattr("builtins.print", lambda *args, **_: told.append(" ".join(map(str, args))))
        flags = [
            "--steps",
            "2",
            "--repeats",
            "3",
            "--save",
            str(folder / "saved.json"),
            "--profile",
            str(folder / "trace"),
        ]
        assert cli.main(command(str(tiny_base), *flags)) == 0
    return folder / "saved.json", "\n".join(told)


# ---------------------------------------------------------------------------------------- bad input

BAD = {
    "no base": ({"base": None}, [], "base is not set; name it, --config.base=NAME"),
    "unknown base": ({"base": "nobody/none"}, [], "the sizes of 'nobody/none' are not known"),
    "a field": ({"compression.k": -1}, [], "compression.k is -1"),
    "contexts": (
        {"accumulate": 2},
        ["--contexts", "3"],
        "--contexts is 3; give a multiple of accumulate x mesh.data x mesh.fsdp, 2 x 1",
    ),
    "no contexts": ({}, ["--contexts", "0"], "--contexts is 0; give a multiple"),
    "short contexts": (
        {},
        ["--context_length", "1"],
        "--context_length is 1; give at least 2 tokens",
    ),
    "long contexts": (
        {},
        ["--context_length", "250"],
        "contexts of 250 tokens need 315 positions, the base has 256",
    ),
    "steps": ({}, ["--steps", "0"], "--steps is 0; give a positive number"),
    "repeats": ({}, ["--repeats", "-1"], "--repeats is -1; give a positive number"),
    "growth": (
        {},
        ["--growth", "1,x"],
        "--growth is '1,x'; give some positive whole numbers, such as 1,2,4,8",
    ),
    "growth over microbatches": (
        {"accumulate": 4},
        ["--growth", "4,6"],
        "--growth is 6; give a multiple of accumulate",
    ),
    "no qa": ({}, ["--qa_tokens", "8,2"], "--qa_tokens is 8,2, but objectives.qa is 0"),
    "one number": (
        {},
        ["--qa_tokens", "8"],
        "--qa_tokens is '8'; give 2 positive whole numbers, such as 24,8",
    ),
    "mesh": (
        {"mesh.fsdp": 3},
        [],
        "mesh is data 1, fsdp 3, tensor 1, which does not make 1 device",
    ),
    "no such flag": ({}, ["--sav", "x"], "unknown argument '--sav'"),
    "no file": (
        {},
        ["--compare", "nowhere.json"],
        "nowhere.json: no such file; it should hold what icae bench train --save wrote",
    ),
    "a folder": ({}, ["--save", "."], "--save . is a folder; give another path"),
    "a scheme": ({"quantize": "int4"}, [], "quantize is 'int4'; choose from int8, nf4"),
    "one base": ({}, ["--bases", "int8"], "--bases is 'int8'; give at least two different ones"),
    "a base twice": ({}, ["--bases", "int8,int8"], "give at least two different ones of float32"),
    "unknown bases": ({}, ["--bases", "float32,int4"], "--bases is 'float32,int4'; give"),
    "bases grown": (
        {},
        ["--bases", "float32,int8", "--growth", "1,2"],
        "--bases and --growth exclude each other",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_anything_compiles(name, tiny_base, monkeypatch, capsys):
    changes, flags, wanted = BAD[name]
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(worker, "run", lambda *_: pytest.fail("a process was started"))
    assert cli.main(command(str(tiny_base), *flags, **changes)) == 2
    told = capsys.readouterr().err
    assert wanted in told and told.startswith("icae bench train: ") and told.count("\n") == 1


def test_questions_longer_than_training_takes(tiny_base, capsys):
    assert cli.main(command(str(tiny_base), "--qa_tokens", "10,4", phase="finetune")) == 2
    assert "targets of 13 tokens, longer than data.max_target_tokens, 12" in capsys.readouterr().err


def test_without_a_kind(capsys):
    assert cli.main(["bench"]) == 2 and "usage: icae bench KIND" in capsys.readouterr().err
    assert (
        cli.main(["bench", "--help"]) == 0
        and "  train    a training step" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "train", "--help"])
    assert "--growth" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"bench": "decode"}', '{"bench": "train", "config": []}']
)
def test_a_file_that_is_no_result(content, tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("something was measured"))
    (tmp_path / "f.json").write_text(content)
    assert cli.main(command(str(tiny_base), "--compare", str(tmp_path / "f.json"))) == 2
    assert f"{tmp_path / 'f.json'}: not " in capsys.readouterr().err


# ------------------------------------------------------------------------------- a real measurement


def test_the_fields_of_a_report_fit_each_other(saved):
    """Breaks when a figure is per context instead of per step, or rates are of different times."""
    r = json.loads(saved[0].read_text())
    assert (r["contexts"], r["context_tokens"], r["label_tokens"]) == (4, 64, 4 * 2 * 17) and (
        r["steps"],
        r["repeats"],
    ) == (2, 3)
    seconds = r["seconds"]["median"]
    for name in ("seconds", "seconds_per_context", "cpu_seconds_per_context"):
        assert 0 < r[name]["min"] <= r[name]["median"] <= r[name]["max"]
    assert r["seconds_per_context"]["median"] * 4 == pytest.approx(seconds)
    assert r["seconds_per_label_token"] * r["label_tokens"] == pytest.approx(seconds)
    assert r["contexts_per_second"] * seconds == pytest.approx(4) and r[
        "context_tokens_per_second"
    ] * seconds == pytest.approx(64)
    assert (
        r["flops_per_second"] * seconds == pytest.approx(r["least_flops"])
        and r["xla_flops"] == 1.25 * r["least_flops"]
    )
    assert r["matmul_share"] == pytest.approx(r["flops_per_second"] / 1e12) and r["mfu"] is None
    assert r["seconds_to_first_step"] > r["trace_seconds"] + r["compile_seconds"] and isinstance(
        r["cache_hit"], bool
    )
    assert (
        r["peak_bytes"] == r["memory"]["process_peak_bytes"] > 0
        and not r["random_weights"]
        and r["attention"] == "xla"
    )
    assert sum(row["seconds"] for row in r["profile"]["rows"]) == pytest.approx(
        r["profile"]["busy_seconds"]
    )


def test_what_is_printed(saved):
    """Breaks when the text lacks what the JSON has, or where the trace is and how to open it."""
    path, told = saved
    assert "1 x cpu, mesh data 1, fsdp 1, tensor 1" in told and "its own weights, loaded in" in told
    assert "s; float32, 0.000 GiB, activations float32" in told
    assert (
        "4 contexts of 16 tokens in 1 microbatch, 136 labels" in told
        and "compiled in" in told
        and "cross_entropy" in told
    )
    assert f"xprof {path.parent / 'trace'}" in told
    assert list((path.parent / "trace").glob("plugins/profile/*/*.xplane.pb"))


def test_the_same_again(saved, tiny_base, tmp_path, monkeypatch, capsys):
    """Breaks when a report is not compared, the ratio is inverted, or --json prints two lines."""
    before = json.loads(saved[0].read_text())
    now = {name: value for name, value in before.items() if name not in ("profile", "config")}
    now |= {"compile_seconds": 2.0, "matmul_share": 0.3}
    before |= {"compile_seconds": 8.0, "matmul_share": 0.2, "peak_bytes": None}
    before["config"].pop("attention")  # saved before there was such a field
    (tmp_path / "old.json").write_text(json.dumps(before))
    monkeypatch.setattr(
        bench, "measure", lambda args, spec, params: (now, steps.TrainingStep(spec, params))
    )
    assert cli.main(command(str(tiny_base), "--compare", str(tmp_path / "old.json"), "--json")) == 0
    (line,) = capsys.readouterr().out.splitlines()
    compared = json.loads(line)["compared"]
    assert (
        compared["compile_seconds"] == {"now": 2.0, "saved": 8.0, "ratio": 0.25}
        and "peak_bytes" not in compared
    )
    assert (
        compared["matmul_share"]["ratio"] == pytest.approx(1.5)
        and compared["seconds_per_context.median"]["ratio"] == 1
    )
    assert "s to compile" in bench_report.text(json.loads(line)) and "0.250" in bench_report.text(
        json.loads(line)
    )


def test_unlike_results_are_refused(saved, tiny_base, tmp_path, monkeypatch, capsys):
    """Breaks when two configurations, or two devices, are held against each other."""
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("something was measured"))
    assert (
        cli.main(
            command(str(tiny_base), "--compare", str(saved[0]), "--contexts", "8", remat="full")
        )
        == 2
    )
    told = capsys.readouterr().err
    assert (
        "config.contexts: 8 here, 4 there" in told
        and "config.remat: 'full' here, 'none' there" in told
        and "config.k" not in told
    )
    other = json.loads(saved[0].read_text())
    for changes, wanted in (
        ({"devices": 2}, "devices: 1 here, 2 there"),
        ({"device": "TPU v4"}, "device: 'cpu' here, 'TPU v4' there"),
    ):
        (tmp_path / "other.json").write_text(json.dumps(other | changes))
        assert cli.main(command(str(tiny_base), "--compare", str(tmp_path / "other.json"))) == 2
        assert wanted in capsys.readouterr().err
    (tmp_path / "other.json").write_text(
        json.dumps({name: value for name, value in other.items() if name != "matmul_share"})
    )
    assert cli.main(command(str(tiny_base), "--compare", str(tmp_path / "other.json"))) == 2
    assert "lacks matmul_share; make it anew" in capsys.readouterr().err


# --------------------------------------------------------------------------------- quantised bases


def leaf_bytes(scheme):
    shapes = schemes.quantized_shapes(llama.param_shapes(TINY), scheme, "float32")
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


@pytest.mark.nightly
@pytest.mark.parametrize("stored", [True, False], ids=["its own weights", "random weights"])
def test_a_quantised_base_is_measured(stored, tiny_base, tmp_path, monkeypatch, capsys):
    """Breaks when the step that is measured multiplies with full precision, dequantising counts as
    the step's FLOPs, or the report does not say what the base is.
    """
    monkeypatch.setattr(steps, "matmul_rate", lambda dtype: 1e12)
    monkeypatch.setattr(steps, "xla_flops", counted)
    base = tiny_base
    if not stored:
        base = tmp_path / "sizes"
        base.mkdir()
        shutil.copy(tiny_base / "config.json", base)
    flags = ["--steps", "1", "--repeats", "1", "--json"]
    assert cli.main(command(str(base), *flags, quantize="int8")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["base_format"] == report["config"]["quantize"] == "int8"
    assert report["base_bytes"] == leaf_bytes("int8") < leaf_bytes("") / 2
    assert report["random_weights"] != stored
    assert report["flops_ratio"] == 1.25
    assert report["dequantising_flops"] == pytest.approx(0.5 * report["least_flops"])
    assert f"and {report['dequantising_flops'] / 1e12:.3g} T of deq" in bench_report.text(report)
    assert "random weights; int8" in bench_report.text(report) or stored


def test_random_weights_are_those_of_full_precision_quantised():
    """Breaks when another base is quantised than the one it is compared with, or lies elsewhere."""
    with eight_devices():
        mesh = sharding.make_mesh(sharding.MeshConfig(1, 4, 2))
        placement = sharding.Placement(mesh, TINY)
        whole = steps.random_params(TINY, placement, "float32", 3)
        made = steps.random_params(TINY, placement, "float32", 3, "int8+ends")
        wanted = schemes.quantize_params(whole, "int8+ends")
        same(made, wanted)
        assert jax.tree.map(lambda x: x.sharding, made) == placement.tree(made)


def test_bases_take_turns_and_are_compared_within_one(monkeypatch, tmp_path, capsys):
    """Breaks when formats are measured one after the other, a ratio is of two turns, or a format's
    dtype and scheme are not those that are measured.
    """
    order = []

    def run(module, request):
        assert module == bench_bases.__name__ and request["kind"] == "measure"
        assert (request["options"].repeats, request["options"].save) == (1, None)
        name, turn = request["name"], len(order) // 2
        order.append(name)
        seconds = (turn + 1) * {"float32": 4.0, "nf4": 3.0}[name]  # slower from turn to turn
        return {
            **{"jax": "0", "device": "cpu", "devices": 1, "mesh": {}, "random_weights": True},
            **{"contexts": 4, "label_tokens": 9, "load_seconds": 0.5, "base_bytes": 7 << 30},
            "config": {"base": "b", "context_length": 16, "dtype": "float32", "quantize": name},
            "seconds": {"median": seconds, "min": 0.0, "max": 9.0},
            "peak_bytes": (turn + 2) * {"float32": 2 << 30, "nf4": 1 << 30}[name],
            "memory": {"argument_bytes": 1, "temporary_bytes": 2},
            "first_losses": {"ae": 5.0},
        }

    monkeypatch.setattr(worker, "run", run)
    options = bench.Options(repeats=3, save=str(tmp_path / "report.json"))
    config = from_dict(TrainConfig, {"base": "b", "data": {"train": "-"}})
    report = bench_bases.compare(("float32", "nf4"), options, config)
    assert order == ["float32", "nf4"] * 3
    row = report["bases"]["nf4"]
    assert row["seconds"] == {"median": 6.0, "min": 3.0, "max": 9.0}
    assert (row["seconds_to_first"], row["peak_to_first"]) == (0.75, 0.5)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    text = bench_bases.text(report).splitlines()
    assert re.search(r"^nf4 +float32 +7\.000 +6 \(3 to 9\) +0\.750 +3 \(2 to 4\) +0\.500", text[-1])


def test_a_base_that_is_stored_otherwise_is_refused(monkeypatch):
    """Breaks when what is told as float32 was measured in int8."""
    config = from_dict(TrainConfig, {"base": "b", "data": {"train": "-"}})
    asked = []

    def measured(options, config):
        asked.append((config.dtype, config.quantize))
        return {"base_format": "int8"}, ""

    monkeypatch.setattr(bench, "bench", measured)
    assert bench_bases._measure("int8", bench.Options(), config) == {"base_format": "int8"}
    with pytest.raises(UserError, match="--bases names bfloat16, but b is stored in int8"):
        bench_bases._measure("bfloat16", bench.Options(), config)
    assert asked == [("float32", "int8"), ("bfloat16", "")]


@pytest.mark.nightly
def test_bases_in_processes_of_their_own(tiny_base, capsys):
    """Breaks when a format is not measured by its own process, or the processes do not answer."""
    flags = ["--bases", "float32,int8", "--steps", "1", "--repeats", "1", "--json"]
    assert cli.main(command(str(tiny_base), *flags)) == 0
    report = json.loads(capsys.readouterr().out)
    full, small = report["bases"].values()
    assert list(report["bases"]) == ["float32", "int8"]
    assert (full["base_bytes"], small["base_bytes"]) == (leaf_bytes(""), leaf_bytes("int8"))
    assert full["peak_bytes"]["max"] > 0 < small["seconds_to_first"]
    assert small["first_losses"]["ae"] == pytest.approx(full["first_losses"]["ae"], rel=0.01)
    assert small["first_losses"] != full["first_losses"]


# ------------------------------------------------------------------------------------- stood in for


class Fake:
    """A training step of 0.5 s plus 0.25 s a context, slower at each measurement.

    It does not fit with more than 4 contexts.
    """

    def __init__(self, spec, params):
        self.spec, self.contexts, self.times = spec, spec.config.batch_size, 0
        if self.contexts > 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    def run(self, count):
        seconds = count * (0.5 + 0.25 * self.contexts) * max(self.times, 1)
        self.times += 1
        return steps.Measured(seconds, 0.0, {})


def test_growth(monkeypatch):
    """Breaks when sizes of different turns are compared, or one that does not fit ends all."""
    monkeypatch.setattr(steps, "TrainingStep", Fake)
    config = from_dict(TrainConfig, {"base": "b", "data": {"train": "-"}})
    args = bench.Options(steps=3, repeats=2)
    specs = [
        programs.Spec("train", dataclasses.replace(config, batch_size=n), TINY, n, 16)
        for n in (2, 4, 8)
    ]
    table = bench.growth(args, specs, None)
    assert table[0] == {
        "contexts": 2,
        "seconds": 1.5,
        "to_first": 1.0,
        "to_linear": {"median": 1.0, "min": 1.0, "max": 1.0},
    }
    assert table[1] == {
        "contexts": 4,
        "seconds": 2.25,
        "to_first": 1.5,
        "to_linear": {"median": 0.75, "min": 0.75, "max": 0.75},
    }
    assert table[2] == {"contexts": 8, "seconds": None, "to_first": None, "to_linear": None}
    assert bench.growth(args, specs[2:], None) == table[2:]

    def run(self, count):  # 4 contexts no longer fit once they are measured beside others
        if self.contexts == 4 and count == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return steps.Measured(float(count), 0.0, {})

    monkeypatch.setattr(Fake, "run", run)
    table = bench.growth(bench.Options(steps=1, repeats=2), specs, None)
    assert [row["seconds"] for row in table] == [1.0, None, None]
    with (
        pytest.raises(
            ValueError, match=r"8 contexts of 16 tokens in 1 .* do not fit.*fewer --contexts"
        ),
        bench.fitting(specs[2]),
    ):
        Fake(specs[2], None)
