"""Losses at label positions: sums with counts, so that any split of a batch gives the same step."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from icae_jax.compression.decoder import Decoder
from icae_jax.compression.layout import Layout
from icae_jax.compression.memory import Memory
from icae_jax.models.llama import Head


def _chunks(x, size):
    """Cuts axis 1 of `[B, U, …]` into near-equal, padded chunks of at most `size`, chunks first."""
    U = x.shape[1]
    count = math.ceil(U / size)
    step = math.ceil(U / count)  # near-equal: 513 in chunks of at most 512 are 2 x 257, not 2 x 512
    x = jnp.pad(x, ((0, 0), (0, count * step - U)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], count, step, *x.shape[2:]), 1, 0)


def _join(chunks, U):
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :U]


def _chunk_losses(h, head, labels):
    logits = head.logits(h)
    label_logits = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - label_logits, logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def frozen_head_losses(
    h_BUD: Float[Array, "B U D"], head: Head, labels_BU: Int[Any, "B U"], chunk: int
) -> Float[Array, "B U"]:
    """Cross-entropy of every label in float32 nats; `[B, U, V]` never lives.

    chunk: positions whose logits are computed at once.

    The head is frozen and gets no gradient. The gradient of the hidden states is formed in the
    forward pass, which takes two head matmuls and no recomputation.
    """
    losses = jax.lax.map(
        lambda x: _chunk_losses(x[0], head, x[1])[0],
        (_chunks(h_BUD, chunk), _chunks(labels_BU, chunk)),
    )
    return _join(losses, h_BUD.shape[1])


def _frozen_head_fwd(h_BUD, head, labels_BU, chunk):
    def losses_and_gradient(x):
        h, labels = x
        losses, logits = _chunk_losses(h, head, labels)
        d_logits = jax.nn.softmax(logits, -1) - jax.nn.one_hot(labels, logits.shape[-1])
        return losses, head.backward(d_logits, logits, h.dtype)

    chunks = _chunks(h_BUD, chunk), _chunks(labels_BU, chunk)
    losses, d_h = jax.lax.map(losses_and_gradient, chunks)
    U = h_BUD.shape[1]
    return _join(losses, U), _join(d_h, U)


def _frozen_head_bwd(chunk, d_h, g_BU):
    return (d_h * g_BU[..., None]).astype(d_h.dtype), None, None


frozen_head_losses.defvjp(_frozen_head_fwd, _frozen_head_bwd)


def _chunk_divergences(h, teacher_h, head, labels):
    """Of one chunk: cross-entropy, KL, and what their gradients are formed of."""
    losses, logits = _chunk_losses(h, head, labels)
    log_p, teacher_log_p = (jax.nn.log_softmax(x, -1) for x in (logits, head.logits(teacher_h)))
    divergences = jnp.sum(jnp.exp(teacher_log_p) * (teacher_log_p - log_p), -1)
    return losses, divergences, (logits, log_p, teacher_log_p)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def distilled_head_losses(
    h_BUD: Float[Array, "B U D"],
    teacher_BUD: Float[Array, "B U D"],
    head: Head,
    labels_BU: Int[Any, "B U"],
    weight: float,
    chunk: int,
) -> tuple[Float[Array, "B U"], Float[Array, "B U"]]:
    """Cross-entropy of every label, and KL(teacher || student) there, in float32 nats.

    As `frozen_head_losses`, with one head matmul more for the teacher, which gets no gradient; its
    temperature is 1. weight: of the KL beside the cross-entropy.

    One matmul forms the gradient of both together: what is differentiated must be the cross-entropy
    plus `weight` times the KL, and its gradient passes through the cross-entropy alone.
    """
    chunks = _chunks(h_BUD, chunk), _chunks(teacher_BUD, chunk), _chunks(labels_BU, chunk)
    both = jax.lax.map(lambda x: _chunk_divergences(x[0], x[1], head, x[2])[:2], chunks)
    return tuple(_join(x, h_BUD.shape[1]) for x in both)


def _distilled_head_fwd(h_BUD, teacher_BUD, head, labels_BU, weight, chunk):
    def losses_and_gradient(x):
        h, teacher_h, labels = x
        *both, (logits, log_p, teacher_log_p) = _chunk_divergences(h, teacher_h, head, labels)
        p, label = jnp.exp(log_p), jax.nn.one_hot(labels, logits.shape[-1])
        d_logits = p - label + weight * (p - jnp.exp(teacher_log_p))
        return *both, head.backward(d_logits, logits, h.dtype)

    chunks = _chunks(h_BUD, chunk), _chunks(teacher_BUD, chunk), _chunks(labels_BU, chunk)
    *both, d_h = (_join(x, h_BUD.shape[1]) for x in jax.lax.map(losses_and_gradient, chunks))
    return tuple(both), d_h


def _distilled_head_bwd(weight, chunk, d_h, gradients):
    return (d_h * gradients[0][..., None]).astype(d_h.dtype), None, None, None


distilled_head_losses.defvjp(_distilled_head_fwd, _distilled_head_bwd)


# -------------------------------------------------------------------------------- behind one memory

Targets = dict[str, dict[str, Any]]  # by objective, arrays of `packing.pack`
KL = "_kl"  # behind the name of an objective: its KL to a teacher


class Teaching(NamedTuple):
    """What a teacher (`distil`) knows of the targets.

    hidden: its states at labels, by objective. weight: of the KL beside the cross-entropy.
    """

    hidden: dict[str, Float[Array, "B G U D"]]
    weight: float


def label_losses(
    decoder: Decoder,
    memory: Memory,
    targets: Targets,
    heads: dict[str, tuple[int, ...]],
    layout: Layout,
    chunk: int,
    teaching: Teaching | None = None,
) -> dict[str, Float[Array, "B G U"]]:
    """Losses of every label, by objective, in nats.

    heads: by objective, the ids before the memory. Head and memory run once for each distinct head.
    Targets of one shape that start at one position behind the same head run in one call. teaching:
    adds the KL of the objectives that it has, by their names with `KL` behind them, to be
    differentiated as `distilled_head_losses` says.
    """
    losses, taught = {}, teaching.hidden if teaching else {}
    for head in dict.fromkeys(heads[o] for o in targets):
        prefix = memory.read(decoder, head)
        behind_head = [o for o in targets if heads[o] == head]
        for objectives in _alike(behind_head, targets, layout, taught):
            packed = {
                name: jnp.concatenate([targets[o][name] for o in objectives], 1)
                for name in targets[objectives[0]]
            }
            starts = layout.target_starts(objectives[0], prefix.end)
            hidden = decoder.label_hidden(prefix, starts, packed["ids"], packed["label_at"])
            B, G, U = packed["labels"].shape
            with jax.named_scope("cross_entropy"):
                labels = packed["labels"].reshape(B * G, U)
                if objectives[0] in taught:
                    states = jnp.concatenate([taught[o] for o in objectives], 1)
                    states = states.reshape(hidden.shape)
                    flat, divergences = distilled_head_losses(
                        hidden, states, decoder.base.head, labels, teaching.weight, chunk
                    )
                    by_name = {"": flat, KL: divergences}
                else:
                    by_name = {"": frozen_head_losses(hidden, decoder.base.head, labels, chunk)}
            widths = [targets[o]["labels"].shape[1] for o in objectives]
            for name, flat in by_name.items():
                ends = itertools.accumulate(widths)
                for o, width, end in zip(objectives, widths, ends, strict=True):
                    losses[o + name] = flat.reshape(B, G, U)[:, end - width : end]
    return losses


def _alike(objectives, targets, layout, taught):
    """Objectives grouped by what one decoder call shares: shapes, where targets start, and whether
    there is a teacher.
    """
    groups = {}
    for o in objectives:
        T, U = targets[o]["ids"].shape[2], targets[o]["labels"].shape[2]
        groups.setdefault((T, U, layout.restarts(o), o in taught), []).append(o)
    return groups.values()


def objective_sums(
    losses: dict[str, Float[Array, "B G U"]], targets: Targets
) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
    """By objective, the sum of losses in nats and the number of labels."""
    return {
        o: (
            jnp.sum(jnp.where(targets[o]["label_mask"], losses[o], 0.0)),
            jnp.sum(targets[o]["label_mask"]).astype(jnp.float32),
        )
        for o in losses
    }
