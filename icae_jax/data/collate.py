"""From examples to arrays of fixed shapes."""

import typing
from collections.abc import Iterable, Sequence

from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.segments import segment_contexts, segment_shape
from icae_jax.data.config import DataConfig
from icae_jax.data.index import Example, ExampleSpec
from icae_jax.objectives.packing import pack

Batch = dict[str, typing.Any]


def bucket_shape(length: int, compression: CompressionConfig) -> tuple[int, int]:
    """(segments, tokens per segment) of the contexts in a bucket.

    A text shorter than `length` may fill one whole segment, which is longer than the near-equal
    segments of the longest text.
    """
    return segment_shape(length, compression)[0], min(length, compression.segment_tokens)


def target_shapes(
    config: DataConfig,
    compression: CompressionConfig,
    objectives: Iterable[str],
    length: int,
    qa_shape: tuple[int, int] | None,
    pad_labels: bool,
) -> dict[str, tuple[int, int, int]]:
    """`{objective: (G, T, U)}` of a bucket's targets, see `pack`.

    AE and LM targets have one shape, so that both run in one decoder call. `length` is the most
    tokens of a context; `qa_shape` is (T, U) of questions with their answers. With `pad_labels` AE
    targets go on to the end of the padded segments.
    """
    size = 1 + (padded_length(length, compression) if pad_labels else length)
    return {
        o: (config.questions_per_context, *qa_shape) if o == "qa" else (1, size, size)
        for o in objectives
    }


def padded_length(tokens: int, compression: CompressionConfig) -> int:
    """Tokens of a text whose segments are all padded to the most that one may hold."""
    return segment_shape(tokens, compression)[0] * compression.segment_tokens


def collate_contexts(contexts: Sequence[list[int]], length: int, spec: ExampleSpec) -> Batch:
    """`context [B, S, N]` and `lengths [B, S]` of contexts of at most `length` tokens."""
    shape = bucket_shape(length, spec.compression)
    ids, lengths = segment_contexts(contexts, spec.compression, shape, spec.framing.eos)
    return {"context": ids, "lengths": lengths}


def collate(
    examples: Sequence[Example],
    length: int,
    spec: ExampleSpec,
    qa_shape: tuple[int, int] | None,
) -> Batch:
    """`context [B, S, N]`, `lengths [B, S]` and `targets` of examples with up to `length` tokens.

    qa_shape: (inputs, labels) that hold every question; None without questions.
    """
    shapes = target_shapes(
        spec.data, spec.compression, spec.objectives, length, qa_shape, spec.pad_labels
    )
    targets = {
        objective: pack([example.targets.get(objective, []) for example in examples], *shape)
        for objective, shape in shapes.items()
    }
    contexts = [example.context for example in examples]
    return collate_contexts(contexts, length, spec) | {"targets": targets}
