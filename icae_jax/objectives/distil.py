"""Distillation: a teacher that reads the whole text, for the student behind a memory to agree with.

The teacher is the frozen base, alone or with a decoder LoRA, and gets no gradient. Its states at
labels enter `loss.label_losses` as a `Teaching`; the loss of a label is then

    cross-entropy + weight x KL(teacher || student), in nats, at temperature 1.

xRAG (arXiv 2405.13792) trains so with weight 2. AE has no KL: its trained trigger means nothing
to the base, and its labels are the text itself.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.objectives.loss import Targets


def read_text(
    teacher: Decoder,
    ids_BSN: Int[Any, "B S N"],
    lengths_BS: Int[Any, "B S"],
    before: tuple[int, ...] = (),
    skipped: int = 0,
) -> Prefix:
    """The texts themselves, put together again from their segments, in a memory's place.

    before: ids before the text. skipped: tokens at a text's start that are not read, such as an
    encoder's `<s>`. Neither they nor padding take positions.
    """
    B, S, N = ids_BSN.shape
    real = jnp.arange(N)[None, None] < lengths_BS[..., None]
    real = real.at[:, 0, :skipped].set(False).reshape(B, S * N)
    real = jnp.concatenate([jnp.ones((B, len(before)), bool), real], 1)
    start = jnp.broadcast_to(jnp.asarray(before, jnp.int32), (B, len(before)))
    ids = jnp.concatenate([start, ids_BSN.reshape(B, S * N)], 1)
    positions = _positions(real)
    k, v = teacher.prefix_kv(ids, positions, real)
    return Prefix(k, v, real, positions, real.sum(1, dtype=jnp.int32))


def label_hidden(
    teacher: Decoder,
    prefix: Prefix,
    ids_BGT: Int[Any, "B G T"],
    label_at_BGU: Int[Any, "B G U"],
) -> Float[Array, "B G U D"]:
    """The teacher's hidden states at the labels of packed targets behind a text.

    Special tokens, rows of the trained table, mean nothing to it: they are masked and take no
    position, and a label behind one is predicted by the token before. (No target of
    `targets.TAUGHT` begins with a label.)
    """
    B, G, T = ids_BGT.shape
    ids = ids_BGT.reshape(B * G, T)
    real = ids >= 0
    positions = jnp.repeat(prefix.end, G)[:, None] + _positions(real)
    last_real = jax.lax.cummax(jnp.where(real, jnp.arange(T)[None], 0), axis=1)
    at = jnp.take_along_axis(last_real, label_at_BGU.reshape(B * G, -1), 1)
    ids = jnp.maximum(ids, 0)
    hidden, _ = teacher.run(ids, positions, prefix.visible, real=real, at=at)
    return hidden.reshape(B, G, *hidden.shape[1:])


def _positions(real):
    """Of each token among the real ones of its row, from 0."""
    return jnp.maximum(jnp.cumsum(real, 1, dtype=jnp.int32) - 1, 0)


def teach(
    teacher: Decoder,
    ids_BSN: Int[Any, "B S N"],
    lengths_BS: Int[Any, "B S"],
    targets: Targets,
    before: Mapping[str, tuple[int, ...]],
    skipped: int = 0,
) -> dict[str, Float[Array, "B G U D"]]:
    """The teacher's states at labels, by the objectives of `before`, without a gradient.

    before: by objective, ids before the text; a text runs once for each. skipped: see `read_text`.
    """
    teacher, hidden = jax.lax.stop_gradient(teacher), {}
    with jax.named_scope("teacher"):
        for start in dict.fromkeys(before.values()):
            prefix = read_text(teacher, ids_BSN, lengths_BS, start, skipped)
            for o in before:
                if before[o] == start:
                    packed = targets[o]
                    hidden[o] = label_hidden(teacher, prefix, packed["ids"], packed["label_at"])
    return hidden
