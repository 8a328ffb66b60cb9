"""Writing memories: contexts, in batches, through the encoder."""

from collections.abc import Sequence

import jax
from jax.typing import DTypeLike

from icae_jax.compression import encoder, segments
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.memory import Memory
from icae_jax.compression.segments import Contexts
from icae_jax.inference.batching import batch_starts, concatenate, round_up
from icae_jax.inference.devices import Devices
from icae_jax.models.llama import FrozenModel, ModelConfig
from icae_jax.runtime import attention_choice, sharding

# Compiled once for all compressors of one base and configuration.
_compress = jax.jit(encoder.compress_several, static_argnames=("ks", "config"))


def fastest_attention(
    model: ModelConfig,
    config: CompressionConfig,
    devices: Devices,
    dtype: DTypeLike,
    rows: int,
) -> str:
    """The implementation of attention that compresses whole segments fastest on the devices."""
    mesh = devices.mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    fastest, _ = attention_choice.choose(
        attention_choice.AUTO,
        model,
        mesh,
        rows=rows,
        length=config.encoder_tokens(config.segment_tokens),
        dtype=dtype,
        mask=config.encoder_mask,
    )
    return fastest


class MemoryWriter:
    """Writes contexts into memory.

    Attributes:
        base: the frozen base, with the attention that is fastest for whole segments.
        trained: the encoder's LoRA and the memory table.
        config: method, layout and sizes.
        devices: where it runs.
        pad_id: what shorter segments are padded with.
    """

    def __init__(
        self,
        base: FrozenModel,
        trained: dict,
        config: CompressionConfig,
        devices: Devices,
        pad_id: int,
    ):
        self.base, self.trained, self.config = base, trained, config
        self.devices, self.pad_id = devices, pad_id

    def write(self, contexts: Sequence[Sequence[int]], k: int, batch_size: int) -> Memory:
        """The memory of lists of token ids, on the host. k: memory tokens per segment."""
        return self._write(contexts, (k,), batch_size)[0]

    def write_several(
        self, contexts: Sequence[Sequence[int]], ks: Sequence[int], batch_size: int
    ) -> list[Memory]:
        """As `write` for each of several k: in one pass of the encoder if the method can."""
        together = bool(self.config.spec.write_several)
        passes = [tuple(ks)] if together else [(k,) for k in ks]
        written = [self._write(contexts, of_pass, batch_size) for of_pass in passes]
        return [memory for of_pass in written for memory in of_pass]

    def _write(self, contexts, ks, batch_size) -> list[Memory]:
        batches = []
        for start in batch_starts(len(contexts), batch_size):
            batch = contexts[start : start + batch_size]
            rows = self.devices.rows(batch_size if start else len(batch))
            padded = [*batch, *[[]] * (rows - len(batch))]
            arrays = segments.segment_contexts(padded, self.config, self._shape(batch), self.pad_id)
            ids, lengths = self.devices.put(arrays)
            with self.devices.active():
                memories = _compress(
                    self.base,
                    self.trained,
                    Contexts(ids, lengths, ks[-1]),
                    ks=ks,
                    config=self.config,
                )
            batches.append([memory[: len(batch)] for memory in jax.device_get(memories)])
        return [concatenate(of_k, self.config) for of_k in zip(*batches, strict=True)]

    def _shape(self, contexts):
        """Segments, and tokens per segment rounded up, so that few shapes are compiled."""
        shapes = [segments.segment_shape(len(context), self.config) for context in contexts]
        tokens = round_up(max(tokens for _, tokens in shapes))
        return max(count for count, _ in shapes), min(tokens, self.config.segment_tokens)
