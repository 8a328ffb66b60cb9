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
from jaxtyping import Float, Shaped

from icae_jax.models import rope
from icae_jax.models.attention import attend, seen, usable
from icae_jax.models.axes import PROJECTION_AXES, constrain, gathered
from icae_jax.models.quantize import linear

NOWHERE = np.zeros(0, np.int32)  # as `at` of `Llama`: no hidden states are wanted


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
        if self.plus_one:
            return jnp.einsum("...d,d->...d", x32, 1 + scale.astype(jnp.float32)).astype(x.dtype)
        return jnp.einsum("...d,d->...d", x32.astype(x.dtype), scale.astype(x.dtype))


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

        Returns `[B, U or T, D]` and (k before RoPE, v).
        """
        kv = k, v = self.keys_and_values(x_BTD)
        q = self._project("q_proj", self.config.num_heads, rows(x_BTD, at))
        with jax.named_scope("attention"):
            out = attend(
                rope.rotate(q, tuple(rows(table, at) for table in cos_sin)),
                rope.rotate(k, cos_sin),
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
        return output(out), kv

    @nn.compact
    def keys_and_values(self, x_BTD: Float[Any, "B T D"]) -> tuple[Any, ...]:
        """(k before RoPE, v)."""
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

    @nn.compact
    def __call__(self, x, prefix, window, cos_sin, positions, mask, at=None, keep=None):
        """(the block's output at `at`, its K/V at `keep` or None)."""
        c, lora = self.config, (self.lora_scale, self.lora_dropout)
        # The barrier ties the mask to the block's input; otherwise XLA would expand it for every
        # head once, before the scan, and keep it throughout.
        x, mask = jax.lax.optimization_barrier((x, mask))
        attention = Attention(c, *lora, self.implementation, self.unroll, name="self_attn")
        before, after = c.norms != "after", c.norms != "before"
        normed = norm(c, "input_layernorm")(x) if before else x
        if at is not None and not at.size:
            return rows(x, at), attention.keys_and_values(rows(normed, keep))
        if prefix is not None:
            k, v, prefix_mask, prefix_positions = prefix
            prefix = k, v, jax.lax.optimization_barrier(prefix_mask)
        if mask.ndim == 3:
            mask = mask if mask.shape[1] == 1 else rows(mask, at)  # a single row is for all queries
        elif window is not None or isinstance(at, jax.Array):
            mask = seen(mask, at)
        if window is not None:
            query_positions = rows(positions, at)[:, :, None]
            mask = mask & (query_positions - positions[:, None] < window)
            if prefix is not None:
                copies = x.shape[0] // k.shape[0]
                prefix_positions = jnp.repeat(prefix_positions, copies, axis=0)[:, None]
                near = query_positions - prefix_positions < window
                prefix = k, v, jnp.repeat(prefix[2], copies, axis=0)[:, None] & near
        h, kv = attention(normed, cos_sin, mask, prefix, at)
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
