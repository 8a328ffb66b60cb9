"""The decoder-only Llama family in linen: Llama, Mistral, Qwen, Gemma, OLMo 2, Phi-3, Granite, ….

RMSNorm, rotary positions, grouped-query attention, gated MLPs. What a member computes differently
is a field of `ModelConfig`; which member has which is said in `models.families`.

One letter per dimension, in names and comments throughout the package: B batch, G targets per
memory, T decoder time, S source time, P prefix, M memory, D model width, N query heads, K key/value
heads, Q queries per key/value head (N / K), H head size, F feed-forward, V vocabulary, L layers, R
LoRA rank (of RoPE: the rotated numbers of a head), U labels.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from icae_jax.errors import UserError
from icae_jax.models import axes, rope
from icae_jax.models.axes import constrain, gathered
from icae_jax.models.blocks import ACTIVATIONS, Block, frozen, norm, prefix_parts
from icae_jax.models.pytree import pytree, static
from icae_jax.models.quantize import linear, linear_transposed, take_rows

Params = dict[str, Any]  # the tree of a base's parameters
KeysValues = tuple[Float[Array, "L B T K H"], Float[Array, "L B T K H"]]  # keys before RoPE


def _all_but_weights(prim, *_, **__):
    """Saves all residuals except weights.

    Saving the per-layer slices, and what is gathered of them, would hold a second copy of the base.
    """
    return prim.name not in ("sharding_constraint", "dynamic_slice", "squeeze")


# What the backward pass finds saved of a block's forward pass.
REMAT_POLICIES = {
    "none": _all_but_weights,  # everything
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # all matmuls but attention's
    # The matmul and attention outputs that gradients need while weights are frozen: no matmul runs
    # twice.
    "frozen": jax.checkpoint_policies.save_only_these_names("projection", "lora", "attention"),
    "full": jax.checkpoint_policies.nothing_saveable,  # the block's input only
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants that determine what a base computes.

    qkv_bias: q, k and v projections have biases (Qwen2). o_bias, mlp_bias: so does attention's
    output projection, and so do the three projections of the MLP (Llama, by its config.json).
    qk_norm: heads of q and k are normalised before RoPE (Qwen3, Gemma 3). windows: for each layer,
    how many positions back a query sees, itself included, 0 for no limit (Mistral, Qwen2, Gemma);
    () if no layer has a limit.

    qk_projection_norm: q and k are normalised as a whole, all heads together (OLMo 2). norms: where
    attention and MLP have a norm, "before", "after" (OLMo 2) or "both" (Gemma). norm_plus_one:
    norms multiply by 1 + their scale (Gemma). activation: of the MLP, "silu" or "gelu_tanh"
    (Gemma). embedding_multiplier: of looked-up embeddings (Gemma: the root of D; Granite).
    residual_multiplier: of what attention and MLP add (Granite). attention_scale: what products of
    queries and keys are multiplied by, None for H^-1/2 (Gemma, Granite). attention_softcap,
    final_softcap: c of c tanh(x / c), of attention's scores and of logits, None for none (Gemma 2).
    logits_divisor: of logits (Granite). rotary_dim: how many numbers of a head RoPE rotates, None
    for all (Phi-3). ropes: the kind of RoPE of each layer (`rope.KINDS`), () if all have the
    model's. local_rope_theta: of kind "local", unstretched (Gemma 3).

    fused: the hub's checkpoints hold q, k and v as one tensor, gate and up as another (Phi-3). It
    changes names of tensors only.
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
    qk_projection_norm: bool = False
    norms: str = "before"
    norm_plus_one: bool = False
    activation: str = "silu"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    logits_divisor: float = 1.0
    rotary_dim: int | None = None
    ropes: tuple[str, ...] = ()
    local_rope_theta: float | None = None
    fused: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numeric = field.type in (int, float) or (
                field.type in (int | None, float | None) and value is not None
            )
            if numeric and not 0 < value < math.inf:
                raise UserError(f"{field.name} of the model is {value}; it must be positive")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if self.rotary_dim and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise UserError(
                f"RoPE rotates {self.rotary_dim} numbers of a head of {self.head_dim}; it needs an "
                "even number of them"
            )
        choices = {"norms": ("before", "after", "both"), "activation": tuple(ACTIVATIONS)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} of the model is {getattr(self, name)!r}; choose from "
                    f"{', '.join(known)}"
                )
        if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise UserError(
                f"windows of the model are {self.windows}; give one >= 0 for each of the "
                f"{self.num_layers} layers"
            )
        if self.ropes and (
            len(self.ropes) != self.num_layers or not set(self.ropes) <= set(rope.KINDS)
        ):
            raise UserError(
                f"ropes of the model are {self.ropes}; give one of {', '.join(rope.KINDS)} for "
                f"each of the {self.num_layers} layers"
            )
        if rope.LOCAL in self.ropes and self.local_rope_theta is None:
            raise UserError("local_rope_theta of the model is missing; layers have a local RoPE")

    def first_layers(self, count: int) -> "ModelConfig":
        """The same with its first layers only."""
        by_layer = {name: getattr(self, name)[:count] for name in ("windows", "ropes")}
        return dataclasses.replace(self, num_layers=count, **by_layer)

    @property
    def biased(self) -> tuple[str, ...]:
        """The projections that have biases."""
        groups = (
            (self.qkv_bias, ("q_proj", "k_proj", "v_proj")),
            (self.o_bias, ("o_proj",)),
            (self.mlp_bias, ("gate_proj", "up_proj", "down_proj")),
        )
        return tuple(name for has_bias, names in groups if has_bias for name in names)


class Llama(nn.Module):
    """The blocks and the final norm. `embed` and `head` are the two ends.

    remat: what the backward pass recomputes of each block: "none" nothing, "frozen" no matmul,
        "dots" attention, "full" everything but the block's input. The last block is not
        rematerialised when `at` selects positions.
    unroll: blocks per iteration of the scan; if more than one, attention has no loops either.
    attention: its implementation, see `models.attention`.
    stop: how many of the blocks run, the first ones, without the final norm; None: all, with it.
        LoRA, prefix and K/V are then of these layers.
    """

    config: ModelConfig
    lora_scale: float = 1.0
    lora_dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    unroll: int = 1
    attention: str = "xla"
    stop: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Shaped[Any, "B T ..."],
        positions: Any,
        mask: Any,
        *,
        prefix: Any = None,
        at: Any = None,
        return_kv: bool = False,
        rotated: bool = False,
        keep: Any = None,
    ) -> tuple[Any, Any]:
        """Runs the blocks.

        Parameters of the layers are stacked, and the blocks scanned; or they are a tuple of trees,
        one for each layer (`layers_apart`), and the blocks are written out.

        Args:
          x: token ids `[B, T]`, or what the first block reads, `[B, T, D]`: embeddings as `embed`
            gives them, multiplied, or memory, which is never multiplied.
          positions: `[B or 1, T]` integers.
          mask: bool. `[B or 1, T]`: real tokens; each token sees the real ones up to itself. Or `[B
            or 1, T or 1, T]`: whether a query (axis 1; 1: all alike) sees a key (axis 2). Both
            within the layer's window of positions.
          prefix: None, or what is seen before the sequence: a `blocks.PrefixPart`, or its fields k,
            v, mask and positions, or a list of parts.
          at: token indices to return, `[U]` or `[B, U]`, None for all; elsewhere the last block
            computes only K/V.
          return_kv: also return K/V.
          rotated: whether K is returned behind RoPE.
          keep: token indices `[M]` of the K/V to return, None for all.

        Returns:
          Hidden states after the final norm, if all blocks run, `[B, U or T, D]`, and None or (k,
          v), each `[L, B, M or T, K, H]`, or a tuple of L arrays where the layers are apart; k
          **before** RoPE unless `rotated`.
        """
        c = self.config
        if jnp.issubdtype(x.dtype, jnp.integer):
            shape = (c.vocab_size, c.hidden_size)
            table = frozen(self, "embed", nn.initializers.normal(0.02), shape)
            x = embed({"embed": table}, c, x, self.dtype)
        x = constrain(x.astype(self.dtype), "batch", None, None)
        block = functools.partial(
            Block,
            c,
            self.lora_scale,
            self.lora_dropout,
            self.attention,
            self.unroll > 1,
            return_kv,
            rotated,
        )
        tables = [rope.tables(c, positions, kind) for kind in rope.kinds(c)]
        shared = positions, mask
        if self.is_initializing():  # makes the parameters, those of all layers in one array each
            stacked = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast,) * 5,
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = stacked(*block.args, name="layers")(x, [], None, tables[0], *shared)
            return norm(c, "norm")(x), None

        # What differs between layers is scanned over, so that all layers are one program.
        params, adapters = (
            self.variables.get(kind, {}).get("layers") for kind in ("params", "lora")
        )
        windows = kinds = keys = None
        if len(tables) > 1:
            tables = [tuple(map(jnp.stack, zip(*tables, strict=True)))]
            kinds = jnp.asarray(rope.layer_kinds(c), jnp.int32)
        if c.windows:
            unlimited = jnp.iinfo(jnp.int32).max
            windows = jnp.asarray([w or unlimited for w in c.windows], jnp.int32)
        if self.has_rng("dropout"):
            keys = jax.random.split(self.make_rng("dropout"), c.num_layers)
        parts = prefix_parts(prefix)
        scanned = adapters, [(part.k, part.v) for part in parts], windows, kinds, keys
        layers = self.stop or c.num_layers
        apart = isinstance(params, tuple)
        # If not all layers run, or the last is a program of its own, slicing off the frozen
        # parameters would copy the others: then each layer slices its own.
        uniform = at is None and layers == c.num_layers
        count = layers if at is None else layers - 1

        def layer(x, xs, at=None):
            layer_params, (layer_adapters, prefix_kv, window, kind, key) = xs
            if not (uniform or apart):
                layer_params = jax.tree.map(
                    lambda w: jax.lax.dynamic_index_in_dim(w, layer_params, keepdims=False), params
                )
            variables = {"params": layer_params}
            if layer_adapters is not None:
                variables["lora"] = layer_adapters
            layer_prefix = [
                part.replace(k=k, v=v) for part, (k, v) in zip(parts, prefix_kv, strict=True)
            ]
            rngs = None if key is None else {"dropout": key}
            cos_sin = tables[0]
            if kind is not None:
                cos_sin = tuple(
                    jax.lax.dynamic_index_in_dim(t, kind, keepdims=False) for t in cos_sin
                )
            return block(parent=None).apply(
                variables, x, layer_prefix, window, cos_sin, *shared, at, keep, rngs=rngs
            )

        def checkpointed(policy, function, **options):
            return jax.checkpoint(function, policy=REMAT_POLICIES[policy], **options)

        if apart:
            each = []
            for i in range(layers):
                lora = adapters and adapters[i]
                others = (t if t is None else t[i] for t in (windows, kinds, keys))
                xs = params[i], (lora, [(part.k[i], part.v[i]) for part in parts], *others)
                x, kv = layer(x, xs, at if i == layers - 1 else None)
                each.append(kv)
            x = x if self.stop else norm(c, "norm")(x)
            return x, tuple(zip(*each, strict=True)) if return_kv else None

        body = layer
        if self.remat != "none" or not uniform or axes.active():
            body = checkpointed(self.remat, layer, prevent_cse=self.unroll > 1)
        xs = (
            params if uniform else jnp.arange(count),
            jax.tree.map(lambda t: t[:count], scanned),
        )
        x, kv = jax.lax.scan(body, x, xs, unroll=max(1, min(self.unroll, count)))
        if at is not None:  # never rematerialised: the backward pass begins with this layer
            last = jax.tree.map(lambda t: t[count], scanned)
            x, last_kv = checkpointed("none", functools.partial(layer, at=at))(
                x, (jnp.asarray(count), last)
            )
            kv = kv and tuple(
                jnp.concatenate([t, end[None]]) for t, end in zip(kv, last_kv, strict=True)
            )
        kv = kv and tuple(constrain(t, *axes.KV_AXES) for t in kv)
        return x if self.stop else norm(c, "norm")(x), kv


# ------------------------------------------------------------------------------------- the two ends


def embed(
    params: Params, config: ModelConfig, ids: Int[Any, "..."], dtype: DTypeLike
) -> Float[Array, "... D"]:
    """What the first block reads of token ids: rows of the table, times the model's multiplier.

    dtype: of the result; the multiplier is rounded to it, as in transformers.
    """
    x = take_rows(gathered(params["embed"], ("vocab", "embed")), ids).astype(dtype)
    multiplier = config.embedding_multiplier
    return x if multiplier == 1 else x * jnp.asarray(multiplier, dtype)


@pytree
class Head:
    """The output matrix: `[D, V]`, or the embedding table `[V, D]` where the two are tied.

    divisor, softcap: of the products, before they are logits; see `ModelConfig`.
    """

    weight: Any
    tied: bool = static()
    divisor: float = static(default=1.0)
    softcap: float | None = static(default=None)

    def logits(self, hidden: Float[Any, "... D"]) -> Float[Array, "... V"]:
        """Logits in float32."""
        multiply = linear_transposed if self.tied else linear
        logits = multiply(hidden, self.weight, jnp.float32)
        logits = logits if self.divisor == 1 else logits / self.divisor
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def backward(
        self, d_logits: Float[Any, "... V"], logits: Float[Any, "... V"], dtype: DTypeLike
    ) -> Float[Array, "... D"]:
        """The gradient of the hidden states from that of the logits.

        logits: what `logits` returned. dtype: of the result, and of the matmul.
        """
        if self.softcap is not None:
            d_logits = d_logits * (1 - jnp.square(logits / self.softcap))
        d_logits = d_logits if self.divisor == 1 else d_logits / self.divisor
        multiply = linear if self.tied else linear_transposed
        return multiply(d_logits.astype(dtype), self.weight)


def head(params: Params, config: ModelConfig) -> Head:
    """The head of a model's parameters."""
    how = {"divisor": config.logits_divisor, "softcap": config.final_softcap}
    if "lm_head" in params:
        return Head(gathered(params["lm_head"], ("embed", "vocab")), tied=False, **how)
    return Head(gathered(params["embed"], ("vocab", "embed")), tied=True, **how)


@pytree
class FrozenModel:
    """A frozen base as one value: the module, which is static, and its parameters."""

    module: Llama = static()
    params: Params

    @property
    def config(self) -> ModelConfig:
        """The base's sizes."""
        return self.module.config

    @property
    def dtype(self) -> Any:
        """The dtype of activations."""
        return self.module.dtype

    @property
    def head(self) -> Head:
        """The output matrix."""
        return head(self.params, self.config)

    def first_layers(self, count: int) -> "FrozenModel":
        """The same, stopped behind so many layers, without the final norm."""
        return FrozenModel(self.module.clone(stop=count), self.params)

    def layers_apart(self) -> "FrozenModel":
        """The same, with the parameters of each layer in arrays of their own.

        XLA's CPU backend copies a layer's weights out of the stack before it multiplies with them,
        which takes half the time of a decoding step. On CPUs the arrays share the stack's memory.
        """
        layers = layers_apart(self.params["layers"], self.config.num_layers)
        return FrozenModel(self.module, {**self.params, "layers": layers})

    def embed(self, ids: Int[Any, "..."]) -> Float[Array, "... D"]:
        """What the first block reads of token ids, in the dtype of activations."""
        return embed(self.params, self.config, ids, self.dtype)

    def __call__(
        self,
        x: Any,
        positions: Any,
        mask: Any,
        *,
        lora: Any = None,
        dropout_key: jax.Array | None = None,
        **how,
    ) -> tuple[Any, Any]:
        """Runs `Llama` with its arguments, through a LoRA tree if one is given.

        dropout_key: for LoRA's dropout, in training only.
        """
        variables = {"params": self.params} | ({} if lora is None else {"lora": lora})
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return self.module.apply(variables, x, positions, mask, rngs=rngs, **how)


def layers_apart(stacked: Params, count: int) -> tuple[Params, ...]:
    """The trees of `count` layers of a tree of stacked arrays."""
    return tuple(jax.tree.map(lambda x, i=i: _of_layer(x, i), stacked) for i in range(count))


def _of_layer(x, i):
    """A layer's part of a stacked array, in the same memory where that is the host's."""
    if isinstance(x, jax.Array) and x.is_fully_addressable and x.platform() == "cpu":
        device = x.sharding if x.committed else None
        return jax.device_put(np.asarray(x)[i], device, may_alias=True)
    return x[i]


# --------------------------------------------------------------------------------------- parameters


def causal_mask(length: int) -> Bool[Array, "1 T T"]:
    """True on and below the diagonal."""
    return jnp.tril(jnp.ones((1, length, length), bool))


# Jitted as one program; eagerly, every array's shape would be one.
@functools.partial(jax.jit, static_argnames="config")
def init_params(key: Array, config: ModelConfig) -> Params:
    """Random float32 parameters: normal(0.02), output projections scaled by 1/sqrt(2 L) (GPT-2)."""
    key, head_key = jax.random.split(key)
    ids = jnp.zeros((1, 2), jnp.int32)
    # Also under a mesh they are made on one device, for the caller to place.
    with nn.logical_axis_rules(axes.UNCONSTRAINED):
        params = Llama(config).init(key, ids, jnp.arange(2)[None], causal_mask(2))["params"]
    for module, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        params["layers"][module][name]["kernel"] *= (2 * config.num_layers) ** -0.5
    if not config.tie_word_embeddings:
        shape = (config.hidden_size, config.vocab_size)
        params["lm_head"] = 0.02 * jax.random.normal(head_key, shape)
    return params


def param_shapes(config: ModelConfig) -> Params:
    """The tree of `jax.ShapeDtypeStruct` that `init_params` would make."""
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config))
