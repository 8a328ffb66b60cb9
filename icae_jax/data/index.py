"""Which examples a tokenised source holds: windows of its texts, or contexts with questions."""

import dataclasses
import typing

import numpy as np
from jaxtyping import Bool, Int

from icae_jax.compression.config import CompressionConfig
from icae_jax.data.config import DataConfig
from icae_jax.data.tokens import Tokens
from icae_jax.errors import UserError
from icae_jax.objectives.targets import (
    LM_MINIMUM,
    LM_UNLABELLED,
    Framing,
    Target,
    Template,
    lm_target,
)


@dataclasses.dataclass(frozen=True)
class ExampleSpec:
    """How tokens become examples.

    Attributes:
      data: context lengths and limits.
      compression: how contexts are cut into segments.
      phase: "pretrain" (windows of text, for AE and LM) or "finetune" (contexts with questions,
        for QA and AE).
      objectives: the objectives that have a weight, of "ae", "lm" and "qa".
      template: how a question is put to the memory.
      framing: the ids around a text.
      pad_labels: AE targets go on to the end of the padded segments.
    """

    data: DataConfig
    compression: CompressionConfig
    phase: str
    objectives: tuple[str, ...]
    template: Template
    framing: Framing
    pad_labels: bool = False


class Example(typing.NamedTuple):
    """The token ids of one context, and its targets by objective (None: an absent target)."""

    context: list[int]
    targets: dict[str, list[Target | None]]


class Windows:
    """Pretraining examples: windows of a text (AE), each with the window that follows it (LM).

    Attributes:
      rows: per bucket (text, start, stop, end of the continuation) of each example. The last two
        are equal where there is no continuation.
      weights: how often each bucket is drawn.
      dropped: nothing is left out of the windows.
      qa_shape: None; there are no questions.

    Raises:
      UserError: a context length leaves LM without labels.
    """

    def __init__(self, tokens: Tokens, spec: ExampleSpec):
        lengths = spec.data.context_lengths
        if "lm" in spec.objectives:
            _check_lm(lengths[0], len(spec.framing.start))
        self._tokens, self._spec = tokens, spec
        self.rows = [self._windows(length) for length in lengths]
        self.weights = np.asarray(spec.data.context_weights or [1.0] * len(lengths), float)
        self.dropped: dict[str, int] = {}
        self.qa_shape = None

    def _windows(self, length) -> Int[np.ndarray, "examples 4"]:
        """Windows of `length` tokens, `<s>` included.

        The rest of a text is a window if it is the whole text or at least half a window.
        """
        size = length - len(self._spec.framing.start)
        text_lengths = np.diff(self._tokens.text_offsets)
        text, number = _enumerate_groups(-(-text_lengths // size))
        start, text_length = number * size, text_lengths[text]
        stop = np.minimum(start + size, text_length)
        after = np.minimum(stop + size, text_length)
        continued = after - stop > min(LM_MINIMUM, size - 1)
        rows = np.stack([text, start, stop, np.where(continued, after, stop)], 1)
        return rows[(start == 0) | (2 * (stop - start) >= size)]

    def read(self, row: Int[np.ndarray, "4"]) -> Example:
        """The context and the LM target of one of `rows`."""
        text_number, start, stop, after = row.tolist()
        text, targets = self._tokens.text(text_number), {}
        if "lm" in self._spec.objectives:
            continuation = text[stop:after].tolist()
            targets["lm"] = [lm_target(continuation) if continuation else None]
        return Example([*self._spec.framing.start, *text[start:stop].tolist()], targets)


class Questions:
    """Fine-tuning examples: contexts, each with some of its questions.

    Attributes:
      rows: per bucket (text, first question, last question + 1) of each example.
      weights: examples of each bucket.
      dropped: `{reason: count}` of the texts and questions that are left out.
      qa_shape: (inputs, labels) of the longest question with its answer.
    """

    def __init__(self, tokens: Tokens, spec: ExampleSpec):
        self._tokens, self._spec = tokens, spec
        prompts, answers = np.diff(tokens.prompt_offsets), np.diff(tokens.answer_offsets)
        inputs, labels = spec.template.target_sizes(prompts, answers)
        self._fits: Bool[np.ndarray, " questions"] = inputs <= spec.data.max_target_tokens
        self.qa_shape = tuple(int(sizes[self._fits].max(initial=1)) for sizes in (inputs, labels))

        lengths = np.diff(tokens.text_offsets) + len(spec.framing.start)
        buckets = np.searchsorted(spec.data.context_lengths, lengths)
        asked = np.diff(tokens.question_offsets) > 0
        too_long = asked & (buckets == len(spec.data.context_lengths))
        left_out = {
            "texts without a question": ~asked,
            "contexts longer than the largest of data.context_lengths": too_long,
            "questions longer than data.max_target_tokens": ~self._fits,
        }
        self.dropped = {reason: int(at.sum()) for reason, at in left_out.items() if at.any()}
        self.rows = [
            self._groups(np.flatnonzero(asked & (buckets == bucket)))
            for bucket in range(len(spec.data.context_lengths))
        ]
        self.weights = np.asarray([len(rows) for rows in self.rows], float)

    def _groups(self, texts) -> Int[np.ndarray, "examples 3"]:
        """The questions of these texts in groups, but for groups without a question that fits."""
        offsets, most = self._tokens.question_offsets, self._spec.data.questions_per_context
        index, number = _enumerate_groups(-(-(offsets[texts + 1] - offsets[texts]) // most))
        text = texts[index]
        first = offsets[text] + number * most
        last = np.minimum(first + most, offsets[text + 1])
        fitting_before = np.concatenate([[0], np.cumsum(self._fits)])
        some_fit = fitting_before[last] > fitting_before[first]
        return np.stack([text, first, last], 1)[some_fit]

    def read(self, row: Int[np.ndarray, "3"]) -> Example:
        """The context and the QA targets of one of `rows`; a question that is too long is None."""
        text, first, last = row.tolist()
        targets = {}
        if "qa" in self._spec.objectives:
            targets["qa"] = [self._target(question) for question in range(first, last)]
        return Example([*self._spec.framing.start, *self._tokens.text(text).tolist()], targets)

    def _target(self, question):
        if not self._fits[question]:
            return None
        prompt, answer = self._tokens.prompt(question), self._tokens.answer(question)
        return self._spec.template.target(prompt.tolist(), answer.tolist())


def _check_lm(shortest, start):
    unlabelled = start + LM_UNLABELLED
    if shortest <= unlabelled:
        raise UserError(
            f"data.context_lengths holds {shortest}, too short for objectives.lm: the first "
            f"{LM_UNLABELLED} tokens of a continuation, which is as long as its context, are not "
            f"labels; give at least {unlabelled + 1}, or set objectives.lm to 0"
        )


def _enumerate_groups(
    counts: Int[np.ndarray, " groups"],
) -> tuple[Int[np.ndarray, " items"], Int[np.ndarray, " items"]]:
    """(group, number within it) of each item of groups of these sizes.

    `[2, 0, 1]` gives `[0, 0, 2]` and `[0, 1, 0]`.
    """
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
