"""`span`: the perplexity of a continuation as the memories of 1, 2, 4, … segments before it are joined.

After arXiv 2307.06945, figure 6. Perplexity and labels as in `continue`; the continuation is the same for every number of segments.
"""

from icae_jax.errors import UserError
from icae_jax.evaluation.examples import example
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.common import CUT, FULL, NONE
from icae_jax.evaluation.suites.continuation import plain_arms
from icae_jax.objectives.targets import Target


class Span(common.Suite):
    """Segments of `context_lengths` tokens (one number; by default what one segment holds), each compressed by itself, then joined."""

    name = "span"
    METRICS = ("perplexity",)
    ARMS = (FULL, CUT, NONE)
    group_label = "segments joined"

    def __init__(self, compressor, options):
        super().__init__(compressor, options)
        self.tokens = self.one_length()
        if self.tokens > self.segment:
            raise UserError(
                f"--context_lengths is {self.tokens}, but one segment of this adapter holds {self.segment} tokens"
            )
        self.most = max(options.spans)

    def examples(self, text):
        """The text's front as segments, the tokens after them as continuation."""
        ids, total = self.compressor.ids(text.text), self.most * self.tokens
        least = min(common.CONTINUATION_LEAST, self.options.continuation_tokens)
        if len(ids) < total + least:
            return f"texts shorter than {total + least} tokens, {self.most} segments and a continuation (see --spans, --context_lengths)"
        rest = tuple(ids[total : total + self.options.continuation_tokens])
        segment = self.tokens + len(
            self.compressor.framing.start
        )  # each begins as a text of its own
        written, start = self.compressor.positions(self.most * segment, self.choices[0], self.most)
        wrong = self.does_not_fit(self.tokens, 0, total + len(rest) + 1)
        if max(written, start + len(rest)) > self.positions:
            wrong = (
                f"texts whose joined memories need more than the base's {self.positions} positions"
            )
        return wrong or [example(text, ids[:total], total, continuation=rest)]

    def main(self, records):
        """Those of the most segments."""
        return [r for r in records if r["group"]["segments"] == str(self.most)]

    def measure(self, batch):
        compressor, size = self.compressor, self.options.batch_size
        spans, rows = sorted(self.options.spans), [[Target(list(e.continuation), 1)] for e in batch]
        records = {s: [common.record(e, group={"segments": str(s)}) for e in batch] for s in spans}
        parts = [
            compressor.framed(e.ids[i * self.tokens : (i + 1) * self.tokens])
            for i in range(self.most)
            for e in batch
        ]

        def note(segments, arm, found):
            for one, score in zip(records[segments], found, strict=True):
                common.add(one, arm, perplexity=common.nats(score))

        for arm, memory in self.memories(parts):
            each = [memory[i * len(batch) : (i + 1) * len(batch)] for i in range(self.most)]
            for s in spans:
                found = compressor.score_targets(
                    compressor.join(each[self.most - s :]), rows, "lm", size
                )
                note(s, arm, [row[0] for row in found])
        for s in spans:
            contexts = [e.ids[(self.most - s) * self.tokens :] for e in batch]
            for arm, found in plain_arms(self, batch, contexts, [s * self.choices[0]] * len(batch)):
                note(s, arm, found)
        return [[records[s][i] for s in spans] for i in range(len(batch))]
