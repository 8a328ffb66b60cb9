"""launch/benchmarks/compare.py: the PyTorch baseline computes the same, and ratios are right."""

import dataclasses
import functools
import json
import math
import os
import statistics
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, close, random_trained

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from icae_jax.interop.adapters import lora_tensors  # noqa: E402
from icae_jax.training.compressor_task import CompressorLosses  # noqa: E402

BENCH = ROOT / "launch" / "benchmarks"
K, RANK = 4, 4
SIZES = {
    "seed": 0,
    "tokens": 16,
    "memory": K,
    "lora_rank": RANK,
    "questions": 3,
    "prompt": 4,
    "answer": 3,
    "batch": 2,
    "dtype": "float32",
}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc and sets the cores of processes"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Runs PyTorch in one thread; at these sizes more threads only spin."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench(monkeypatch):
    """A module of launch/benchmarks by name."""
    monkeypatch.syspath_prepend(BENCH)
    return lambda name: __import__(name)


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"context": (2, 16), "continuation": (2, 13), "prompt": (2, 3, 4), "answer": (2, 3, 3)}
    return {
        name: rng.integers(3, TINY.vocab_size, shape, np.int32) for name, shape in shapes.items()
    }


@functools.cache
def trained():
    return random_trained(TINY, K)


@functools.cache
def ours(sides, params, case):
    """`{objective: (loss, gradient of the trained tree)}` of both contexts, without dropout."""
    config = dataclasses.replace(sides.train_config(case, SIZES, 2), remat="none", attention="xla")
    task, batch = (
        CompressorLosses(config, TINY, config.compression),
        sides.training_batch(config, arrays(), 2),
    )

    @jax.jit
    def all_of(tree):
        losses, pull = jax.vjp(
            lambda tree: {
                o: s / n for o, (s, n) in task.losses(tree, params.tree, batch, None).items()
            },
            tree,
        )
        alone = np.eye(len(losses), dtype=np.float32)  # a row weighs one objective alone
        return losses, jax.vmap(pull)(dict(zip(losses, alone.T, strict=True)))[0]

    losses, gradients = jax.device_get(all_of(trained()))
    return {
        o: (loss, jax.tree.map(lambda x, i=i: x[i], gradients))
        for i, (o, loss) in enumerate(losses.items())
    }


class Hashable:
    def __init__(self, tree):
        self.tree = tree


@pytest.fixture(scope="module")
def params(tiny_params):
    return Hashable(tiny_params)


@pytest.fixture
def torch_side(bench, tiny_base):
    """A function that makes a recipe on the tiny base, with random adapters and without dropout."""

    def make(recipe, dtype="float32"):
        model = bench("torch_icae").TorchICAE(
            tiny_base, recipe, K, RANK, bench("sides").ALPHA, dropout=0.0, dtype=dtype
        )
        lora = {
            name: torch.tensor(np.asarray(x))
            for name, x in lora_tensors.lora_to_hub(trained()["lora"]).items()
        }
        missing = peft.set_peft_model_state_dict(model.encoder, lora)
        assert not missing.unexpected_keys
        with torch.no_grad():
            model.table.weight.copy_(torch.tensor(np.asarray(trained()["memory_table"])))
        return model

    return make


def passes(bench, model, objective):
    rows = 1 if model.recipe.own_decoder else 2
    return bench("torch_icae").passes({**arrays(), "eos": bench("sides").EOS}, objective, rows)


# ------------------------------------------------------------------------------------- the baseline


@pytest.mark.parametrize("objective", ["ae", "lm", "qa"])
@pytest.mark.parametrize("recipe", ["reference", "stronger"])
def test_losses_and_gradients_agree(bench, torch_side, params, recipe, objective):
    """Breaks when the sides differ in tokens, positions, labels, or what is trained or adapted."""
    sides = bench("sides")
    want, grads = ours(sides, params, "qa" if objective == "qa" else "ae+lm")[objective]
    model = torch_side(recipe)
    turns = passes(bench, model, objective)
    assert len(turns) == (6 if objective == "qa" else 2) // (1 if recipe == "reference" else 2)
    losses = [model.loss(*rows) for rows in turns]
    sum(losses).div(len(turns)).backward()
    assert abs(sum(losses).item() / len(turns) - float(want)) <= 1e-5 * float(want)
    got = {
        name.replace(".default", ""): p.grad
        for name, p in model.encoder.named_parameters()
        if p.requires_grad
    }
    for name, grad in lora_tensors.lora_to_hub(grads["lora"]).items():
        close(got.pop(name), grad, 1e-4)
    assert not got  # nothing else is trained
    close(model.table.weight.grad, grads["memory_table"], 1e-4)


def test_autoencoding_alone_is_that_half_of_both(bench):
    """Breaks when the case "ae" trains on our side what is not compared with the baseline above."""
    sides, batches = bench("sides"), {}
    for case, weights in (("ae", {"ae": 1.0}), ("ae+lm", {"ae": 0.5, "lm": 0.5})):
        config = sides.train_config(case, SIZES, 2)
        assert config.objectives.weights == weights
        batches[case] = sides.training_batch(config, arrays(), 2)
    batches["ae+lm"]["targets"].pop("lm")
    jax.tree.map(np.testing.assert_array_equal, batches["ae"], batches["ae+lm"])


def test_the_reference_decoder_is_a_frozen_copy_that_recomputes(bench, torch_side):
    """Breaks when the baseline is not the recipe that its name says."""
    model = torch_side("reference")
    inner = {"encoder": model.encoder.get_base_model(), "decoder": model.decoder}
    pointers = [{p.data_ptr() for p in module.parameters()} for module in inner.values()]
    assert not pointers[0] & pointers[1] and not any(
        p.requires_grad for p in model.decoder.parameters()
    )
    assert not any("lora" in name for name, _ in model.decoder.named_parameters())
    runs = dict.fromkeys(inner, 0)
    # Calls are counted as they start, since recomputing stops within the MLP.
    for name, module in inner.items():
        module.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, name=name: runs.update({name: runs[name] + 1})
        )
    before = {
        name: p.clone()
        for name, p in [*model.encoder.named_parameters(), *model.decoder.named_parameters()]
    }
    table = model.table.weight.clone()
    rows = passes(bench, model, "ae")[0]
    assert model.step(*rows) > 0 and runs == {"encoder": 1, "decoder": 2}
    after = dict([*model.encoder.named_parameters(), *model.decoder.named_parameters()])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora" in name} and not torch.equal(
        model.table.weight, table
    )


def test_the_stronger_recipe_has_one_base_and_recomputes_nothing(bench, torch_side):
    """Breaks when it holds a second base, runs a layer more than twice, or leaves adapters off."""
    model = torch_side("stronger")
    runs = []
    model.encoder.get_base_model().model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: runs.append(1)
    )
    before = [p.clone() for p in model.trained]
    model.step(*passes(bench, model, "qa")[0])
    assert model.decoder is model.encoder and len(runs) == 2
    assert all(
        p.requires_grad and not torch.equal(p, old)
        for p, old in zip(model.trained, before, strict=True)
    )


@pytest.mark.parametrize("recipe", ["reference", "stronger"])
def test_bfloat16(bench, torch_side, recipe):
    """Breaks when the baseline does not train in bfloat16, or what it trains is rounded to it."""
    rows = passes(bench, torch_side(recipe), "ae")[0]
    want, model = torch_side(recipe).loss(*rows).item(), torch_side(recipe, "bfloat16")
    got = model.step(*rows).item()
    assert got != want and abs(got - want) <= 2e-2 * want
    assert {p.dtype for p in model.trained} == {torch.float32}
    assert {p.dtype for p in model.encoder.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_flops_of_the_baseline_count_attention_and_what_is_recomputed(bench, torch_side):
    """Breaks when fused attention, the head, or the decoder's recomputation is not counted."""
    c, h = TINY, TINY.num_heads * TINY.head_dim
    for recipe in ("reference", "stronger"):
        model = torch_side(recipe)
        rows = passes(bench, model, "ae")[0]
        B, n = rows[0].shape
        written, read = n + K, K + 1 + n + 1
        kv = c.num_kv_heads * c.head_dim
        block = 2 * c.num_layers * c.hidden_size * (2 * h + 2 * kv + 3 * c.intermediate_size)
        adapters_of = 2 * c.num_layers * RANK * (2 * c.hidden_size + h + kv)
        passes_read = 3 if recipe == "reference" else 2
        want = block * (2 * written + passes_read * read) + 3 * adapters_of * written
        want += 4 * c.num_layers * h * (3 * written**2 + (passes_read + 1) * read**2)
        want += 2 * c.hidden_size * c.vocab_size * (written + 2 * read)
        if recipe == "reference":
            # Recomputing stops before a block's last matmul, whose result no gradient needs.
            want -= 2 * c.num_layers * c.hidden_size * c.intermediate_size * read
        assert model.flops(*rows) == B * want
        assert all(p.grad is None for p in model.trained)


# ----------------------------------------------------------------------------------- the comparison


class Fake:
    """A side with a given loss."""

    def __init__(self, name, loss, batch=1):
        self.name, self.loss, self.batch = name, loss, batch

    def ask(self, what, *arguments):
        assert what == "losses"
        return {"ae": 1.0, "lm": self.loss}


@pytest.mark.parametrize("loss, fine", [(2.001, True), (2.005, False), (math.nan, False)])
def test_sides_that_disagree_are_not_measured(bench, loss, fine):
    """Breaks when sides that train different things are compared, or NaN agrees with a loss."""
    compare = bench("compare")
    group = [Fake("ours", 2.0), Fake("reference", 2.0), Fake("stronger", loss)]
    if fine:
        assert compare.check(group, ["ae+lm"], 1e-3)["ae+lm"]["ours"] == {"ae": 1.0, "lm": 2.0}
        return
    with pytest.raises(ArithmeticError, match=r"ae\+lm.*lm losses.*ours 2, stronger"):
        compare.check(group, ["ae+lm"], 1e-3)


def test_every_second_round_is_reversed(bench):
    """Breaks when the same side always runs first, and the other always with warm caches."""
    said = []

    class Recording(Fake):
        batch, contexts = 1, 2

        def ask(self, what, case, contexts):
            said.append(self.name)
            return {"wall_seconds": 3.0 * contexts, "cpu_seconds": 5.0 * contexts}

    taken = bench("compare").measure([Recording("ours", 0), Recording("reference", 0)], ["ae"], 3)
    assert taken[0]["ae"]["ours"] == {"wall_seconds": 3.0, "cpu_seconds": 5.0}  # a context
    one, two = ["ours", "reference"], ["reference", "ours"]
    assert said == one + one + two + one and len(taken) == 3  # the first of them warms up


def test_a_side_that_ends_is_named(bench, tmp_path, capfd):
    """Breaks when a side that dies is waited for forever, or is not named."""
    side = bench("compare").Side(
        "stronger",
        tmp_path,
        {"batch": 2, "contexts": 2, "one_by_one": 1, "threads": 1, "device": "cpu"},
    )
    try:
        with pytest.raises(ChildProcessError, match="side stronger ended with exit code 1"):
            side.ask("train", "ae", 2)
    finally:
        side.end()
    assert "problem.safetensors" in capfd.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--layers", "1"], "--layers is 1"),
        (["--contexts", "12"], "--contexts is 12; it must be a multiple of --batch (8)"),
        (["--one_by_one", "9"], "--one_by_one is 9; it must be at most --contexts (8)"),
        (["--hidden", "100"], "--hidden is 100"),
        (["--continuation", "600"], "--continuation is 600; it must be at most --tokens (512)"),
        (["--continuation", "8"], "--continuation is 8"),
        (["--threads", "100000"], "--threads is 100000"),
        (["--cases", "ae,mlm"], "--cases is ae,mlm; choose from ae,ae+lm,qa"),
        (["--sides", "ours,ours-1"], "--sides is ours,ours-1; give ours"),
        (["--sides", "reference"], "--sides is reference; give ours"),
        (["--dtype", "float16"], "float16"),
        (["--rounds", "0"], "--rounds is 0"),
    ],
    ids=lambda x: "" if isinstance(x, str) else " ".join(x),
)
def test_bad_flags_are_named(bench, tmp_path, capsys, flags, message):
    """Breaks when a mistyped flag is noticed only after a model was loaded."""
    with pytest.raises(SystemExit) as out:
        bench("compare").flags(["--workdir", str(tmp_path / "w"), *flags])
    assert (
        out.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "w").exists()
    )


def test_a_folder_of_other_sizes_is_refused(bench, tmp_path):
    """Breaks when a base of other sizes is measured, or someone's files are overwritten."""
    (tmp_path / "sizes.json").write_text('{"hidden": 512, "tokens": 128}')
    with pytest.raises(ValueError, match=r"made with hidden 512 \(now 64\)"):
        bench("problem").prepare(tmp_path, {"hidden": 64, "tokens": 128, "rounds": 3})
    (tmp_path / "sizes.json").rename(tmp_path / "other.json")
    with pytest.raises(ValueError, match="is not empty"):
        bench("problem").prepare(tmp_path, {"hidden": 64})


@pytest.mark.nightly
def test_a_comparison(tmp_path):
    """Breaks when the sides cannot run together, or ratios are not those of measured seconds."""
    sizes = (
        "--hidden 32 --layers 2 --heads 4 --intermediate 48 --vocab 64 --tokens 16 --memory 4 "
        "--lora_rank 4 --continuation 12 --batch 2 --contexts 4 --rounds 2 --cases ae+lm "
        "--sides ours,reference"
    )
    command = [sys.executable, str(BENCH / "compare.py"), "--workdir", str(tmp_path / "w")]
    command += sizes.split()
    out = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert out.returncode == 0, out.stderr
    told = json.loads((tmp_path / "w" / "compare.json").read_text())
    assert (
        told["machine"]["cores"] == len(os.sched_getaffinity(0))
        and told["machine"]["versions"]["torch"] == torch.__version__
    )
    assert told["machine"]["environment"]["OMP_WAIT_POLICY"] == os.environ.get(
        "OMP_WAIT_POLICY", "PASSIVE"
    )
    assert len(told["rounds"]) == 2 and told["peak_bytes"].keys() == {"ours", "reference"}
    for measure in ("cpu_seconds", "wall_seconds"):
        seconds = {
            side: [turn["ae+lm"][side][measure] for turn in told["rounds"]]
            for side in ("ours", "reference")
        }
        summary, ratios = (
            told["summary"]["ae+lm"],
            [b / a for a, b in zip(*seconds.values(), strict=True)],
        )
        want = {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "rounds": ratios,
        }
        assert summary["reference"]["ratios"]["ours"][measure] == want
        for side, values in seconds.items():
            assert summary[side][measure] == statistics.median(values) > 0
        assert f"{want['median']:.2f} ({want['min']:.2f}-{want['max']:.2f})" in out.stdout
    flops, reference = told["flops"]["ae+lm"], told["summary"]["ae+lm"]["reference"]
    assert reference["flops_to_least"] == flops["reference"]["flops"] / flops["ours"]["least"] > 1
    assert reference["flops_to_ours"] == flops["reference"]["flops"] / flops["ours"]["flops"] > 1
    losses = told["losses"]["ae+lm"]
    for objective in ("ae", "lm"):
        assert (
            abs(losses["ours"][objective] - losses["reference on 2"][objective])
            < 1e-3 * losses["ours"][objective]
        )
        assert (
            told["rounds"][-1]["ae+lm"]["reference"]["losses"][objective]
            < losses["ours"][objective] + 0.1
        )
    assert [line.split()[:2] for line in out.stdout.splitlines()[3:5]] == [
        ["ae+lm", "ours"],
        ["ae+lm", "reference"],
    ]
