"""Quantises a parameter on the host while it is read, a few MiB at a time.

A parameter is read twice, so that no full-precision copy of it ever lives: once for its scales and
checksums, by all processes together, each a part; then for the codes of the shards that this
process holds. So the result does not depend on how devices split it.
"""

import concurrent.futures
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from icae_jax.errors import UserError
from icae_jax.interop.hub import identity, placing
from icae_jax.models import schemes

# Of float32 values, quantised at once by each thread.
CHUNK_BYTES = 1 << 20
THREADS = min(8, os.cpu_count() or 1)
Checksums = tuple[Any, Any, bool]  # as `identity.checksums` has them


class Source(NamedTuple):
    """Where a parameter comes from.

    Attributes:
        shape: of the parameter.
        read: float32 values of (start, stop) along each axis.
        read_int8: the same of stored int8 blocks: (codes, float scales); along the axis of blocks
            always all. None if the file has none.
    """

    shape: tuple[int, ...]
    read: Callable[[placing.Ranges], Float[np.ndarray, "..."]]
    read_int8: Callable[[placing.Ranges], tuple[np.ndarray, np.ndarray]] | None = None


class _Parameter(NamedTuple):
    path: placing.Path
    source: Source
    kind: str
    axis: int  # of the blocks

    @property
    def across(self) -> int:
        """The other axis of the matrix."""
        return -1 if self.axis == -2 else -2

    def chunks(self, ranges: placing.Ranges) -> Iterator[placing.Ranges]:
        """Cuts ranges into parts of one layer, whole along the axis of blocks."""
        (*layers, _, _), (start, stop) = ranges, ranges[self.across]
        length = ranges[self.axis][1] - ranges[self.axis][0]
        step = max(1, CHUNK_BYTES // (4 * max(1, length)))
        for layer in range(*layers[0]) if layers else [None]:
            for first in range(start, stop, step):
                chunk = list(ranges)
                chunk[self.across] = (first, min(first + step, stop))
                if layer is not None:
                    chunk[0] = (layer, layer + 1)
                yield tuple(chunk)

    def measure(self, chunk: placing.Ranges) -> tuple[dict[str, np.ndarray], np.ndarray, bool]:
        """(scales, checksums, whether all is finite) of a chunk whole along the axis of blocks.

        Stored int8 blocks have scales of their own, which are read where they are needed.
        """
        w = self.source.read(chunk)
        matrix = w if w.ndim == 2 else w[0]
        starts, width = [start for start, _ in chunk[-2:]], self.source.shape[-1]
        if not np.isfinite(matrix).all():
            return {}, np.zeros(2, np.uint32), False
        stored = self.source.read_int8 is not None
        scales = {} if stored else schemes.host_scales(w, self.kind, self.axis)
        return scales, identity.matrix_checksums(matrix, *starts, width), True

    def codes(self, chunk: placing.Ranges, scales: Mapping[str, np.ndarray]) -> np.ndarray:
        """The codes of a chunk. scales: of the whole parameter."""
        start, stop = chunk[self.axis]
        if self.source.read_int8 is not None:
            at = [slice(None)] * len(chunk)
            at[self.axis] = slice(start, stop)
            return self.source.read_int8(chunk)[0][tuple(at)]
        whole = list(chunk)
        whole[self.axis] = (0, None)
        index = tuple(slice(*axis) for axis in whole)
        parts = {name: leaf[index] for name, leaf in scales.items()}
        return schemes.host_codes(self.source.read(chunk), parts, self.kind, self.axis, start)


def load(
    path: placing.Path,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    kind: str,
    axis: int,
    source: Source,
    done: Callable[[int], Any],
) -> tuple[Any, Checksums]:
    """A parameter, quantised and on its devices, and the checksums of what it was made of.

    All processes must call it together. UserError if a number is not finite.

    Args:
        path: of the parameter.
        targets: where its arrays go, by their names in the `QuantizedMatrix`.
        kind: "int8" or "nf4".
        axis: of the blocks.
        source: reads it.
        done: told the bytes of every array that is on its devices.
    """
    parameter = _Parameter(path, source, kind, axis)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        scales, sums = _scales(parameter, targets, pool)

        def read_codes(ranges):
            shard = np.empty([stop - start for start, stop in ranges], targets["codes"].dtype)
            # As long as the matrix along the axis of blocks: nf4 has two values in a byte.
            per_code = source.shape[axis] // targets["codes"].shape[axis]
            wanted = list(ranges)
            wanted[axis] = tuple(per_code * n for n in ranges[axis])

            def fill(chunk):
                at = [slice(a - o, b - o) for (a, b), (o, _) in zip(chunk, wanted, strict=True)]
                at[axis] = slice(None)
                shard[tuple(at)] = parameter.codes(chunk, scales)

            list(pool.map(fill, parameter.chunks(tuple(wanted))))
            return shard

        def read_stored_scales(ranges):
            shard = np.empty([stop - start for start, stop in ranges], targets["scales"].dtype)
            wanted = list(ranges)
            wanted[axis] = (0, source.shape[axis])
            for chunk in parameter.chunks(tuple(wanted)):
                at = [slice(a - o, b - o) for (a, b), (o, _) in zip(chunk, ranges, strict=True)]
                cut = [slice(None)] * len(chunk)
                at[axis], cut[axis] = slice(None), slice(*ranges[axis])
                shard[tuple(at)] = source.read_int8(chunk)[1][tuple(cut)]
            return shard

        leaves = {}
        for name, target in targets.items():
            if name == "codes":
                read = read_codes
            elif name in scales:
                read = functools.partial(_cut, scales[name])
            else:
                read = read_stored_scales
            leaves[name] = placing.place(target, read)
            done(placing.local_bytes(target))
    return schemes.make_matrix(kind, axis, leaves), sums


def _cut(values, ranges):
    """The part of an array at (start, stop) along each axis."""
    return values[tuple(slice(*axis) for axis in ranges)]


def _scales(parameter, targets, pool):
    """(leaves beside the codes, checksums) of a whole parameter.

    No leaves if the file has them. UserError, in all processes, if a number is not finite.
    """
    shape = parameter.source.shape
    stored = parameter.source.read_int8 is not None
    scales = {
        name: np.zeros(target.shape, target.dtype)
        for name, target in targets.items()
        if name != "codes" and not stored
    }
    layers = math.prod(shape[:-2])
    sums, damaged = np.zeros((2, layers), np.uint32), np.zeros(1, np.uint32)
    chunks = list(parameter.chunks(tuple((0, n) for n in shape)))
    mine = chunks[jax.process_index() :: jax.process_count()]
    measured = pool.map(parameter.measure, mine)
    for chunk, (parts, chunk_sums, finite) in zip(mine, measured, strict=True):
        damaged += not finite
        at = [slice(*axis) for axis in chunk]
        at[parameter.axis] = slice(None)
        for name, part in parts.items():
            scales[name][tuple(at)] = part
        sums[:, 0 if len(shape) == 2 else chunk[0][0]] += chunk_sums
    if jax.process_count() > 1:
        sums, damaged = _over_processes(sums), _over_processes(damaged)
        for leaf in scales.values():
            for layer in leaf if leaf.ndim > 2 else [leaf]:  # a layer at a time, in little memory
                layer[...] = _over_processes(layer)
    if damaged[0]:
        raise UserError(
            f"{'.'.join(parameter.path)} holds numbers that are not finite; the weights are "
            "damaged, download them again"
        )
    first, second = sums if len(shape) > 2 else sums[:, 0]
    return scales, (first, second, True)


def _over_processes(x):
    """The sum of every process's array; where one has a value, the others have 0."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x)).sum(0, dtype=x.dtype)
