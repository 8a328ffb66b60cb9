"""What all suites share: options, arms, and how one example's scores are written down.

A record is what one example gave: `{"id", "cluster", "set", "group", "sums": {metric: {arm: numbers}}, "texts", "ties"}`, plain JSON. The
numbers are what a score is made of (`METRICS` says how): summed over examples they give the score of all.
"""

import dataclasses
from typing import NamedTuple

from icae_jax.compression import segments
from icae_jax.errors import UserError
from icae_jax.evaluation import scores, statistics

MEMORY, SHUFFLED, FULL, CUT, NONE = (
    "memory",
    "shuffled memory",
    "full context",
    "cut context",
    "no context",
)
BUCKET = 100  # tokens; the width of the papers' length buckets
CONTINUATION_LEAST = 16  # tokens; a shorter rest of a text tells little of how well it is continued


class Metric(NamedTuple):
    """label: with its unit. aggregate: from summed numbers to the score. digits: shown. better: "higher" or "lower"."""

    label: str
    aggregate: object
    digits: int
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
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a suite may be told; each uses what concerns it.

    k: memory tokens a segment, () for all that the adapter knows. context_lengths: tokens of a context, () for one segment.
    continuation_tokens, max_new_tokens: at most. spans: numbers of segments that are joined. plain_template: in which the base alone is
    asked, "" for the adapter's without trained tokens. arms: () for all. batch_size: contexts at once; it changes no score.
    """

    k: tuple[int, ...] = ()
    context_lengths: tuple[int, ...] = ()
    continuation_tokens: int = 128
    max_new_tokens: int = 128
    spans: tuple[int, ...] = (1, 2, 4)
    plain_template: str = ""
    arms: tuple[str, ...] = ()
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
                "--continuation_tokens is 1; give at least 2, since the first token of a continuation is no label"
            )
        if not self.spans:
            raise UserError("--spans is empty; give numbers of segments, such as 1,2,4")

    def wants(self, arm):
        return not self.arms or arm in self.arms


class Suite:
    """One measurement. Subclasses have `name`, `METRICS` (shown, in order), `ARMS` beside the memory, `examples` and `measure`.

    compressor: what is measured. options: `Options`. UserError where an option does not suit the adapter.
    """

    ARMS = (SHUFFLED,)
    group_label = ""  # what the values of a record's group stand for, in figures

    def __init__(self, compressor, options):
        self.compressor, self.options = compressor, options
        self.choices = sorted(
            {compressor.config.choose(k) for k in options.k or compressor.config.choices},
            reverse=True,
        )
        self.positions = compressor.base.config.max_position_embeddings
        self.segment = max(
            1, compressor.config.segment_tokens - len(compressor.framing.start)
        )  # tokens of one full segment
        known = self.known_arms()
        unknown = [arm for arm in options.arms if arm not in known]
        if unknown:
            raise UserError(
                f"--arms {unknown[0]!r} is no arm of suite {self.name}; choose from {', '.join(sorted(known))}"
            )

    def known_arms(self):
        """What --arms may name."""
        return {*self.ARMS, *map(self.arm_of, self.choices)}

    def one_length(self):
        """The one number of --context_lengths, by default what a segment holds. UserError where there are several."""
        if len(self.options.context_lengths) > 1:
            raise UserError(
                f"--context_lengths is {self.options.context_lengths}; suite {self.name} takes one number"
            )
        return self.options.context_lengths[0] if self.options.context_lengths else self.segment

    def arm_of(self, k):
        """The name of the memory's arm with k tokens a segment: plain "memory" for the most."""
        return MEMORY if k == self.choices[0] else f"{MEMORY} k={k}"

    def memories(self, contexts):
        """Yields (arm, memory) of contexts (framed ids) for every wanted k, the most tokens first."""
        for k in self.choices:
            if self.options.wants(self.arm_of(k)):
                yield (
                    self.arm_of(k),
                    self.compressor.compress_ids(contexts, self.options.batch_size, k),
                )

    def shuffled(self, batch):
        """The memories of the examples' partners, None where a partner is missing or the arm is not wanted."""
        if not self.options.wants(SHUFFLED) or not all(example.partner for example in batch):
            return None
        # As long as the context itself at most, so that it leaves the same room behind it.
        contexts = [self.compressor.framed(e.partner[: max(1, len(e.ids))]) for e in batch]
        return self.compressor.compress_ids(contexts, self.options.batch_size, self.choices[0])

    def framed(self, batch):
        return [self.compressor.framed(example.ids) for example in batch]

    def memory_tokens(self, tokens):
        """Memory tokens of a context of so many tokens, with the most a segment."""
        return (
            segments.segment_shape(
                tokens + len(self.compressor.framing.start), self.compressor.config
            )[0]
            * self.choices[0]
        )

    def does_not_fit(self, tokens, behind, alone=0, cut=0):
        """Why a context of so many tokens cannot be used, None where it can.

        behind: positions needed behind its memory, the template's head included. alone: all that the base needs where it reads the tokens
        themselves, 0 where it does not. cut: the same for the cut context, where that may take more than the memory.
        """
        written, start = self.compressor.positions(
            tokens + len(self.compressor.framing.start), self.choices[0]
        )
        short = self.options.wants(CUT) or self.options.wants(NONE)
        needed = max(
            written, start + behind, alone if self.options.wants(FULL) else 0, cut if short else 0
        )
        return (
            f"texts that need more than the base's {self.positions} positions"
            if needed > self.positions
            else None
        )

    def main(self, records):
        """The records that the scores of all are taken from; the rest stands in groups."""
        return records


def bucket(tokens):
    """The papers' bucket of a length: "1-100", "101-200", …"""
    low = (tokens - 1) // BUCKET * BUCKET
    return f"{low + 1}-{low + BUCKET}"


def record(example, question=None, group=None):
    """An empty record of an example, or of one of its questions."""
    return {
        "id": question.id if question else example.id, "cluster": example.cluster, "set": example.set,
        "group": group or example.group, "sums": {}, "texts": {}, "ties": {},
    }  # fmt: skip


def add(one, arm, **numbers):
    """Writes an arm's numbers into a record: a number alone is a value to be averaged, a list is taken as it is."""
    for metric, value in numbers.items():
        one["sums"].setdefault(metric, {})[arm] = (
            [float(v) for v in value] if isinstance(value, list | tuple) else [float(value), 1.0]
        )


def nats(score):
    """A `Score` as (negative log-likelihood in nats, labels)."""
    return [-score.log_prob, score.tokens]


def own_score(metric, numbers):
    """One example's score of its own numbers."""
    return (
        scores.sentence_bleu(numbers)
        if metric == "bleu"
        else float(METRICS[metric].aggregate(numbers))
    )
