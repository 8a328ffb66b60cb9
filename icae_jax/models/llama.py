"""The decoder-only Llama family in linen (Llama, Mistral, Qwen2, Qwen3): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

One letter a dimension, in names and comments throughout the package:
    B batch, G targets on one memory, T decoder time, S source time, P prefix, M memory, D model width, N query heads,
    K key/value heads, Q queries per key/value head (N / K), H head size, F feed-forward, V vocabulary, L layers, R LoRA rank.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from icae_jax.errors import UserError
from icae_jax.models import rope
from icae_jax.models.attention import attend, seen


def _all_but_weights(prim, *_, **__):
    """Saves everything but a layer's weights, as they were sliced from the stack and gathered from other devices: keeping those would
    keep the whole base once more.
    """
    return prim.name not in ("sharding_constraint", "dynamic_slice", "squeeze")


# What the backward pass finds of a block's forward pass: everything; what matmuls gave, attention's apart; what matmuls and attention gave
# that the gradient needs where weights are *frozen*, so that no matmul is done twice; nothing but the block's input.
REMAT_POLICIES = {
    "none": _all_but_weights,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "frozen": jax.checkpoint_policies.save_only_these_names("projection", "lora", "attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants that fix what the base computes.

    qkv_bias: q, k and v projections have biases (Qwen2). qk_norm: heads of q and k are normalised before RoPE (Qwen3). windows: of each
    layer, how many positions back a query sees, itself included, 0 for all of them (Mistral, Qwen2); () where every layer sees all.
    o_bias, mlp_bias: so have the output projection of attention, and the three projections of the MLP (Llama, by its config.json).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: rope.Scaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    o_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and not 0 < value < math.inf:
                raise UserError(f"{field.name} of the model is {value}; it must be positive")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise UserError(
                f"windows of the model are {self.windows}; give one >= 0 for each of the {self.num_layers} layers"
            )

    @property
    def biased(self) -> tuple[str, ...]:
        """The projections that have biases."""
        parts = (
            (self.qkv_bias, ("q_proj", "k_proj", "v_proj")),
            (self.o_bias, ("o_proj",)),
            (self.mlp_bias, ("gate_proj", "up_proj", "down_proj")),
        )
        return tuple(name for has_bias, names in parts if has_bias for name in names)


# ------------------------------------------------------------------------------------------------------- logical axes

# The axes of the parameters by names that the mesh's rules know (`runtime.sharding`): (input, output) of each kernel.
PROJECTION_AXES = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}
NOWHERE = np.zeros(0, np.int32)  # as `at` of `Llama`: no hidden states are wanted
STORED_ONLY = ("embed", "rank")  # split where parameters are kept, whole where they are used
KV_AXES = (
    "layers",
    "batch",
    None,
    "kv_heads",
    None,
)  # of stacked keys or values, `[L, B, T, K, H]`


def logical_axes(path):
    """The logical axes of the parameter at a path, as ("layers", "self_attn", "q_proj", "kernel"): () where it is never split.

    LoRA's a and b have paths like the kernel that they stand beside.
    """
    name, parent = path[-1] if path else "", path[-2] if len(path) > 1 else ""
    if parent in PROJECTION_AXES:
        d_in, d_out = PROJECTION_AXES[parent]
        return (
            "layers",
            *{"kernel": (d_in, d_out), "bias": (d_out,), "a": (d_in, "rank"), "b": ("rank", d_out)}[
                name
            ],
        )
    return {"embed": ("vocab", "embed"), "lm_head": ("embed", "vocab")}.get(name, ())


def constrain(x, *names):
    """`x` split by logical axes (None: not split), one for each dimension; as it is where no mesh's rules are active.

    A dimension that its mesh axes do not divide stays whole, such as the one row of a head that stands before every memory.
    """
    if not nn.get_logical_axis_rules():
        return x
    sizes = jax.sharding.get_abstract_mesh().shape
    spec = []
    for axes, n in zip(nn.logical_to_mesh_axes(names), x.shape, strict=True):
        parts = math.prod(
            sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())
        )
        spec.append(None if n % parts else axes)
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*spec))


def gathered(w, axes):
    """A parameter as a matmul uses it: whole along the axes that are split in storage alone."""
    return constrain(w, *(None if axis in STORED_ONLY else axis for axis in axes))


# ------------------------------------------------------------------------------------------------------------- modules


def linear(x, w):
    """`x [..., in] @ w [in, out]`: the one place through which every frozen matmul goes."""
    return jnp.einsum("...i,io->...o", x, w.astype(x.dtype))


class Projection(nn.Module):
    """A matmul with a frozen kernel (and bias), plus the LoRA branch when the "lora" collection holds this module."""

    features: int
    lora_scale: float
    lora_dropout: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        d_in, d_out = PROJECTION_AXES.get(self.name, (None, None))
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        y = linear(x, gathered(kernel, (d_in, d_out)))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + jnp.broadcast_to(gathered(bias, (d_out,)).astype(x.dtype), y.shape)
        if self.has_variable("lora", "a"):
            # Cast first, so that only half the bytes are gathered where the base is bfloat16.
            a, b = (self.get_variable("lora", name).astype(x.dtype) for name in "ab")
            if (
                self.has_rng("dropout") and self.lora_dropout > 0
            ):  # the caller gives this stream in training only
                bits = jax.random.bits(
                    self.make_rng("dropout"), x.shape, jnp.uint16
                )  # half of what `bernoulli` draws
                x = jnp.where(
                    bits >= round(self.lora_dropout * 2**16), x / (1 - self.lora_dropout), 0
                ).astype(x.dtype)
            inner = checkpoint_name(linear(x, gathered(a, (d_in, "rank"))), "lora")
            y = y + linear(inner, gathered(b, ("rank", d_out))) * jnp.asarray(
                self.lora_scale, x.dtype
            )
        return checkpoint_name(y, "projection")


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return jnp.einsum("...d,d->...d", x32.astype(x.dtype), scale.astype(x.dtype))


def rows(x, at):
    """`x [B or 1, T, …]` at some time indices: `[U]`, those of every row, or `[B, U]`, each row its own. All for None."""
    if at is None:
        return x
    if at.ndim == 1:
        if isinstance(at, np.ndarray) and at.size and (np.diff(at) == 1).all():
            return x[:, at[0] : at[-1] + 1]
        return jnp.take(x, at, axis=1, mode="clip")
    x = jnp.broadcast_to(x, (at.shape[0], *x.shape[1:]))
    return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1, mode="clip")


class Attention(nn.Module):
    config: ModelConfig
    lora_scale: float
    lora_dropout: float
    implementation: str
    unroll: bool

    def _project(self, name, heads, x):
        c = self.config
        y = Projection(
            heads * c.head_dim, self.lora_scale, self.lora_dropout, name in c.biased, name=name
        )(x)
        y = constrain(
            y.reshape(*y.shape[:2], heads, c.head_dim),
            "batch",
            None,
            PROJECTION_AXES[name][1],
            None,
        )
        return (
            RMSNorm(c.rms_norm_eps, name=f"{name[0]}_norm")(y)
            if c.qk_norm and name != "v_proj"
            else y
        )

    @nn.compact
    def __call__(self, x_BTD, cos_sin, mask, prefix, at):
        """The queries at `at` alone, of keys everywhere: ([B, U or T, D], (k before RoPE, v))."""
        kv = k, v = tuple(
            self._project(name, self.config.num_kv_heads, x_BTD) for name in ("k_proj", "v_proj")
        )
        q = self._project("q_proj", self.config.num_heads, rows(x_BTD, at))
        with jax.named_scope("attention"):
            rotated = rope.rotate(q, tuple(rows(t, at) for t in cos_sin)), rope.rotate(k, cos_sin)
            # Splash knows no queries at times that are told while it runs: the last layer's, where labels are.
            implementation = (
                "xla" if self.implementation == "splash" and mask.ndim == 3 else self.implementation
            )
            at = at if mask.ndim == 2 else None
            out = attend(
                *rotated, v, mask, prefix, at=at, implementation=implementation, unroll=self.unroll
            )
        return Projection(
            x_BTD.shape[-1], self.lora_scale, self.lora_dropout, self.config.o_bias, name="o_proj"
        )(out), kv

    @nn.compact
    def keys_and_values(self, x_BTD):
        """(k before RoPE, v) alone."""
        return tuple(
            self._project(name, self.config.num_kv_heads, x_BTD) for name in ("k_proj", "v_proj")
        )


class MLP(nn.Module):
    config: ModelConfig
    lora_scale: float
    lora_dropout: float

    @nn.compact
    def __call__(self, x):
        def projection(name, features):
            return Projection(
                features, self.lora_scale, self.lora_dropout, self.config.mlp_bias, name=name
            )

        gate = projection("gate_proj", self.config.intermediate_size)(x)
        up = projection("up_proj", self.config.intermediate_size)(x)
        hidden = constrain(jax.nn.silu(gate) * up, "batch", None, "mlp")
        return projection("down_proj", x.shape[-1])(hidden)


class Block(nn.Module):
    config: ModelConfig
    lora_scale: float
    lora_dropout: float
    implementation: str
    unroll: bool
    return_kv: bool

    @nn.compact
    def __call__(self, x, prefix, window, cos_sin, positions, mask, at=None, keep=None):
        c, lora = self.config, (self.lora_scale, self.lora_dropout)
        # Tied to what changes from block to block, or the mask of every head would be made once, before the scan, and kept through it.
        x, mask = jax.lax.optimization_barrier((x, mask))
        attention = Attention(c, *lora, self.implementation, self.unroll, name="self_attn")
        normed = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
        if at is not None and not at.size:
            return rows(x, at), attention.keys_and_values(rows(normed, keep))
        if prefix is not None:
            k, v, prefix_mask, prefix_positions = prefix
            prefix = k, v, jax.lax.optimization_barrier(prefix_mask)
        if mask.ndim == 3:
            mask = (
                mask if mask.shape[1] == 1 else rows(mask, at)
            )  # a single row is what every query sees
        elif window is not None or isinstance(at, jax.Array):
            mask = seen(mask, at)
        if window is not None:
            here = rows(positions, at)[:, :, None]
            mask = mask & (here - positions[:, None] < window)
            if prefix is not None:
                copies = x.shape[0] // k.shape[0]
                near = here - jnp.repeat(prefix_positions, copies, axis=0)[:, None] < window
                prefix = k, v, jnp.repeat(prefix[2], copies, axis=0)[:, None] & near
        h, kv = attention(normed, cos_sin, mask, prefix, at)
        x = constrain(rows(x, at) + h, "batch", None, None)
        x = x + MLP(c, *lora, name="mlp")(
            RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x)
        )
        # K/V sliced here, inside the scan, so that those of all positions of all layers never live at once.
        return constrain(x, "batch", None, None), tuple(
            rows(t, keep) for t in kv
        ) if self.return_kv else None


class Llama(nn.Module):
    """The blocks and the final norm. `embed` and `head_kernel` below are the two ends.

    remat: what the backward pass computes again of each block: "none" nothing, "frozen" no matmul, "dots" attention, "full" all, so that
        only block inputs are kept. The last block is not rematerialised where `at` cuts it.
    unroll: how many blocks one turn of the scan holds; where it is more than one, attention has no loops either. attention: how it is
        computed, see `models.attention`.
    """

    config: ModelConfig
    lora_scale: float = 1.0
    lora_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: int = 1
    attention: str = "xla"

    @nn.compact
    def __call__(self, x, positions, mask, *, prefix=None, at=None, return_kv=False, keep=None):
        """Runs the blocks.

        x: token ids `[B, T]` or embeddings `[B, T, D]`. positions `[B or 1, T]` integers. mask: `[B or 1, T]`, the real tokens, of which
        each sees itself and those before it; or `[B or 1, T or 1, T]`, true where query (axis 1, 1: all alike) sees key (axis 2); both
        within the layer's window of positions. prefix: None or `(k, v, mask, positions)`, k and v `[L, Bp, P, K, H]` with k already rotated
        (`rope.rotate_keys`), mask and the positions that windows count with `[Bp, P]`; Bp divides B (see `attention.attend`).
        at: time indices of the hidden states to return, `[U]` or each row's own `[B, U]`, None for all; of the last block only K and V
        are computed elsewhere. return_kv: also return K/V. keep: `[M]` time indices of the K/V to return, None for all.

        Returns (hidden states after the final norm `[B, U or T, D]`, None or (k, v) each `[L, B, M or T, K, H]`, k **before** RoPE).
        """
        c = self.config
        if jnp.issubdtype(x.dtype, jnp.integer):
            table = self.param("embed", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size))
            x = jnp.take(gathered(table, ("vocab", "embed")), x, axis=0)
        x = constrain(x.astype(self.dtype), "batch", None, None)
        block = functools.partial(
            Block, c, self.lora_scale, self.lora_dropout, self.attention, self.unroll > 1, return_kv
        )
        shared = rope.tables(c, positions), positions, mask
        if self.is_initializing():  # makes the parameters, of all layers in one array each
            stacked = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(nn.broadcast,) * 5, length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )  # fmt: skip
            x, _ = stacked(*block.args, name="layers")(x, None, None, *shared)
            return RMSNorm(c.rms_norm_eps, name="norm")(x), None

        # What differs between layers is scanned over, so that they stay one program.
        params, adapters = (
            self.variables.get(kind, {}).get("layers") for kind in ("params", "lora")
        )
        windows = (
            jnp.asarray([w or jnp.iinfo(jnp.int32).max for w in c.windows], jnp.int32)
            if c.windows
            else None
        )
        keys = (
            jax.random.split(self.make_rng("dropout"), c.num_layers)
            if self.has_rng("dropout")
            else None
        )
        scanned = adapters, None if prefix is None else prefix[:2], windows, keys
        # Where the last layer is another program, the others' slice of the frozen parameters would be a copy: they are sliced one by one.
        whole = at is None
        count = c.num_layers if whole else c.num_layers - 1

        def layer(x, xs, at=None):
            of, (adapters, prefix_kv, window, key) = xs
            if not whole:
                of = jax.tree.map(
                    lambda w: jax.lax.dynamic_index_in_dim(w, of, keepdims=False), params
                )
            return block(parent=None).apply(
                {"params": of} if adapters is None else {"params": of, "lora": adapters},
                x, None if prefix is None else (*prefix_kv, *prefix[2:]), window, *shared, at, keep,
                rngs=None if key is None else {"dropout": key},
            )  # fmt: skip

        def saving(policy, function, **options):
            return jax.checkpoint(function, policy=REMAT_POLICIES[policy], **options)

        one = layer
        if self.remat != "none" or not whole or nn.get_logical_axis_rules():
            one = saving(self.remat, layer, prevent_cse=self.unroll > 1)
        first = jax.tree.map(lambda t: t[:count], scanned)
        x, kv = jax.lax.scan(
            one,
            x,
            (params if whole else jnp.arange(count), first),
            unroll=max(1, min(self.unroll, count)),
        )
        if not whole:  # never rematerialised: of the decoder's, the backward pass comes at once
            last = jax.tree.map(lambda t: t[count], scanned)
            x, last_kv = saving("none", functools.partial(layer, at=at))(
                x, (jnp.asarray(count), last)
            )
            kv = kv and tuple(
                jnp.concatenate([t, end[None]]) for t, end in zip(kv, last_kv, strict=True)
            )
        kv = kv and tuple(constrain(t, *KV_AXES) for t in kv)
        return RMSNorm(c.rms_norm_eps, name="norm")(x), kv


# ------------------------------------------------------------------------------------------------------- the two ends


def embed(params, ids):
    """Token embeddings `[..., D]` of ids `[...]`, in the stored dtype."""
    return jnp.take(gathered(params["embed"], ("vocab", "embed")), ids, axis=0)


def head_kernel(params):
    """The output matrix `[D, V]`: the head's own, or the embedding table transposed where they are tied."""
    if "lm_head" in params:
        return gathered(params["lm_head"], ("embed", "vocab"))
    return gathered(params["embed"], ("vocab", "embed")).T


def causal_mask(length):
    """`[1, T, T]`, true on and below the diagonal."""
    return jnp.tril(jnp.ones((1, length, length), bool))


@functools.partial(
    jax.jit, static_argnames="config"
)  # one program, not one for every array's shape; what it makes is traced once
def init_params(key, config):
    """Random float32 parameters: normal(0.02), output projections of each block scaled by 1/sqrt(2 L) (GPT-2's rule)."""
    key, head_key = jax.random.split(key)
    ids = jnp.zeros((1, 2), jnp.int32)
    with nn.logical_axis_rules(
        ()
    ):  # also where a mesh is active they are made on one device, for the caller to place
        params = Llama(config).init(key, ids, jnp.arange(2)[None], causal_mask(2))["params"]
    for module, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        params["layers"][module][name]["kernel"] *= (2 * config.num_layers) ** -0.5
    if not config.tie_word_embeddings:
        params["lm_head"] = 0.02 * jax.random.normal(
            head_key, (config.hidden_size, config.vocab_size)
        )
    return params


def param_shapes(config):
    """The tree of `jax.ShapeDtypeStruct` that `init_params` would make, without making it."""
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config))
