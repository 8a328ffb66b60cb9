"""The decoder-only Llama family in linen (Llama, Mistral, Qwen2, Qwen3): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

One letter a dimension, in names and comments throughout the package:
    B batch, G targets on one memory, T decoder time, S source time, P prefix, M memory, D model width, N query heads,
    K key/value heads, Q queries per key/value head (N / K), H head size, F feed-forward, V vocabulary, L layers, R LoRA rank.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name


def _all_but_gathered(prim, *_, **__):
    """Saves everything but what was gathered from other devices, above all a layer's weights: keeping those would keep the whole base."""
    return prim.name != "sharding_constraint"


# What the backward pass finds of a block's forward pass: everything; what matmuls gave; of these what a *frozen* weight's gradient chain
# needs (its own gradient would need its input, but it has none); nothing but the block's input.
REMAT_POLICIES = {
    "none": _all_but_gathered,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "frozen": jax.checkpoint_policies.save_only_these_names("projection", "lora"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class LinearRopeScaling:
    """Positions divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float

    def stretch(self, freqs, rope_theta):
        return freqs / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Frequency-dependent stretching of RoPE (Llama 3.1, section 3.4.1 of arXiv 2407.21783), as config.json names it."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def stretch(self, freqs, rope_theta):
        # Wavelengths longer than the original context are stretched by `factor`, short ones kept, between them a ramp.
        wavelength = 2 * math.pi / freqs
        ramp = self.original_max_position_embeddings / wavelength - self.low_freq_factor
        ramp = np.clip(ramp / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return (1 - ramp) * freqs / self.factor + ramp * freqs


@dataclasses.dataclass(frozen=True)
class YarnRopeScaling:
    """YaRN (arXiv 2309.00071, section 3.2 to 3.4): slow frequencies are stretched by `factor`, fast ones kept, and cos and sin are
    multiplied by `attention_factor`. beta_fast, beta_slow: rotations over the original context between which the ramp lies.

    truncate: the ramp's ends are rounded outwards to whole frequencies.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def stretch(self, freqs, rope_theta):
        half = len(freqs)

        def index_of(rotations):
            """The (fractional) index of the frequency that turns so many times over the original context."""
            return half * math.log(self.original_max_position_embeddings / (rotations * 2 * math.pi)) / math.log(rope_theta)

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        stretched = np.clip((np.arange(half) - low) / (high - low or 0.001), 0.0, 1.0)
        return stretched * freqs / self.factor + (1 - stretched) * freqs


RopeScaling = LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants that fix what the base computes.

    qkv_bias: q, k and v projections have biases (Qwen2). qk_norm: heads of q and k are normalised before RoPE (Qwen3). windows: of each
    layer, how many positions back a query sees, itself included, 0 for all of them (Mistral, Qwen2); () where every layer sees all.
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
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and not value > 0:
                raise ValueError(f"{field.name} of the model is {value}; it must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise ValueError(f"windows of the model are {self.windows}; give one >= 0 for each of the {self.num_layers} layers")


# ---------------------------------------------------------------------------------------------------------------- RoPE


def rope_frequencies(config):
    """Angular frequencies in radians per position, `[H / 2]`, float64 numpy."""
    half = config.head_dim // 2
    freqs = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    return freqs if config.rope_scaling is None else config.rope_scaling.stretch(freqs, config.rope_theta)


def rope_tables(config, positions):
    """cos and sin of every position's angles, each `[..., H / 2]` float32, for integer positions `[...]`."""
    angles = jnp.einsum("...,h->...h", positions.astype(jnp.float32), jnp.asarray(rope_frequencies(config), jnp.float32))
    magnitude = getattr(config.rope_scaling, "attention_factor", 1.0)
    return magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)


def rotate(x, rope):
    """Rotates heads `x [..., T, heads, H]` by `rope = (cos, sin)`, each `[..., T, H / 2]` (halves paired as the hub's Llama does)."""
    cos, sin = (t[..., None, :] for t in rope)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def rotate_keys(config, k_LBPKH, positions_BP):
    """Rotates the stacked, unrotated keys that `Llama` returns, for use as a prefix at the given positions."""
    cos, sin = rope_tables(config, positions_BP)
    return rotate(k_LBPKH, (cos[None], sin[None]))


# ------------------------------------------------------------------------------------------------------- logical axes

# The axes of the parameters by names that the mesh's rules know (`training.sharding`): (input, output) of each kernel.
PROJECTION_AXES = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}
STORED_ONLY = ("embed", "rank")  # split where parameters are kept, whole where they are used
KV_AXES = ("layers", "batch", None, "kv_heads", None)  # of stacked keys or values, `[L, B, T, K, H]`


def logical_axes(path):
    """The logical axes of the parameter at a path, as ("layers", "self_attn", "q_proj", "kernel"): () where it is never split.

    LoRA's a and b have paths like the kernel that they stand beside.
    """
    name, parent = path[-1] if path else "", path[-2] if len(path) > 1 else ""
    if parent in PROJECTION_AXES:
        d_in, d_out = PROJECTION_AXES[parent]
        return ("layers", *{"kernel": (d_in, d_out), "bias": (d_out,), "a": (d_in, "rank"), "b": ("rank", d_out)}[name])
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
        parts = math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
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
            y = y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)
        if self.has_variable("lora", "a"):
            # Cast first, so that only half the bytes are gathered where the base is bfloat16.
            a, b = (self.get_variable("lora", name).astype(x.dtype) for name in "ab")
            if self.has_rng("dropout") and self.lora_dropout > 0:  # the caller gives this stream in training only
                keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.lora_dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.lora_dropout), 0).astype(x.dtype)
            inner = checkpoint_name(linear(x, gathered(a, (d_in, "rank"))), "lora")
            y = y + linear(inner, gathered(b, ("rank", d_out))) * jnp.asarray(self.lora_scale, x.dtype)
        return checkpoint_name(y, "projection")


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return jnp.einsum("...d,d->...d", x32.astype(x.dtype), scale.astype(x.dtype))


def attention(q_BTNH, k_BTKH, v_BTKH, mask_BTT, prefix=None):
    """Softmax attention over a shared prefix and the sequence itself; softmax in float32.

    mask_BTT: true where a query (second axis) may see a key (third axis); its batch axis may be 1.
    prefix: None or `(k, v, mask)` with k, v `[Bp, P, K, H]` and mask `[Bp, P]`, or `[B, T, P]` where queries see different parts of it.
        Bp divides B: prefix b serves rows b * B/Bp ... (b + 1) * B/Bp - 1, which is how many targets read one memory without copies.
    Returns `[B, T, N * H]`.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q = q_BTNH.reshape(B, T, K, N // K, H) * jnp.asarray(H**-0.5, q_BTNH.dtype)

    def hidden(mask):
        """What is added to scores: so far below them that nothing of them is left where they must not be seen."""
        return jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min / 2)

    scores = jnp.einsum("btkqh,bskh->bkqts", q, k_BTKH, preferred_element_type=jnp.float32)
    scores = scores + jnp.broadcast_to(hidden(mask_BTT)[:, None, None], scores.shape)
    if prefix is not None:
        pk, pv, p_mask = prefix
        Bp, P = pk.shape[:2]
        shared = (Bp, B // Bp)
        p_mask = p_mask[:, None, None, None, None] if p_mask.ndim == 2 else p_mask.reshape(*shared, 1, 1, T, P)
        p_scores = jnp.einsum("bgtkqh,bpkh->bgkqtp", q.reshape(*shared, *q.shape[1:]), pk, preferred_element_type=jnp.float32)
        p_scores = (p_scores + jnp.broadcast_to(hidden(p_mask), p_scores.shape)).reshape(B, K, N // K, T, P)
        scores = jnp.concatenate([p_scores, scores], -1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTKH.dtype)
    if prefix is None:
        out = jnp.einsum("bkqts,bskh->btkqh", weights, v_BTKH)
    else:
        out = jnp.einsum("bkqts,bskh->btkqh", weights[..., P:], v_BTKH)
        p_weights = weights[..., :P].reshape(*shared, K, N // K, T, P)
        out = out + jnp.einsum("bgkqtp,bpkh->bgtkqh", p_weights, pv).reshape(out.shape)
    return out.reshape(B, T, N * H)


class Attention(nn.Module):
    config: ModelConfig
    lora_scale: float
    lora_dropout: float

    @nn.compact
    def __call__(self, x_BTD, rope, mask, prefix):
        c = self.config
        B, T, D = x_BTD.shape

        def project(name, heads):
            y = Projection(heads * c.head_dim, self.lora_scale, self.lora_dropout, c.qkv_bias, name=name)(x_BTD)
            return constrain(y.reshape(B, T, heads, c.head_dim), "batch", None, PROJECTION_AXES[name][1], None)

        q, k, v = project("q_proj", c.num_heads), project("k_proj", c.num_kv_heads), project("v_proj", c.num_kv_heads)
        if c.qk_norm:
            q, k = RMSNorm(c.rms_norm_eps, name="q_norm")(q), RMSNorm(c.rms_norm_eps, name="k_norm")(k)
        with jax.named_scope("attention"):
            out = attention(rotate(q, rope), rotate(k, rope), v, mask, prefix)
        return Projection(D, self.lora_scale, self.lora_dropout, name="o_proj")(out), (k, v)


class MLP(nn.Module):
    config: ModelConfig
    lora_scale: float
    lora_dropout: float

    @nn.compact
    def __call__(self, x):
        def projection(name, features):
            return Projection(features, self.lora_scale, self.lora_dropout, name=name)

        gate = projection("gate_proj", self.config.intermediate_size)(x)
        up = projection("up_proj", self.config.intermediate_size)(x)
        hidden = constrain(jax.nn.silu(gate) * up, "batch", None, "mlp")
        return projection("down_proj", x.shape[-1])(hidden)


class Block(nn.Module):
    config: ModelConfig
    lora_scale: float
    lora_dropout: float
    return_kv: bool

    @nn.compact
    def __call__(self, x, prefix_kv, window, rope, mask, prefix_mask, distances, keep):
        c, lora = self.config, (self.lora_scale, self.lora_dropout)
        # Tied to what changes from block to block, or the mask of every head would be made once, before the scan, and kept through it.
        x, mask, prefix_mask = jax.lax.optimization_barrier((x, mask, prefix_mask))
        if window is not None:
            distance_BTT, prefix_distance_BTP = distances
            mask = mask & (distance_BTT < window)
            if prefix_kv is not None:
                rows = prefix_distance_BTP.shape[0] // prefix_mask.shape[0]
                prefix_mask = jnp.repeat(prefix_mask, rows, axis=0)[:, None] & (prefix_distance_BTP < window)
        prefix = None if prefix_kv is None else (*prefix_kv, prefix_mask)
        h, kv = Attention(c, *lora, name="self_attn")(RMSNorm(c.rms_norm_eps, name="input_layernorm")(x), rope, mask, prefix)
        x = constrain(x + h, "batch", None, None)
        x = x + MLP(c, *lora, name="mlp")(RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x))
        if not self.return_kv:
            kv = None
        elif keep is not None:  # sliced here, inside the scan, so that K/V of all positions of all layers never live at once
            kv = tuple(jnp.take(t, keep, axis=1) for t in kv)
        return constrain(x, "batch", None, None), kv


class Llama(nn.Module):
    """The blocks and the final norm. `embed` and `head_kernel` below are the two ends.

    remat: what the backward pass keeps of each block: "none" recomputes nothing, "dots" keeps matmul outputs, "frozen" those that the
        gradient through frozen weights needs, "full" only block inputs. unroll: how many blocks one turn of the scan holds.
    """

    config: ModelConfig
    lora_scale: float = 1.0
    lora_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(self, x, positions, mask, *, prefix=None, return_kv=False, keep=None):
        """Runs the blocks.

        x: token ids `[B, T]` or embeddings `[B, T, D]`. positions `[B or 1, T]` integers. mask `[B or 1, T, T]`, true where
        query (axis 1) sees key (axis 2), within the layer's window of positions. prefix: None or `(k, v, mask, positions)`, k and v
        `[L, Bp, P, K, H]` with k already rotated (`rotate_keys`), mask and the positions that windows count with `[Bp, P]`; Bp divides B
        (see `attention`). return_kv: also return K/V. keep: `[M]` time indices of the K/V to return, None for all.

        Returns (hidden states after the final norm `[B, T, D]`, None or (k, v) each `[L, B, M or T, K, H]`, k **before** RoPE).
        """
        if jnp.issubdtype(x.dtype, jnp.integer):
            table = self.param("embed", nn.initializers.normal(0.02), (self.config.vocab_size, self.config.hidden_size))
            x = jnp.take(gathered(table, ("vocab", "embed")), x, axis=0)
        x = constrain(x.astype(self.dtype), "batch", None, None)
        block = Block
        if self.remat != "none" or nn.get_logical_axis_rules():
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=self.unroll > 1)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, *[nn.broadcast] * 5),
            out_axes=0,
            length=self.config.num_layers,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.config, self.lora_scale, self.lora_dropout, return_kv, name="layers")
        prefix_kv, prefix_mask, prefix_positions = (None, None, None) if prefix is None else (prefix[:2], *prefix[2:])
        windows, distances = None, None
        if self.config.windows:  # what differs between layers is scanned over, so that they stay one program
            far = jnp.iinfo(jnp.int32).max
            windows = jnp.asarray([w or far for w in self.config.windows], jnp.int32)
            distances = positions[:, :, None] - positions[:, None], None
            if prefix is not None:
                at = jnp.broadcast_to(positions, x.shape[:2])[:, :, None]
                distances = distances[0], at - jnp.repeat(prefix_positions, x.shape[0] // prefix_positions.shape[0], axis=0)[:, None]
        x, kv = layers(x, prefix_kv, windows, rope_tables(self.config, positions), mask, prefix_mask, distances, keep)
        kv = kv and tuple(constrain(t, *KV_AXES) for t in kv)
        return RMSNorm(self.config.rms_norm_eps, name="norm")(x), kv


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


def init_params(key, config):
    """Random float32 parameters: normal(0.02), output projections of each block scaled by 1/sqrt(2 L) (GPT-2's rule)."""
    key, head_key = jax.random.split(key)
    ids = jnp.zeros((1, 2), jnp.int32)
    params = Llama(config).init(key, ids, jnp.arange(2)[None], causal_mask(2))["params"]
    for module, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        params["layers"][module][name]["kernel"] *= (2 * config.num_layers) ** -0.5
    if not config.tie_word_embeddings:
        params["lm_head"] = 0.02 * jax.random.normal(head_key, (config.hidden_size, config.vocab_size))
    return params


def param_shapes(config):
    """The tree of `jax.ShapeDtypeStruct` that `init_params` would make, without making it."""
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config))
