"""The jitted training and evaluation steps, with gradients accumulated over microbatches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from icae_jax.models.axes import constrain
from icae_jax.training.task import Objectives


def init_state(trained: PyTree, optimizer: optax.GradientTransformation) -> dict[str, PyTree]:
    """The train state: step, trained parameters (float32), optimizer state; no frozen weights."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "trained": trained,
        "opt_state": optimizer.init(trained),
    }


def microbatches(batch: PyTree, accumulate: int) -> PyTree:
    """Reshapes `[B, …]` to `[accumulate, B / accumulate, …]`.

    Rows are interleaved, so that each device keeps the rows that it holds.
    """

    def cut(x):
        x = jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 0, 1)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(cut, batch)


def make_train_step(
    task: Objectives,
    optimizer: optax.GradientTransformation,
    seed: int,
    accumulate: int,
    shardings: PyTree | None = None,
) -> Callable:
    """Returns the jitted `step(state, frozen, batch) -> (state, metrics)`; it donates the state.

    Each objective's loss is divided by its label count over the whole batch, so accumulating
    equals one large batch. Dropout keys depend on (seed, step) alone. shardings: of the state,
    in and out.
    """

    def step(state, frozen, batch):
        counts = task.counts(batch)
        key = jax.random.fold_in(jax.random.key(seed), state["step"])

        def weighted_loss(trained, micro, micro_key):
            losses = task.losses(trained, frozen, micro, micro_key)
            sums = {o: loss_sum for o, (loss_sum, _) in losses.items()}
            return sum(task.weights[o] * sums[o] / jnp.maximum(counts[o], 1.0) for o in sums), sums

        def accumulate_gradients(totals, xs):
            micro, number = xs
            (_, sums), grads = jax.value_and_grad(weighted_loss, has_aux=True)(
                state["trained"], micro, jax.random.fold_in(key, number)
            )
            return jax.tree.map(jnp.add, totals, (grads, sums)), None

        zero = (jax.tree.map(jnp.zeros_like, state["trained"]), {o: jnp.zeros(()) for o in counts})
        if accumulate == 1:
            (grads, sums), _ = accumulate_gradients(zero, (batch, 0))
        else:
            numbered = (microbatches(batch, accumulate), jnp.arange(accumulate))
            (grads, sums), _ = jax.lax.scan(accumulate_gradients, zero, numbered)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["trained"])
            trained = optax.apply_updates(state["trained"], updates)
        metrics = {
            "sums": sums,
            "counts": counts,
            "tokens": task.tokens(batch),
            "grad_norm": optax.global_norm(grads),
            "param_norm": optax.global_norm(trained),  # after the update: what would be saved
        }
        return {"step": state["step"] + 1, "trained": trained, "opt_state": opt_state}, metrics

    return jax.jit(
        step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None)
    )


def make_eval_step(task: Objectives, accumulate: int = 1) -> Callable:
    """Returns the jitted `step(trained, frozen, batch) -> {objective: (sum, count)}`.

    No dropout; in as many microbatches as training, so that it needs no more memory.
    """

    def step(trained, frozen, batch):
        if accumulate == 1:
            return task.losses(trained, frozen, batch, None)

        def add(totals, micro):
            return jax.tree.map(jnp.add, totals, task.losses(trained, frozen, micro, None)), None

        zero = {o: (jnp.zeros(()), jnp.zeros(())) for o in task.counts(batch)}
        return jax.lax.scan(add, zero, microbatches(batch, accumulate))[0]

    return jax.jit(step)
