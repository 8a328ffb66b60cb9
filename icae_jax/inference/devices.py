"""Where a compressor computes: one device, or a mesh that base and batches are split over."""

import contextlib
from typing import TypeVar

import jax

from icae_jax.compression.decoder import Decoder
from icae_jax.compression.memory import Memory
from icae_jax.models.llama import ModelConfig
from icae_jax.runtime import sharding

T = TypeVar("T")
M = TypeVar("M", bound=Memory)


class Devices:
    """A mesh of this process's devices; None for the default device alone."""

    def __init__(self, mesh: jax.sharding.Mesh | None, config: ModelConfig):
        self.mesh = mesh
        self.placement = None if mesh is None else sharding.Placement(mesh, config)
        self._apart: list[tuple[Decoder, Decoder]] = []  # those that decoded last

    def active(self) -> contextlib.AbstractContextManager:
        """A context in which what is compiled is split over the mesh by `runtime.sharding`."""
        return contextlib.nullcontext() if self.placement is None else self.placement.active()

    def for_decoding(self, decoder: Decoder) -> Decoder:
        """A decoder as it decodes fastest here: on a CPU with its layers apart."""
        if self.mesh is not None or jax.default_backend() != "cpu":
            return decoder
        for known, apart in self._apart:
            if known is decoder:
                return apart
        apart = decoder.layers_apart()
        self._apart = [*self._apart[-1:], (decoder, apart)]
        return apart

    def rows(self, count: int) -> int:
        """`count`, rounded up to a multiple of the parts that the mesh splits a batch into."""
        if self.mesh is None:
            return count
        parts = sharding.rows_at_once(self.mesh)
        return -(-count // parts) * parts

    def put(self, batch: T) -> T:
        """Places arrays whose first axis is the batch."""
        if self.mesh is None:
            return batch
        return jax.tree.map(lambda x: sharding.split(self.mesh, x), batch)

    def put_memory(self, memory: M) -> M:
        """Places a memory, split by texts."""
        if self.mesh is None:
            return memory
        axes = {name: memory.TEXT_AXIS if name in memory.CONTENTS else 0 for name in vars(memory)}
        placed = {
            name: sharding.split(self.mesh, getattr(memory, name), axis)
            for name, axis in axes.items()
        }
        return memory.replace(**placed)

    def put_parameters(self, tree: T) -> T:
        """Places a tree of parameters."""
        return jax.device_put(tree, None if self.placement is None else self.placement.tree(tree))
