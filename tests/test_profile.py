"""Traces summed by the parts of a step: a real one on this CPU, and ones as GPUs and TPUs write."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import TINY

from icae_jax.models import llama
from icae_jax.performance import profile, programs, steps
from icae_jax.runtime import profiler
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict


@pytest.mark.parametrize(
    ("op_name", "wanted"),
    [
        (
            "jit(step)/jvp(encoder)/Llama/while/body/closed_call/layers/mlp/up_proj/"
            "...i,io->...o/dot_general",
            ("encoder", "mlp", "forward"),
        ),
        (
            "jit(step)/jvp(encoder)/Llama/while/body/layers/self_attn/q_proj/random_bits",
            ("encoder", "dropout", "forward"),
        ),
        (
            "jit(step)/transpose(jvp(decoder))/Llama/layers/self_attn/o_proj/dot_general",
            ("decoder", "projections", "backward"),
        ),
        (
            "jit(step)/transpose(jvp(decoder))/Llama/while/body/checkpoint/"
            "rematted_computation/layers/self_attn/attention/div",
            ("decoder", "attention", "recomputed"),
        ),
        ("jit(step)/jvp(memory_prefix)/Llama/norm/mul", ("memory_prefix", "norms", "forward")),
        (
            "jit(step)/while/body/jvp(memory_prefix)/Llama/layers/post_attention_layernorm/mul",
            ("memory_prefix", "norms", "forward"),
        ),
        (
            "jit(step)/jvp(encoder)/Llama/while/body/jit(dynamic_index_in_dim)/dynamic_slice",
            ("encoder", "rest", "forward"),
        ),
        (
            "jit(step)/jvp(cross_entropy)/while/body/closed_call/bud,dv->buv/dot_general",
            ("cross_entropy", "", "forward"),
        ),
        ("jit(step)/optimizer/mul", ("optimizer", "", "forward")),
        ("jit(step)/transpose(jvp(jit(_take)))/scatter-add", ("other", "", "backward")),
        (
            r"frozen[\\'layers\\'][\\'mlp\\'][\\'up_proj\\'][\\'kernel\\']",
            ("arguments", "", "forward"),
        ),
        ("", ("other", "", "forward")),
    ],
)
def test_where_an_instruction_belongs(op_name, wanted):
    assert profile.place(op_name) == wanted


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """(profile of a step that spends most on its vocabulary, its wall and CPU seconds)."""
    model = dataclasses.replace(TINY, vocab_size=16384)
    raw = {
        "base": "b",
        "data": {"train": "-"},
        "lora": {"rank": 4},
        "compression": {"k": 4, "rate": 4.0},
        "remat": "full",
    }
    config = from_dict(TrainConfig, raw | {"objectives": {"ae": 1.0, "lm": 0.0}})
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.asarray(0.02 * rng.standard_normal(x.shape), np.float32),
        llama.param_shapes(model),
    )
    step = steps.TrainingStep(programs.Spec("train", config, model, 8, 32), params)
    step.run(2)
    folder = tmp_path_factory.mktemp("trace")
    with profiler.tracing(folder):
        told = step.run(3)
    trace = profile.newest_trace(folder)
    return profile.read_profile(trace, step.compiled.as_text(), 3), told.wall_seconds / 3


@pytest.mark.nightly
def test_a_real_step_sums_to_its_total(traced):
    """Breaks when nested events count twice, a loop's turns are lost, or steps are not averaged."""
    found, wall = traced
    assert sum(row.seconds for row in found.rows) == pytest.approx(found.busy_seconds)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert min(row.seconds for row in found.rows) >= 0 <= found.idle_seconds
    threads = (found.busy_seconds + found.idle_seconds) / wall
    assert 0.5 < threads < 64.5 and found.busy_seconds > 0.2 * wall
    assert len({(row.part, row.piece, row.direction) for row in found.rows}) == len(found.rows)


@pytest.mark.nightly
def test_the_part_that_was_made_slow_is_the_longest(traced):
    """Breaks when a nameless fusion, a copy or a loop's body is put down to the wrong part."""
    found, _ = traced
    parts = {
        part: sum(row.seconds for row in found.rows if row.part == part) for part in profile.PARTS
    }
    assert (
        max(parts, key=parts.get) == "cross_entropy"
        and parts["cross_entropy"] > 0.5 * found.busy_seconds
    )
    assert min(parts[part] for part in ("encoder", "memory_prefix", "decoder", "optimizer")) > 0
    assert {row.direction for row in found.rows if row.part == "encoder"} == set(profile.PASSES)
    assert {row.piece for row in found.rows if row.part == "decoder"} >= {
        "attention",
        "projections",
        "mlp",
        "norms",
    }
    lines = found.text().splitlines()
    assert lines[-2].endswith("100.0 %") and lines[-1].startswith("idle, or without a name")


# ------------------------------------------------------------------------------- written-out traces

HLO = """HloModule jit_step, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %m = f32[4]{0} multiply(%p, %p), metadata={op_name="jit(step)/jvp(encoder)/layers/mlp/mul"}
}

%body (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %plain = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused
  ROOT %copy.1 = f32[4]{0} copy(%a)
}

%cond (b: f32[4]) -> pred[] {
  %b = f32[4]{0} parameter(0)
  ROOT %t = pred[] constant(true)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %while.1 = f32[4]{0} while(%x), condition=%cond, body=%body, metadata={op_name="transpose(jvp(decoder))/while"}
  ROOT %adam = f32[4]{0} add(%while.1, %x), metadata={op_name="jit(step)/optimizer/add"}
}
"""  # noqa: E501


def plane(name, lines, stat="hlo_op"):
    """A plane of a trace: `lines` are (name, [(instruction, start, microseconds)])."""
    names = sorted({event for _, events in lines for event, _, _ in events})
    number = {event: i + 1 for i, event in enumerate(names)}
    text = f'planes {{ id: 1 name: "{name}" '
    text += f'stat_metadata {{ key: 1 value {{ id: 1 name: "{stat}" }} }}\n'
    for event, i in number.items():
        text += f'event_metadata {{ key: {i} value {{ id: {i} name: "{event}" }} }}\n'
    for i, (line, events) in enumerate(lines):
        text += f'lines {{ id: {i} name: "{line}" timestamp_ns: 1000\n'
        for event, start, length in events:
            stats = f'stats {{ metadata_id: 1 str_value: "{event}" }}' if stat == "hlo_op" else ""
            times = f"offset_ps: {start}000000 duration_ps: {length}000000"
            text += f"events {{ metadata_id: {number[event]} {times} {stats} }}\n"
        text += "}\n"
    return text + "}\n"


def read(*planes, steps=1):
    trace = jax.profiler.ProfileData.from_text_proto("".join(planes))
    return profile.read_profile(trace, HLO, steps)


WANTED = {
    ("encoder", "mlp", "forward"): 4e-6,
    ("decoder", "rest", "backward"): 1e-6,
    ("optimizer", "", "forward"): 3e-6,
}


def seconds(found):
    return {row[:3]: pytest.approx(row.seconds) for row in found.rows}


def test_a_gpu_s_streams():
    """Breaks when a loop's kernel counts once, idle time counts, or the host's plane does too."""
    compute = (
        "Stream #13(Compute)",
        [("plain", 0, 2), ("plain", 4, 2), ("copy.1", 6, 1), ("adam", 7, 3)],
    )
    host = plane("/host:CPU", [("python", [("adam", 0, 900)])])
    found = read(host, plane("/device:GPU:0", [compute]))
    assert (
        seconds(found) == WANTED
        and found.busy_seconds == pytest.approx(8e-6)
        and found.idle_seconds == pytest.approx(2e-6)
    )
    two = read(host, plane("/device:GPU:0", [compute]), plane("/device:GPU:1", [compute]), steps=4)
    assert two.busy_seconds == pytest.approx(2e-6) and two.rows[0].share == pytest.approx(0.5)
    within = ("Stream #13(Compute)", [("adam", 0, 3), ("copy.1", 1, 1)])
    assert [row.seconds for row in read(plane("/device:GPU:0", [within])).rows] == pytest.approx(
        [2e-6, 1e-6]
    )
    beside = ("Stream #14(Memcpy)", [("copy.1", 1, 4)])
    assert read(plane("/device:GPU:0", [compute, beside])).busy_seconds == pytest.approx(12e-6)


def test_a_tpu_s_line_of_operations():
    """Breaks when a loop counts beside its body, or whole steps and modules beside operations."""
    whole = ("XLA Modules", [("jit_step", 0, 10)])
    events = [
        ("%while.1 = f32[4] while(%x)", 0, 7),
        ("%plain = f32[4] fusion(%a)", 0, 2),
        ("%plain = f32[4] fusion(%a)", 4, 2),
    ]
    ops = (
        "XLA Ops",
        [*events, ("%copy.1 = f32[4] copy(%a)", 6, 1), ("%adam = f32[4] add(%while.1, %x)", 7, 3)],
    )
    found = read(plane("/device:TPU:0", [whole, ops], stat="none"))
    assert seconds(found) == WANTED and found.idle_seconds == pytest.approx(2e-6)


def test_traces_without_the_program(tmp_path):
    with pytest.raises(ValueError, match="the trace holds no instruction of the program"):
        read(plane("/host:CPU", [("python", [("f", 0, 1)])], stat="none"))
    with pytest.raises(
        ValueError, match=r"no trace .* in it; make one with icae bench train --profile"
    ):
        profile.newest_trace(tmp_path)
