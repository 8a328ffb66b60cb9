"""Softmax attention over a shared prefix and the sequence itself, in three implementations that compute the same.

    xla       plain: chunks of queries, one after another, each with the scores of the keys it may see; runs anywhere, with any mask
    cudnn     cuDNN's flash attention through `jax.nn.dot_product_attention`; NVIDIA GPUs, 16-bit dtypes, any mask
    splash    the flash attention of `jax.experimental.pallas.ops.tpu`; TPUs, causal masks with padding alone

Scores and softmax are float32 in all, and none keeps them for the backward pass: their memory grows with T + S, not T x S (flash
attention, arXiv 2205.14135). Plain, a chunk's scores are an array in memory; the kernels never let theirs leave the chip.
Letters: see `models.llama`; here S keys stand behind P keys of a prefix, and T queries stand at some of the S times.
"""

import functools
import math
import statistics
import time
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
CHUNK = 128  # plain attention's queries at a time: long enough for matmuls, short enough that a CPU's cache holds their scores
CUDNN_MULTIPLE = 64  # beside a mask, cuDNN needs even numbers of queries and of keys; 64 also aligns the mask's rows
LANES = 128  # splash takes lengths in multiples of this
BLOCKS = (640, 512, 384)  # splash's, of queries and of keys: each costs a start, and its float32 scores (1.6 MB for 640) lie in VMEM
MOST_FUSED = 4  # blocks of keys up to which one kernel makes all gradients: it writes q's once a block


def attend(q_BTNH, k_BSKH, v_BSKH, mask, prefix=None, *, at=None, implementation="xla"):
    """Attention of T queries over a shared prefix of P keys and their own sequence of S keys; softmax in float32.

    mask: bool. `[B or 1, S]`, which keys are real: a query at time t sees the real ones up to t. Or `[B or 1, T, S]`, what each query sees.
    prefix: None or `(k, v, mask)` with k, v `[Bp, P, K, H]`, k rotated, and mask `[Bp, P]`, or `[B, T, P]` where queries see different
        parts of it. Bp divides B: prefix b serves rows b * B/Bp ... (b + 1) * B/Bp - 1, which is how many targets read one memory.
    at: the queries' times, `[T]` or each row's own `[B, T]`; None where T = S are all of them. Only a 2-D mask needs it.
    implementation: as the module lists them; `supported` says which can be had. The flash ones repeat the prefix for each row.

    splash: masks must be 2-D. A query that is itself padding gets something finite, and gives no gradient to what is real. Where `at` is
    not a numpy array `[T]` that rises by one, and so known when the program is traced, the call is computed as xla does.

    Where a mesh's rules are active, the flash kernels run on each device's rows and heads (`training.sharding`).
    Returns `[B, T, N * H]`. ValueError where the mask, the mesh or the name is not for this implementation.
    """
    B, T, N, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    _check(implementation)
    if mask.ndim == 2 and (S if at is None else at.shape[-1]) != T:
        raise ValueError(f"{T} queries of {S} keys, and at is {at if at is None else at.shape}; give the time of every query")
    if implementation == "splash":
        if mask.ndim != 2 or (prefix is not None and prefix[2].ndim != 2):
            raise ValueError("attention splash: the mask says for each query what it sees, and splash is causal; choose xla or cudnn")
        first = 0 if at is None else _first(at)
        if first is not None:
            return _splash(q_BTNH, k_BSKH, v_BSKH, mask, prefix, first).reshape(B, T, N * H)
    if implementation == "cudnn":
        out = _cudnn(q_BTNH, k_BSKH, v_BSKH, seen(mask, at) if mask.ndim == 2 else mask, prefix)
    else:
        out = _xla(q_BTNH, k_BSKH, v_BSKH, mask, prefix, at)
    return out.reshape(B, T, N * H)


def _check(implementation):
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {implementation!r}; choose from {', '.join(IMPLEMENTATIONS)}")


def seen(real_BS, at=None):
    """`[B or 1, T, S]`: the keys that queries at the times `at` see, the real ones up to themselves; see `attend`."""
    S = real_BS.shape[1]
    times = jnp.arange(S)[None] if at is None else jnp.asarray(at).reshape(-1, at.shape[-1])
    return real_BS[:, None] & (jnp.arange(S)[None, None] <= times[:, :, None])


def supported(implementation, platform, *, dtype, head_dim, heads=1, kv_heads=1, windows=False, tensor=1):
    """None where an implementation can compute such a model's attention, or the reason why not, as text.

    platform: a device's, "cpu", "gpu" or "tpu". windows: whether layers see a window only. tensor: devices that heads are split over.
    ValueError for an unknown implementation.
    """
    _check(implementation)
    if implementation == "xla":
        return None
    needs, dtypes = {"cudnn": ("gpu", (jnp.bfloat16, jnp.float16)), "splash": ("tpu", (jnp.bfloat16, jnp.float32))}[implementation]
    if {"cuda": "gpu"}.get(platform, platform) != needs:
        return f"{implementation} needs a {needs}; the device is a {platform}"
    if jnp.dtype(dtype) not in map(jnp.dtype, dtypes):
        return f"{implementation} computes in {' or '.join(jnp.dtype(d).name for d in dtypes)}; the dtype is {jnp.dtype(dtype).name}"
    if implementation == "cudnn" and (head_dim % 8 or head_dim > 256):
        return f"cudnn needs a head_dim that is a multiple of 8, up to 256; it is {head_dim}"
    if implementation == "splash" and windows:
        return "splash has one causal mask for all layers; this model's layers see windows"
    if heads % tensor == 0 and kv_heads % tensor:
        return f"{heads} query heads are split over {tensor} devices, {kv_heads} key/value heads cannot be"
    return None


# ------------------------------------------------------------------------------------------------------- plain


def _rows(x, texts):
    """`x [B, K, Q, T, …]`, with the rows that read each of so many texts' keys side by side: `[texts, K, B / texts * Q * T, …]`."""
    x = jnp.moveaxis(x.reshape(texts, x.shape[0] // texts, *x.shape[1:]), 1, 2)
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:5]), *x.shape[5:])


def _unrows(rows, B, Q):
    """What `_rows` was given."""
    texts, K = rows.shape[:2]
    x = jnp.moveaxis(rows.reshape(texts, K, B // texts, Q, -1, *rows.shape[3:]), 2, 1)
    return x.reshape(B, *x.shape[2:])


def _scores(q_BKQTH, k_bSKH, mask):
    """Scores in float32, `[b, K, rows, S]` with rows as `_rows` has them, far below all others where the mask is false.

    mask: `[1, b or B; 1 or T; S]`, what all queries see, or those of each text, or each row's.
    """
    (B, K, Q, T, _), (b, S, _, _) = q_BKQTH.shape, k_bSKH.shape
    scores = jnp.einsum("bkrh,bskh->bkrs", _rows(q_BKQTH, b), k_bSKH, preferred_element_type=jnp.float32)
    shape = (b, K, B // b, Q, T, S)
    seen = mask.reshape(b, 1, B // b, 1, *mask.shape[1:]) if mask.shape[0] == B else mask[:, None, None, None]
    lowered = jnp.broadcast_to(jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min / 2), shape)
    return (scores.reshape(shape) + lowered).reshape(scores.shape)


def _parts(q_BKQTH, sources, ends):
    """The queries in chunks, each with what it may see of every source: `[(slice of queries, [(number of keys, mask), …])]`."""
    T = q_BKQTH.shape[3]
    for number, end in enumerate(ends):
        at = slice(number * CHUNK, min(T, (number + 1) * CHUNK))
        masks = [mask if mask.shape[1] == 1 else mask[:, at] for _, _, mask in sources]
        keys = [end, *(k.shape[1] for k, _, _ in sources[1:])]
        yield at, [(n, mask[:, :, :n]) for n, mask in zip(keys, masks, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _plain(q_BKQTH, sources, ends):
    """Softmax attention over all keys of some sources, `[B, K, Q, T, H]`, in chunks of `CHUNK` queries, whose scores are not kept: the
    backward pass makes them anew, so that one chunk's are all that ever live.

    q: scaled. sources: `(k, v, mask)` each, k and v `[b, S, K, H]` with b a divisor of B, mask as for `_scores`. ends: how many keys of
    the first source each chunk may see at most; those behind are not even looked at.
    """
    return _plain_fwd(q_BKQTH, sources, ends)[0]


@functools.partial(jax.jit, static_argnums=2)
def _plain_fwd(q, sources, ends):
    B, _, Q = q.shape[:3]
    outs, logs = [], []
    for at, visible in _parts(q, sources, ends):
        scores = [_scores(q[:, :, :, at], k[:, :n], mask) for (k, _, _), (n, mask) in zip(sources, visible, strict=True)]
        top = functools.reduce(jnp.maximum, (_unrows(s.max(-1), B, Q) for s in scores))
        out = total = 0.0
        for s, (_, v, _), (n, _) in zip(scores, sources, visible, strict=True):
            weights = jnp.exp(s - _rows(top, len(v))[..., None])
            total = total + _unrows(weights.sum(-1), B, Q)
            read = jnp.einsum("bkrs,bskh->bkrh", weights.astype(v.dtype), v[:, :n], preferred_element_type=jnp.float32)
            out = out + _unrows(read, B, Q)
        outs.append(out / total[..., None])
        logs.append(top + jnp.log(total))
    out, logs = (checkpoint_name(jnp.concatenate(x, 3).astype(dtype), "attention") for x, dtype in ((outs, q.dtype), (logs, jnp.float32)))
    return out, (q, sources, out, logs)


@functools.partial(jax.jit, static_argnums=0)
def _plain_bwd(ends, residuals, g):
    q, sources, out, logs = residuals
    B, _, Q = q.shape[:3]
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1)  # of the weights' gradients, by their weights
    d_q, d_kv = [], [[jnp.zeros(x.shape, jnp.float32) for x in (k, v)] for k, v, _ in sources]
    for at, visible in _parts(q, sources, ends):
        q_at, g_at, logs_at, mean_at = (x[:, :, :, at] for x in (q, g, logs, mean))
        d_q_at = 0.0
        for (k, v, _), (n, mask), d in zip(sources, visible, d_kv, strict=True):
            rows = functools.partial(_rows, texts=len(k))
            weights = jnp.exp(_scores(q_at, k[:, :n], mask) - rows(logs_at)[..., None])
            d_weights = jnp.einsum("bkrh,bskh->bkrs", rows(g_at), v[:, :n], preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - rows(mean_at)[..., None])).astype(q.dtype)
            d_q_at = d_q_at + _unrows(jnp.einsum("bkrs,bskh->bkrh", d_scores, k[:, :n], preferred_element_type=jnp.float32), B, Q)
            for i, (of, rows_of) in enumerate(((d_scores, rows(q_at)), (weights.astype(g.dtype), rows(g_at)))):
                d[i] = d[i].at[:, :n].add(jnp.einsum("bkrs,bkrh->bskh", of, rows_of, preferred_element_type=jnp.float32))
        d_q.append(d_q_at)
    d_sources = tuple((dk.astype(k.dtype), dv.astype(v.dtype), None) for (k, v, _), (dk, dv) in zip(sources, d_kv, strict=True))
    return jnp.concatenate(d_q, 3).astype(q.dtype), d_sources


_plain.defvjp(_plain_fwd, _plain_bwd)


def _xla(q_BTNH, k_BSKH, v_BSKH, mask, prefix, at):
    """As `attend`: `[B, T, N, H]`. The prefix is read where it is, for all rows that it serves."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    ends = [S] * -(-T // CHUNK)
    if mask.ndim == 2:
        if at is None or (isinstance(at, np.ndarray) and at.ndim == 1):  # else times are not known yet
            times = np.arange(S) if at is None else at
            ends = [int(times[start : start + CHUNK].max()) + 1 for start in range(0, T, CHUNK)]
        mask = seen(mask, at)
    q = (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    sources = ((k_BSKH, v_BSKH, mask),)
    if prefix is not None and prefix[0].shape[1]:
        pk, pv, p_mask = prefix
        sources += ((pk, pv, p_mask[:, None] if p_mask.ndim == 2 else p_mask),)
    return _plain(q, sources, tuple(ends)).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


# ------------------------------------------------------------------------------------------- what both kernels need


def _joined(k, v, prefix, dtype, rows):
    """Keys and values of prefix and sequence in one, each of `rows` rows, in the queries' dtype."""
    if prefix is not None:
        k, v = (jnp.concatenate([jnp.repeat(p, rows // p.shape[0], axis=0).astype(dtype), x.astype(dtype)], 1)
                for p, x in zip(prefix[:2], (k, v), strict=True))  # fmt: skip
    return k.astype(dtype), v.astype(dtype)


def _padded(x, axis, length):
    """`x`, longer along an axis, with zeros (False)."""
    return jnp.pad(x, [(0, length - n if i == axis % x.ndim else 0) for i, n in enumerate(x.shape)])


def _on_devices(kernel, q_BTNH, k_BSKH, v_BSKH, *masks):
    """`kernel(q, k, v, *masks)`, which the compiler cannot split: under a mesh's rules, each device calls it with its rows and heads.

    masks: `[B or 1, …]` each. A dimension that its mesh axes do not divide stays whole, and each device computes all of it.
    """
    if not nn.get_logical_axis_rules():
        return kernel(q_BTNH, k_BSKH, v_BSKH, *masks)
    sizes = jax.sharding.get_abstract_mesh().shape

    def split(name, n):
        """The mesh axes that split a dimension of this length, and the number of parts."""
        axes = nn.logical_to_mesh_axes((name,))[0] or ()
        parts = math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
        return (None, 1) if parts == 1 or n % parts else (axes, parts)

    B, N, K = q_BTNH.shape[0], q_BTNH.shape[2], k_BSKH.shape[2]
    (rows, _), (heads, parts), (kv_heads, _) = split("batch", B), split("heads", N), split("kv_heads", K)
    if heads != kv_heads:
        raise ValueError(f"attention: {N} query heads are split over {parts} devices, {K} key/value heads are not; choose xla")
    of_heads = PartitionSpec(rows, None, heads, None)
    of_masks = tuple(PartitionSpec(rows if mask.shape[0] == B else None) for mask in masks)
    # check_vma: neither kernel says which of its results differ between devices.
    on_each = jax.shard_map(kernel, in_specs=(of_heads,) * 3 + of_masks, out_specs=of_heads, check_vma=False)
    return on_each(q_BTNH, k_BSKH, v_BSKH, *masks)


# ------------------------------------------------------------------------------------------------------- cuDNN


def _cudnn(q_BTNH, k_BSKH, v_BSKH, mask_BTS, prefix, inner="cudnn"):
    """As `_xla`, with lengths in multiples of 64. inner: which `jax.nn.dot_product_attention` computes it."""
    B, T = q_BTNH.shape[:2]
    k, v = _joined(k_BSKH, v_BSKH, prefix, q_BTNH.dtype, B)
    if prefix is not None:
        p_mask = prefix[2]
        if p_mask.ndim == 2:
            p_mask = jnp.repeat(p_mask, B // p_mask.shape[0], axis=0)[:, None]
        mask_BTS = jnp.concatenate([jnp.broadcast_to(m, (B, T, m.shape[2])) for m in (p_mask, mask_BTS)], 2)
    to, key_to = (-(-n // CUDNN_MULTIPLE) * CUDNN_MULTIPLE for n in (T, k.shape[1]))
    mask = _padded(_padded(mask_BTS, 1, to), 2, key_to)[:, None]

    def kernel(q, k, v, mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=inner)

    return _on_devices(kernel, _padded(q_BTNH, 1, to), _padded(k, 1, key_to), _padded(v, 1, key_to), mask)[:, :T]


# ------------------------------------------------------------------------------------------------------- splash


def _first(at):
    """The first of times that rise by one and are known when tracing; None where they do not or are not."""
    known = isinstance(at, np.ndarray) and at.ndim == 1 and at.size
    return int(at[0]) if known and (np.diff(at) == 1).all() else None


def _blocks(length):
    """(padded length, block): one block where that is enough, or several of the size that pads least."""
    whole = -(-length // LANES) * LANES
    if whole <= BLOCKS[0]:
        return whole, whole
    return min(((-(-length // block) * block, block) for block in BLOCKS), key=lambda found: found[0])


def _splash(q_BTNH, k_BSKH, v_BSKH, real_BS, prefix, first):
    """As `attend` with a 2-D mask and queries at the times `first`, `first` + 1, …: `[B, T, N, H]`.

    Real and padding are two segments, which see only themselves: every query sees itself at least, as the kernel needs. Rematerialisation
    knows what the forward kernel gives the backward one by the name "attention" (`jax.checkpoint_policies.save_only_these_names`).
    """
    B, T, _, H = q_BTNH.shape
    k, v = _joined(k_BSKH, v_BSKH, prefix, q_BTNH.dtype, B)
    before = k.shape[1] - k_BSKH.shape[1]
    real = jnp.broadcast_to(real_BS, (B, real_BS.shape[1]))
    real_queries = real[:, first : first + T]
    if prefix is not None:
        real = jnp.concatenate([jnp.repeat(prefix[2], B // prefix[2].shape[0], axis=0), real], 1)
    (to, block), (key_to, key_block) = _blocks(T), _blocks(k.shape[1])
    fused = key_to <= MOST_FUSED * key_block
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=key_block, block_q_dkv=block, block_kv_dkv=key_block, use_fused_bwd_kernel=fused,
        block_q_dq=None if fused else block, block_kv_dq=None if fused else key_block,
    )  # fmt: skip

    def kernel(q, k, v, query_segments, segments):
        causal = splash_attention_mask.CausalMask((to, key_to), offset=before + first)
        of_row = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([causal] * q.shape[2]), block_sizes=sizes, head_shards=1, q_seq_shards=1,
            residual_checkpoint_name="attention",
        )  # fmt: skip
        ids = splash_attention_kernel.SegmentIds(query_segments, segments)
        return jax.vmap(of_row)(*(x.swapaxes(1, 2) for x in (q, k, v)), ids).swapaxes(1, 2)

    q = _padded(q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype), 1, to)
    ids = [_padded(x, 1, n).astype(jnp.int32) for x, n in ((real_queries, to), (real, key_to))]
    return _on_devices(kernel, q, _padded(k, 1, key_to), _padded(v, 1, key_to), *ids)[:, :T]


# ------------------------------------------------------------------------------------------------- which is fastest


class Choice(NamedTuple):
    """implementation: the fastest. seconds: of each that was measured. refused: why each of the others was not."""

    implementation: str
    seconds: dict[str, float]
    refused: dict[str, str]


def _seconds(step, arguments, repeats=5):
    """Median seconds of a call, its compilation apart."""
    jax.block_until_ready(step(*arguments))
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def fastest(*, rows, length, heads, kv_heads, head_dim, dtype, windows=False, device=None, seconds=_seconds):
    """The `Choice` for one device, by default the first: forward and backward pass of one layer are timed on random numbers.

    rows, heads, kv_heads: of one device. windows: whether layers see a window only. seconds: takes a jitted function and its arguments
    and times it. One candidate alone is not timed; one that the backend refuses is left out, and xla is chosen where it refuses all.
    Call it where no mesh is active. Processes may measure different winners: all must take one's.
    """
    device = device or jax.local_devices()[0]
    sizes = {"dtype": dtype, "head_dim": head_dim, "heads": heads, "kv_heads": kv_heads, "windows": windows}
    why_not = {name: supported(name, device.platform, **sizes) for name in IMPLEMENTATIONS}
    refused = {name: why for name, why in why_not.items() if why}
    names = [name for name in IMPLEMENTATIONS if name not in refused]
    if len(names) == 1:
        return Choice(names[0], {}, refused)
    measured = {}
    with jax.default_device(device):
        q, k, v = (
            jax.random.normal(key, (rows, length, n, head_dim), dtype)
            for key, n in zip(jax.random.split(jax.random.key(0), 3), (heads, kv_heads, kv_heads), strict=True)
        )
        mask = jnp.ones((1, length), bool)
        mask = jnp.tril(jnp.ones((1, length, length), bool)) if windows else mask
        for name in names:

            def loss(q, k, v, name=name):
                return jnp.sum(jnp.square(attend(q, k, v, mask, implementation=name).astype(jnp.float32)))

            try:
                measured[name] = seconds(jax.jit(jax.grad(loss, (0, 1, 2))), (q, k, v))
            except (RuntimeError, ValueError) as error:  # JaxRuntimeError and NotImplementedError are RuntimeErrors
                refused[name] = (str(error).strip().splitlines() or [repr(error)])[0]
    return Choice(min(measured, key=measured.get, default="xla"), measured, refused)
