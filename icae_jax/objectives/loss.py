"""Losses on label positions: sums with counts, so that any split of a batch gives the same step."""

import functools
import math

import jax
import jax.numpy as jnp

from icae_jax.compression import encoder, methods
from icae_jax.compression import layout as layouts
from icae_jax.models import llama


def _chunks(x, size):
    """Cuts axis 1 of `[B, U, …]` into near-equal chunks of at most `size`, scanned axis first, and says how many positions pad it."""
    U = x.shape[1]
    count = math.ceil(U / size)
    step = math.ceil(U / count)  # near-equal: 513 in chunks of at most 512 are 2 x 257, not 2 x 512
    pad = count * step - U
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], count, step, *x.shape[2:]), 1, 0)


def _join(chunks, U):
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :U]


def _logits(h, head):
    return jnp.einsum("bud,dv->buv", h, head.astype(h.dtype), preferred_element_type=jnp.float32)


def _losses_of_chunk(h, head, labels):
    logits = _logits(h, head)
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[..., None], -1)[
        ..., 0
    ], logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def frozen_head_losses(h_BUD, head_DV, labels_BU, chunk):
    """Cross-entropy of every label, `[B, U]` float32 nats, in chunks of `chunk` positions: `[B, U, V]` never lives.

    The head is frozen: it gets no gradient, and the gradient of `h` is formed in the forward pass, which takes two head
    matmuls and no recomputation.
    """
    losses = jax.lax.map(
        lambda x: _losses_of_chunk(x[0], head_DV, x[1])[0],
        (_chunks(h_BUD, chunk), _chunks(labels_BU, chunk)),
    )
    return _join(losses, h_BUD.shape[1])


def _frozen_head_fwd(h_BUD, head_DV, labels_BU, chunk):
    def one(x):
        h, labels = x
        losses, logits = _losses_of_chunk(h, head_DV, labels)
        d_logits = jax.nn.softmax(logits, -1) - jax.nn.one_hot(labels, logits.shape[-1])
        return losses, jnp.einsum("buv,dv->bud", d_logits.astype(h.dtype), head_DV.astype(h.dtype))

    losses, d_h = jax.lax.map(one, (_chunks(h_BUD, chunk), _chunks(labels_BU, chunk)))
    U = h_BUD.shape[1]
    return _join(losses, U), (_join(d_h, U), head_DV)


def _frozen_head_bwd(chunk, residuals, g_BU):
    d_h, head = residuals
    return (d_h * g_BU[..., None]).astype(d_h.dtype), jnp.zeros_like(head), None


frozen_head_losses.defvjp(_frozen_head_fwd, _frozen_head_bwd)


# --------------------------------------------------------------------------------------------------- behind one memory


def label_hidden(model, base_params, trained, prefix, starts_B, ids_BGT, label_at_BGU):
    """The decoder's hidden states at label positions, `[B * G, U, D]`: every target sees head, memory and itself."""
    B, G, T = ids_BGT.shape
    x = encoder.embed_with_table(base_params, trained["memory_table"], ids_BGT).reshape(
        B * G, T, -1
    )
    positions = jnp.repeat(starts_B, G)[:, None] + jnp.arange(T)[None]
    with jax.named_scope("decoder"):
        # Targets are padded on the right only, so causal attention already hides the padding from every real token.
        real = jnp.ones((1, T), bool)
        hidden, _ = model.apply(
            {"params": base_params},
            x,
            positions,
            real,
            prefix=prefix.seen,
            at=label_at_BGU.reshape(B * G, -1),
        )
    return hidden


def label_losses(model, base_params, trained, memory, targets, heads, layout, chunk):
    """Per-label losses of every objective, `{objective: [B, G, U]}` nats.

    targets: `{objective: arrays of targets.pack}`. heads: `{objective: ids before the memory}`. Head and memory run once for
    each distinct head; targets of one shape behind the same head run in one call.
    """
    losses = {}
    for head in dict.fromkeys(heads[o] for o in targets):
        prefix = methods.read(model, base_params, memory, head)
        behind = [o for o in targets if heads[o] == head]
        for shape in dict.fromkeys(
            (targets[o]["ids"].shape[2], targets[o]["labels"].shape[2]) for o in behind
        ):
            alike = [
                o
                for o in behind
                if (targets[o]["ids"].shape[2], targets[o]["labels"].shape[2]) == shape
            ]
            calls = [alike]
            if len({layouts.get(layout).ae_restarts and o == "ae" for o in alike}) > 1:
                calls = [[o] for o in alike]  # they start at different positions
            for call in calls:
                joined = {
                    key: jnp.concatenate([targets[o][key] for o in call], 1)
                    for key in targets[call[0]]
                }
                starts = layouts.target_starts(layouts.get(layout), call[0], prefix)
                hidden = label_hidden(
                    model, base_params, trained, prefix, starts, joined["ids"], joined["label_at"]
                )
                B, G, U = joined["labels"].shape
                with jax.named_scope("cross_entropy"):
                    flat = frozen_head_losses(
                        hidden,
                        llama.head_kernel(base_params),
                        joined["labels"].reshape(B * G, U),
                        chunk,
                    )
                at = 0
                for o in call:
                    width = targets[o]["labels"].shape[1]
                    losses[o] = flat.reshape(B, G, U)[:, at : at + width]
                    at += width
    return losses


def objective_sums(losses, targets):
    """`{objective: (sum of losses in nats, number of labels)}`."""
    return {
        o: (
            jnp.sum(jnp.where(targets[o]["label_mask"], losses[o], 0.0)),
            jnp.sum(targets[o]["label_mask"]).astype(jnp.float32),
        )
        for o in losses
    }
