"""Softmax attention over a shared prefix and the sequence itself, in three implementations that compute the same.

    xla       plain: a few texts after others, chunks of queries after others, each with the scores of the keys it may see; runs
              anywhere, with any mask
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
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec

from icae_jax.errors import UserError

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
CHUNK = 128  # plain attention's queries at a time: long enough for matmuls, short enough that a CPU's cache holds their scores
SCORES = (
    1 << 20
)  # of a chunk, up to which plain attention takes several texts at a time: 4 MiB, for the same reason
CUDNN_MULTIPLE = 64  # beside a mask, cuDNN needs even numbers of queries and of keys; 64 also aligns the mask's rows
LANES = 128  # splash takes lengths in multiples of this
BLOCKS = (
    640,
    512,
    384,
)  # splash's, of queries and of keys: each costs a start, and its float32 scores (1.6 MB for 640) lie in VMEM
MOST_FUSED = (
    4  # blocks of keys up to which one kernel makes all gradients: it writes q's once a block
)


def attend(
    q_BTNH, k_BSKH, v_BSKH, mask, prefix=None, *, at=None, implementation="xla", unroll=False
):
    """Attention of T queries over a shared prefix of P keys and their own sequence of S keys; softmax in float32.

    mask: bool. `[B or 1, S]`, which keys are real: a query at time t sees the real ones up to t. Or `[B or 1, T, S]`, what each query sees.
    prefix: None or `(k, v, mask)` with k, v `[Bp, P, K, H]`, k rotated, and mask `[Bp, P]`, or `[B, T, P]` where queries see different
        parts of it. Bp divides B: prefix b serves rows b * B/Bp ... (b + 1) * B/Bp - 1, which is how many targets read one memory.
    at: the queries' times, `[T]` or each row's own `[B, T]`; None where T = S are all of them. Only a 2-D mask needs it.
    implementation: as the module lists them; `supported` says which can be had. The flash ones repeat the prefix for each row.
    unroll: whether what xla does for some texts after others is written out, so that XLA counts the FLOPs of all.

    splash: masks must be 2-D. A query that is itself padding gets something finite, and gives no gradient to what is real. Where `at` is
    not a numpy array `[T]` that rises by one, and so known when the program is traced, the call is computed as xla does.

    Where a mesh's rules are active, the flash kernels run on each device's rows and heads (`runtime.sharding`).
    Returns `[B, T, N * H]`. UserError where the mask, the mesh or the name is not for this implementation.
    """
    B, T, N, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    _check(implementation)
    if mask.ndim == 2 and (S if at is None else at.shape[-1]) != T:
        raise ValueError(
            f"{T} queries of {S} keys, and at is {at if at is None else at.shape}; give the time of every query"
        )
    if implementation == "splash":
        if mask.ndim != 2 or (prefix is not None and prefix[2].ndim != 2):
            raise UserError(
                "attention splash: the mask says for each query what it sees, and splash is causal; choose xla or cudnn"
            )
        first = 0 if at is None else _first(at)
        if first is not None:
            return _splash(q_BTNH, k_BSKH, v_BSKH, mask, prefix, first).reshape(B, T, N * H)
    if implementation == "cudnn":
        out = _cudnn(q_BTNH, k_BSKH, v_BSKH, seen(mask, at) if mask.ndim == 2 else mask, prefix)
    else:
        out = _xla(q_BTNH, k_BSKH, v_BSKH, mask, prefix, at, unroll)
    return out.reshape(B, T, N * H)


def _check(implementation):
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"attention is {implementation!r}; choose from {', '.join(IMPLEMENTATIONS)}"
        )


def seen(real_BS, at=None):
    """`[B or 1, T, S]`: the keys that queries at the times `at` see, the real ones up to themselves; see `attend`."""
    S = real_BS.shape[1]
    times = jnp.arange(S)[None] if at is None else jnp.asarray(at).reshape(-1, at.shape[-1])
    return real_BS[:, None] & (jnp.arange(S)[None, None] <= times[:, :, None])


def usable(implementation, mask):
    """The implementation that computes a call with such a mask.

    Splash knows causal masks only. The last layer of targets, whose queries are labels at times known only when the
    program runs, has a 3-D mask; there XLA's attention computes instead.
    """
    return "xla" if implementation == "splash" and mask.ndim == 3 else implementation


def supported(
    implementation, platform, *, dtype, head_dim, heads=1, kv_heads=1, windows=False, tensor=1
):
    """None where an implementation can compute such a model's attention, or the reason why not, as text.

    platform: a device's, "cpu", "gpu" or "tpu". windows: whether layers see a window only. tensor: devices that heads are split over.
    UserError for an unknown implementation.
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
        return f"{implementation} computes in {' or '.join(jnp.dtype(d).name for d in dtypes)}; the dtype is {jnp.dtype(dtype).name}"
    if implementation == "cudnn" and (head_dim % 8 or head_dim > 256):
        return f"cudnn needs a head_dim that is a multiple of 8, up to 256; it is {head_dim}"
    if implementation == "splash" and windows:
        return "splash has one causal mask for all layers; this model's layers see windows"
    if heads % tensor == 0 and kv_heads % tensor:
        return f"{heads} query heads are split over {tensor} devices, {kv_heads} key/value heads cannot be"
    return None


def _split(name, n):
    """The mesh axes that split a dimension of this logical name and length, and the number of parts: (None, 1) where none does."""
    if not nn.get_logical_axis_rules():
        return None, 1
    sizes, axes = jax.sharding.get_abstract_mesh().shape, nn.logical_to_mesh_axes((name,))[0] or ()
    parts = math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
    return (None, 1) if parts == 1 or n % parts else (axes, parts)


# ------------------------------------------------------------------------------------------------------- plain


# Queries `[b, K, G, Q, T, H]` are those of b texts, each read by G rows (B = b * G). A source of keys is `(k, v, mask)`: k and v
# `[b, G, S, K, H]`, each row's own, or `[b, S, K, H]`, one text's for all its rows; mask `[b or 1, 1, G or 1, 1, T or 1, S]`.


def _product(x, y, out):
    """An einsum in float32 of two `(letters, array)`: queries are "bkgqth", scores "bkgqts", keys and values as `_letters` says."""
    return jnp.einsum(f"{x[0]},{y[0]}->{out}", x[1], y[1], preferred_element_type=jnp.float32)


def _letters(k):
    return "bgskh" if k.ndim == 5 else "bskh"


def _scores(q, k, mask):
    """Scores in float32, far below all others where the mask is false."""
    lowered = jnp.where(mask, np.float32(0), jnp.finfo(jnp.float32).min / 2)
    return _product(("bkgqth", q), (_letters(k), k), "bkgqts") + jnp.broadcast_to(
        lowered, (*q.shape[:5], k.shape[-3])
    )


def _chunks(sources, ends, T):
    """The queries in chunks, each with what it may see of every source: `[(slice of queries, [(k, v, mask), …])]`."""
    for number, end in enumerate(ends):
        at = slice(number * CHUNK, min(T, (number + 1) * CHUNK))
        (k, v, mask), *shared = sources
        visible = [(k[..., :end, :, :], v[..., :end, :, :], mask[..., :end]), *shared]
        yield (
            at,
            [(k, v, mask if mask.shape[4] == 1 else mask[..., at, :]) for k, v, mask in visible],
        )


class _How(NamedTuple):
    """ends: how many keys of the first source each chunk may see at most; those behind are not even looked at. turns: into how many the
    texts of each of `devices` are divided, that are computed one after another. unroll: whether these are written out.
    """

    ends: tuple[int, ...]
    turns: int
    devices: int
    unroll: bool


def _in_turns(how, function, *trees):
    """`function(*trees)`, of some texts after others: arrays `[b, …]` are cut along their first axis, those `[1, …]` are for all."""
    if how.turns == 1:
        return function(*trees)
    leaves, tree = jax.tree.flatten(trees)

    def cut(x):
        x = x.reshape(how.devices, how.turns, len(x) // (how.devices * how.turns), *x.shape[1:])
        return jnp.swapaxes(x, 0, 1).reshape(how.turns, -1, *x.shape[3:])

    def joined(x):
        x = x.reshape(how.turns, how.devices, x.shape[1] // how.devices, *x.shape[2:])
        return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:])

    def turn(_, xs):
        xs = iter(xs)
        return None, function(
            *jax.tree.unflatten(tree, [x if len(x) == 1 else next(xs) for x in leaves])
        )

    _, out = jax.lax.scan(turn, None, [cut(x) for x in leaves if len(x) > 1], unroll=how.unroll)
    return jax.tree.map(joined, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _plain(q, sources, how):
    """Softmax attention over all keys of some sources, `[b, K, G, Q, T, H]`, in chunks of `CHUNK` queries, whose scores are not kept: the
    backward pass makes them anew, so that one chunk's are all that ever live. q: scaled.
    """
    return _plain_fwd(q, sources, how)[0]


@functools.partial(jax.jit, static_argnums=2)
def _plain_fwd(q, sources, how):
    out, logs = (
        checkpoint_name(x, "attention")
        for x in _in_turns(how, functools.partial(_forward, how.ends), q, sources)
    )
    return out, (q, sources, out, logs)


@functools.partial(jax.jit, static_argnums=0)
def _plain_bwd(how, residuals, g):
    d_q, d_sources = _in_turns(how, functools.partial(_backward, how.ends), *residuals, g)
    return d_q, tuple((*d_kv, None) for d_kv in d_sources)


_plain.defvjp(_plain_fwd, _plain_bwd)


def _forward(ends, q, sources):
    """What attention gives, and the logarithms of its sums, `[b, K, G, Q, T, 1]` float32."""
    outs, logs = [], []
    for at, visible in _chunks(sources, ends, q.shape[4]):
        scores = [_scores(q[..., at, :], k, mask) for k, _, mask in visible]
        top = functools.reduce(jnp.maximum, (s.max(-1, keepdims=True) for s in scores))
        weights = [jnp.exp(s - top) for s in scores]
        total = sum(w.sum(-1, keepdims=True) for w in weights)
        values = [(_letters(v), v) for _, v, _ in visible]
        read = sum(
            _product(("bkgqts", w.astype(v[1].dtype)), v, "bkgqth")
            for w, v in zip(weights, values, strict=True)
        )
        outs.append((read / total).astype(q.dtype))
        logs.append(top + jnp.log(total))
    return jnp.concatenate(outs, 4), jnp.concatenate(logs, 4)


def _backward(ends, q, sources, out, logs, g):
    """The gradients of the queries, and of every source's keys and values."""
    mean = jnp.sum(
        g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True
    )  # of the weights' gradients, by their weights
    d_q, d_kv = [], [[jnp.zeros(x.shape, jnp.float32) for x in (k, v)] for k, v, _ in sources]
    for at, visible in _chunks(sources, ends, q.shape[4]):
        q_at, g_at, logs_at, mean_at = (x[..., at, :] for x in (q, g, logs, mean))
        d_q_at = 0.0
        for (k, v, mask), d in zip(visible, d_kv, strict=True):
            kv = _letters(k)
            weights = jnp.exp(_scores(q_at, k, mask) - logs_at)
            d_scores = (weights * (_product(("bkgqth", g_at), (kv, v), "bkgqts") - mean_at)).astype(
                q.dtype
            )
            d_q_at += _product(("bkgqts", d_scores), (kv, k), "bkgqth")
            for i, (of, by) in enumerate(((d_scores, q_at), (weights.astype(g.dtype), g_at))):
                d[i] = (
                    d[i]
                    .at[..., : k.shape[-3], :, :]
                    .add(_product(("bkgqts", of), ("bkgqth", by), kv))
                )
        d_q.append(d_q_at.astype(q.dtype))
    return jnp.concatenate(d_q, 4), [
        (dk.astype(k.dtype), dv.astype(v.dtype))
        for (k, v, _), (dk, dv) in zip(sources, d_kv, strict=True)
    ]


def _xla(q_BTNH, k_BSKH, v_BSKH, mask, prefix, at, unroll):
    """As `attend`: `[B, T, N, H]`. The prefix is read where it is, for all rows that it serves."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    ends = [S] * -(-T // CHUNK)
    if mask.ndim == 2:
        if at is None or (
            isinstance(at, np.ndarray) and at.ndim == 1
        ):  # else times are not known yet
            times = np.arange(S) if at is None else at
            ends = [int(times[start : start + CHUNK].max()) + 1 for start in range(0, T, CHUNK)]
        mask = seen(mask, at)
    prefix = prefix if prefix is not None and prefix[0].shape[1] else None
    b = B if prefix is None else len(prefix[0])

    def laid_out(mask):
        """`[1 or b or B; T or 1; S]`, as sources have them."""
        return mask.reshape(min(len(mask), b), 1, -1, 1, *mask.shape[1:])

    q = (
        (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype))
        .reshape(b, B // b, T, K, N // K, H)
        .transpose(0, 3, 1, 4, 2, 5)
    )
    sources = ((*(x.reshape(b, B // b, S, K, H) for x in (k_BSKH, v_BSKH)), laid_out(mask)),)
    if prefix is not None:
        pk, pv, p_mask = prefix
        sources += ((pk, pv, laid_out(p_mask[:, None] if p_mask.ndim == 2 else p_mask)),)
    _, devices = _split("batch", b)
    most = max(
        1, SCORES // (B // b * N * min(T, CHUNK) * sum(mask.shape[-1] for _, _, mask in sources))
    )
    texts = b // devices
    turns = next(
        turns for turns in range(1, texts + 1) if texts % turns == 0 and texts // turns <= most
    )
    out = _plain(q, sources, _How(tuple(ends), turns, devices, unroll))
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(B, T, N, H)


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
    B, N, K = q_BTNH.shape[0], q_BTNH.shape[2], k_BSKH.shape[2]
    (rows, _), (heads, parts), (kv_heads, _) = (
        _split("batch", B),
        _split("heads", N),
        _split("kv_heads", K),
    )
    if heads != kv_heads:
        raise UserError(
            f"attention: {N} query heads are split over {parts} devices, {K} key/value heads are not; choose xla"
        )
    of_heads = PartitionSpec(rows, None, heads, None)
    of_masks = tuple(PartitionSpec(rows if mask.shape[0] == B else None) for mask in masks)
    # check_vma: neither kernel says which of its results differ between devices.
    on_each = jax.shard_map(
        kernel, in_specs=(of_heads,) * 3 + of_masks, out_specs=of_heads, check_vma=False
    )
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
        mask_BTS = jnp.concatenate(
            [jnp.broadcast_to(m, (B, T, m.shape[2])) for m in (p_mask, mask_BTS)], 2
        )
    to, key_to = (-(-n // CUDNN_MULTIPLE) * CUDNN_MULTIPLE for n in (T, k.shape[1]))
    mask = _padded(_padded(mask_BTS, 1, to), 2, key_to)[:, None]

    def kernel(q, k, v, mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=inner)

    return _on_devices(
        kernel, _padded(q_BTNH, 1, to), _padded(k, 1, key_to), _padded(v, 1, key_to), mask
    )[:, :T]


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
    return min(
        ((-(-length // block) * block, block) for block in BLOCKS), key=lambda found: found[0]
    )


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


def fastest(
    *, rows, length, heads, kv_heads, head_dim, dtype, windows=False, device=None, seconds=_seconds
):
    """The `Choice` for one device, by default the first: forward and backward pass of one layer are timed on random numbers.

    rows, heads, kv_heads: of one device. windows: whether layers see a window only. seconds: takes a jitted function and its arguments
    and times it. One candidate alone is not timed; one that the backend refuses is left out, and xla is chosen where it refuses all.
    Call it where no mesh is active. Processes may measure different winners: all must take one's.
    """
    device = device or jax.local_devices()[0]
    sizes = {
        "dtype": dtype,
        "head_dim": head_dim,
        "heads": heads,
        "kv_heads": kv_heads,
        "windows": windows,
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
        mask = jnp.ones((1, length), bool)
        mask = jnp.tril(jnp.ones((1, length, length), bool)) if windows else mask
        for name in names:

            def loss(q, k, v, name=name):
                return jnp.sum(
                    jnp.square(attend(q, k, v, mask, implementation=name).astype(jnp.float32))
                )

            try:
                measured[name] = seconds(jax.jit(jax.grad(loss, (0, 1, 2))), (q, k, v))
            except (
                RuntimeError,
                ValueError,
            ) as error:  # JaxRuntimeError and NotImplementedError are RuntimeErrors
                refused[name] = (str(error).strip().splitlines() or [repr(error)])[0]
    return Choice(min(measured, key=measured.get, default="xla"), measured, refused)
