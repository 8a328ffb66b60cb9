"""What a base is known by: fingerprints of its sizes, weights and tokenizer, and their comparison.

A quantised base is known by the weights that it was made of.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int, UInt32

from icae_jax import errors
from icae_jax.errors import UserError
from icae_jax.models import llama
from icae_jax.runtime.sharding import on_host

# Fields with a default that have always been part of fingerprints.
_FIRST_FIELDS = ("rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings")
# Fields that change no result.
_NEVER_COUNT = ("max_position_embeddings", "fused")
# Two sums of hashes with these salts stand for an array.
_SALTS = (1, 0x9E3779B9)
_BLOCK = 1 << 16  # values on the host that are summed at once
_PIECE = 1 << 18  # values of a larger matrix on a device that are


def fingerprint(config: llama.ModelConfig, params: dict) -> str:
    """Identity of a base: a sha256 of what is read quickly.

    It covers the fields that change results, the final norm and 64 embedding rows in bfloat16.
    Rows spread over the vocabulary tell bases apart, fine-tunes too, without reading gigabytes.
    Rounding makes float32, bfloat16 and converted copies of one base agree.
    """
    norm, rows = params["norm"]["scale"], params["embed"][fingerprint_rows(config)]
    return fingerprint_of(config, *on_host([norm, rows]))


def fingerprint_rows(config: llama.ModelConfig) -> Int[np.ndarray, " rows"]:
    """The tokens whose embeddings `fingerprint` covers."""
    return np.linspace(0, config.vocab_size - 1, 64).astype(int)


def fingerprint_of(
    config: llama.ModelConfig, norm: Float[np.ndarray, " D"], rows: Float[np.ndarray, "rows D"]
) -> str:
    """`fingerprint` from the final norm and the embeddings of `fingerprint_rows`."""
    digest = hashlib.sha256()
    # Fields that were added later count only if they are used, so that older fingerprints hold.
    plain = {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING and field.name not in _FIRST_FIELDS
    }
    plain |= {name: getattr(config, name) for name in _NEVER_COUNT}
    fields = {
        k: v for k, v in dataclasses.asdict(config).items() if k not in plain or v != plain[k]
    }
    digest.update(json.dumps(fields, sort_keys=True).encode())
    for value in (norm, rows):
        digest.update(value.astype(np.float32).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def _hash_bits(x):
    """The lowbias32 hash of integers."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _sums(x, index, counted=True):
    """Two sums, modulo 2^32, of each value's bits in bfloat16 times a hash of its index.

    counted: whether a value counts.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    return [
        jnp.sum((bits + 1) * _hash_bits(index + jnp.uint32(salt)), dtype=jnp.uint32, where=counted)
        for salt in _SALTS
    ]


def matrix_checksums(
    x: Float[np.ndarray, "rows columns"], row: int, column: int, width: int
) -> UInt32[np.ndarray, " 2"]:
    """What a part of a matrix adds to its checksums.

    Args:
        x: the part.
        row: where it begins in the matrix.
        column: likewise.
        width: columns of the matrix.
    """
    rows, columns = (
        np.arange(start, start + n, dtype=np.uint32)
        for start, n in zip((row, column), x.shape, strict=True)
    )
    index = np.ravel(rows[:, None] * np.uint32(width) + columns[None])
    values, total = np.ravel(x), np.zeros(2, np.uint32)
    for start in range(0, values.size, _BLOCK):  # of one length, to compile one program
        count = min(_BLOCK, values.size - start)
        parts = (part[start : start + count] for part in (values, index))
        block = (np.pad(part, (0, _BLOCK - count)) for part in parts)
        total += np.asarray(_block_sums(*block, count))
    return total


@jax.jit
def _block_sums(x, index, count):
    """The checksums of the first `count` values."""
    return jnp.stack(_sums(x, index, jnp.arange(x.size) < count))


def checksums(params: dict) -> dict:
    """Two checksums of every parameter in bfloat16, and whether it is finite; by layer if stacked.

    A checksum is a sum, modulo 2^32, of each value's bits times a hash of its index, so it does not
    depend on devices or the order of summation.
    """
    return _checksums(params, tuple(map(_unsplit_axis, jax.tree.leaves(params))))


def _unsplit_axis(x):
    """The first axis of a matrix that devices do not split; None if there is none."""
    shard = x.sharding.shard_shape(x.shape) if isinstance(x, jax.Array) else x.shape
    axes = (-2, -1) if x.ndim > 1 else ()
    return next((axis for axis in axes if shard[axis] == x.shape[axis]), None)


@functools.partial(jax.jit, static_argnames="axes")
def _checksums(params, axes):
    """axes: of each parameter, the one along which it is cut."""
    axes = jax.tree.unflatten(jax.tree.structure(params), axes)
    layers = jax.tree.map(
        lambda x, axis: jax.lax.map(lambda layer: _array_sums(layer, axis), x),
        params["layers"],
        axes["layers"],
    )
    others = {
        name: jax.tree.map(_array_sums, value, axes[name])
        for name, value in params.items()
        if name != "layers"
    }
    return others | {"layers": layers}


def _array_sums(x, axis):
    """The checksums of an array; those of a large matrix in pieces along an axis.

    XLA on CPUs materialises the indices and the bits of all that it sums at once.
    """
    if x.ndim < 2 or axis is None or x.size <= _PIECE:
        return _piece_sums(x, x.shape, 0, 0, 0)
    axis, n = axis % x.ndim, x.shape[axis]
    length = max(1, _PIECE * n // x.size)

    def sums(first):
        start = jnp.minimum(first, n - length)  # the last piece begins earlier, to be as long
        piece = jax.lax.dynamic_slice_in_dim(x, start, length, axis)
        return _piece_sums(piece, x.shape, axis, start, first)

    *totals, finite = jax.lax.map(sums, jnp.arange(0, n, length))
    return *(jnp.sum(parts, dtype=jnp.uint32) for parts in totals), finite.all()


def _piece_sums(piece, shape, axis, start, first):
    """What a piece, from `start` along an axis of an array, adds to it; only from `first` on."""
    index = jnp.zeros(piece.shape, jnp.uint32)
    for i, n in enumerate(shape):
        places = jax.lax.broadcasted_iota(jnp.uint32, piece.shape, i)
        if i == axis:
            places = places + jnp.asarray(start, jnp.uint32)
            counted = places >= jnp.asarray(first, jnp.uint32)
        index = index * jnp.uint32(n) + places
    return *_sums(piece, index, counted), jnp.isfinite(piece).all()


def weights_fingerprint(params: dict, source: str = "") -> str:
    """Identity of all of a base's weights, rounded to bfloat16: a sha256 of their checksums.

    A fine-tune may share the embedding rows and the norm that `fingerprint` reads with its base.

    Args:
        params: the base.
        source: where it comes from, for messages.

    Raises:
        UserError: a weight is not finite.
    """
    return checksums_fingerprint(on_host(checksums(params)), source)


def checksums_fingerprint(sums: dict, source: str = "") -> str:
    """`weights_fingerprint` from the `checksums` of all parameters, on the host."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(sums, is_leaf=lambda x: isinstance(x, tuple))
    for path, (*values, finite) in leaves:
        name = ".".join(key.key for key in path)
        if not np.all(finite):
            raise UserError(
                f"base {source}: {name} holds numbers that are not finite; the weights are "
                "damaged, download them again"
            )
        digest.update(name.encode())
        for value in values:
            digest.update(np.asarray(value, np.uint32).tobytes())
    return digest.hexdigest()


_DIFFERS = {
    "tokenizer": "encodes texts differently; give the base with the tokenizer that it was made "
    "with",
    "weights": "has other weights, as a fine-tune of that base has; give the base that it was made "
    "with",
}


def check_identity(what: str, stated: Mapping[str, str | None], have: Mapping[str, str]) -> None:
    """UserError if an adapter or a memory was made with another tokenizer or other weights.

    A note says if it does not tell, as those of earlier versions do not.

    Args:
        what: the adapter or memory, for messages.
        stated: the identities that it carries.
        have: `Base.identity`.
    """
    for name, own in have.items():
        if stated.get(name) not in (None, "", own):
            raise UserError(
                f"{what} was made with {name} {stated[name][:12]}, but the base's is {own[:12]}: "
                f"it {_DIFFERS[name]}"
            )
    unstated = [name for name in have if not stated.get(name)]
    if unstated:
        errors.say(
            f"{what} does not say with which {' and '.join(unstated)} it was made; "
            "taken to be the base's"
        )


def compare_quantisation(what: str, stated: str, have: str) -> None:
    """A note on stderr if an adapter or a memory was made on another quantisation of the base.

    Args:
        what: the adapter or memory, for messages.
        stated: the scheme that it carries, "" for none.
        have: `Base.quantize`.
    """
    if stated != have:
        errors.say(
            f"{what} was made on the base {precision_text(stated)}, and this base is "
            f"{precision_text(have)}, whose rounding differs: of SmolLM2-135M, int8 raises the "
            "perplexity by 0.4 %, nf4 by 28 %"
        )


def precision_text(quantize: str) -> str:
    """A scheme as messages say it."""
    return f"in {quantize}" if quantize else "in full precision"
