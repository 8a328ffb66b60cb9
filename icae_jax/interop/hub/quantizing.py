"""Quantises a parameter on the host while it is read, a few MiB at a time.

A parameter is read twice, so that no full-precision copy of it ever lives: once for its scales and
checksums, by all processes together, each a part; then for the codes of the shards that this
process holds. So the result does not depend on how devices split it.
"""

import concurrent.futures
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from icae_jax.errors import UserError
from icae_jax.interop.hub import identity, placing
from icae_jax.models import quantize

# Of float32 values, quantised at once by each thread; checksums take ten times as much meanwhile.
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

    def measure(self, chunk: placing.Ranges) -> tuple[dict[str, np.ndarray], list[Any]]:
        """(scales, checksums) of a chunk that is whole along the axis of blocks."""
        w = self.source.read(chunk)
        matrix = w if w.ndim == 2 else w[0]
        starts, width = [start for start, _ in chunk[-2:]], self.source.shape[-1]
        *sums, finite = identity.matrix_checksums(_on_cpu(matrix), *starts, width)
        if not finite:
            raise UserError(
                f"{'.'.join(self.path)} holds numbers that are not finite; the weights are "
                "damaged, download them again"
            )
        if self.source.read_int8 is not None:
            return {"scales": self.source.read_int8(chunk)[1].astype(np.float32)}, sums
        return quantize.host_scales(w, self.kind, self.axis), sums

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
        return quantize.host_codes(self.source.read(chunk), parts, self.kind, self.axis, start)


def _on_cpu(x: np.ndarray) -> Any:
    """An array for a jitted function that is to run on the host, if JAX has a CPU backend."""
    try:
        return jax.device_put(x, jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return x


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

        leaves = {}
        for name, target in targets.items():
            values = scales.get(name)
            leaves[name] = placing.place(
                target,
                read_codes
                if values is None
                else lambda ranges, values=values: values[tuple(slice(*r) for r in ranges)],
            )
            done(placing.local_bytes(target))
    return quantize.make_matrix(kind, axis, leaves), sums


def _scales(parameter, targets, pool):
    """(leaves beside the codes, checksums) of a whole parameter."""
    shape = parameter.source.shape
    scales = {
        name: np.zeros(target.shape, target.dtype)
        for name, target in targets.items()
        if name != "codes"
    }
    layers = math.prod(shape[:-2])
    sums = np.zeros((2, layers), np.uint32)
    chunks = list(parameter.chunks(tuple((0, n) for n in shape)))
    mine = chunks[jax.process_index() :: jax.process_count()]
    for chunk, (parts, chunk_sums) in zip(mine, pool.map(parameter.measure, mine), strict=True):
        at = [slice(*axis) for axis in chunk]
        at[parameter.axis] = slice(None)
        for name, part in parts.items():
            scales[name][tuple(at)] = part
        sums[:, 0 if len(shape) == 2 else chunk[0][0]] += np.asarray(chunk_sums, np.uint32)
    if jax.process_count() > 1:
        sums = _over_processes(sums)
        for leaf in scales.values():
            for layer in leaf if leaf.ndim > 2 else [leaf]:  # a layer at a time, in little memory
                layer[...] = _over_processes(layer)
    first, second = sums if len(shape) > 2 else sums[:, 0]
    return scales, (first, second, True)


def _over_processes(x):
    """The sum of every process's array; where one has a value, the others have 0."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x)).sum(0, dtype=x.dtype)
