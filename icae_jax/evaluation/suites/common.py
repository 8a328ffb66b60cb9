"""What all suites share: options, arms, metrics, and the record of an example's scores."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from icae_jax.compression import segments
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError
from icae_jax.evaluation import scores, statistics
from icae_jax.evaluation.examples import Example, Question, Text
from icae_jax.evaluation.stored import StoredMemories
from icae_jax.inference import cascade
from icae_jax.inference.compressor import Compressor
from icae_jax.inference.reading import Score

MEMORY, SHUFFLED = "memory", "shuffled memory"
FULL, CUT, NONE = "full context", "cut context", "no context"
TUNED = "full context with decoder LoRA"
CASCADE = "cascade"
BUCKET = 100  # tokens: the width of the papers' length buckets
CONTINUATION_LEAST = 16  # tokens: on a shorter rest of a text, perplexity says little

Record = dict[str, Any]
"""What one example, or one question, gave, as plain JSON.

`{"id", "cluster", "set", "group", "sums": {metric: {arm: numbers}}, "sizes": {arm: [memory tokens,
bytes]}, "texts", "ties"}`. Summed over examples, the numbers give the score of all, by the metric's
`aggregate`. Bytes are those of the memory's dtype; an arm without a memory has 0 tokens and None.
"""


class Metric(NamedTuple):
    """label: with its unit. aggregate: summed numbers to score. better: "higher" or "lower"."""

    label: str
    aggregate: Callable | None
    digits: int  # shown
    better: str


METRICS = {
    "ae_loss": Metric("AE loss, nats/token", statistics.ratio, 3, "lower"),
    "bleu": Metric("BLEU-4", statistics.corpus_bleu, 1, "higher"),
    "exact_match": Metric("exact match, %", statistics.ratio, 1, "higher"),
    "prefix_match": Metric("prefix match, %", statistics.ratio, 1, "higher"),
    "perplexity": Metric("perplexity", statistics.perplexity, 3, "lower"),
    "f1": Metric("F1", statistics.ratio, 1, "higher"),
    "em": Metric("EM", statistics.ratio, 1, "higher"),
    "rouge1": Metric("ROUGE-1", statistics.ratio, 1, "higher"),
    "rouge2": Metric("ROUGE-2", statistics.ratio, 1, "higher"),
    "rougeL": Metric("ROUGE-L", statistics.ratio, 1, "higher"),
    "answer_loss": Metric("answer loss, nats/token", statistics.ratio, 3, "lower"),
    "retention": Metric("F1 retained, %", None, 1, "higher"),
    "retention_tuned": Metric("F1 retained of decoder LoRA's, %", None, 1, "higher"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of suites; each takes what concerns it.

    k: memory tokens per segment; () for all that the adapter supports.
    context_lengths: tokens of a context; () for what one segment holds.
    continuation_tokens, max_new_tokens: upper limits.
    spans: numbers of segments to join.
    plain_template: for the base without a memory; "" for the adapter's without trained tokens.
    arms: () for all.
    ladder: rising memory tokens per segment of the cascade (`inference.cascade`); () for none.
    threshold: of the cascade, nats per token.
    batch_size: contexts at once; it changes no score.
    """

    k: tuple[int, ...] = ()
    context_lengths: tuple[int, ...] = ()
    continuation_tokens: int = 128
    max_new_tokens: int = 128
    spans: tuple[int, ...] = (1, 2, 4)
    plain_template: str = ""
    arms: tuple[str, ...] = ()
    ladder: tuple[int, ...] = ()
    threshold: float = cascade.LIKELY
    batch_size: int = 16

    def __post_init__(self):
        for name in ("k", "context_lengths", "spans"):
            values = getattr(self, name)
            if any(v < 1 for v in values) or len(set(values)) != len(values):
                raise UserError(f"--{name} is {values}; give different whole numbers from 1 on")
        for name in ("continuation_tokens", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.continuation_tokens < 2:
            raise UserError(
                "--continuation_tokens is 1; give at least 2, since a continuation's first token "
                "is not a label"
            )
        if not math.isfinite(self.threshold):  # results are JSON, which has no other numbers
            raise UserError(
                f"--threshold is {self.threshold}; give a finite number of nats per token, such as "
                f"{cascade.LIKELY:.3f}"
            )
        if not self.spans:
            raise UserError("--spans is empty; give numbers of segments, such as 1,2,4")

    def wants(self, arm: str) -> bool:
        """Whether an arm is to be measured."""
        return not self.arms or arm in self.arms


@runtime_checkable
class Measurement(Protocol):
    """What running a suite and summing it up needs of it."""

    name: str
    METRICS: tuple[str, ...]

    def measure(self, batch: Sequence[Example]) -> list[list[Record]]:
        """The records of each example, one or, of several questions, more."""

    def main(self, records: Sequence[Record]) -> Sequence[Record]:
        """The records that the scores of all are taken from; groups have all records."""


class Suite:
    """One measurement of a compressor.

    Subclasses have `name`, `METRICS` (in the order shown), `ARMS` beside the memory, `examples`
    and `measure`. UserError where an option does not suit the adapter.
    """

    name: str
    METRICS: tuple[str, ...]
    ARMS: tuple[str, ...] = (SHUFFLED,)
    group_label = ""  # the x axis of figures by group

    stored: StoredMemories | None = None  # memories of a store, read in place of compressing

    def __init__(self, compressor: Compressor, options: Options):
        self.compressor, self.options = compressor, options
        config = compressor.config
        choices = {config.choose(k) for k in options.k or config.choices}
        self.choices = sorted(choices, reverse=True)
        self.has_decoder_lora = compressor.decoder.lora is not None
        self.positions = compressor.base.config.max_position_embeddings
        self.most_k = self.choices[0]
        # Tokens of text that one segment holds.
        self.segment = max(1, config.segment_tokens - len(compressor.framing.start))
        known = self.known_arms()
        unknown = [arm for arm in options.arms if arm not in known]
        if unknown:
            raise UserError(
                f"--arms {unknown[0]!r} is no arm of suite {self.name}; "
                f"choose from {', '.join(sorted(known))}"
            )

    def examples(self, text: Text) -> list[Example] | str:
        """The examples of a text, or the reason why it cannot be used."""
        raise NotImplementedError

    def measure(self, batch: Sequence[Example]) -> list[list[Record]]:
        """The records of each example."""
        raise NotImplementedError

    def main(self, records: Sequence[Record]) -> Sequence[Record]:
        """The records that the scores of all are taken from; groups have all records."""
        return records

    def known_arms(self) -> set[str]:
        """What --arms may name."""
        arms = {*self.ARMS, *map(self.arm_of, self.choices)}
        return arms if self.has_decoder_lora else arms - {TUNED}

    def wants(self, arm: str) -> bool:
        """Whether an arm is to be measured, and can be."""
        return self.options.wants(arm) and (arm != TUNED or self.has_decoder_lora)

    def decoder(self, arm: str) -> Decoder:
        """What reads the text itself in an arm: the base alone, or with the decoder's LoRA."""
        return self.compressor.decoder if arm == TUNED else self.compressor.plain_decoder

    def one_length(self) -> int:
        """The one number of --context_lengths, by default what a segment holds.

        UserError where there are several.
        """
        if len(self.options.context_lengths) > 1:
            raise UserError(
                f"--context_lengths is {self.options.context_lengths}; "
                f"suite {self.name} takes one number"
            )
        return self.options.context_lengths[0] if self.options.context_lengths else self.segment

    def arm_of(self, k: int) -> str:
        """The arm of the memory with k tokens per segment: plain "memory" for the largest k."""
        return MEMORY if k == self.choices[0] else f"{MEMORY} k={k}"

    def memories(self, contexts: Sequence[Sequence[int]]) -> Iterator[tuple[str, Memory]]:
        """Yields (arm, memory) of contexts (framed ids) for every wanted k, the largest first."""
        for k in self.choices:
            arm = self.arm_of(k)
            if self.options.wants(arm):
                if self.stored is not None:
                    yield arm, self.stored.read(contexts, k)
                else:
                    yield arm, self.compressor.compress_ids(contexts, self.options.batch_size, k)

    def add_size(self, record: Record, arm: str, memory: Memory | None, row: int) -> None:
        """Writes into a record what an arm reads of one text, in bytes as it is kept."""
        size = (0, None)
        if memory is not None:
            stored = self.stored is not None and arm != SHUFFLED
            per_token = self.stored.bytes_per_token if stored else memory.bytes_per_token
            tokens = int(memory.tokens[row])
            size = (tokens, tokens * per_token)
        record["sizes"][arm] = list(size)

    def shuffled(self, batch: Sequence[Example]) -> Memory | None:
        """The memories of the examples' partners, which are compressed even with a store.

        None where a partner is missing or the arm is not wanted.
        """
        if not self.options.wants(SHUFFLED) or not all(example.partner for example in batch):
            return None
        # At most as long as the context itself, so that it leaves the same room behind it.
        contexts = [self.compressor.framed(e.partner[: max(1, len(e.ids))]) for e in batch]
        return self.compressor.compress_ids(contexts, self.options.batch_size, self.choices[0])

    def framed(self, batch: Sequence[Example]) -> list[list[int]]:
        """The contexts' ids as the encoder reads them."""
        return [self.compressor.framed(example.ids) for example in batch]

    def memory_tokens(self, tokens: int) -> int:
        """The memory tokens of a context of so many tokens, at the largest k."""
        framed = tokens + len(self.compressor.framing.start)
        return segments.segment_shape(framed, self.compressor.config)[0] * self.choices[0]

    def does_not_fit(self, tokens: int, behind: int, alone: int = 0, cut: int = 0) -> str | None:
        """Why a context cannot be used, or None.

        Args:
          tokens: its length.
          behind: positions needed behind its memory, the template's head included.
          alone: all positions that the base needs to read the tokens themselves; 0 if it does not.
          cut: the same for the cut context, where that may take more than the memory.
        """
        framed = tokens + len(self.compressor.framing.start)
        written, start = self.compressor.positions(framed, self.most_k)
        needed = [written, start + behind]
        if self.wants(FULL) or self.wants(TUNED):
            needed.append(alone)
        if self.options.wants(CUT) or self.options.wants(NONE):
            needed.append(cut)
        if max(needed) <= self.positions:
            return None
        return f"texts too long for the base's {self.positions} positions"


def bucket(tokens: int) -> str:
    """The papers' bucket of a length: "1-100", "101-200", …"""
    low = (tokens - 1) // BUCKET * BUCKET
    return f"{low + 1}-{low + BUCKET}"


def record(
    example: Example, question: Question | None = None, group: dict[str, str] | None = None
) -> Record:
    """An empty record of an example, or of one of its questions."""
    return {
        "id": question.id if question else example.id,
        "cluster": example.cluster,
        "set": example.set,
        "group": group or example.group,
        "sums": {},
        "sizes": {},
        "texts": {},
        "ties": {},
    }


def add(record: Record, arm: str, **numbers) -> None:
    """Writes an arm's numbers into a record, by metric.

    A single number is a value to be averaged; a list is taken as it is.
    """
    for metric, value in numbers.items():
        values = value if isinstance(value, list | tuple) else (value, 1.0)
        record["sums"].setdefault(metric, {})[arm] = [float(v) for v in values]


def nats(score: Score) -> list[float | int]:
    """[negative log-likelihood in nats, labels] of a `Score`."""
    return [-score.log_prob, score.tokens]


def own_score(metric: str, numbers: Sequence[float | int]) -> float:
    """The score of a single example."""
    if metric == "bleu":
        return scores.sentence_bleu(numbers)
    return float(METRICS[metric].aggregate(numbers))
