"""The jitted steps: gradients of weighted mean losses, accumulated as sums, clipped, applied; and evaluation.

A task's `losses(trained, frozen, batch, dropout_key)` gives `{objective: (sum, count)}` of one (micro)batch, `counts(batch)` the
counts alone, `tokens(batch)` how many tokens it processes.
"""

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from icae_jax.models.axes import constrain


def make_optimizer(config, steps):
    """AdamW or Muon with warm-up and global-norm clipping, and its learning-rate schedule (step -> rate)."""
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

    # The first update is step 1: a warm-up from 0 would otherwise spend it on nothing.
    def rate(step):
        return schedule(step + 1)

    if c.name == "muon":
        update = optax.contrib.muon(
            rate, weight_decay=c.weight_decay, muon_weight_dimension_numbers=_muon_dimensions,
            adam_learning_rate=lambda step: 0.3 * rate(step), adam_b1=c.b1, adam_b2=c.b2, adam_weight_decay=c.weight_decay,
        )  # fmt: skip
    else:
        update = optax.adamw(rate, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay)
    return optax.chain(optax.clip_by_global_norm(c.clip), update), rate


def _muon_dimensions(params):
    """Muon's matrices are the blocks' kernels, one a layer; None leaves a parameter to AdamW."""
    kernel = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: kernel if path[-1].key == "kernel" else None, params
    )


def init_state(trained, optimizer):
    """The train state: step, trained parameters (float32), optimizer state. The frozen base is not part of it."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "trained": trained,
        "opt_state": optimizer.init(trained),
    }


def microbatches(batch, accumulate):
    """A batch `[B, …]` cut into `[accumulate, B / accumulate, …]`; interleaved, so that every device keeps the rows it has."""

    def cut(x):
        x = jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 0, 1)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(cut, batch)


def make_train_step(task, optimizer, seed, accumulate, shardings=None):
    """`step(state, frozen, batch) -> (state, metrics)`, jitted, the state donated. shardings: of the state, in and out.

    Each objective's denominator is its label count over the whole batch, known before any microbatch runs, so that
    accumulating equals one large batch. Randomness is a function of (seed, step).
    """

    def step(state, frozen, batch):
        counts = task.counts(batch)
        key = jax.random.fold_in(jax.random.key(seed), state["step"])

        def weighted(trained, micro, micro_key):
            sums = {o: s for o, (s, _) in task.losses(trained, frozen, micro, micro_key).items()}
            return sum(task.weights[o] * sums[o] / jnp.maximum(counts[o], 1.0) for o in sums), sums

        def add(carry, xs):
            micro, number = xs
            (_, sums), grads = jax.value_and_grad(weighted, has_aux=True)(
                state["trained"], micro, jax.random.fold_in(key, number)
            )
            return jax.tree.map(jnp.add, carry, (grads, sums)), None

        zero = (jax.tree.map(jnp.zeros_like, state["trained"]), {o: jnp.zeros(()) for o in counts})
        if accumulate == 1:
            (grads, sums), _ = add(zero, (batch, 0))
        else:
            (grads, sums), _ = jax.lax.scan(
                add, zero, (microbatches(batch, accumulate), jnp.arange(accumulate))
            )
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["trained"])
            trained = optax.apply_updates(state["trained"], updates)
        metrics = {
            "sums": sums,
            "counts": counts,
            "tokens": task.tokens(batch),
            "grad_norm": optax.global_norm(grads),
        }
        metrics["param_norm"] = optax.global_norm(trained)  # after the update: what would be saved
        return {"step": state["step"] + 1, "trained": trained, "opt_state": opt_state}, metrics

    return jax.jit(
        step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None)
    )


def make_eval_step(task, accumulate=1):
    """`step(trained, frozen, batch) -> {objective: (sum, count)}`, jitted, without dropout, in as many microbatches as training takes."""

    def step(trained, frozen, batch):
        if accumulate == 1:
            return task.losses(trained, frozen, batch, None)

        def add(totals, micro):
            return jax.tree.map(jnp.add, totals, task.losses(trained, frozen, micro, None)), None

        zero = {o: (jnp.zeros(()), jnp.zeros(())) for o in task.counts(batch)}
        return jax.lax.scan(add, zero, microbatches(batch, accumulate))[0]

    return jax.jit(step)
