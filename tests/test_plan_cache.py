"""What plans keep: asked once, anew for whatever decides the answer, and how long a plan takes."""

import dataclasses
import json
import shutil

import pytest
from conftest import TINY

from icae_jax import cache
from icae_jax.cli import main as cli
from icae_jax.data.tokens import CACHE_VERSION
from icae_jax.performance import plan, plan_cache, programs, worker
from icae_jax.runtime.sharding import MeshConfig
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict

SLICE = {"kind": "TPU v5 lite", "chips": 4}
SHAPE = {"data": 1, "fsdp": 4, "tensor": 1}
GIB = 1 << 30


def config(**changes):
    return from_dict(TrainConfig, {"base": "b", "data": {"train": "-"}} | changes)


def request(**changes):
    spec = programs.Spec("train", config(), TINY, 4, 32)
    asked = {"kind": "tpu", "spec": spec, "topology": "v5e:2x2", "mesh": MeshConfig()}
    return asked | {"exact": False} | changes


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("ICAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def asked(root, monkeypatch):
    """What workers are asked: (request, host devices). They answer as if all but 9 contexts fit."""
    requests = []

    def ask(request, host_devices=1):
        requests.append((request, host_devices))
        if request["kind"] == "topology":
            return dict(SLICE)
        if request["kind"] == "host":
            quantised = bool(request["specs"][0].config.quantize)
            return {"flops": [10.0 + quantised, 13.0 + quantised]}
        contexts = request["spec"].contexts
        if contexts > 8:
            raise worker.OutOfMemory("RESOURCE_EXHAUSTED: Used 17.25G of 15.75G hbm.")
        return {
            **SLICE,
            "notes": [],
            "argument_bytes": GIB,
            "temporary_bytes": contexts * GIB,
            "peak_bytes": (1 + contexts) * GIB,
            "hbm_bytes": 1e9,
            "collectives": [],
        }

    monkeypatch.setattr(worker, "ask", ask)
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: name)
    return requests


def files_of(root):
    return sorted((root / "plans").glob("*.json"))


# -------------------------------------------------------------------------------------- whole plans


@pytest.mark.parametrize("search", [False, True])
def test_the_same_plan_again_asks_nobody(search, asked, tiny_base):
    """Breaks when anything of a plan is compiled twice, libtpu starts for the slice's size, or the
    user is not told.
    """
    options = plan.Options("v5e:2x2", context_length=32, search=search)
    planned, said = config(base=str(tiny_base), quantize="int8"), []
    first = plan.plan(options, planned, said.append)
    kinds = [request["kind"] for request, _ in asked]
    assert kinds[0] == "topology" and kinds[-2:] == ["host", "host"]
    assert [request["spec"].what for request, _ in asked[1:-2]] == ["train"] * (
        kinds.count("tpu") - 1
    ) + ["evaluate"]
    assert said[0].startswith(f"compiling {9 if search else 4} programs: about ")
    assert first["fits"] and first["contexts"] == 8 and first["dequantising_flops_per_chip"] == 1
    asked.clear(), said.clear()
    assert plan.plan(options, planned, said.append) == first
    assert asked == [] and said[0].startswith("everything is kept from an earlier plan")
    plan.plan(options, dataclasses.replace(planned, remat="full"), said.append)
    assert {request["kind"] for request, _ in asked} == {"tpu", "host"}, "but not the topology"


def test_a_plan_that_was_ended_goes_on(asked, tiny_base, monkeypatch):
    """Breaks when a search that was interrupted starts again, or its rest is said to be kept."""
    options = plan.Options("v5e:2x2", context_length=32, search=True)
    planned, said = config(base=str(tiny_base)), []
    with monkeypatch.context() as patch:
        patch.setattr(plan, "count_flops", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan.plan(options, planned, said.append)
    asked.clear(), said.clear()
    plan.plan(options, planned, said.append)
    assert [request["kind"] for request, _ in asked] == ["host"]
    assert said[0].startswith("compiling 1 program: about ")


def _interrupted(*_):
    raise KeyboardInterrupt


# --------------------------------------------------------------------------- what decides an answer

SPEC = request()["spec"]
OTHERS = {
    "the topology": request(topology="v5e:4x4"),
    "the mesh": request(mesh=MeshConfig(data=2)),
    "the effort": request(exact=True),
    "the kind": request(kind="host"),
    "the program": request(spec=dataclasses.replace(SPEC, what="compress")),
    "contexts": request(spec=dataclasses.replace(SPEC, contexts=8)),
    "the length": request(spec=dataclasses.replace(SPEC, length=64)),
    "a size": request(
        spec=dataclasses.replace(SPEC, model=dataclasses.replace(TINY, num_layers=3))
    ),
    "the configuration": request(spec=dataclasses.replace(SPEC, config=config(remat="full"))),
    "the quantisation": request(spec=dataclasses.replace(SPEC, config=config(quantize="nf4"))),
}


def test_any_other_request_is_another(root):
    """Breaks when a plan of one program is told as that of another."""
    keys = {plan_cache.identity(other) for other in OTHERS.values()}
    keys |= {plan_cache.identity(request()), plan_cache.identity(request(), 4)}
    assert len(keys) == len(OTHERS) + 2 and plan_cache.identity(request()) in keys
    assert not any(" at 0x" in key for key in keys), "an address differs between processes"


def test_other_sources_versions_and_settings_are_asked_anew(asked, monkeypatch, tmp_path):
    """Breaks when a plan outlives the code, the compiler or the flags that it was made with."""
    plan_cache.ask(request()), plan_cache.ask(request())
    assert len(asked) == 1
    for name in ("jax", "jaxlib", "libtpu", "flax"):
        assert plan_cache._versions().get(name), f"{name} is not part of the key"
        with monkeypatch.context() as patch:
            changed = plan_cache._versions() | {name: "0"}
            patch.setattr(plan_cache, "_versions", lambda changed=changed: changed)
            plan_cache.ask(request())
    with monkeypatch.context() as patch:
        patch.setattr(plan_cache, "source_digest", lambda: "another")
        plan_cache.ask(request())
    with monkeypatch.context() as patch:
        patch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
        plan_cache.ask(request())
    assert len(asked) == 7
    plan_cache.ask(request())
    assert len(asked) == 7


def test_the_sources_are_those_that_programs_import(tmp_path):
    """Breaks when a module that decides a program can change without a plan noticing, or one that
    does not makes every plan anew.
    """
    import test_floors

    reached, waiting = set(), {"performance.programs", "performance.worker", "performance.hlo"}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= test_floors.IMPORTS[name] - reached
    beside = {name for name in reached if name.split(".")[0] in ("interop", *test_floors.GROUND)}
    package = test_floors.PACKAGE
    copy = shutil.copytree(package, tmp_path / "icae_jax")
    same = plan_cache.source_digest(package)
    assert plan_cache.source_digest(copy) == same == plan_cache.source_digest()
    digested = {
        test_floors.module_name(path)
        for folder in plan_cache.SOURCES
        for path in (package / folder).rglob("*.py")
    } | {name[:-3].replace("/", ".") for name in plan_cache.READERS}
    missing = {n for n in reached - beside - digested if n and not n.startswith("performance")}
    assert not missing
    for name, differs in (
        ("models/llama.py", True),
        ("training/step.py", True),
        ("performance/worker.py", True),
        ("performance/plan_summary.py", False),
        ("cli/plan.py", False),
    ):
        text = (copy / name).read_text()
        (copy / name).write_text(text + "\n# changed\n")
        assert (plan_cache.source_digest(copy) != same) == differs, name
        (copy / name).write_text(text)


def test_sources_that_change_while_it_compiles(asked, root, monkeypatch):
    """Breaks when an answer of half-edited sources is kept under either of them."""
    digests = iter(["before", "before", "after"])
    monkeypatch.setattr(plan_cache, "source_digest", lambda: next(digests))
    plan_cache.ask(request())
    assert len(asked) == 1 and files_of(root) == []


# ---------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"peak_bytes": 5', '"peak_bytes": 4'),
        lambda text: text.replace('"answer"', '"anser"'),
        lambda text: "\0" * len(text),
    ],
    ids=["empty", "cut", "a list", "a figure", "a field", "zeros"],
)
def test_a_damaged_entry_is_replaced(damage, asked, root):
    """Breaks when a file that a power loss or a stray hand left is believed, or ends the plan."""
    answer = plan_cache.ask(request())
    (path,) = files_of(root)
    whole = path.read_text()
    assert damage(whole) != whole
    path.write_text(damage(whole))
    assert "no plan like it was made here" in plan_cache.forecast([(request(), 1)])
    assert plan_cache.ask(request()) == answer and len(asked) == 2
    assert json.loads(path.read_text())["answer"] == answer
    assert plan_cache.ask(request()) == answer and len(asked) == 2


def test_failures_are_not_kept_but_that_it_does_not_fit(asked, root, monkeypatch):
    """Breaks when a crash or a typing error comes back for ever, or what does not fit is compiled
    again.
    """
    large = request(spec=dataclasses.replace(SPEC, contexts=12))
    for _ in range(2):
        with pytest.raises(worker.OutOfMemory, match="RESOURCE_EXHAUSTED"):
            plan_cache.ask(large)
    assert len(asked) == 1 and len(files_of(root)) == 1
    for error in (RuntimeError("killed"), plan.UserError("no such topology")):
        monkeypatch.setattr(worker, "ask", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            plan_cache.ask(request())
    assert len(files_of(root)) == 1


def test_without_a_place_to_keep_it(asked, root, monkeypatch, capsys):
    """Breaks when a plan of an hour ends because its answer cannot be written."""
    monkeypatch.setattr(plan_cache.files, "write_json", _full)
    assert plan_cache.ask(request())["peak_bytes"] == 5 * GIB
    assert "cannot be kept: [Errno 28]" in capsys.readouterr().err
    monkeypatch.undo()


def _full(*_):
    raise OSError(28, "No space left on device")


def test_the_cache_verb_knows_plans(asked, root, capsys):
    """Breaks when plans are not listed or pruned, or a user's own files are."""
    plan_cache.ask(request()), plan_cache.ask(request(exact=True))
    (root / "plans" / "notes.json").write_text("{}")
    assert cli.main(["cache", "list", "--json"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["what"], row["name"], row["count"]) == ("plans", "of programs", 2)
    assert len(cache.prune(root, 0, CACHE_VERSION, everything=True)) == 2
    assert [path.name for path in (root / "plans").iterdir()] == ["notes.json"]
    plan_cache.ask(request())
    assert len(asked) == 3


# ---------------------------------------------------------------------------------------- durations


def test_how_long_a_plan_takes_is_learnt_from_like_ones(asked, root, monkeypatch):
    """Breaks when a forecast takes the time of another kind, machine or program for this one's."""
    rule = plan_cache.forecast([(request(), 1)])
    assert rule == (
        "compiling 1 program: about 2 min, as for Llama-3-8B on an AMD EPYC, "
        "since no plan like it was made here"
    )
    times = {4: 60.0, 8: 90.0}
    for contexts, seconds in times.items():
        clock = iter([0.0, seconds])
        with monkeypatch.context() as patch:
            patch.setattr(plan_cache.time, "perf_counter", lambda clock=clock: next(clock))
            plan_cache.ask(request(spec=dataclasses.replace(SPEC, contexts=contexts)))
    wider = request(spec=dataclasses.replace(SPEC, config=config(steps=7)))
    assert plan_cache.forecast([(wider, 1)]) == (
        "compiling 1 program: about 60 s, as earlier plans took here"
    )
    between = request(spec=dataclasses.replace(SPEC, contexts=6))
    assert "about 75 s" in plan_cache.forecast([(between, 1)])
    assert "about 2 min" in plan_cache.forecast([(between, 1), (wider, 1)])
    evaluation = request(spec=dataclasses.replace(SPEC, what="evaluate"))
    assert "about 60 s, as earlier" in plan_cache.forecast([(evaluation, 1)])
    larger = request(spec=dataclasses.replace(SPEC, model=dataclasses.replace(TINY, vocab_size=9)))
    for other in (request(exact=True), larger):
        assert "no plan like it" in plan_cache.forecast([(other, 1)])
    monkeypatch.setattr(plan_cache.compiled, "processor", lambda: "another")
    assert plan_cache.forecast([(wider, 1)]) == rule
