"""Writing memories: contexts, in batches, through the encoder."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from icae_jax.compression import encoder, segments
from icae_jax.compression import memory as memories
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.memory import Memory
from icae_jax.compression.segments import Contexts
from icae_jax.inference.batching import (
    batch_starts,
    concatenate,
    round_up,
    segment_batches,
)
from icae_jax.inference.devices import Devices
from icae_jax.models.llama import FrozenModel, ModelConfig
from icae_jax.runtime import attention_choice, sharding

# Compiled once for all compressors of one base and configuration.
_compress = jax.jit(encoder.compress_several, static_argnames=("ks", "config"))


class Work(NamedTuple):
    """tokens: of contexts. computed: tokens that the encoder read for them, padding included."""

    tokens: int
    computed: int

    @property
    def padding(self) -> float:
        """The share of what was computed that is padding."""
        return 1 - self.tokens / self.computed if self.computed else 0.0


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
            encoded = self._encode(padded, self._shape(batch), ks)
            batches.append([memory[: len(batch)] for memory in encoded])
        return [concatenate(of_k, self.config) for of_k in zip(*batches, strict=True)]

    def write_each(
        self, contexts: Sequence[Sequence[int]], k: int, batch_size: int
    ) -> tuple[list[Memory], Work]:
        """The memory of each list of token ids, on the host, for many of different lengths.

        Segments do not see each other, so those of all contexts are batched by their lengths
        (`batching.segment_batches`), whatever context they are of.

        k: memory tokens per segment. batch_size: whole segments encoded at once.

        Returns the memories, of one context each, and what was computed.
        """
        shapes = [segments.segment_shape(len(context), self.config) for context in contexts]
        pieces = [
            context[s * size : (s + 1) * size]
            for context, (count, size) in zip(contexts, shapes, strict=True)
            for s in range(count)
        ]
        lengths = list(map(len, pieces))
        batches = segment_batches(lengths, self.config, batch_size, self.devices.rows)
        parts: list[dict[str, np.ndarray]] = [{}] * len(pieces)
        for batch in batches:
            rows = [pieces[i] for i in batch.segments]
            padded = [*rows, *[[]] * (batch.rows - len(rows))]
            (memory,) = self._encode(padded, (1, batch.tokens), (k,))
            for row, i in enumerate(batch.segments):
                parts[i] = {
                    name: np.take(x, row, memory.TEXT_AXIS) for name, x in memory.contents.items()
                }
        computed = sum(batch.rows * batch.tokens for batch in batches)
        return self._joined(parts, lengths, shapes), Work(sum(lengths), computed)

    def _encode(self, contexts, shape, ks) -> tuple[Memory, ...]:
        """The memories of one batch at each of several k, padded to a shape, on the host."""
        arrays = segments.segment_contexts(contexts, self.config, shape, self.pad_id)
        ids, lengths = self.devices.put(arrays)
        with self.devices.active():
            written = _compress(
                self.base, self.trained, Contexts(ids, lengths, ks[-1]), ks=ks, config=self.config
            )
        return jax.device_get(written)

    def _joined(self, parts, lengths, shapes) -> list[Memory]:
        """The memory of each context from those of its segments."""
        kind, starts = self.config.spec.memory, np.cumsum([0, *(count for count, _ in shapes)])
        joined: list[Memory | None] = [None] * len(shapes)
        for count in {count for count, _ in shapes}:  # those of one shape are placed at once
            rows = [row for row, shape in enumerate(shapes) if shape[0] == count]
            spans = [slice(starts[row], starts[row] + count) for row in rows]
            contents = {
                name: np.stack(
                    [
                        np.concatenate([part[name] for part in parts[span]], kind.TEXT_AXIS)
                        for span in spans
                    ],
                    kind.TEXT_AXIS,
                )
                for name in kind.CONTENTS
            }
            of_rows = np.asarray([lengths[span] for span in spans], np.int32)
            memory = jax.device_get(memories.place(kind, contents, of_rows, self.config))
            for i, row in enumerate(rows):
                joined[row] = memory[i]
        return joined

    def _shape(self, contexts):
        """Segments, and tokens per segment rounded up, so that few shapes are compiled."""
        shapes = [segments.segment_shape(len(context), self.config) for context in contexts]
        tokens = round_up(max(tokens for _, tokens in shapes))
        return max(count for count, _ in shapes), min(tokens, self.config.segment_tokens)
