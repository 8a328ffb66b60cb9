"""The timed training step: that it is training's own, what its random arrays are, and what is
counted of it.
"""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, WORDS, close, write_jsonl

from icae_jax.models import llama
from icae_jax.models.families import sizes
from icae_jax.performance import programs, steps
from icae_jax.runtime import sharding
from icae_jax.training import metrics
from icae_jax.training import step as training_step
from icae_jax.training.compressor_losses import CompressorLosses
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict
from icae_jax.training.optimizer import make_optimizer

QA = {"phase": "finetune", "init_from": "scratch", "objectives": {"ae": 0.5, "lm": 0.0, "qa": 0.5}}


def make_spec(model=TINY, contexts=4, length=32, qa=None, **changes):
    raw = {
        "base": "b",
        "data": {"train": "-", "max_target_tokens": 12},
        "lora": {"rank": 4},
        "compression": {"k": 4, "rate": 4.0},
    }
    return programs.Spec(
        "train", from_dict(TrainConfig, raw | changes), model, contexts, length, qa
    )


@pytest.fixture(scope="module")
def raw(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    rng = np.random.default_rng(0)
    source = write_jsonl(
        folder / "text.jsonl",
        [{"text": " ".join(rng.choice(WORDS[8:], size=64))} for _ in range(8)],
    )
    data = {"train": source, "context_lengths": [32], "cache_dir": str(folder / "cache")}
    lora = {"rank": 4, "dropout": 0.1}
    optimizer = {"warmup_steps": 1, "learning_rate": 0.01}
    return {
        "base": str(tiny_base),
        "batch_size": 4,
        "accumulate": 2,
        "compression": {"k": 4, "rate": 4.0},
        "lora": lora,
        "data": data,
        "optimizer": optimizer,
    }


@pytest.mark.slow
def test_the_step_is_training_s(raw):
    """Breaks when what is timed is another step than a run's: other losses, dropout, accumulation,
    or no update of the state.
    """
    config = from_dict(TrainConfig, raw)
    task = CompressorTask(config)
    batches, trained = list(task.train_batches(0, 2)), jax.tree.map(np.asarray, task.init())
    spec = programs.Spec("train", config, TINY, 2, 32)
    timed = steps.TrainingStep(spec, task.frozen, batches[0], trained)
    optimizer, _ = make_optimizer(config.optimizer, config.steps)
    train, state = (
        training_step.make_train_step(task, optimizer, config.seed, 2),
        training_step.init_state(trained, optimizer),
    )
    state = sharding.put(state, task.placement.tree(state))
    for batch in batches:
        with task.placement.active():
            state, told = train(
                state, task.frozen, sharding.put_batch(timed.mesh, batch, np.arange(4), 4)
            )
        timed.batch = sharding.put_batch(timed.mesh, batch, np.arange(4), 4)
        assert timed.run(1).losses == pytest.approx(
            metrics.means(told["sums"], told["counts"]), rel=1e-6
        )
    for ours, theirs in zip(jax.tree.leaves(timed.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert timed.label_tokens == sum(
        int(t["label_mask"].sum()) for t in batches[0]["targets"].values()
    )
    assert timed.context_tokens == batches[0]["lengths"].sum()


def test_what_steps_took(raw):
    """Breaks when losses are those of a later step, a caller's arrays are consumed, or steps do not
    go on from one another.
    """
    params = steps.random_params(
        TINY, sharding.Placement(sharding.local_mesh(), TINY), "float32", seed=1
    )
    spec = programs.Spec(
        "train", from_dict(TrainConfig, raw), TINY, 2, 32
    )  # that of the test before: one program
    trained = jax.device_put(steps.initial(spec, params), jax.local_devices()[0])
    step = steps.TrainingStep(spec, params, trained=trained)
    assert step.contexts == 4 and step.context_tokens == 4 * 32 and step.label_tokens == 4 * 2 * 33
    assert step.least_flops == programs.least(spec) and step.compiled is None
    told = step.compile()
    assert (
        isinstance(told["cache_hit"], bool) and told["trace_seconds"] > 0 < told["compile_seconds"]
    )
    start, shardings = (
        jax.tree.map(np.array, step.state),
        jax.tree.map(lambda x: x.sharding, step.state),
    )
    first, second = step.run(1), step.run(2)
    step.state = sharding.put(start, shardings)
    again = step.run(2)
    assert first.losses == again.losses != second.losses and int(step.state["step"]) == 2
    assert (
        first.losses == {o: pytest.approx(math.log(64), rel=0.01) for o in ("ae", "lm")}
        and again.wall_seconds > 0 < again.cpu_seconds
    )
    close(trained["memory_table"], steps.initial(spec, params)["memory_table"])
    memory = step.memory()
    assert (
        memory["argument_bytes"] > 8 * sum(x.size for x in jax.tree.leaves(trained))
        and memory["temporary_bytes"] > 0
    )
    assert memory["process_peak_bytes"] > 1e8 and memory["device_peak_bytes"] is None  # on a CPU


@pytest.mark.nightly
def test_a_step_that_was_compiled_before_is_read_from_the_cache():
    """Breaks when a step's program depends on anything that another run of the same configuration
    has not, such as an object's address, so that every start compiles anew; or when a hit is not
    told.
    """
    assert jax.config.jax_compilation_cache_dir
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        new = time.time_ns() % 2**31  # the seed is part of the program
        first, second = (steps.TrainingStep(make_spec(seed=new)).compile() for _ in range(2))
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    assert first["cache_hit"] is False and second["cache_hit"] is True


@pytest.mark.parametrize(
    "changes",
    [
        {},
        QA | {"qa": (9, 3)},
        {"length": 40},
        {"compression": {"method": "x500", "k": 4, "rate": 4.0}},
    ],
)
def test_random_batches_are_full(changes):
    """Breaks when a context or target has padding that real ones of this length have not, or a
    label is predicted from another place.
    """
    spec = make_spec(**changes)
    batch = steps.random_batch(spec)
    steps._check_batch(spec, batch)
    assert (batch["lengths"].sum(1) == spec.length).all() and batch[
        "context"
    ].max() < TINY.vocab_size
    for of in batch["targets"].values():
        T, U = of["ids"].shape[2], of["labels"].shape[2]
        assert of["label_mask"].all() and (of["label_at"] == np.arange(T - U, T)).all()
        assert (of["labels"][..., :-1] == of["ids"][..., T - U + 1 :]).all()
    if spec.qa:
        assert batch["targets"]["qa"]["ids"].shape[2:] == (9,) and batch["targets"]["qa"][
            "labels"
        ].shape[2:] == (3,)


def test_labels_behind_the_memories_of_all_k_are_counted():
    """Breaks when a benchmark of several k in one step counts the labels of one."""
    compression = {"method": "pooled", "k": 4, "rate": 4.0, "k_choices": [2, 4]}
    spec = make_spec(**QA | {"compression": compression, "attention": "xla"})
    step = steps.TrainingStep(spec)
    task = CompressorLosses(spec.config, TINY, spec.compression)
    assert step.label_tokens == sum(map(float, task.counts(step.batch).values())) > 0


def test_a_batch_of_another_shape_is_refused():
    spec = make_spec()
    longer = steps.random_batch(make_spec(length=16))
    with pytest.raises(
        ValueError,
        match=r"batch context has shape \(4, 1, 16\), the specification's is \(4, 2, 16\)",
    ):
        steps.TrainingStep(spec, batch=longer)
    with pytest.raises(ValueError, match=r"batch k is 2, the specification's is 4"):
        steps.TrainingStep(spec, batch=steps.random_batch(spec) | {"k": 2})


def test_random_parameters_start_as_bases_do():
    """Breaks when random weights give numbers that a step is slow or wrong with: all alike,
    infinite, norms of nothing; or B is not 0.
    """
    model = dataclasses.replace(TINY, qkv_bias=True)
    params = steps.random_params(
        model, sharding.Placement(sharding.local_mesh(), model), "bfloat16"
    )
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, llama.param_shapes(model))
    params = jax.tree.map(np.asarray, params)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        assert x.dtype == "bfloat16"
        wanted = {"scale": (1, 0), "bias": (0, 0)}.get(path[-1].key, (0, 0.02))
        assert (np.mean(x, dtype=float), np.std(np.asarray(x, float))) == pytest.approx(
            wanted, abs=0.002
        )
    rows = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"], float)
    assert abs(np.corrcoef(rows[0].ravel(), rows[1].ravel())[0, 1]) < 0.1  # layers are drawn apart
    trained = jax.tree.map(np.asarray, steps.initial(make_spec(model), params))
    assert not np.any(trained["lora"]["layers"]["self_attn"]["q_proj"]["b"])
    assert np.std(trained["memory_table"]) == pytest.approx(0.02, rel=0.3)


def test_a_large_base_is_made_layer_by_layer():
    """Breaks when making random weights takes a float32 copy of any, or the random bits of a whole
    stack at once: of Llama-2-7B's MLP gigabytes beside the 2.9 of the kernel.
    """
    model = sizes.find("meta-llama/Llama-2-7b-hf")
    placement = sharding.Placement(sharding.local_mesh(), model)
    traced = jax.make_jaxpr(lambda: steps.random_params(model, placement, "bfloat16"))()

    def made(jaxpr):
        for equation in jaxpr.eqns:
            yield from (
                (v.aval.dtype.name, v.aval.size)
                for v in equation.outvars
                if hasattr(v.aval, "dtype")
            )
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from made(inner)

    largest = {}
    for dtype, size in made(traced.jaxpr):
        largest[dtype] = max(size, largest.get(dtype, 0))
    assert largest["bfloat16"] == 32 * 4096 * 11008 and largest.get("float32", 0) <= 1
    assert (
        max(size for dtype, size in largest.items() if "int" in dtype) <= 32000 * 4096
    )  # of the embeddings, which are no stack
    assert {x.dtype.name for x in traced.out_avals} == {"bfloat16"}


WIDE = dataclasses.replace(
    TINY,
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=4,
    num_heads=4,
    head_dim=128,
)


def test_two_and_three_layers_are_continued_to_all(monkeypatch):
    """Breaks when layers beyond the third are left out, microbatches are not multiplied in, a
    kernel is counted as nothing, or a count that XLA does not give is taken for one.
    """
    lowered = []

    class Lowered:
        def __init__(self, spec, mesh, platforms):
            lowered.append(
                (spec.model.num_layers, spec.config.unroll, spec.config.attention, platforms)
            )

        def cost_analysis(self):
            return {"flops": {2: 10.0, 3: 13.0}[lowered[-1][0]]}

    monkeypatch.setattr(steps.programs, "lower", Lowered)
    spec = make_spec(
        dataclasses.replace(WIDE, num_layers=7), attention="splash", accumulate=2, batch_size=8
    )
    assert steps.xla_flops(spec, None) == 2 * (10 + 5 * 3)
    assert lowered == [(2, 2, "xla", ("cpu",)), (3, 3, "xla", ("cpu",))]
    monkeypatch.setattr(Lowered, "cost_analysis", lambda self: None)
    assert steps.xla_flops(spec, None) is None


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("changes", "low", "high"), [({}, 1.0, 1.06), ({"remat": "full"}, 1.2, 1.5)]
)
def test_xla_counts_what_the_mathematics_asks_for(changes, low, high):
    """Breaks when layers beyond the third are left out, microbatches are not multiplied in, or
    recomputation is not seen.
    """
    wide = {
        "compression": {"k": 16, "rate": 4.0},
        "objectives": {"ae": 1.0, "lm": 0.0},
        "batch_size": 4,
        "accumulate": 2,
    }
    spec = make_spec(WIDE, 2, 64, **wide | changes)
    assert low <= steps.xla_flops(spec, sharding.local_mesh()) / programs.least(spec) <= high


def test_the_rate_of_large_matmuls(monkeypatch):
    """Breaks when the rate is of one side's dimension, of all chains instead of the best, or a
    chain is not waited for, or at each of its products. Stood in for by products that take an
    eighth of a second once they are waited for, or two in a chain that is slowed down.
    """
    waits, asked, clock = [], 0, 0.0

    class Product:
        def block_until_ready(self):
            nonlocal asked, clock
            clock += asked * (2 if len(waits) == 3 else 1) / 8
            waits.append(asked)
            asked = 0

    def jit(f):
        square = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)
        (product,) = jax.make_jaxpr(f)(square, square).eqns
        assert product.primitive.name == "dot_general" and product.outvars[0].aval.shape == (
            2048,
            2048,
        )

        def multiply(x, w):
            nonlocal asked
            assert isinstance(x, Product) or x.shape == w.shape == (2048, 2048)
            asked += 1
            return Product()

        return multiply

    monkeypatch.setattr(
        steps.jax.random, "normal", lambda key, shape, dtype: jnp.zeros(shape, dtype)
    )
    monkeypatch.setattr(steps.jax, "jit", jit)
    monkeypatch.setattr(steps.time, "perf_counter", lambda: clock)
    assert steps.matmul_rate("float32") == 2 * 2048**3 * 8
    assert waits == [1, 1, 2, 2, 2, 2, 2]
