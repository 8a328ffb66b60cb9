"""`icae plan`: bad input, the search, what is told, and real programs compiled for a TPU slice."""

import dataclasses
import importlib.util
import json
import re

import jax
import pytest
from conftest import ROOT, TINY

from icae_jax.cli import main as cli
from icae_jax.performance import chips, plan, plan_summary, programs, subject
from icae_jax.runtime import sharding
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict

GIB = subject.GIB
V5E = chips.find("TPU v5e")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which is not installed"
)


@pytest.fixture(autouse=True)
def _nothing_kept(tmp_path, monkeypatch):
    """Each test plans from nothing."""
    monkeypatch.setenv("ICAE_CACHE", str(tmp_path / "cache"))


def base_folder(folder, **changes):
    """A folder that holds the config.json of a base, and no weights."""
    sizes = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sizes | changes))
    return str(folder)


def command(base, *more, topology="v5e:2x2", changes=()):
    values = {
        "base": base,
        "compression.k": 4,
        "data.context_lengths": "(32,)",
        "data.context_weights": "()",
        "batch_size": 8,
    }
    values |= {"lora.rank": 4, "data.max_target_tokens": 8} | dict(changes)
    config = [f"--config.{name}={value}" for name, value in values.items() if value is not None]
    return [
        "plan",
        "--config",
        str(ROOT / "configs" / "icae.py"),
        "--topology",
        topology,
        *config,
        *more,
    ]


def make_spec(what="train", contexts=4, **changes):
    raw = {
        "base": "b",
        "data": {"train": "-"},
        "batch_size": contexts * changes.get("accumulate", 1),
    } | changes
    return programs.Spec(what, from_dict(TrainConfig, raw), TINY, contexts, 512)


# ---------------------------------------------------------------------------------------- bad input

NO_COMPILATION = {"kind": "TPU v5 lite", "chips": 16}
BAD = {
    "no base": (
        {"base": None},
        [],
        "base is not set; name it, --config.base=NAME.*meta-llama/Llama-2-7b-hf",
    ),
    "unknown base": (
        {"base": "nobody/none"},
        [],
        "the sizes of 'nobody/none' are not known; known: meta-llama/Llama-2-7b-hf",
    ),
    "a field": ({"compression.k": -1}, [], r"compression\.k is -1"),
    "both": (
        {},
        ["--contexts_per_chip", "2", "--search"],
        "--contexts_per_chip and --search exclude each other",
    ),
    "uneven batch": (
        {"batch_size": 24},
        [],
        "24 contexts do not divide over mesh.data x mesh.fsdp, 16: give --contexts_per_chip",
    ),
    "uneven contexts": (
        {"mesh.tensor": 2},
        ["--contexts_per_chip", "0.3"],
        "5 contexts do not divide .* 8: .*multiple of 0.5",
    ),
    "no contexts": (
        {},
        ["--contexts_per_chip", "0"],
        "--contexts_per_chip is 0; give a positive number",
    ),
    "infinite contexts": (
        {},
        ["--contexts_per_chip", "inf"],
        "--contexts_per_chip is inf; give a positive number",
    ),
    "short contexts": (
        {},
        ["--context_length", "1"],
        "--context_length is 1; give at least 2 tokens",
    ),
    "no such context": (
        {},
        ["--context_length", "0"],
        "--context_length is 0; give at least 2 tokens",
    ),
    "long contexts": (
        {"batch_size": 16},
        ["--context_length", "250"],
        "contexts of 250 tokens need 315 positions, the base has 256",
    ),
    "encoder layers": (
        {"batch_size": 16, "compression.encoder_layers": 9},
        [],
        r"compression\.encoder_layers is 9; the base has 2 layers",
    ),
    "mesh": (
        {"mesh.fsdp": 3},
        [],
        "mesh is data 1, fsdp 3, tensor 1, which does not make 16 devices",
    ),
    "no such flag": ({}, ["--serch"], "serch"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_anything_compiles(name, tiny_base, monkeypatch, capsys):
    """Breaks when bad input is found by the compiler, minutes later, or is not named."""

    def ask(request, devices=1):
        assert request["kind"] == "topology"
        return NO_COMPILATION

    monkeypatch.setattr(plan.worker, "ask", ask)
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: name)
    changes, flags, said = BAD[name]
    assert cli.main(command(str(tiny_base), *flags, changes=changes)) == 2
    told = capsys.readouterr().err
    assert re.search(said, told) and told.startswith("icae plan: ") and told.count("\n") == 1


def test_chips_without_published_peaks_and_no_libtpu(tiny_base, monkeypatch, capsys):
    """Breaks when a plan fails by an import error, or divides by what is not known of a chip."""
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    assert cli.main(command(str(tiny_base))) == 2
    assert (
        "icae plan: libtpu is not installed" in (told := capsys.readouterr().err)
        and "pip install 'icae_jax[tpu]'" in told
    )
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(plan.worker, "ask", lambda *_: {"kind": "TPU v9", "chips": 4})
    assert cli.main(command(str(tiny_base), topology="v9:2x2")) == 2
    assert "--topology v9:2x2: no published peaks are known of TPU v9" in capsys.readouterr().err


@needs_libtpu
def test_a_topology_that_does_not_exist(tiny_base, capsys):
    """Breaks when libtpu's own refusal ends in a traceback."""
    assert cli.main(command(str(tiny_base), topology="v5e:3x3")) == 2
    told = capsys.readouterr().err
    assert "--topology v5e:3x3: " in told and "such as v5e:4x4" in told and told.count("\n") == 1


# ------------------------------------------------------------------------------------------- search

ROOM = 15.75  # GiB that programs get of the chip's 16
SHAPES = {  # GiB by contexts a part, calls at most
    "linear": (lambda n: 3 + 0.9 * n, 6),
    "linear, hundreds": (lambda n: 3 + 0.031 * n, 6),
    "linear, thousands": (lambda n: 3 + 0.0019 * n, 7),
    "one fits": (lambda n: 9 + 6 * n, 2),
    "two fit": (lambda n: 5 + 5 * n, 5),
    "steps": (lambda n: 3 + 1.7 * -(-n // 4), 10),
    "flat, then a jump": (lambda n: 4 if n < 40 else 20, 12),
    "quadratic": (lambda n: 3 + 0.002 * n * n, 12),
    "root": (lambda n: 1 + 0.6 * n**0.5, 14),
    "flatter and flatter": (lambda n: 12 + 0.05 * n - 0.04 * min(n, 60), 14),
}


@pytest.mark.parametrize("told", [True, False], ids=["", "failures of unknown size"])
@pytest.mark.parametrize("name", SHAPES)
def test_search_finds_the_most_that_fit(name, told):
    """Breaks when a search ends too early, never, or compiles often (which takes minutes each)."""
    peak, most_calls = SHAPES[name]
    asked, said = [], []

    def compile_(spec):
        n = spec.contexts // 4
        asked.append(n)
        fits = peak(n) <= ROOM
        return {
            "fits": fits,
            "peak_bytes": peak(n) * GIB if fits or told else None,
            "kind": "TPU v5 lite",
        }

    spec, found = plan.search(make_spec(contexts=4), compile_, said.append)
    best = max(n for n in range(1, 20000) if peak(n) <= ROOM)
    got = spec.contexts // 4
    assert found["fits"] and got <= best <= got + max(0, got // 50) and asked.count(got) == 1
    assert len(asked) == len(set(asked)) == len(said) <= most_calls
    assert said[0].startswith("4 contexts: fit, peak ")


def test_search_where_nothing_fits():
    """Breaks when the failure of the fewest contexts is searched below, or lost."""
    failure = {"fits": False, "peak_bytes": None, "message": "RESOURCE_EXHAUSTED"}
    lines = []
    spec, found = plan.search(make_spec(contexts=4), lambda spec: dict(failure), lines.append)
    assert found == failure and spec.contexts == 4 and lines == ["4 contexts: do not fit"]


# ------------------------------------------------------------------------------------------ telling


@pytest.mark.parametrize(
    ("message", "peak"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 17.25G of 15.75G hbm. "
            "Exceeded hbm capacity by 1.50G.\n\nTotal hbm usage >= 17.50G:",
            17.25 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (1.50T) exceeds available "
            "HBM (15.75G).",
            1536 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: something new", None),
    ],
)
def test_what_a_program_that_does_not_fit_wanted(message, peak, monkeypatch):
    """Breaks when a compiler's message is misread, or one that says nothing ends the plan."""

    def ask(request, host_devices):
        raise plan.worker.OutOfMemory(message)

    monkeypatch.setattr(plan.worker, "ask", ask)
    for _ in range(2):  # as compiled, and as kept
        found = plan.compile_for(make_spec(), "v5e:2x2")
        monkeypatch.setattr(plan.worker, "ask", lambda *_: pytest.fail("asked again"))
        assert found == {"fits": False, "peak_bytes": peak, "message": message.splitlines()[0]}


def test_advice_names_the_cheapest_change_first():
    """Breaks when advice is moot, does not divide, or the costly changes come first."""
    shape = {"data": 2, "fsdp": 4, "tensor": 1}
    spec = make_spec(contexts=24, remat="dots", accumulate=2)
    assert plan.advice(spec, shape) == [
        "--config.remat=full",
        "fewer contexts at once (--search finds how many): --config.accumulate=6",
        "the base over more chips: --config.mesh.data=1 --config.mesh.fsdp=8",
        "a base of half the bytes: --config.quantize=int8 (nf4: of a quarter)",
        "activations over more chips too: --config.mesh.fsdp=2 --config.mesh.tensor=2",
        "a larger slice",
    ]
    assert plan.advice(make_spec(contexts=24, batch_size=100), shape)[1].endswith(
        "--contexts_per_chip=1"
    )
    assert (
        plan.advice(make_spec(remat_decoder="dots", remat="full"), shape)[0]
        == "--config.remat=full --config.remat_decoder=full"
    )
    nothing_left = {"data": 1, "fsdp": 4, "tensor": 2}
    quantised = make_spec(remat="full", quantize="int8")
    assert plan.advice(quantised, nothing_left) == ["a larger slice"]
    assert plan.advice(make_spec("compress"), nothing_left | {"fsdp": 1, "data": 4})[0].startswith(
        "the base over more chips"
    )


FOUND = {
    "fits": True,
    "peak_bytes": 12 * GIB,
    "argument_bytes": 5 * GIB,
    "temporary_bytes": 7 * GIB,
    "hbm_bytes": 8.19e11,
    "notes": ["a note"],
    "collectives": [
        ["all-gather", 2e9, 30, "bf16[1,8]"],
        ["all-gather", 3e9, 1, "bf16[9,9]"],
        ["all-reduce", 1e9, 2, "f32[7]"],
    ],
}


def summary(monkeypatch, found, what="train", flops=5e14, extra=0.0, **changes):
    shape = {"data": 1, "fsdp": 4, "tensor": 1}
    monkeypatch.setattr(programs, "least", lambda *_: 4 * 4e14)
    spec = make_spec(what, contexts=8, accumulate=2, **changes)
    counted = plan_summary.Counted(flops, extra, shape)
    return plan_summary.summarise(spec, shape, "v5e:2x2", V5E, found, counted)


def test_the_estimate(monkeypatch):
    """Breaks when the slowest of compute, memory and links is not the time, or MFU counts too much.

    Too much is what is recomputed; a collective counts with its turns.
    """
    got = summary(monkeypatch, FOUND)
    assert got["collectives"]["all-gather"] == {
        "times": 31,
        "bytes": 63e9,
        "largest_bytes": 3e9,
        "largest": "bf16[9,9]",
    }
    assert got["estimated_parts"] == pytest.approx(
        {"compute": 5e14 / 197e12, "memory": 1.0, "links": (63e9 + 2 * 2e9) / 200e9}
    )
    assert got["estimated_seconds"] == pytest.approx(5e14 / 197e12) and got[
        "estimated_mfu"
    ] == pytest.approx(0.8)
    assert (
        got["flops_ratio"] == pytest.approx(1.25)
        and got["contexts_per_chip"] == 2
        and got["accumulate"] == 2
    )
    links = summary(monkeypatch, FOUND, flops=1e12)
    assert links["estimated_seconds"] == links["estimated_parts"]["memory"] == pytest.approx(1.0)
    lines = plan_summary.text(got)
    assert (
        "2 a chip, 8 at once, 512 tokens each" in lines
        and "yes: peak 12.00 GiB of 16 GiB a chip" in lines
    )
    assert (
        "1.250 of the least possible" in lines
        and "6.3 contexts/s, MFU 80 %" in lines
        and lines.endswith("\na note")
    )


def test_dequantising_is_told_apart(monkeypatch):
    """Breaks when dequantising counts as matmuls, or the base's bytes are not the quantised."""
    plain = summary(monkeypatch, FOUND)
    got = summary(monkeypatch, FOUND, extra=1e13, quantize="int8")
    same = ("flops_per_chip", "flops_ratio", "estimated_seconds", "estimated_mfu")
    assert {name: got[name] for name in same} == {name: plain[name] for name in same}
    assert got["dequantising_flops_per_chip"] == 1e13 and got["quantize"] == "int8"
    lines = plan_summary.text(got)
    assert re.search(r"^dequantising +10 T a chip, 2 % of these", lines, re.MULTILINE)
    assert re.search(r"^base +int8, ", lines, re.MULTILINE)
    assert "dequantising" not in plan_summary.text(plain)
    # Four chips: kernels in a byte and a scale of 4 bytes an output; the table and the head stay.
    kernels = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    scales = sum(out for _, out in kernels) * 4
    ends = 2 * 64 * 32 * 4
    norms = (2 * 2 + 1) * 32 * 4
    split = 2 * sum(n * m for n, m in kernels) + ends
    # Scales are split where a kernel's outputs are: those of o and down, over the width.
    o_and_down = 2 * 32 * 4
    assert got["base_bytes_per_chip"] == (
        split / 4 + norms + 2 * (scales - o_and_down + o_and_down / 4)
    )


def test_what_is_told_of_a_program_that_does_not_fit(monkeypatch):
    """Breaks when a plan that does not fit gives a time, or no way out."""
    got = summary(
        monkeypatch, {"fits": False, "peak_bytes": None, "message": "RESOURCE_EXHAUSTED: why"}
    )
    assert (
        got["estimated_seconds"] is None is got["estimated_mfu"]
        and json.loads(json.dumps(got)) == got
    )
    lines = plan_summary.text(got | {"advice": ["a larger slice"]}).splitlines()
    assert any(line.startswith("fits") and "no: peak unknown of 16 GiB" in line for line in lines)
    assert (
        "RESOURCE_EXHAUSTED: why" in lines
        and lines[-1] == "to make it fit: a larger slice"
        and "estimate" not in plan_summary.text(got)
    )


def test_decoding_says_how_much_is_read_and_written(monkeypatch):
    got = summary(monkeypatch, FOUND, "decode")
    assert (got["prompt_tokens"], got["new_tokens"], got["accumulate"]) == (programs.PROMPT, 256, 1)
    assert "; 32 more of a question, 256 answered" in plan_summary.text(got)


# -------------------------------------------------------------------------------- compiled for TPUs

KEYS = {
    "flops_per_chip",
    "least_flops_per_chip",
    "peak_hbm_bytes_per_chip",
    "fits",
    "contexts_per_chip",
    "estimated_seconds",
    "estimated_mfu",
}


@pytest.mark.nightly
@pytest.mark.slow
@needs_libtpu
def test_a_training_step_gathers_one_layer_at_a_time(tmp_path, monkeypatch, capsys):
    """Breaks when the whole base is gathered at once, which would not fit.

    Also when a chip does not hold a quarter of the base, or the program does not compile for a TPU.
    """
    base = base_folder(tmp_path / "base")
    # FLOPs and the evaluation take processes of their own; planning below includes them.
    shape = {"data": 1, "fsdp": 4, "tensor": 1}
    counted = plan_summary.Counted(4e9, 1e8, shape)
    monkeypatch.setattr(plan, "count_flops", lambda *_: counted)
    restoring = [
        "--config.objectives.ae=1.0",
        "--config.objectives.lm=0.0",
        "--config.eval_examples=0",
    ]
    assert cli.main(command(base, "--json", *restoring)) == 0
    got = json.loads(capsys.readouterr().out)
    assert (
        got.keys() >= KEYS and got["fits"] and got["chips"] == 4 and got["contexts_per_chip"] == 2
    )
    widest = 2 * 128 * 256  # bytes of an MLP kernel, and of the embedding table
    gathers = got["collectives"]["all-gather"]
    assert gathers["largest_bytes"] == widest and gathers["times"] > 7 * 4
    parameters = 2 * (2 * 256 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 256))
    assert 1 < got["argument_bytes_per_chip"] / (parameters / 4) < 1.3
    assert got["argument_bytes_per_chip"] < got["peak_hbm_bytes_per_chip"] < 16e6
    assert (
        got["estimated_seconds"]
        == max(got["estimated_parts"].values())
        > 0
        < got["estimated_mfu"]
        < 1
    )


def small_training(scheme):
    """A training step on a base in a scheme, and what planning it on four chips gives."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    model = dataclasses.replace(TINY, num_kv_heads=4, **wide)
    config = make_spec(quantize=scheme, dtype="bfloat16", lora={"rank": 4}).config
    spec = programs.Spec("train", config, model, 4, 32)
    return spec, plan.compile_for(spec, "v5e:2x2")


@pytest.fixture(scope="module")
def full_precision():
    return small_training("")


@needs_libtpu
@pytest.mark.nightly
@pytest.mark.parametrize(("scheme", "codes"), [("int8", "s8["), ("nf4", "u8[")])
def test_a_quantised_base_is_gathered_in_its_codes(full_precision, scheme, codes):
    """Breaks when a layer is dequantised where it is stored, so that links carry as much as before,
    or a chip holds full precision.
    """
    spec, compiled = small_training(scheme)
    gathered = {shape for kind, *_, shape in compiled["collectives"] if kind == "all-gather"}
    kernels = {"[1,128,128]", "[1,128,256]", "[1,256,128]", "[1,64,128]", "[1,64,256]"}
    matrices = {shape for shape in gathered if shape[shape.index("[") :] in kernels}
    assert matrices and all(shape.startswith(codes) for shape in matrices)
    plain, compiled_plain = full_precision
    saved = compiled_plain["argument_bytes"] - compiled["argument_bytes"]
    shape = {"data": 1, "fsdp": 4, "tensor": 1}
    less = programs.base_bytes(plain, shape) - programs.base_bytes(spec, shape)
    assert saved == pytest.approx(less, rel=0.2)  # arrays are padded to tiles


@needs_libtpu
@pytest.mark.nightly
def test_a_slice_of_one_chip():
    """Breaks when only whole hosts can be planned."""
    assert plan.worker.ask({"kind": "topology", "topology": "v5e:1x1"}) == {
        "kind": "TPU v5 lite",
        "chips": 1,
    }


@needs_libtpu
@pytest.mark.nightly
@pytest.mark.parametrize("what", programs.WHATS)
def test_every_program(what, tiny_base, capsys):
    """Breaks when training with its evaluation, writing or reading memories cannot be planned."""
    assert (
        cli.main(
            command(
                str(tiny_base), "--what", what, "--contexts_per_chip", "1", "--config.data.eval=-"
            )
        )
        == 0
    )
    told = capsys.readouterr().out
    assert (
        "1 a chip, 4 at once, 32 tokens each" in told
        and "fits         yes" in told
        and ("evaluation" in told) == (what == "train")
    )
    assert (
        "4 x TPU v5 lite (v5e:2x2), mesh data 1, fsdp 4, tensor 1" in told
        and "a roofline from published peaks" in told
    )


@needs_libtpu
@pytest.mark.nightly
def test_a_program_that_really_does_not_fit(tmp_path, capsys):
    """Breaks when the compiler's refusal, or the memory that it wanted, is misread."""
    broad = base_folder(
        tmp_path / "base", hidden_size=1024, intermediate_size=2**21 + 2**20, num_hidden_layers=2
    )
    assert cli.main(command(broad, "--what", "compress", "--json")) == 1
    got = json.loads(capsys.readouterr().out)
    layer = (
        3 * 2 * 1024 * 3 * 2**20
    )  # bytes of one layer's MLP: a quarter of each of two is held, and kernels are gathered
    assert (
        got.keys() >= KEYS
        and not got["fits"]
        and got["estimated_seconds"] is None
        and got["message"].startswith("RESOURCE_EXHAUSTED")
    )
    assert (
        layer < got["peak_hbm_bytes_per_chip"] < 1.5 * layer
        and got["peak_hbm_bytes_per_chip"] > got["chip_hbm_bytes"]
    )
    assert got["advice"][-1] == "a larger slice"


@pytest.mark.parametrize(("evaluation", "fits", "peak"), [(3.0, True, 2.0), (None, False, 9.0)])
def test_a_training_s_evaluation_is_planned_too(evaluation, fits, peak):
    """Breaks when a plan says that a run fits whose held-out evaluation does not."""
    asked = []

    def compile_(spec):
        asked.append(spec.what)
        return (
            {"fits": True, "peak_bytes": evaluation}
            if evaluation
            else {"fits": False, "peak_bytes": 9.0, "message": "why"}
        )

    found = plan.with_evaluation(make_spec(), {"fits": True, "peak_bytes": 2.0}, compile_)
    assert asked == ["evaluate"]
    assert (found["fits"], found["peak_bytes"], found["evaluation_peak_bytes"]) == (
        fits,
        peak,
        evaluation or 9.0,
    )
    for spec, compiled in (
        (make_spec(what="decode"), {"fits": True}),
        (make_spec(eval_examples=0), {"fits": True}),
        (make_spec(), {"fits": False}),
    ):
        assert plan.with_evaluation(spec, compiled, compile_) == compiled
    assert len(asked) == 1


def test_the_evaluation_that_is_planned_is_the_one_that_runs():
    """Breaks when the planned evaluation has other shapes than training's, or no microbatches."""
    spec = dataclasses.replace(make_spec(accumulate=2), what=programs.EVALUATE)
    mesh = sharding.make_mesh(spec.config.mesh, jax.devices()[:1])
    text = programs.lower(spec, mesh).as_text()
    alone = programs.lower(
        dataclasses.replace(spec, config=dataclasses.replace(spec.config, accumulate=1)), mesh
    ).as_text()
    assert text.count("stablehlo.while") > alone.count("stablehlo.while")
    assert len(programs.lower(dataclasses.replace(spec, what="train"), mesh).as_text()) > 1.5 * len(
        text
    )
