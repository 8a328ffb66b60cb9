"""Softmax attention over a shared prefix and the sequence itself, in three equal implementations.

    xla       plain XLA (`models.plain_attention`); any device, any mask
    cudnn     cuDNN's flash attention through `jax.nn.dot_product_attention`; NVIDIA GPUs, 16-bit
              dtypes, any mask
    splash    the flash attention of `jax.experimental.pallas.ops.tpu`; TPUs, causal and full masks
              with padding

All compute scores and softmax in float32, and none keeps scores for the backward pass: memory grows
with T + S, not T x S (flash attention, arXiv 2205.14135). xla materialises one chunk's scores at a
time; the kernels keep theirs on the chip. Letters: see `models.llama`; here there are S keys behind
P keys of a prefix, and T queries at some of the S times.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from icae_jax.errors import UserError
from icae_jax.models import axes, plain_attention

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
# Beside a mask, cuDNN needs even numbers of queries and keys; 64 also aligns the mask's rows.
CUDNN_MULTIPLE = 64
LANES = 128  # splash takes lengths in multiples of this
# Splash's block sizes, of queries and of keys: each block costs a start, and its float32 scores
# (1.6 MB for 640) lie in VMEM.
BLOCKS = (640, 512, 384)
# Up to this many blocks of keys, one kernel makes all gradients: it writes q's once per block.
MOST_FUSED = 4


def attend(
    q_BTNH: Float[Any, "B T N H"],
    k_BSKH: Float[Any, "B S K H"],
    v_BSKH: Float[Any, "B S K H"],
    mask: Any,
    prefix: Any = None,
    *,
    at: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str = "xla",
    unroll: bool = False,
) -> Float[Array, "B T NH"]:
    """Attention of T queries over a shared prefix of P keys and their own sequence of S keys.

    Args:
      q_BTNH: queries, rotated.
      k_BSKH: keys, rotated.
      v_BSKH: values.
      mask: bool. `[B or 1, S]`, which keys are real: a query at time t sees the real ones up to t.
        Or `[B or 1, T or 1, S]`, what each query sees.
      prefix: None or `(k, v, mask)` with k, v `[Bp, P, K, H]`, k rotated, and mask `[Bp, P]`, or
        `[B, T, P]` if queries see different parts of it. Bp divides B: prefix b serves rows
        b * B/Bp ... (b + 1) * B/Bp - 1, which is how many targets read one memory. Or a list of
        them, all seen: their numbers of rows are B, or one other.
      at: the queries' times, `[T]` or each row's own `[B, T]`; None for all of T = S. Only a 2-D
        mask needs it.
      scale: what scores are multiplied by, None for H^-1/2.
      softcap: None, or c: scaled scores s become c tanh(s / c) (Gemma 2, arXiv 2408.00118), by xla
        only.
      implementation: see the module, and `supported` for which can be had. The flash kernels repeat
        the prefix for each row. Splash needs 2-D masks or, without a prefix, `[B or 1, 1, S]`; a
        query that is itself padding gets something finite, and gives no gradient to real tokens.
        Queries whose times are not a numpy
        array that rises by one, and so known when tracing, are computed by xla.
      unroll: whether xla writes its loop over texts out, so that XLA counts the FLOPs of all.

    Under a mesh's rules, the flash kernels run on each device's rows and heads.

    Returns:
      `[B, T, N * H]`. UserError if the mask, the mesh or the name is not for this implementation.
    """
    B, T, N, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    _check(implementation)
    if softcap and implementation != "xla":
        raise UserError(f"attention {implementation} has no soft cap; choose xla")
    scale = H**-0.5 if scale is None else scale
    if mask.ndim == 2 and (S if at is None else at.shape[-1]) != T:
        raise ValueError(
            f"{T} queries of {S} keys, and at is {at if at is None else at.shape}; give the time "
            "of every query"
        )
    qkv = q_BTNH, k_BSKH, v_BSKH
    prefix = _one_prefix(prefix, B) if implementation != "xla" else prefix
    if implementation == "splash":
        if _is_full(mask) and prefix is None:
            # Rows without a real token see their padding: the kernel needs something.
            real = mask[:, 0] | ~mask[:, 0].any(1, keepdims=True)
            return _splash(*qkv, real, None, None, scale).reshape(B, T, N * H)
        if mask.ndim != 2 or (prefix is not None and prefix[2].ndim != 2):
            raise UserError(
                "attention splash: the mask says for each query what it sees, and splash is "
                "causal or full; choose xla or cudnn"
            )
        first = 0 if at is None else _first(at)
        if first is not None:
            return _splash(*qkv, mask, prefix, first, scale).reshape(B, T, N * H)
    if implementation == "cudnn":
        mask = seen(mask, at) if mask.ndim == 2 else mask
        return _cudnn(*qkv, mask, prefix, scale).reshape(B, T, N * H)
    chunk = plain_attention.CHUNK
    ends = [S] * -(-T // chunk)
    if mask.ndim == 2:
        # Times that are known when tracing bound the keys that a chunk of queries sees.
        if at is None or (isinstance(at, np.ndarray) and at.ndim == 1):
            times = np.arange(S) if at is None else at
            ends = [int(times[start : start + chunk].max()) + 1 for start in range(0, T, chunk)]
        mask = seen(mask, at)
    scores = plain_attention.Scores(scale, softcap)
    out = plain_attention.attend(*qkv, mask, prefix, tuple(ends), unroll, scores)
    return out.reshape(B, T, N * H)


def _is_full(mask):
    """Whether all queries see the same keys."""
    return mask.ndim == 3 and mask.shape[1] == 1


def _check(implementation):
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"attention is {implementation!r}; choose from {', '.join(IMPLEMENTATIONS)}"
        )


def seen(real_BS: Bool[Any, "_ S"], at: Any = None) -> Bool[Array, "_ T S"]:
    """The keys that queries at the times `at` see: the real ones up to themselves; see `attend`."""
    S = real_BS.shape[1]
    times = jnp.arange(S)[None] if at is None else jnp.asarray(at).reshape(-1, at.shape[-1])
    return real_BS[:, None] & (jnp.arange(S)[None, None] <= times[:, :, None])


def usable(implementation: str, mask: Any, prefix: Any = None) -> str:
    """The implementation that computes a call with such a mask and prefix, see `attend`.

    Splash knows causal masks, and full ones without a prefix. In the last layer of targets, queries
    are labels at times that are known only when the program runs; their 3-D mask is computed by
    xla.
    """
    unknown = mask.ndim == 3 and not (_is_full(mask) and not prefix)
    return "xla" if implementation == "splash" and unknown else implementation


def supported(
    implementation: str,
    platform: str,
    *,
    dtype: DTypeLike,
    head_dim: int,
    heads: int = 1,
    kv_heads: int = 1,
    windows: bool = False,
    softcap: bool = False,
    tensor: int = 1,
    mask: str = "causal",
) -> str | None:
    """Why an implementation cannot compute such a model's attention, None if it can.

    platform: a device's, "cpu", "gpu" or "tpu". windows: whether layers see only a window.
    softcap: whether scores are capped. tensor: devices that heads are split over. mask: "causal",
    "all" (each token sees all real ones), or another. UserError for an unknown implementation.
    """
    _check(implementation)
    if implementation == "xla":
        return None
    needs, dtypes = {
        "cudnn": ("gpu", (jnp.bfloat16, jnp.float16)),
        "splash": ("tpu", (jnp.bfloat16, jnp.float32)),
    }[implementation]
    if {"cuda": "gpu"}.get(platform, platform) != needs:
        return f"{implementation} needs a {needs}; the device is a {platform}"
    if jnp.dtype(dtype) not in map(jnp.dtype, dtypes):
        names = " or ".join(jnp.dtype(d).name for d in dtypes)
        return f"{implementation} computes in {names}; the dtype is {jnp.dtype(dtype).name}"
    if implementation == "cudnn" and (head_dim % 8 or head_dim > 256):
        return f"cudnn needs a head_dim that is a multiple of 8, up to 256; it is {head_dim}"
    if softcap:
        return f"{implementation} has no soft cap here; this model caps its attention's scores"
    if implementation == "splash" and windows:
        return "splash has one causal mask for all layers; this model's layers see windows"
    if implementation == "splash" and mask not in ("causal", "all"):
        return f"splash has causal masks and full ones; the encoder's mask is {mask}"
    if heads % tensor == 0 and kv_heads % tensor:
        return (
            f"{heads} query heads are split over {tensor} devices, {kv_heads} key/value heads "
            "cannot be"
        )
    return None


# --------------------------------------------------------------------------- what both kernels need


def _one_prefix(prefix, rows):
    """A list of prefixes as one, or None; see `attend`."""
    if not isinstance(prefix, list) or len(prefix) < 2:
        return prefix[0] if isinstance(prefix, list) and prefix else prefix or None

    def joined(arrays, axis):
        copies = [jnp.repeat(x, rows // len(x), axis=0) for x in arrays]
        return jnp.concatenate(copies, axis)

    ks, vs, masks = zip(*prefix, strict=True)
    if any(mask.ndim == 3 for mask in masks):
        masks = [mask[:, None] if mask.ndim == 2 else mask for mask in masks]
        most = max(mask.shape[1] for mask in masks)
        masks = [jnp.broadcast_to(m, (len(m), most, m.shape[2])) for m in masks]
    return joined(ks, 1), joined(vs, 1), joined(masks, -1)


def _joined(k, v, prefix, dtype, rows):
    """Keys and values of prefix and sequence joined, with `rows` rows, in the queries' dtype."""
    k, v = k.astype(dtype), v.astype(dtype)
    if prefix is None:
        return k, v

    def join(prefix, x):
        copies = jnp.repeat(prefix, rows // prefix.shape[0], axis=0)
        return jnp.concatenate([copies.astype(dtype), x], 1)

    return join(prefix[0], k), join(prefix[1], v)


def _padded(x, axis, length):
    """`x` padded along an axis to a length with zeros (False)."""
    return jnp.pad(x, [(0, length - n if i == axis % x.ndim else 0) for i, n in enumerate(x.shape)])


def _on_devices(kernel, q_BTNH, k_BSKH, v_BSKH, *masks):
    """`kernel(q, k, v, *masks)`, on a mesh by each device with its rows and heads.

    The compiler cannot split a kernel. masks: `[B or 1, …]` each. A dimension that its mesh axes do
    not divide stays whole, and each device computes all of it.
    """
    if not axes.active():
        return kernel(q_BTNH, k_BSKH, v_BSKH, *masks)
    B, N, K = q_BTNH.shape[0], q_BTNH.shape[2], k_BSKH.shape[2]
    (rows, _), (heads, parts), (kv_heads, _) = (
        axes.split(name, n) for name, n in (("batch", B), ("heads", N), ("kv_heads", K))
    )
    if heads != kv_heads:
        raise UserError(
            f"attention: {N} query heads are split over {parts} devices, {K} key/value heads are "
            "not; choose xla"
        )
    of_heads = PartitionSpec(rows, None, heads, None)
    of_masks = tuple(PartitionSpec(rows if mask.shape[0] == B else None) for mask in masks)
    # check_vma=False: neither kernel declares which of its results differ between devices.
    on_each = jax.shard_map(
        kernel, in_specs=(of_heads,) * 3 + of_masks, out_specs=of_heads, check_vma=False
    )
    return on_each(q_BTNH, k_BSKH, v_BSKH, *masks)


# -------------------------------------------------------------------------------------------- cuDNN


def _cudnn(q_BTNH, k_BSKH, v_BSKH, mask_BTS, prefix, scale, inner="cudnn"):
    """As `attend`, `[B, T, N, H]`, with lengths padded to multiples of 64.

    inner: the implementation of `jax.nn.dot_product_attention`.
    """
    B, T = q_BTNH.shape[:2]
    k, v = _joined(k_BSKH, v_BSKH, prefix, q_BTNH.dtype, B)
    masks = [mask_BTS]
    if prefix is not None:
        p_mask = prefix[2]
        if p_mask.ndim == 2:
            p_mask = jnp.repeat(p_mask, B // p_mask.shape[0], axis=0)[:, None]
        masks = [p_mask, mask_BTS]
    mask_BTS = jnp.concatenate([jnp.broadcast_to(m, (B, T, m.shape[2])) for m in masks], 2)
    to, key_to = (-(-n // CUDNN_MULTIPLE) * CUDNN_MULTIPLE for n in (T, k.shape[1]))
    mask = _padded(_padded(mask_BTS, 1, to), 2, key_to)[:, None]

    def kernel(q, k, v, mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation=inner)

    return _on_devices(
        kernel, _padded(q_BTNH, 1, to), _padded(k, 1, key_to), _padded(v, 1, key_to), mask
    )[:, :T]


# ------------------------------------------------------------------------------------------- splash


def _first(at):
    """The first of times that rise by one and are known when tracing, None for others."""
    known = isinstance(at, np.ndarray) and at.ndim == 1 and at.size
    return int(at[0]) if known and (np.diff(at) == 1).all() else None


def _blocks(length):
    """(padded length, block size): a single block if enough, or the size that pads least."""
    whole = -(-length // LANES) * LANES
    if whole <= BLOCKS[0]:
        return whole, whole
    padded = [(-(-length // block) * block, block) for block in BLOCKS]
    return min(padded, key=lambda choice: choice[0])


def _splash(q_BTNH, k_BSKH, v_BSKH, real_BS, prefix, first, scale):
    """As `attend`, `[B, T, N, H]`, with queries at the times from `first` on; None: all see all.

    Under a causal mask, real tokens and padding are two segments that see only themselves, so that
    every query sees at least itself, as the kernel needs. The residuals are named "attention", by
    which rematerialisation saves them (`jax.checkpoint_policies.save_only_these_names`).
    """
    B, T = q_BTNH.shape[:2]
    k, v = _joined(k_BSKH, v_BSKH, prefix, q_BTNH.dtype, B)
    before = k.shape[1] - k_BSKH.shape[1]
    real = jnp.broadcast_to(real_BS, (B, real_BS.shape[1]))
    real_queries = jnp.ones((B, T), bool) if first is None else real[:, first : first + T]
    if prefix is not None:
        real = jnp.concatenate([jnp.repeat(prefix[2], B // prefix[2].shape[0], axis=0), real], 1)
    (to, block), (key_to, key_block) = _blocks(T), _blocks(k.shape[1])
    fused = key_to <= MOST_FUSED * key_block
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=key_block,
        block_q_dkv=block,
        block_kv_dkv=key_block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else key_block,
        use_fused_bwd_kernel=fused,
    )

    def kernel(q, k, v, query_segments, segments):
        if first is None:
            mask = splash_attention_mask.FullMask((to, key_to))
        else:
            mask = splash_attention_mask.CausalMask((to, key_to), offset=before + first)
        of_row = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * q.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name="attention",
        )
        ids = splash_attention_kernel.SegmentIds(query_segments, segments)
        return jax.vmap(of_row)(*(x.swapaxes(1, 2) for x in (q, k, v)), ids).swapaxes(1, 2)

    q = _padded(q_BTNH * jnp.asarray(scale, q_BTNH.dtype), 1, to)
    ids = [_padded(x, 1, n).astype(jnp.int32) for x, n in ((real_queries, to), (real, key_to))]
    return _on_devices(kernel, q, _padded(k, 1, key_to), _padded(v, 1, key_to), *ids)[:, :T]


# --------------------------------------------------------------------------------- which is fastest


class Choice(NamedTuple):
    """The fastest implementation.

    seconds: of each that was measured. refused: why each of the others was not.
    """

    implementation: str
    seconds: dict[str, float]
    refused: dict[str, str]


def _seconds(step, arguments, repeats=5):
    """Median seconds of a call, without its compilation."""
    jax.block_until_ready(step(*arguments))
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def fastest(
    *,
    rows: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
    windows: bool = False,
    softcap: bool = False,
    mask: str = "causal",
    device: Any = None,
    seconds: Callable[..., float] = _seconds,
) -> Choice:
    """Times the forward and backward pass of one layer on a device, by default the first.

    rows, heads, kv_heads: of one device. windows, softcap, mask: as for `supported`. seconds: times
    a jitted function on its arguments. A single candidate is not timed. One that the backend
    refuses is left out; xla is chosen if it refuses all. Call it where no mesh is active. Processes
    may measure different winners: all must take one's.
    """
    device = device or jax.local_devices()[0]
    sizes = {
        "dtype": dtype,
        "head_dim": head_dim,
        "heads": heads,
        "kv_heads": kv_heads,
        "windows": windows,
        "softcap": softcap,
        "mask": mask,
    }
    why_not = {name: supported(name, device.platform, **sizes) for name in IMPLEMENTATIONS}
    refused = {name: why for name, why in why_not.items() if why}
    names = [name for name in IMPLEMENTATIONS if name not in refused]
    if len(names) == 1:
        return Choice(names[0], {}, refused)
    measured = {}
    with jax.default_device(device):
        q, k, v = (
            jax.random.normal(key, (rows, length, n, head_dim), dtype)
            for key, n in zip(
                jax.random.split(jax.random.key(0), 3), (heads, kv_heads, kv_heads), strict=True
            )
        )
        sees = jnp.ones((1, length), bool)  # causal
        if windows or mask not in ("causal", "all"):
            sees = jnp.tril(jnp.ones((1, length, length), bool))
        elif mask == "all":
            sees = sees[:, None]
        for name in names:

            def loss(q, k, v, name=name):
                out = attend(q, k, v, sees, implementation=name)
                return jnp.sum(jnp.square(out.astype(jnp.float32)))

            try:
                measured[name] = seconds(jax.jit(jax.grad(loss, (0, 1, 2))), (q, k, v))
            # JaxRuntimeError and NotImplementedError are RuntimeErrors.
            except (RuntimeError, ValueError) as error:
                refused[name] = (str(error).strip().splitlines() or [repr(error)])[0]
    return Choice(min(measured, key=measured.get, default="xla"), measured, refused)
