"""Fixed-shape batches as a pure function of (seed, step).

An example is one context with all its targets. In pretraining it is a window of a text (AE) with the window after it (LM); in
fine-tuning a context with some of its questions (QA), and perhaps the context itself (AE). Contexts are padded to one of a few
lengths (buckets); a step draws one bucket for the whole batch, so that all processes agree on shapes.
"""

import dataclasses
import functools
import math

import grain
import jax
import numpy as np

from icae_jax.compression import segments
from icae_jax.data import reading, sources
from icae_jax.data.rows import check_no_answer
from icae_jax.errors import UserError
from icae_jax.objectives import targets as layouts
from icae_jax.objectives.packing import pack


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """train, eval: sources (`data.sources`). context_lengths: buckets, tokens of a context at most, with the tokenizer's `<s>`.

    train_weights: the share of training's examples that each source of train makes up, in any unit (empty: all are one set).
    context_weights: how often pretraining draws each bucket (empty: equally often). questions_per_context: QA targets of one
    example at most; a context with more makes several examples. max_target_tokens: longer QA targets are left out, counted.
    max_row_bytes: what one line of a file, or a text file, may hold once unpacked. no_answer: the answer to train questions with that
    have none ("": they are left out, counted). strict: an error in place of rows that are left out for being empty.
    """

    train: str = ""
    eval: str = ""
    train_weights: tuple[float, ...] = ()
    context_lengths: tuple[int, ...] = (512,)
    context_weights: tuple[float, ...] = ()
    questions_per_context: int = 4
    max_target_tokens: int = 256
    max_row_bytes: int = reading.MAX_ROW_BYTES
    cache_dir: str = ""
    tfds_dir: str = ""
    no_answer: str = ""
    strict: bool = False

    def __post_init__(self):
        check_no_answer(self.no_answer, "data.no_answer")
        lengths = self.context_lengths
        if not lengths or min(lengths) < 2 or list(lengths) != sorted(set(lengths)):
            raise UserError(
                f"data.context_lengths is {lengths}; give rising lengths of at least 2 tokens, such as (256, 512)"
            )
        if self.context_weights and (
            len(self.context_weights) != len(self.context_lengths) or min(self.context_weights) < 0
        ):
            raise UserError(
                f"data.context_weights {self.context_weights} must give one weight >= 0 for each of data.context_lengths"
            )
        if self.context_weights and not sum(self.context_weights) > 0:
            raise UserError(
                f"data.context_weights {self.context_weights} are all zero; give at least one a positive weight"
            )
        if self.train_weights:
            weights, named = self.train_weights, sources.split_source(self.train)
            if len(weights) != len(named) or not all(0 <= w < math.inf for w in weights):
                raise UserError(
                    f"data.train_weights {weights} must hold a weight >= 0 for each source of data.train, {', '.join(named)}"
                )
            if not sum(weights) > 0:
                raise UserError(
                    f"data.train_weights {weights} are all zero; give at least one a positive weight"
                )
        for name in ("questions_per_context", "max_target_tokens", "max_row_bytes"):
            if getattr(self, name) <= 0:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be positive")


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One padded context length and its examples: rows of (text, start, stop, next stop) or (text, first, last question)."""

    length: int
    shape: tuple[int, int]
    examples: np.ndarray


def segment_shape(length, compression):
    """(segments, tokens of each) of the contexts of a bucket. A shorter text may fill one whole segment, which is longer than the
    near-equal segments of the longest.
    """
    return segments.segment_shape(length, compression)[0], min(length, compression.segment_tokens)


def target_shapes(config, compression, objectives, length, qa_shape, pad_labels):
    """`{objective: (G, T, U)}` of a bucket's targets, see `objectives.targets.pack`. qa_shape: (T, U) of questions with their answers."""
    size = 1 + (
        segments.segment_shape(length, compression)[0] * compression.segment_tokens
        if pad_labels
        else length
    )
    return {
        o: (config.questions_per_context, *qa_shape) if o == "qa" else (1, size, size)
        for o in objectives
    }


@functools.lru_cache(maxsize=32)
def _permutation(seed, bucket, epoch, count, *source):
    return np.random.default_rng([seed, 1, bucket, epoch, *source]).permutation(count)


def in_order(seed, bucket, position, count, *source):
    """Which of a bucket's `count` examples stands at a position of the endless row of its epochs, each of which has its own order."""
    return _permutation(seed, bucket, int(position // count), count, *source)[position % count]


def _spread(counts):
    """(which, number) of everything where item i has counts[i]: `[2, 0, 1]` gives `[0, 0, 2]`, `[0, 1, 0]`."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


class Examples:
    """The examples of one tokenised source under one configuration, and how they become arrays.

    phase: "pretrain" or "finetune". objectives: those with a weight, of "ae", "lm", "qa". pad_labels: AE targets go on to the end of
    the padded segments. dropped: `{reason: count}` of what was left out. qa_shape: (inputs, labels) of the longest question with its
    answer, None without questions. UserError where nothing is left.
    """

    def __init__(
        self, tokens, config, compression, phase, objectives, template, framing, pad_labels=False
    ):
        self.tokens, self.config, self.compression = tokens, config, compression
        self.objectives, self.template, self.framing, self.pad_labels = (
            objectives,
            template,
            framing,
            pad_labels,
        )
        self.dropped, self.qa_shape = dict(tokens.left_out), None
        if phase == "pretrain":
            self._check_lm()
            examples = [self._windows(length) for length in config.context_lengths]
            weights = np.asarray(config.context_weights or [1.0] * len(examples), float)
        else:
            examples = self._questions()
            weights = np.asarray([len(e) for e in examples], float)
        self.buckets = [
            Bucket(length, segment_shape(length, compression), e)
            for length, e in zip(config.context_lengths, examples, strict=True)
        ]
        weights = weights * [len(e) > 0 for e in examples]
        if not weights.sum() > 0:
            why = (
                "; ".join(f"{count} {reason}" for reason, count in self.dropped.items())
                or "it has none of the kind needed"
            )
            raise UserError(
                f"no examples for phase {phase} in the data: {why} (data.context_lengths is {config.context_lengths})"
            )
        self.weights = weights / weights.sum()

    @property
    def key(self):
        """Identity of tokenizer and source."""
        return self.tokens.key

    @property
    def earlier_key(self):
        """The same as the first version of token caches had it."""
        return self.tokens.earlier_key

    def _check_lm(self):
        shortest, alone = (
            self.config.context_lengths[0],
            len(self.framing.start) + layouts.LM_UNLABELLED,
        )
        if "lm" in self.objectives and shortest <= alone:
            raise UserError(
                f"data.context_lengths holds {shortest}, too short for objectives.lm: the first {layouts.LM_UNLABELLED} tokens of a "
                f"continuation, which is as long as its context, are no labels; give at least {alone + 1}, or set objectives.lm to 0"
            )

    @property
    def shapes(self):
        """What the shapes of batches, and which examples they hold, depend on: of each bucket its length, segments and examples."""
        return [[b.length, *b.shape, len(b.examples)] for b in self.buckets] + [self.qa_shape]

    def _windows(self, length):
        """(text, start, stop, next stop) of windows of `length` tokens, `<s>` included; a short rest stands if it is all, or half."""
        size = length - len(self.framing.start)
        counts = np.diff(self.tokens.text_offsets)
        text, number = _spread(-(-counts // size))
        start, count = number * size, counts[text]
        stop = np.minimum(start + size, count)
        after = np.minimum(stop + size, count)
        continued = after - stop > min(layouts.LM_MINIMUM, size - 1)
        rows = np.stack([text, start, stop, np.where(continued, after, stop)], 1)
        return rows[(start == 0) | (2 * (stop - start) >= size)]

    def _questions(self):
        """(text, first question, last + 1) for every bucket."""
        offsets, group = self.tokens.question_offsets, self.config.questions_per_context
        asked, lengths = (
            np.diff(offsets),
            np.diff(self.tokens.text_offsets) + len(self.framing.start),
        )
        bucket = np.where(asked > 0, np.searchsorted(self.config.context_lengths, lengths), -1)
        self._drop("texts without a question", asked == 0)
        self._drop(
            "contexts longer than the largest of data.context_lengths",
            bucket == len(self.config.context_lengths),
        )
        prompts, answers = np.diff(self.tokens.prompt_offsets), np.diff(self.tokens.answer_offsets)
        inputs, labels = self.template.target_sizes(prompts, answers)
        self._fits = inputs <= self.config.max_target_tokens
        self._drop("questions longer than data.max_target_tokens", ~self._fits)
        self.qa_shape = tuple(int(sizes[self._fits].max(initial=1)) for sizes in (inputs, labels))
        fitting_before = np.concatenate([[0], np.cumsum(self._fits)])
        result = []
        for chosen in (
            np.flatnonzero(bucket == number) for number in range(len(self.config.context_lengths))
        ):
            at, number = _spread(-(-asked[chosen] // group))
            text = chosen[at]
            first = offsets[text] + number * group
            last = np.minimum(first + group, offsets[text + 1])
            result.append(
                np.stack([text, first, last], 1)[fitting_before[last] > fitting_before[first]]
            )
        return result

    def _drop(self, reason, which):
        if which.any():
            self.dropped[reason] = int(which.sum())

    def _question(self, q):
        """The `Target` of a question, None where it is too long."""
        return (
            self.template.target(self.tokens.prompt(q).tolist(), self.tokens.answer(q).tolist())
            if self._fits[q]
            else None
        )

    # ------------------------------------------------------------------------------------------------- which examples

    def draw(self, seed, step, batch_size):
        """The global batch of a step: (bucket number, example numbers `[batch_size]`). Every epoch of a bucket has its own order.

        A bucket's order is indexed by the global step, whether or not earlier steps drew that bucket: with one bucket an epoch is
        each example once; with several, each epoch takes a random part of every bucket, in exchange for needing no history.
        """
        bucket = int(
            np.random.default_rng([seed, 0, step]).choice(len(self.buckets), p=self.weights)
        )
        count = len(self.buckets[bucket].examples)
        at = np.arange(step * batch_size, (step + 1) * batch_size)
        return bucket, np.asarray([in_order(seed, bucket, i, count) for i in at])

    def held_out(self, batch_size, most):
        """Fixed batches for evaluation, about `most` examples, at least one a bucket.

        Yields (bucket number, example numbers, -1 for blank rows).
        """
        for number, bucket in enumerate(self.buckets):
            count = min(
                len(bucket.examples),
                max(1, int(most * self.weights[number])) if self.weights[number] > 0 else 0,
            )
            chosen = np.random.default_rng([0, 2]).permutation(len(bucket.examples))[:count]
            for start in range(0, count, batch_size):
                rows = np.full(batch_size, -1)
                part = chosen[start : start + batch_size]
                rows[: len(part)] = part
                yield number, rows

    def of_another_text(self, bucket, row):
        """(bucket number, example number) of another text than an example's own: the next in its bucket, or else in the others.

        None where all examples are of one text; texts of the same tokens are one.
        """
        own = self.buckets[bucket].examples[row][0]
        ids = self.tokens.text(own)
        for number in sorted(range(len(self.buckets)), key=lambda n: n != bucket):
            texts, distinct = (
                self.buckets[number].examples[:, 0],
                self._distinct_texts[number],
            )  # both rising
            for text in np.roll(distinct, -np.searchsorted(distinct, own, side="right")):
                if not np.array_equal(self.tokens.text(text), ids):
                    first, end = (
                        np.searchsorted(texts, text),
                        np.searchsorted(texts, text, side="right"),
                    )
                    return number, int(
                        first + row % (end - first)
                    )  # not only the beginnings of texts
        return None

    @functools.cached_property
    def _distinct_texts(self):
        return [np.unique(bucket.examples[:, 0]) for bucket in self.buckets]

    # ------------------------------------------------------------------------------------------------- into arrays

    def targets(self, bucket, row):
        """(context ids, `{objective: [Target or None]}`) of one example of a bucket; of -1, a blank row, nothing."""
        if row < 0:
            return [], {}
        example = self.buckets[bucket].examples[row]
        text = self.tokens.text(example[0])
        if len(example) == 4:
            _, start, stop, after = example
            context, targets = [*self.framing.start, *text[start:stop].tolist()], {}
            if "lm" in self.objectives:
                targets["lm"] = [
                    layouts.lm_target(text[stop:after].tolist()) if after > stop else None
                ]
        else:
            _, first, last = example
            context, targets = [*self.framing.start, *text.tolist()], {}
            if "qa" in self.objectives:
                targets["qa"] = [self._question(q) for q in range(first, last)]
        if "ae" in self.objectives:
            padded_to = 0
            if self.pad_labels:
                padded_to = (
                    segments.segment_shape(len(context), self.compression)[0]
                    * self.compression.segment_tokens
                )
            targets["ae"] = [layouts.ae_target(context, self.framing, padded_to)]
        return context, targets

    def collate(self, bucket, rows):
        """Arrays of the given examples of one bucket (-1: a blank row): `context [B, S, N]`, `lengths [B, S]`, `targets`.

        AE and LM targets have one shape, so that both run in one decoder call.
        """
        return self.pack(bucket, [self.targets(bucket, r) for r in rows])

    def other_contexts(self, bucket, rows):
        """`context` and `lengths` as `collate` gives them, but of another text than each example's own, in the same shapes.

        None, whatever the rows, where all examples are of one text.
        """
        if not self._several_texts:
            return None
        contexts = [
            [] if row < 0 else self.targets(*self.of_another_text(bucket, row))[0] for row in rows
        ]
        length = self.buckets[bucket].length  # one from another bucket may be longer
        return self._segments(bucket, [context[:length] for context in contexts])

    @functools.cached_property
    def _several_texts(self):
        return (
            self.of_another_text(
                next(i for i, bucket in enumerate(self.buckets) if len(bucket.examples)), 0
            )
            is not None
        )

    def _segments(self, bucket, contexts):
        ids, lengths = segments.segment_contexts(
            contexts, self.compression, self.buckets[bucket].shape, self.framing.eos
        )
        return {"context": ids, "lengths": lengths}

    def pack(self, bucket, made, qa_shape=None):
        """The same, of examples that `targets` made. qa_shape: that of questions, where those of other sources are among them."""
        length, qa_shape = self.buckets[bucket].length, qa_shape or self.qa_shape
        shapes = target_shapes(
            self.config, self.compression, self.objectives, length, qa_shape, self.pad_labels
        )
        targets = {
            o: pack([t.get(o, []) for _, t in made], *shape) for o, shape in shapes.items()
        }
        return self._segments(bucket, [context for context, _ in made]) | {"targets": targets}


@jax.tree_util.register_static
class StaticInt(int):
    """A whole number in a batch that is no array: a jitted function compiles once for each of its values."""


def draw_k(seed, step, choices):
    """The number of memory tokens a segment of a step, one of `choices`, equally often."""
    return StaticInt(np.random.default_rng([seed, 3, step]).choice(choices))


def train_batches(examples, seed, batch_size, start, stop, k_choices, rows=slice(None)):
    """Iterates over the batches of steps start … stop - 1, made ahead. rows: those of the global batch that are made, a process's own;
    every process draws the same `k`.
    """

    def make(step):
        bucket, drawn = examples.draw(seed, step, batch_size)
        return examples.collate(bucket, drawn[rows]) | {"k": draw_k(seed, step, k_choices)}

    return ahead(make, start, stop)


def ahead(make, start, stop):
    """Iterates over `make(step)` for start … stop - 1, made ahead of use by a thread."""
    steps = grain.MapDataset.range(start, stop).map(lambda step: make(int(step)))
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
