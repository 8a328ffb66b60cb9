"""Programs planned from shapes: the shapes of real batches, all programs of both methods, and FLOPs
counted in worker processes.
"""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import TINY, WORDS, eight_devices, seen_devices, write_jsonl

from icae_jax.compression.config import CompressionConfig
from icae_jax.models import llama
from icae_jax.performance import flops, plan, programs, steps, utilisation, worker
from icae_jax.runtime import sharding
from icae_jax.runtime.sharding import MeshConfig
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict

X500 = {"method": "x500", "k": 4, "rate": 4.0}
PADDED = {"ae": 1.0, "lm": 0.0, "pad_labels": True}
QA = {"phase": "finetune", "init_from": "scratch", "objectives": {"ae": 0.0, "lm": 0.0, "qa": 1.0}}


@pytest.fixture(scope="module")
def sources(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    rng = np.random.default_rng(0)

    def words(n):
        return " ".join(rng.choice(WORDS[8:], size=n))

    # The longest question that max_target_tokens of 12 lets in: 7 tokens of the template's, 3 of
    # the question, 2 and </s> answered.
    qa = [{"context": words(12), "question": words(3), "answers": [words(2)]} for _ in range(3)]
    return {
        "base": str(tiny_base),
        "pretrain": write_jsonl(folder / "text.jsonl", [{"text": words(60)} for _ in range(9)]),
        "finetune": write_jsonl(folder / "qa.jsonl", qa),
        "cache": str(folder / "cache"),
    }


def config_of(sources, **changes):
    data = {
        "train": sources[changes.get("phase", "pretrain")],
        "context_lengths": [32],
        "cache_dir": sources["cache"],
    }
    data["max_target_tokens"] = 12
    raw = {
        "base": sources["base"],
        "batch_size": 4,
        "compression": {"k": 4, "rate": 4.0},
        "lora": {"rank": 4},
    }
    return from_dict(TrainConfig, raw | {"data": data | changes.pop("data", {})} | changes)


def as_shapes(batch):
    return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype).kind), batch)


# ------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compression": X500},
        {
            "compression": {"k": 4, "rate": 4.0, "layout": "sequential"},
            "data": {"context_lengths": [40]},
        },
        {
            "compression": X500 | {"layout": "reference"},
            "objectives": PADDED,
            "data": {"context_lengths": [12]},
        },
        {"compression": {"k": 8, "rate": 8.0}, "data": {"context_lengths": [20]}},
        {"batch_size": 8, "accumulate": 2},
        QA,
        QA
        | {"objectives": {"ae": 0.5, "lm": 0.0, "qa": 0.5}, "data": {"questions_per_context": 2}},
        QA | {"compression": {"k": 4, "rate": 4.0, "k_choices": [2, 4]}},
    ],
    ids=[
        "segments",
        "x500",
        "uneven segments",
        "reference",
        "short",
        "accumulate",
        "qa",
        "qa and ae",
        "k drawn",
    ],
)
def test_batches_have_the_shapes_of_real_ones(sources, changes):
    """Breaks when what is planned is another batch than a run's: a segment, a question, a
    microbatch, or the padding of a layout.
    """
    config = config_of(sources, **dict(changes))
    task = CompressorTask(config)
    real = next(iter(task.train_batches(0, 1)))
    planned = programs.batch(
        programs.Spec(
            "train",
            config,
            TINY,
            config.batch_size // config.accumulate,
            max(config.data.context_lengths),
        )
    )
    real["k"] = planned["k"] = type(real["k"])(
        int(max(real["k"], planned["k"]))
    )  # planned is the largest k, a run draws one
    if (
        "qa" in real["targets"]
    ):  # the longest that the configuration allows; a run takes the longest that its data hold
        at = planned["targets"]["qa"]
        longest, shorter = at["ids"].shape[2], real["targets"]["qa"]["ids"].shape[2]
        assert (
            longest == config.data.max_target_tokens >= shorter and at["labels"].shape[2] == longest
        )
        assert as_shapes({n: x[:, :, 0] for n, x in real["targets"].pop("qa").items()}) == {
            n: ((*x.shape[:2],), np.dtype(x.dtype).kind)
            for n, x in planned["targets"].pop("qa").items()
        }
    assert as_shapes(real) == as_shapes(planned)
    assert planned["k"] == config.compression.k


@pytest.mark.parametrize("method", ["icae", "x500", "pooled", "sac"])
@pytest.mark.parametrize("what", programs.WHATS)
def test_programs_lower(sources, method, what):
    """Breaks when a program cannot be traced from shapes, does not take what the real one takes, or
    holds the base as constants.
    """
    config = config_of(
        sources, compression={"method": method, "k": 4, "rate": 4.0}, batch_size=4, accumulate=2
    )
    spec = programs.Spec(what, config, TINY, 2, 32)
    lowered = programs.lower(spec, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    arguments = jax.tree.leaves(lowered.in_avals)
    base = sum(x.size for x in jax.tree.leaves(llama.param_shapes(TINY)))
    assert (
        sum(x.size for x in arguments) > 0.9 * base
    )  # K/V memories are written without the output head
    rows = {"train": 4, "compress": 2, "decode": 2}[what]
    assert any(x.shape[:1] == (rows,) for x in arguments)
    memory = (2, 8, 32) if config.compression.spec.keeps == "hidden" else (2, 2, 8, 2, 8)
    table = (config.compression.vectors + 3, 32)
    assert {"train": table, "compress": memory, "decode": (2, 12)}[what] in {
        x.shape for x in jax.tree.leaves(lowered.out_info)
    }


@pytest.mark.parametrize("scheme", ["int8", pytest.param("nf4+ends", marks=pytest.mark.nightly)])
def test_programs_take_the_quantised_base(sources, scheme):
    """Breaks when a plan is of full precision where the configuration says otherwise, a quantised
    program cannot be traced, or a chip's part of the base is not what the program takes.
    """
    widths = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # in blocks of 64
    model = dataclasses.replace(TINY, **widths)
    config = config_of(sources, quantize=scheme, dtype="bfloat16")
    with eight_devices():
        mesh = sharding.make_mesh(MeshConfig(1, 2, 4))
        for what in (*programs.WHATS, programs.EVALUATE):
            spec = programs.Spec(what, config, model, 4, 32)
            assert any(x.dtype.itemsize == 1 for x in jax.tree.leaves(programs.base_shapes(spec)))
            avals = jax.tree.leaves(programs.lower(spec, mesh).in_avals)
            integers = sum(x.size for x in avals if x.dtype in (np.int8, np.uint8))
            expected = programs.base_shapes(spec)
            assert integers == sum(
                x.size for x in jax.tree.leaves(expected) if x.dtype in (np.int8, np.uint8)
            )
        params = steps.random_params(model, sharding.Placement(mesh, model), "bfloat16", 0, scheme)
        parts = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params)]
    assert programs.base_bytes(spec, dict(mesh.shape)) == sum(parts)


def test_dequantising_is_what_the_quantised_program_adds(sources):
    """Breaks when it is counted in the matmuls, of another program, or in a dtype whose
    conversions a CPU adds of its own.
    """
    asked = []

    def ask(request, devices):
        asked.extend((s.config.quantize, s.config.dtype) for s in request["specs"])
        extra = 0.5 if request["specs"][0].config.quantize else 0.0
        return {"flops": [10.0 + extra, 13.0 + 2 * extra]}

    config = config_of(sources, quantize="nf4", dtype="bfloat16", accumulate=2, batch_size=8)
    spec = programs.Spec("train", config, dataclasses.replace(TINY, num_layers=5), 4, 32)
    counted = plan.count_flops(spec, {"data": 1, "fsdp": 4, "tensor": 1}, ask)
    assert counted.matmuls == 2 * (10 + 3 * 3) and counted.dequantising == 2 * (0.5 + 3 * 0.5)
    assert asked == [("", "float32")] * 2 + [("nf4", "float32")] * 2


def test_the_least_flops_are_those_of_the_training_metrics(sources):
    """Breaks when a plan's MFU and a run's are of different definitions, or contexts, microbatches
    and new tokens do not add up.
    """
    config = config_of(sources, batch_size=8, accumulate=2)
    spec = programs.Spec("train", config, TINY, 4, 32)
    task = CompressorTask(config)
    meter = utilisation.Meter(task)
    assert programs.least(spec) == meter.least_flops(next(iter(task.train_batches(0, 1))))

    def of(what, contexts, **given):
        return programs.least(programs.Spec(what, config, TINY, contexts, 32), **given)

    assert (
        of("compress", 4)
        == flops.compress(TINY, config.lora, (4, 2, 16), 4, CompressionConfig(k=4)).total
    )
    for what in programs.WHATS:
        assert of(what, 12) == 3 * of(what, 4) > 0
    one, two, most = (of("decode", 4, tokens=n) for n in (1, 2, 12))
    assert most == of("decode", 4) == one + 11 * (two - one)
    room = 2 * 4 + programs.PROMPT + config.data.max_target_tokens
    assert two - one == flops.decode(TINY, 4, room + 1).total


# -------------------------------------------------------------------------------------------- FLOPs

# Wide enough that what is not a matmul is little, of four heads to split.
WIDE = dataclasses.replace(
    TINY,
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=128,
)
FSDP = {"data": 1, "fsdp": 4, "tensor": 1}


def wide(sources, what="train", contexts=4, **changes):
    changes |= {
        "compression": {"k": 16, "rate": 4.0},
        "data": {"context_lengths": [64]},
        "objectives": {"ae": 1.0, "lm": 0.0},
    }
    return programs.Spec(what, config_of(sources, **changes), WIDE, contexts, 64)


counted = {}


def ask(request, devices):
    """A worker's answer, given by this process, which has as many devices."""
    assert devices == len(jax.devices())
    return worker.KINDS[request["kind"]](**{k: v for k, v in request.items() if k != "kind"})


def count(spec, mesh):
    key = spec.what, spec.config.remat, *mesh.values()
    if key not in counted:
        with seen_devices(plan.shape_size(mesh), backend="cpu"):
            found = plan.count_flops(spec, mesh, ask)
        assert found.on == mesh and not found.dequantising
        counted[key] = found.matmuls
    return counted[key]


def ratio(spec, mesh):
    return count(spec, mesh) * plan.shape_size(mesh) / programs.least(spec)


def test_devices_share_a_step_s_work():
    """Breaks when devices repeat one another's work, on a mesh that splits rows, weights and
    heads.
    """
    raw = {
        "base": "b",
        "data": {"train": "-"},
        "lora": {"rank": 4},
        "compression": {"k": 16, "rate": 4.0},
    }
    config = from_dict(TrainConfig, raw | {"objectives": {"ae": 1.0, "lm": 0.0}})
    spec, mesh = (
        programs.few_layers(programs.Spec("train", config, WIDE, 4, 64), 2),
        MeshConfig(2, 2, 2),
    )
    with seen_devices(8, backend="cpu"):
        (part,) = ask({"kind": "host", "specs": [spec], "mesh": mesh}, 8)["flops"]
    assert 1.0 <= 8 * part / programs.least(spec) <= 1.05


@pytest.mark.nightly
@pytest.mark.parametrize(("remat", "low", "high"), [("none", 1.0, 1.05), ("full", 1.25, 1.42)])
def test_flops_of_a_partitioned_step(sources, remat, low, high):
    """Breaks when devices repeat one another's work, a layer is not counted, or recomputation is
    counted where there is none.
    """
    assert low <= ratio(wide(sources, remat=remat), FSDP) <= high


@pytest.mark.nightly
def test_a_chip_s_flops_stay_with_more_chips(sources):
    """Breaks when, at as many contexts a chip, every chip does part of the whole slice's work."""
    flops = {}
    for chips in (4, 8):
        spec = programs.few_layers(wide(sources, contexts=chips), 2)
        with seen_devices(chips, backend="cpu"):
            (flops[chips],) = ask(
                {"kind": "host", "specs": [spec], "mesh": MeshConfig(1, chips, 1)}, chips
            )["flops"]
    assert 0.98 < flops[8] / flops[4] < 1.05


@pytest.mark.nightly
def test_layers_continue_a_straight_line(sources):
    """Breaks when the count of a deep base, from two and three layers, is another than that of the
    base itself.
    """
    spec, mesh = wide(sources), FSDP
    (direct,) = worker.ask(
        {"kind": "host", "specs": [programs.few_layers(spec, 4)], "mesh": MeshConfig(**mesh)}, 4
    )["flops"]
    assert count(spec, mesh) == pytest.approx(direct, rel=0.01)


@pytest.mark.nightly
def test_a_decoding_loop_counts_every_token(sources):
    """Breaks when the loop's body, which XLA counts once, is that of one token, or the prompt
    counts as often as tokens do.
    """
    spec, mesh = wide(sources, "decode"), {"data": 1, "fsdp": 2, "tensor": 1}
    assert 1.0 <= ratio(spec, mesh) < 1.1


def test_microbatches_and_a_smaller_mesh_to_count_on():
    """Breaks when accumulation is not multiplied in, or counting on fewer devices changes a chip's
    share of contexts.
    """
    asked = []

    def ask(request, devices):
        asked.append((request, devices))
        return {"flops": [10.0, 13.0]}

    config = from_dict(
        TrainConfig, {"base": "b", "data": {"train": "-"}, "batch_size": 4096, "accumulate": 4}
    )
    model = dataclasses.replace(TINY, num_layers=32)
    spec = programs.Spec("train", config, model, 1024, 512)
    got = plan.count_flops(spec, {"data": 4, "fsdp": 256, "tensor": 1}, ask)
    assert got.matmuls == 4 * (10 + 30 * 3) and got.on == {"data": 4, "fsdp": 64, "tensor": 1}
    ((request, devices),) = asked
    assert (
        devices == 256
        and request["mesh"] == MeshConfig(4, 64, 1)
        and [s.contexts for s in request["specs"]] == [256, 256]
    )
    assert [
        (s.model.num_layers, s.config.unroll, s.config.accumulate) for s in request["specs"]
    ] == [(2, 2, 1), (3, 3, 1)]
    with pytest.raises(
        ValueError,
        match=r"mesh is .*'fsdp': 257.*too large to count FLOPs on 256 host devices; use even",
    ):
        plan.counting_mesh({"data": 1, "fsdp": 257, "tensor": 1})
