"""The examples of one tokenised source as fixed-shape batches, a pure function of (seed, step).

An example is one context with all its targets. In pretraining it is a window of a text (AE) with
the window after it (LM); in fine-tuning a context with some of its questions (QA), and perhaps the
context itself (AE). Contexts are padded to one of a few lengths (buckets). A step draws one bucket
for the whole batch, so that all processes agree on shapes.
"""

import dataclasses
import functools
import typing
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from icae_jax.data import drawing
from icae_jax.data.collate import (
    Batch,
    bucket_shape,
    collate,
    collate_contexts,
    padded_length,
)
from icae_jax.data.index import Example, ExampleSpec, Questions, Windows
from icae_jax.data.tokens import Tokens
from icae_jax.errors import UserError, counted
from icae_jax.objectives.targets import ae_target

BLANK = -1  # the number of a row of a batch without an example


@typing.runtime_checkable
class TrainingExamples(typing.Protocol):
    """What training draws from: the `Examples` of one source, or a `Mixture` of several.

    Attributes:
      key: identity of the tokenizer and the data.
      earlier_key: the same as the first version of token caches computed it.
      dropped: `{reason: count}` of what was left out of the data.
      qa_shape: (inputs, labels) that hold every question with its answer; None without questions.
    """

    key: str
    earlier_key: str
    dropped: dict[str, int]
    qa_shape: tuple[int, int] | None

    @property
    def shapes(self) -> list:
        """What the shapes of batches and their examples depend on; alike in all processes."""

    def draw(self, seed: int, step: int, batch_size: int) -> tuple[int, Int[np.ndarray, "B ..."]]:
        """The global batch of a step: the number of its bucket, and which example each row is."""

    def collate(self, bucket: int, rows: Int[np.ndarray, "B ..."]) -> Batch:
        """`context [B, S, N]`, `lengths [B, S]` and `targets` of drawn examples of one bucket."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One padded context length, its (segments, tokens per segment), and the rows of its examples.

    The columns of `examples` are those of `Windows.rows` or `Questions.rows`.
    """

    length: int
    shape: tuple[int, int]
    examples: Int[np.ndarray, "examples columns"]


class Examples:
    """The examples of one source. `TrainingExamples` lists what it shares with mixtures.

    Attributes:
      tokens: the source's tokens.
      spec: how examples are made of them.
      buckets: one for each of data.context_lengths.
      weights: probability of each bucket.

    Raises:
      UserError: no example is left.
    """

    def __init__(self, tokens: Tokens, spec: ExampleSpec):
        self.tokens, self.spec = tokens, spec
        self.key, self.earlier_key = tokens.key, tokens.earlier_key
        self._index = (Windows if spec.phase == "pretrain" else Questions)(tokens, spec)
        self.qa_shape = self._index.qa_shape
        self.dropped = tokens.left_out | self._index.dropped
        self.buckets = [
            Bucket(length, bucket_shape(length, spec.compression), rows)
            for length, rows in zip(spec.data.context_lengths, self._index.rows, strict=True)
        ]
        weights = self._index.weights * [len(bucket.examples) > 0 for bucket in self.buckets]
        if not weights.sum() > 0:
            reasons = [counted(count, reason) for reason, count in self.dropped.items()]
            raise UserError(
                f"no examples for phase {spec.phase} in the data: "
                f"{'; '.join(reasons) or 'it has none of the kind needed'} "
                f"(data.context_lengths is {spec.data.context_lengths})"
            )
        self.weights = weights / weights.sum()

    @property
    def shapes(self) -> list:
        """Length, segments, tokens per segment and examples of each bucket, and `qa_shape`."""
        return [[b.length, *b.shape, len(b.examples)] for b in self.buckets] + [self.qa_shape]

    # --------------------------------------------------------------------------- which examples

    def draw(self, seed: int, step: int, batch_size: int) -> tuple[int, Int[np.ndarray, " B"]]:
        """The global batch of a step: (number of its bucket, numbers of its examples).

        A bucket's epochs are indexed by the global step, whether or not earlier steps drew that
        bucket, so that no history is needed. With one bucket an epoch visits each example once;
        with several it visits a random part of each bucket.
        """
        bucket = drawing.draw_bucket(seed, step, self.weights)
        count = len(self.buckets[bucket].examples)
        positions = drawing.positions(step, batch_size)
        return bucket, np.asarray([drawing.example_at(seed, bucket, p, count) for p in positions])

    def held_out(self, batch_size: int, most: int) -> Iterator[tuple[int, Int[np.ndarray, " B"]]]:
        """Yields fixed evaluation batches of about `most` examples in all, at least one a bucket.

        Each is (number of its bucket, numbers of its examples, `BLANK` for a row without one).
        """
        for number, (bucket, weight) in enumerate(zip(self.buckets, self.weights, strict=True)):
            count = min(len(bucket.examples), max(1, int(most * weight))) if weight > 0 else 0
            chosen = np.random.default_rng([0, 2]).permutation(len(bucket.examples))[:count]
            for start in range(0, count, batch_size):
                rows = chosen[start : start + batch_size]
                blank = batch_size - len(rows)
                yield number, np.pad(rows, (0, blank), constant_values=BLANK)

    def other_text(self, bucket: int, number: int) -> tuple[int, int] | None:
        """(bucket, number) of an example whose text differs from that of a given example.

        It is of the next such text in the same bucket, else in another. None where all examples
        share one text; texts of the same tokens count as one.
        """
        own = self.buckets[bucket].examples[number][0]
        own_ids = self.tokens.text(own)
        for candidate in sorted(range(len(self.buckets)), key=lambda b: b != bucket):
            texts = self.buckets[candidate].examples[:, 0]  # sorted, as the distinct ones are
            distinct = self._distinct_texts[candidate]
            for text in np.roll(distinct, -np.searchsorted(distinct, own, side="right")):
                if not np.array_equal(self.tokens.text(text), own_ids):
                    first, end = (np.searchsorted(texts, text, side=s) for s in ("left", "right"))
                    # `number` varies the choice, so that not only the beginnings of texts are used
                    return candidate, int(first + number % (end - first))
        return None

    @functools.cached_property
    def _distinct_texts(self):
        return [np.unique(bucket.examples[:, 0]) for bucket in self.buckets]

    @functools.cached_property
    def _has_other_texts(self):
        bucket = next(i for i, bucket in enumerate(self.buckets) if len(bucket.examples))
        return self.other_text(bucket, 0) is not None

    # ------------------------------------------------------------------------------ into arrays

    def example(self, bucket: int, number: int) -> Example:
        """One example of a bucket; for `BLANK` one without tokens and targets."""
        if number == BLANK:
            return Example([], {})
        context, targets = self._index.read(self.buckets[bucket].examples[number])
        if "ae" in self.spec.objectives:
            padded_to = 0
            if self.spec.pad_labels:
                padded_to = padded_length(len(context), self.spec.compression)
            targets["ae"] = [ae_target(context, self.spec.framing, padded_to)]
        return Example(context, targets)

    def collate(self, bucket: int, rows: Int[np.ndarray, " B"]) -> Batch:
        """`context [B, S, N]`, `lengths [B, S]` and `targets` of the given examples of a bucket."""
        examples = [self.example(bucket, number) for number in rows.tolist()]
        return collate(examples, self.buckets[bucket].length, self.spec, self.qa_shape)

    def other_contexts(self, bucket: int, rows: Int[np.ndarray, " B"]) -> Batch | None:
        """`context` and `lengths` as from `collate`, but of another text than each row's own.

        None, whatever the rows, where all examples share one text.
        """
        if not self._has_other_texts:
            return None
        length = self.buckets[bucket].length
        contexts = [
            [] if number == BLANK else self.example(*self.other_text(bucket, number)).context
            for number in rows.tolist()
        ]
        # A context from another bucket may be longer than this one's.
        contexts = [context[:length] for context in contexts]
        return collate_contexts(contexts, length, self.spec)
