"""AdamW or Muon with warm-up, decay and clipping, from an `OptimizerConfig`."""

import jax
import optax
import optax.contrib
from jaxtyping import PyTree

from icae_jax.training.config import OptimizerConfig


def make_optimizer(
    config: OptimizerConfig, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer and its learning rate as a function of the number of updates done.

    A cosine schedule without `decay_steps` ends at `steps`.
    """
    c = config
    if c.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, c.learning_rate, c.warmup_steps, max(c.decay_steps or steps, c.warmup_steps + 1)
        )
    else:
        schedule = optax.join_schedules(
            [
                optax.linear_schedule(0.0, c.learning_rate, max(c.warmup_steps, 1)),
                optax.constant_schedule(c.learning_rate),
            ],
            [c.warmup_steps],
        )

    def rate(step):  # the first update is step 1: a warm-up from 0 would waste it
        return schedule(step + 1)

    if c.name == "muon":
        update = optax.contrib.muon(
            rate,
            weight_decay=c.weight_decay,
            muon_weight_dimension_numbers=_muon_dimensions,
            adam_learning_rate=lambda step: 0.3 * rate(step),
            adam_b1=c.b1,
            adam_b2=c.b2,
            adam_weight_decay=c.weight_decay,
        )
    else:
        update = optax.adamw(rate, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay)
    return optax.chain(optax.clip_by_global_norm(c.clip), update), rate


def _muon_dimensions(params: PyTree) -> PyTree:
    """Muon orthogonalises each layer's kernels; None leaves a parameter to AdamW."""
    kernel = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: kernel if path[-1].key == "kernel" else None, params
    )
