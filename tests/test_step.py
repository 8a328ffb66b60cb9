"""One training step: accumulation, clipping, learning rate, randomness, and bfloat16's error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FRAMING, TINY, close, random_trained

from icae_jax.compression import encoder
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.segments import Contexts, segment_contexts
from icae_jax.models import llama
from icae_jax.models.llama import FrozenModel
from icae_jax.objectives import loss, targets
from icae_jax.objectives.packing import pack
from icae_jax.training import step
from icae_jax.training.config import OptimizerConfig
from icae_jax.training.optimizer import make_optimizer

OPTIMIZER = OptimizerConfig(learning_rate=0.1, warmup_steps=0, clip=0.5)


class Toy:
    """A linear task; objective "lm" has fewer labels than "ae", in some rows none."""

    def __init__(self, noise=0.0):
        self.noise, self.weights = noise, {"ae": 0.3, "lm": 0.7}

    def counts(self, batch):
        return {o: batch[o]["mask"].sum().astype(jnp.float32) for o in self.weights}

    def tokens(self, batch):
        return sum(self.counts(batch).values())

    def losses(self, trained, frozen, batch, key):
        shift = self.noise * jax.random.normal(key, (3,)) if self.noise else jnp.zeros(3)
        out = {}
        for o in self.weights:
            error = (
                jnp.einsum("btd,d->bt", batch[o]["x"], trained["w"] * frozen["scale"] + shift)
                - batch[o]["y"]
            )
            out[o] = (
                jnp.sum(jnp.where(batch[o]["mask"], error**2, 0)),
                batch[o]["mask"].sum().astype(jnp.float32),
            )
        return out


FROZEN = {"scale": np.asarray([1.0, 2.0, -1.0], np.float32)}
LABELS = {"ae": [5, 1, 4, 2, 5, 3, 1, 5], "lm": [0, 2, 0, 5, 1, 0, 3, 0]}  # of each row


def toy_batch(scale=1.0):
    rng = np.random.default_rng(0)
    return {
        o: {
            "x": np.asarray(scale * rng.standard_normal((8, 5, 3)), np.float32),
            "y": np.asarray(rng.standard_normal((8, 5)), np.float32),
            "mask": np.arange(5)[None] < np.asarray(counts)[:, None],
        }
        for o, counts in LABELS.items()
    }


def run(accumulate=1, config=OPTIMIZER, task=None, steps=3, seed=0, scale=1.0):
    """The parameters after every step, and the metrics of every step."""
    optimizer, _ = make_optimizer(config, 100)
    state = step.init_state({"w": jnp.asarray([0.5, -0.5, 1.0])}, optimizer)
    train_step = step.make_train_step(task or Toy(), optimizer, seed, accumulate)
    parameters, metrics = [], []
    for _ in range(steps):
        state, out = train_step(state, FROZEN, toy_batch(scale))
        parameters.append(np.asarray(state["trained"]["w"]))
        metrics.append(jax.device_get(out))
    assert state["step"] == steps
    return parameters, metrics


@pytest.fixture(scope="module")
def plain():
    return run()


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulating_equals_one_large_batch(accumulate, plain):
    """Breaks when microbatches are averaged although their label counts differ, rows are lost, or
    gradients not summed.
    """
    (parameters, metrics), (want, want_metrics) = run(accumulate), plain
    for got, wanted in zip(parameters, want, strict=True):
        close(got, wanted)
    for got, wanted in zip(metrics, want_metrics, strict=True):
        assert got["counts"] == wanted["counts"] == {"ae": 26, "lm": 11} and got["tokens"] == 37
        close(got["grad_norm"], wanted["grad_norm"])
        for o in ("ae", "lm"):
            close(got["sums"][o], wanted["sums"][o])


def test_first_step_by_hand():
    """Breaks when a weight, denominator or sign is wrong, or weight decay is missing: AdamW's first
    step moves by the sign.
    """
    config = dataclasses.replace(OPTIMIZER, clip=1e-3, weight_decay=0.2)
    batch, w = toy_batch(), np.asarray([0.5, -0.5, 1.0])
    gradient = np.zeros(3)
    for o, weight in Toy().weights.items():
        t = batch[o]
        error = np.where(t["mask"], t["x"] @ (w * FROZEN["scale"]) - t["y"], 0)
        gradient += (
            weight
            * np.einsum("bt,btd->d", 2 * error, t["x"])
            * np.asarray(FROZEN["scale"])
            / t["mask"].sum()
        )
    (after,), (metrics,) = run(config=config, steps=1)
    close(metrics["grad_norm"], np.linalg.norm(gradient))
    close(after, w - 0.1 * (np.sign(gradient) + 0.2 * w), 1e-4)


def test_clipping_bounds_what_a_huge_batch_does():
    """Breaks when gradients are not clipped: an outlier would dominate Adam's moments."""
    moments, gradient, zero = (
        [],
        {"w": np.asarray([30.0, 40.0], np.float32)},
        {"w": np.zeros(2, np.float32)},
    )
    for clip in (0.5, 1e9):
        optimizer, _ = make_optimizer(dataclasses.replace(OPTIMIZER, clip=clip), 100)
        update = lambda w: optimizer.update(gradient, optimizer.init(w), w)  # noqa: B023, E731
        _, state = jax.jit(update)(zero)
        moments.append(float(np.linalg.norm(optax.tree.get(state, "mu")["w"])))
    assert moments == pytest.approx([0.1 * 0.5, 0.1 * 50])


def test_randomness_is_a_function_of_seed_and_step():
    """Breaks when dropout repeats in every step or microbatch, ignores the seed, or differs when a
    run is repeated.
    """
    noisy = [
        run(accumulate, task=Toy(0.5), seed=seed)
        for accumulate, seed in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    first = [np.stack(parameters) for parameters, _ in noisy]
    np.testing.assert_array_equal(first[0], first[1])
    assert not np.allclose(first[0], first[2]) and not np.allclose(first[0], first[3])
    key_of_step = []
    task = Toy()
    task.losses = lambda trained, frozen, batch, key: {
        "ae": (jax.random.uniform(key) + 0 * trained["w"].sum(), 1.0),
        "lm": (0.0, 1.0),
    }
    for metrics in run(task=task)[1]:
        key_of_step.append(float(metrics["sums"]["ae"]))
    assert len(set(key_of_step)) == 3


def test_an_objective_without_labels_counts_nothing():
    """Breaks when a batch without LM labels divides by zero."""
    optimizer, _ = make_optimizer(OPTIMIZER, 100)
    batch = toy_batch()
    batch["lm"]["mask"] = np.zeros((8, 5), bool)
    state = step.init_state({"w": jnp.asarray([0.5, -0.5, 1.0])}, optimizer)
    state, metrics = step.make_train_step(Toy(), optimizer, 0, 2)(state, FROZEN, batch)
    assert (
        np.isfinite(state["trained"]["w"]).all()
        and metrics["counts"]["lm"] == 0
        and metrics["grad_norm"] > 0
    )


def test_learning_rate():
    """Breaks when warm-up spends its first step on 0, does not reach the rate, or cosine ends
    elsewhere than at decay_steps.
    """
    config = OptimizerConfig(learning_rate=8.0, warmup_steps=4)
    _, rate = make_optimizer(config, 10)
    assert [float(rate(i)) for i in (0, 1, 2, 3, 4, 9, 1000)] == [2, 4, 6, 8, 8, 8, 8]
    _, rate = make_optimizer(dataclasses.replace(config, warmup_steps=0), 10)
    assert [float(rate(i)) for i in (0, 9)] == [8, 8]
    _, rate = make_optimizer(dataclasses.replace(config, schedule="cosine"), 24)
    assert [float(rate(i)) for i in (0, 3, 13, 23)] == pytest.approx([2, 8, 4, 0], abs=1e-5)
    _, rate = make_optimizer(dataclasses.replace(config, schedule="cosine", decay_steps=44), 24)
    assert [float(rate(i)) for i in (3, 23, 43)] == pytest.approx([8, 4, 0], abs=1e-5)


def test_the_learning_rate_is_the_one_used():
    """Breaks when optimizer and schedule are a step apart: without decay, AdamW's first step is the
    rate itself.
    """
    config = OptimizerConfig(learning_rate=0.8, warmup_steps=4, weight_decay=0.0)
    (after,), _ = run(config=config, steps=1)
    close(np.abs(after - np.asarray([0.5, -0.5, 1.0])), [0.2] * 3, 1e-4)


@pytest.mark.nightly
def test_bfloat16_stays_near_float32(tiny_params):
    """Breaks when bfloat16 changes the loss by over 0.5 % or the gradient by over 12 %, or trained
    parameters leave float32.
    """
    config = CompressionConfig(k=4, rate=4)
    contexts = np.random.default_rng(0).integers(3, 64, (3, 16)).tolist()
    ids, lengths = map(jnp.asarray, segment_contexts(contexts, config))
    packed = {
        "ae": jax.tree.map(
            jnp.asarray,
            pack([[targets.ae_target(c, FRAMING)] for c in contexts], 1, 17, 17),
        )
    }
    trained = random_trained(TINY, 4)

    def loss_and_gradient(dtype):
        model = llama.Llama(TINY, lora_scale=0.5, dtype=dtype)
        params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), tiny_params)

        def of(trained, params):
            memory = encoder.compress(
                FrozenModel(model, params), trained, Contexts(ids, lengths, config.k), config
            )
            losses = loss.label_losses(
                Decoder.of(FrozenModel(model, params), trained),
                memory,
                packed,
                {"ae": ()},
                config.position_layout,
                8,
            )["ae"]
            assert losses.dtype == jnp.float32
            return jnp.mean(losses)

        value, gradient = jax.jit(jax.value_and_grad(of))(trained, params)
        assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
        return float(value), np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])

    (value, gradient), (want, want_gradient) = (
        loss_and_gradient(jnp.bfloat16),
        loss_and_gradient(jnp.float32),
    )
    assert value != want and value == pytest.approx(want, rel=0.005)
    assert np.linalg.norm(gradient - want_gradient) < 0.12 * np.linalg.norm(want_gradient)
