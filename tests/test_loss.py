"""Losses at label positions: chunked cross-entropy behind a frozen head, and targets packed behind
one memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FRAMING, TINY, close, head_kernel, random_trained

from icae_jax.compression import memory as memories
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.method import METHODS
from icae_jax.compression.segments import segment_contexts
from icae_jax.models import llama
from icae_jax.models.llama import FrozenModel, Head
from icae_jax.objectives import loss, targets
from icae_jax.objectives.packing import pack

K = 3
MODEL = llama.Llama(TINY, lora_scale=0.5)
HEAD = (1, 3)
RNG = np.random.default_rng(0)
CONTEXTS = [RNG.integers(3, 64, n).tolist() for n in (9, 24, 14)]


TRAINED = random_trained(TINY, K)


def compression(layout="servable"):
    return CompressionConfig(k=K, rate=4, layout=layout)


def continuation(n, seed):
    return targets.Target(np.random.default_rng(seed).integers(3, 64, n).tolist(), 4)


def question(n, seed):
    return targets.Target([targets.FT, *np.random.default_rng(seed).integers(3, 64, n).tolist()], 3)


# ---------------------------------------------------------------------------------- the frozen head


H = jnp.asarray(RNG.standard_normal((2, 13, 8)), jnp.float32)
W = jnp.asarray(RNG.standard_normal((8, 17)), jnp.float32)
LABELS = RNG.integers(0, 17, (2, 13))
WEIGHTS = RNG.standard_normal((2, 13)).astype(np.float32)


def chunked(h, w, chunk):
    losses = loss.frozen_head_losses(h, Head(w, tied=False), LABELS, chunk)
    return jnp.sum(losses * WEIGHTS), losses


@pytest.mark.parametrize("chunk", [1, 5, 13, 64])
def test_frozen_head_losses_are_softmax_cross_entropy(chunk):
    """Breaks when padding of a chunk leaks in, chunks are joined in another order, or dX is
    wrong.
    """
    logits = np.einsum("bud,dv->buv", np.asarray(H, np.float64), np.asarray(W, np.float64))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    onehot = np.eye(17)[LABELS]
    (_, losses), (d_h, d_w) = jax.jit(
        jax.value_and_grad(chunked, (0, 1), has_aux=True), static_argnums=2
    )(H, W, chunk)
    close(losses, -np.log((p * onehot).sum(-1)))
    close(d_h, np.einsum("buv,dv->bud", (p - onehot) * WEIGHTS[..., None], W))
    assert not np.asarray(d_w).any(), "the frozen head got a gradient"


def test_logits_of_all_positions_never_live():
    """Breaks when the whole `[B, U, V]` is formed, which is what chunks are there to avoid."""
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda h: chunked(h, W, 5)[0]))(H))
    assert "[2,13,17]" not in jaxpr and "[2,5,17]" in jaxpr


# --------------------------------------------------------------------------------- packing is exact


def written(kind, segments, seed):
    """The contents of a memory of texts with so many segments each, at most two; the first text's
    are always the same.
    """
    sizes = kind.sizes(TINY)
    layers, axes = sizes[: kind.TEXT_AXIS], sizes[kind.TEXT_AXIS :]
    first, others = (np.random.default_rng(s) for s in (0, seed))
    each = [
        (others if text else first).standard_normal((len(kind.CONTENTS), *layers, 2 * K, *axes))
        for text in range(len(segments))
    ]
    return dict(
        zip(kind.CONTENTS, np.stack(each, kind.TEXT_AXIS + 1).astype(np.float32), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["icae", "x500"])
def test_packed_target_has_the_loss_and_gradient_it_has_alone(tiny_params, method):
    """Breaks when a target sees its neighbours or padding, starts elsewhere, or a row reads another
    row's memory.
    """
    target, c, kind = (
        continuation(15, 1),
        CompressionConfig(method=method, k=K, rate=4),
        METHODS[method].memory,
    )

    @jax.jit
    @jax.value_and_grad
    def run(contents, lengths, packed, here):
        memory = memories.place(kind, contents, lengths, c)
        losses = loss.label_losses(
            Decoder.of(FrozenModel(MODEL, tiny_params), TRAINED),
            memory,
            {"lm": packed},
            {"lm": HEAD},
            c.position_layout,
            4,
        )["lm"]
        return jnp.sum(jnp.where(packed["label_mask"], losses, 0)[*here])

    def loss_and_gradients(contents, lengths, rows, pack_shape, here):
        value, gradients = run(
            contents, np.asarray(lengths, np.int32), pack(rows, *pack_shape), here
        )
        return [
            value,
            *(
                {name: np.moveaxis(x, kind.TEXT_AXIS, 0) for name, x in gradients.items()}[name]
                for name in kind.CONTENTS
            ),
        ]

    only = {
        name: np.take(x, range(K), kind.TEXT_AXIS + 1) for name, x in written(kind, [1], 1).items()
    }
    alone = loss_and_gradients(only, [[9]], [[target]], (1, 14, 11), (0, 0))
    rows = [
        [question(9, 2), target],
        [continuation(17, 3)],
        [None, question(5, 4), continuation(8, 5)],
    ]
    other_rows = [[None, target, continuation(20, 6)], [question(9, 7), None, question(18, 8)], []]
    for seed, lengths, packed_rows in (
        (1, [[9, 0], [12, 12], [7, 7]], rows),
        (2, [[9, 0], [9, 8], [5, 0]], other_rows),
    ):
        got = loss_and_gradients(
            written(kind, lengths, seed), lengths, packed_rows, (3, 19, 17), (0, 1)
        )
        close(got[0], alone[0])
        for mine, want in zip(got[1:], alone[1:], strict=True):
            close(np.take(mine[0], range(K), kind.TEXT_AXIS), want[0])
            assert (
                not np.take(mine[0], range(K, 2 * K), kind.TEXT_AXIS).any() and not mine[1:].any()
            )


# ------------------------------------------------------------------- several objectives in one call

LENGTHS = [len(c) for c in CONTEXTS]
SHAPE = (2, 13, 13)  # the same for every objective, so that they are joined wherever they may be
PACKED = {
    "ae": pack([[targets.ae_target(c[:9], FRAMING)] for c in CONTEXTS], *SHAPE),
    "lm": pack([[continuation(12, b), continuation(7, b + 3)] for b in range(3)], *SHAPE),
    "qa": pack([[question(7 + b, b)] for b in range(3)], *SHAPE),
}


def memory_in(layout):
    _, lengths = segment_contexts(CONTEXTS, compression())
    place = jax.jit(
        lambda contents, lengths: memories.place(
            memories.Slots, contents, lengths, compression(layout)
        )
    )
    return jax.device_get(place(written(memories.Slots, [1, 2, 2], 4), lengths))


@functools.partial(jax.jit, static_argnums=2)
def in_one_call(params, memory, layout, packed):
    heads = {"ae": (), "lm": (), "qa": HEAD}
    return loss.label_losses(
        Decoder.of(FrozenModel(MODEL, params), TRAINED),
        memory,
        packed,
        {o: heads[o] for o in packed},
        compression(layout).position_layout,
        8,
    )


@functools.partial(jax.jit, static_argnums=2)
def by_itself(params, memory, head, starts, packed):
    prefix = memory.read(Decoder(FrozenModel(MODEL, params), None), head)
    hidden = Decoder.of(FrozenModel(MODEL, params), TRAINED).label_hidden(
        prefix, starts, packed["ids"], packed["label_at"]
    )
    labels = packed["labels"].reshape(len(hidden), -1, 1)
    return -jnp.take_along_axis(
        jax.nn.log_softmax(hidden @ head_kernel(params)), labels, -1
    ).reshape(packed["labels"].shape)


def at_labels(losses, objective):
    return np.where(PACKED[objective]["label_mask"], losses, 0)


def test_objectives_in_one_call_equal_separate_calls(tiny_params):
    """Breaks when joined objectives are split at the wrong place, or a head reaches an objective
    that has none.
    """
    memory = memory_in("servable")
    got = in_one_call(tiny_params, memory, "servable", PACKED)
    assert set(got) == {"ae", "lm", "qa"}
    for o, head in (("ae", ()), ("lm", ()), ("qa", HEAD)):
        starts = np.asarray(
            [len(head) + K, len(head) + 2 * K, len(head) + 2 * K]
        )  # one, two and two segments
        close(
            at_labels(got[o], o),
            at_labels(by_itself(tiny_params, memory, head, starts, PACKED[o]), o),
        )


def test_uniform_layout_restarts_autoencoding_at_zero_only(tiny_params):
    """Breaks when AE shares LM's start positions under UPL's layout (both come in one call), or LM
    does not follow the text.
    """
    memory = memory_in("uniform")
    got = in_one_call(tiny_params, memory, "uniform", {o: PACKED[o] for o in ("ae", "lm")})
    zero, after = np.zeros(3, int), np.asarray(LENGTHS) + 1
    for o, starts, wrong in (("ae", zero, after), ("lm", after, zero)):
        right, other = (
            at_labels(by_itself(tiny_params, memory, (), s, PACKED[o]), o) for s in (starts, wrong)
        )
        close(at_labels(got[o], o), right)
        assert np.abs(right - other).max() > 1e-3, (
            "this target does not depend on its start, so the test shows nothing"
        )


def test_sums_count_labels_only():
    """Breaks when padded labels enter the loss or the count, or a mean is taken here."""
    packed = pack([[continuation(8, 0)], [continuation(6, 0)]], 1, 9, 6)
    losses = RNG.uniform(1, 2, (2, 1, 6)).astype(np.float32)
    total, count = jax.jit(loss.objective_sums)({"lm": losses}, {"lm": packed})["lm"]
    assert count == 4 + 2
    close(total, np.sum(losses[0, 0, :4]) + np.sum(losses[1, 0, :2]))
