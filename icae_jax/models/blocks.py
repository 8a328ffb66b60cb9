"""The blocks of the model, in linen; letters as in `models.llama`.

`config` is a `models.llama.ModelConfig` throughout.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int, Shaped

from icae_jax.models import rope
from icae_jax.models.attention import attend, seen, usable
from icae_jax.models.axes import PROJECTION_AXES, constrain, gathered
from icae_jax.models.pytree import pytree, static
from icae_jax.models.quantize import linear

NOWHERE = np.zeros(0, np.int32)  # as `at` of `Llama`: no hidden states are wanted


@pytree
class PrefixPart:
    """Keys and values that a sequence sees before its own, of all layers or of one.

    k, v: `[L, Bp, P, K, H]`, k rotated, or a tuple of L arrays; with `heads_first`, `[…, K, P, H]`,
    in which a decoding step reads each head's keys in one piece. mask: which are real. positions:
    what windows count. rows: for each row of the sequence the row of this part that it sees; by
    default Bp divides B (see `attention.attend`). first: only so many of the P are read.
    """

    k: Any
    v: Any
    mask: Bool[Any, "Bp P"]
    positions: Int[Any, "Bp P"]
    rows: Int[Any, " B"] | None = None
    heads_first: bool = static(default=False)
    first: int | None = static(default=None)

    def seen_by(self, query_positions: Any, window: Any, count: int) -> tuple[Any, Any, Any]:
        """One layer's `(k, v, mask)` as `attention.attend` takes them, for `count` rows."""
        k, v, mask, positions = self.k, self.v, self.mask, self.positions
        if self.first is not None:
            axis = 2 if self.heads_first else 1
            k, v = (jax.lax.slice_in_dim(x, 0, self.first, axis=axis) for x in (k, v))
        if self.rows is not None:
            take = functools.partial(jnp.take, indices=self.rows, axis=0, mode="clip")
            k, v, mask, positions = map(take, (k, v, mask, positions))
        if self.heads_first:
            k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
        # As for the sequence's own mask, see `Block`.
        mask = jax.lax.optimization_barrier(mask)
        if window is not None:
            copies = count // k.shape[0]
            near = query_positions - jnp.repeat(positions, copies, axis=0)[:, None] < window
            mask = jnp.repeat(mask, copies, axis=0)[:, None] & near
        return k, v, mask


def prefix_parts(prefix: Any) -> list[PrefixPart]:
    """The parts of `Llama`'s `prefix`: of None, a part, its first four fields, or a list."""
    parts = prefix if isinstance(prefix, list) else [] if prefix is None else [prefix]
    return [part if isinstance(part, PrefixPart) else PrefixPart(*part) for part in parts]


def frozen(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    """A parameter of the base; `init` makes it when the tree is initialised.

    Fetched with `get_variable`, since `param` refuses a quantised leaf for its shape.
    """
    if module.is_initializing():
        return module.param(name, init, shape)
    return module.get_variable("params", name)


class Projection(nn.Module):
    """A matmul with a frozen kernel, plus bias and LoRA branch where the trees hold them."""

    features: int
    lora_scale: float
    lora_dropout: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        """Projects `x [B, T, in]` to `[B, T, features]`."""
        d_in, d_out = PROJECTION_AXES.get(self.name, (None, None))
        shape = (x.shape[-1], self.features)
        kernel = frozen(self, "kernel", nn.initializers.normal(0.02), shape)
        y = linear(x, gathered(kernel, (d_in, d_out)))
        if self.use_bias:
            bias = frozen(self, "bias", nn.initializers.zeros, (self.features,))
            y = y + jnp.broadcast_to(gathered(bias, (d_out,)).astype(x.dtype), y.shape)
        if self.has_variable("lora", "a"):
            # Cast first, so that only half the bytes are gathered where the base is bfloat16.
            a, b = (self.get_variable("lora", name).astype(x.dtype) for name in "ab")
            # Callers give this random stream in training only.
            if self.has_rng("dropout") and self.lora_dropout > 0:
                # 16 random bits per element are half of what `bernoulli` draws.
                bits = jax.random.bits(self.make_rng("dropout"), x.shape, jnp.uint16)
                keep = bits >= round(self.lora_dropout * 2**16)
                x = jnp.where(keep, x / (1 - self.lora_dropout), 0).astype(x.dtype)
            inner = checkpoint_name(linear(x, gathered(a, (d_in, "rank"))), "lora")
            update = linear(inner, gathered(b, ("rank", d_out)))
            y = y + update * jnp.asarray(self.lora_scale, x.dtype)
        return checkpoint_name(y, "projection")


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467), computed in float32.

    plus_one: the result is multiplied by 1 + scale, in float32 (Gemma); else by the scale.
    """

    eps: float
    plus_one: bool = False

    @nn.compact
    def __call__(self, x):
        """Normalises the last axis of `x`."""
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = frozen(self, "scale", init, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        # Not an einsum, for which XLA's CPU backend transposes x back and forth.
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        if self.plus_one:
            return (x32 * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        return x32.astype(x.dtype) * scale.astype(x.dtype)


def norm(config: Any, name: str) -> RMSNorm:
    """A norm of this model."""
    return RMSNorm(config.rms_norm_eps, config.norm_plus_one, name=name)


def rows(x: Shaped[Any, "..."], at: Any) -> Shaped[Any, "..."]:
    """`x [B or 1, T, …]` at time indices.

    at: `[U]` for all rows, `[B, U]` for each row, None for all times.
    """
    if at is None:
        return x
    if at.ndim == 1:
        if isinstance(at, np.ndarray) and at.size and (np.diff(at) == 1).all():
            return x[:, at[0] : at[-1] + 1]
        return jnp.take(x, at, axis=1, mode="clip")
    x = jnp.broadcast_to(x, (at.shape[0], *x.shape[1:]))
    return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1, mode="clip")


class Attention(nn.Module):
    """Grouped-query attention with rotary positions over a prefix and the sequence itself."""

    config: Any
    lora_scale: float
    lora_dropout: float
    implementation: str
    unroll: bool
    rotated: bool = False

    def _project(self, name, heads, x):
        c = self.config
        projection = Projection(
            heads * c.head_dim, self.lora_scale, self.lora_dropout, name in c.biased, name=name
        )
        y = projection(x)
        if c.qk_projection_norm and name != "v_proj":
            y = norm(c, f"{name[0]}_norm")(y)
        y = y.reshape(*x.shape[:2], heads, c.head_dim)
        y = constrain(y, "batch", None, PROJECTION_AXES[name][1], None)
        if c.qk_norm and name != "v_proj":
            return norm(c, f"{name[0]}_norm")(y)
        return y

    @nn.compact
    def __call__(self, x_BTD, cos_sin, mask, prefix, at):
        """Attention of the queries at `at` over keys at all times.

        Returns `[B, U or T, D]` and (k, v), k before RoPE or, if `rotated`, behind it.
        """
        k, v = self._keys_and_values(x_BTD)
        rotated = rope.rotate(k, cos_sin)
        q = self._project("q_proj", self.config.num_heads, rows(x_BTD, at))
        with jax.named_scope("attention"):
            out = attend(
                rope.rotate(q, tuple(rows(table, at) for table in cos_sin)),
                rotated,
                v,
                mask,
                prefix,
                at=at if mask.ndim == 2 else None,
                scale=self.config.attention_scale,
                softcap=self.config.attention_softcap,
                implementation=usable(self.implementation, mask, prefix),
                unroll=self.unroll,
            )
        output = Projection(
            x_BTD.shape[-1], self.lora_scale, self.lora_dropout, self.config.o_bias, name="o_proj"
        )
        return output(out), (rotated if self.rotated else k, v)

    @nn.compact
    def keys_and_values(self, x_BTD: Float[Any, "B T D"], cos_sin: Any) -> tuple[Any, Any]:
        """(k, v), k before RoPE or, if `rotated`, behind it."""
        k, v = self._keys_and_values(x_BTD)
        return rope.rotate(k, cos_sin) if self.rotated else k, v

    def _keys_and_values(self, x_BTD):
        return tuple(
            self._project(name, self.config.num_kv_heads, x_BTD) for name in ("k_proj", "v_proj")
        )


# By their names in `ModelConfig`.
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class MLP(nn.Module):
    """A gated MLP (SwiGLU, GeGLU; arXiv 2002.05202): `down(activation(gate(x)) * up(x))`."""

    config: Any
    lora_scale: float
    lora_dropout: float

    @nn.compact
    def __call__(self, x):
        """Applies the MLP to `x [B, T, D]`."""

        def project(name, features, x):
            bias = self.config.mlp_bias
            return Projection(features, self.lora_scale, self.lora_dropout, bias, name=name)(x)

        gate = project("gate_proj", self.config.intermediate_size, x)
        up = project("up_proj", self.config.intermediate_size, x)
        activation = ACTIVATIONS[self.config.activation]
        hidden = constrain(activation(gate) * up, "batch", None, "mlp")
        return project("down_proj", x.shape[-1], hidden)


class Block(nn.Module):
    """One transformer block. Arguments as for `Llama`, of one layer."""

    config: Any
    lora_scale: float
    lora_dropout: float
    implementation: str
    unroll: bool
    return_kv: bool
    rotated: bool = False

    @nn.compact
    def __call__(self, x, prefix, window, cos_sin, positions, mask, at=None, keep=None):
        """(the block's output at `at`, its K/V at `keep` or None)."""
        c, lora = self.config, (self.lora_scale, self.lora_dropout)
        # The barrier ties the mask to the block's input; otherwise XLA would expand it for every
        # head once, before the scan, and keep it throughout.
        x, mask = jax.lax.optimization_barrier((x, mask))
        how = self.implementation, self.unroll, self.rotated
        attention = Attention(c, *lora, *how, name="self_attn")
        before, after = c.norms != "after", c.norms != "before"
        normed = norm(c, "input_layernorm")(x) if before else x
        if at is not None and not at.size:
            kept = tuple(rows(table, keep) for table in cos_sin)
            return rows(x, at), attention.keys_and_values(rows(normed, keep), kept)
        if mask.ndim == 3:
            mask = mask if mask.shape[1] == 1 else rows(mask, at)  # a single row is for all queries
        elif window is not None or isinstance(at, jax.Array):
            mask = seen(mask, at)
        query_positions = None
        if window is not None:
            query_positions = rows(positions, at)[:, :, None]
            mask = mask & (query_positions - positions[:, None] < window)
        parts = prefix_parts(prefix)
        seen_before = [part.seen_by(query_positions, window, len(x)) for part in parts]
        h, kv = attention(normed, cos_sin, mask, seen_before, at)
        # The hub's names of norms: Llama calls the MLP's own "post_attention".
        h = norm(c, "post_attention_layernorm")(h) if after else h
        x = constrain(rows(x, at) + self._weighted(h), "batch", None, None)
        name = "pre_feedforward_layernorm" if after else "post_attention_layernorm"
        h = MLP(c, *lora, name="mlp")(norm(c, name)(x) if before else x)
        h = norm(c, "post_feedforward_layernorm")(h) if after else h
        x = constrain(x + self._weighted(h), "batch", None, None)
        # Sliced inside the scan, so that K/V of all positions never live for all layers at once.
        return x, tuple(rows(t, keep) for t in kv) if self.return_kv else None

    def _weighted(self, h):
        """What attention or MLP adds to the residual stream."""
        multiplier = self.config.residual_multiplier
        return h if multiplier == 1 else h * jnp.asarray(multiplier, h.dtype)
