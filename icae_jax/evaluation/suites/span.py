"""`span`: the perplexity of a continuation as the memories of 1, 2, 4, … segments are joined.

After arXiv 2307.06945, figure 6. Perplexity and labels as in `continue`; the continuation is the
same for every number of segments, which end where it begins.
"""

from collections.abc import Sequence

from icae_jax.errors import UserError
from icae_jax.evaluation.examples import Example, Text, example
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.common import CUT, FULL, NONE, TUNED
from icae_jax.evaluation.suites.continuation import plain_arms
from icae_jax.inference.compressor import Compressor
from icae_jax.objectives.targets import Target


class Span(common.Suite):
    """Segments, each compressed by itself, then joined.

    `context_lengths` (one number) is their length, by default what one segment holds.
    """

    name = "span"
    METRICS = ("perplexity",)
    ARMS = (FULL, TUNED, CUT, NONE)
    group_label = "segments joined"

    def __init__(self, compressor: Compressor, options: common.Options):
        super().__init__(compressor, options)
        self.tokens = self.one_length()
        if self.tokens > self.segment:
            raise UserError(
                f"--context_lengths is {self.tokens}, but one segment of this adapter holds "
                f"{self.segment} tokens"
            )
        self.most = max(options.spans)

    def examples(self, text: Text) -> list[Example] | str:
        """The text's front as segments, the tokens after them as continuation."""
        ids, total = self.compressor.ids(text.text), self.most * self.tokens
        least = min(common.CONTINUATION_LEAST, self.options.continuation_tokens)
        if len(ids) < total + least:
            return (
                f"texts shorter than {total + least} tokens, {self.most} segments and "
                "a continuation (see --spans, --context_lengths)"
            )
        rest = tuple(ids[total : total + self.options.continuation_tokens])
        # Each segment begins like a text of its own.
        segment = self.tokens + len(self.compressor.framing.start)
        written, start = self.compressor.positions(self.most * segment, self.choices[0], self.most)
        if max(written, start + len(rest)) > self.positions:
            return (
                f"texts whose joined memories need more than the base's {self.positions} positions"
            )
        return self.does_not_fit(self.tokens, 0, total + len(rest) + 1) or [
            example(text, ids[:total], total, continuation=rest)
        ]

    def main(self, records: Sequence[common.Record]) -> list[common.Record]:
        """Those of the most segments."""
        return [r for r in records if r["group"]["segments"] == str(self.most)]

    def measure(self, batch: Sequence[Example]) -> list[list[common.Record]]:
        """A record of each example for each number of segments."""
        compressor, size = self.compressor, self.options.batch_size
        spans, rows = sorted(self.options.spans), [[Target(list(e.continuation), 1)] for e in batch]
        records = {n: [common.record(e, group={"segments": str(n)}) for e in batch] for n in spans}
        segments = [
            compressor.framed(e.ids[i * self.tokens : (i + 1) * self.tokens])
            for i in range(self.most)
            for e in batch
        ]

        def note(span, arm, losses, memory=None):
            for i, (record, loss) in enumerate(zip(records[span], losses, strict=True)):
                common.add(record, arm, perplexity=common.nats(loss))
                self.add_size(record, arm, memory, i)

        for arm, memory in self.memories(segments):
            by_segment = [memory[i * len(batch) : (i + 1) * len(batch)] for i in range(self.most)]
            for n in spans:
                joined = compressor.join(by_segment[self.most - n :])
                losses = compressor.score_targets(joined, rows, "lm", size)
                note(n, arm, [row[0] for row in losses], joined)
        for n in spans:
            contexts = [e.ids[(self.most - n) * self.tokens :] for e in batch]
            cut_lengths = [n * self.choices[0]] * len(batch)
            for arm, losses in plain_arms(self, batch, contexts, cut_lengths):
                note(n, arm, losses)
        return [[records[n][i] for n in spans] for i in range(len(batch))]
