"""Several devices: batches really are split over them, and give the losses and gradients that one device gives."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FRAMING, ROOT, TINY, close, random_params, random_trained

from icae_jax.compression import encoder, methods
from icae_jax.data.batches import StaticInt
from icae_jax.models import llama
from icae_jax.objectives import loss, targets
from icae_jax.training import sharding, step
from icae_jax.training.config import OptimizerConfig

DEVICES = 8


class Autoencoding:
    """The smallest compressor with the interface of a task."""

    weights = {"ae": 1.0}  # noqa: RUF012
    model = llama.Llama(TINY, lora_scale=0.5)

    def __init__(self, method):
        self.compression = encoder.CompressionConfig(method=method, k=3, rate=8 / 3, k_choices=(2, 3))

    def counts(self, batch):
        return {"ae": jnp.sum(batch["targets"]["label_mask"]).astype(jnp.float32)}

    def tokens(self, batch):
        return self.counts(batch)["ae"]

    def losses(self, trained, frozen, batch, key):
        c = self.compression
        memory = methods.compress(self.model, frozen, trained, batch["context"], batch["lengths"], c, batch["k"])
        losses = loss.label_losses(self.model, frozen, trained, memory, {"ae": batch["targets"]}, {"ae": ()}, c.layout, 5)
        return loss.objective_sums(losses, {"ae": batch["targets"]})


def train(method):
    """One accumulated step on all devices, with a drawn k: what it gives, and over how many devices batch and parameters lie."""
    task = Autoencoding(method)
    mesh = sharding.make_mesh()
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 64, n).tolist() for n in (5, 8, 3, 4, 7, 6, 2, 8, 8, 1, 3, 5, 6, 6, 7, 2)]
    ids, lengths = encoder.segment_contexts(texts, task.compression)
    packed = targets.pack([[targets.ae_target(t, FRAMING)] for t in texts], 1, 9, 9)
    batch = sharding.put_batch(mesh, {"context": ids, "lengths": lengths, "targets": packed, "k": StaticInt(2)})
    optimizer, _ = step.make_optimizer(OptimizerConfig(warmup_steps=0), 1)
    params, trained = jax.device_put((random_params(TINY), random_trained(TINY, 3)), sharding.replicated(mesh))
    state = jax.device_put(step.init_state(trained, optimizer), sharding.replicated(mesh))
    state, metrics = step.make_train_step(task, optimizer, 0, 2)(state, params, batch)
    return {
        "loss": float(metrics["sums"]["ae"]),
        "grad_norm": float(metrics["grad_norm"]),
        "table": np.asarray(state["trained"]["memory_table"]).tolist(),
        "batch_shards": sorted(s.index[0].start or 0 for s in batch["context"].addressable_shards),
        "replicated": all(
            x.sharding.is_fully_replicated and len(x.sharding.device_set) == mesh.size for x in jax.tree.leaves(state)
        ),
    }


def test_eight_devices_equal_one():
    """Breaks when the batch is not split (or a device sees others' rows), sums are not taken over devices, or state is split."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    code = "import json, test_sharding; print(json.dumps({m: test_sharding.train(m) for m in ('icae', 'x500')}))"
    child = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    alone = {method: train(method) for method in ("icae", "x500")}
    output, _ = child.communicate(timeout=300)
    assert child.returncode == 0
    assert alone["icae"]["loss"] != alone["x500"]["loss"]
    for method, eight in json.loads(output.splitlines()[-1]).items():
        one = alone[method]
        assert eight["batch_shards"] == list(range(0, 16, 2)) and eight["replicated"]
        if jax.device_count() == 1:
            assert one["batch_shards"] == [0]
        for key in ("loss", "grad_norm", "table"):
            close(eight[key], one[key])


def test_microbatches_must_divide_over_the_devices():
    """Breaks when a batch that cannot be split is only found by a sharding error."""
    mesh = sharding.make_mesh()
    sharding.check_batch_size(mesh, 4 * mesh.size, 2)
    fake = type("Mesh", (), {"size": 8})()
    sharding.check_batch_size(fake, 16, 2)
    with pytest.raises(ValueError, match="batch_size / accumulate is 4; it must be a multiple of the 8 devices"):
        sharding.check_batch_size(fake, 8, 2)


def test_host_arrays_are_split_along_any_axis():
    """Breaks when an axis other than the first is not the one that is split, or a mesh takes in other processes' devices."""
    mesh = sharding.local_mesh()
    assert mesh.devices.tolist() == jax.local_devices() and mesh.axis_names == ("data",)
    x = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    for axis in range(3):
        y = sharding.split(mesh, np.swapaxes(x, 1, axis), axis)
        assert y.sharding.spec == jax.sharding.PartitionSpec(*[None] * axis, "data")
        np.testing.assert_array_equal(y, np.swapaxes(x, 1, axis))
