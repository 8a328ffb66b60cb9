"""`continue`: the perplexity of what comes after a context, behind its memory and in the controls.

After arXiv 2307.06945, tables 1 and 6. Perplexity = exp(-sum of log p(label) / number of labels), over the labels of all texts. Labels
are all tokens of a continuation but its first, which is given in every arm: without a context nothing stands before it. So all arms have
the same labels.
"""

from icae_jax.evaluation import plain
from icae_jax.evaluation.examples import example
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.common import CUT, FULL, NONE, SHUFFLED
from icae_jax.objectives.targets import Target


def plain_arms(suite, batch, contexts, kept):
    """Yields (arm, `Score`s) of the base alone. contexts: ids of each example's; kept: how many of its last tokens the cut one has."""
    compressor = suite.compressor
    start = plain.start_ids(compressor)
    arms = {
        FULL: contexts,
        CUT: [
            c[max(0, len(c) - n) :] for c, n in zip(contexts, kept, strict=True)
        ],  # the last ones matter most to what follows
        NONE: [()] * len(batch),
    }
    for arm, given in arms.items():
        if suite.options.wants(arm):
            rows = [
                Target([*start, *c, *e.continuation], len(start) + len(c) + 1)
                for c, e in zip(given, batch, strict=True)
            ]
            yield arm, plain.score(compressor, rows, suite.options.batch_size)


class Continue(common.Suite):
    """A context of each of `context_lengths` (by default one segment), then the same continuation: contexts end where the longest ends."""

    name = "continue"
    METRICS = ("perplexity",)
    ARMS = (FULL, CUT, NONE, SHUFFLED)
    group_label = "context tokens"

    def examples(self, text):
        """The text's front as context, the tokens after it as continuation."""
        ids, lengths = (
            self.compressor.ids(text.text),
            self.options.context_lengths or (self.segment,),
        )
        longest, least = (
            max(lengths),
            min(common.CONTINUATION_LEAST, self.options.continuation_tokens),
        )
        if len(ids) < longest + least:
            return f"texts shorter than {longest + least} tokens, a context and a continuation (see --context_lengths)"
        rest = tuple(ids[longest : longest + self.options.continuation_tokens])
        return self.does_not_fit(longest, len(rest), longest + len(rest) + 1) or [
            example(
                text, ids[longest - n : longest], n, continuation=rest, group={"tokens": str(n)}
            )
            for n in lengths
        ]

    def main(self, records):
        """Those of the longest context: all lengths together would be no setting of anyone's."""
        longest = str(max(int(r["group"]["tokens"]) for r in records))
        return [r for r in records if r["group"]["tokens"] == longest]

    def measure(self, batch):
        compressor, size = self.compressor, self.options.batch_size
        records, rows = (
            [common.record(e) for e in batch],
            [[Target(list(e.continuation), 1)] for e in batch],
        )

        def note(arm, found):
            for one, score in zip(records, found, strict=True):
                common.add(one, arm, perplexity=common.nats(score))

        for arm, memory in self.memories(self.framed(batch)):
            note(arm, [row[0] for row in compressor.score_targets(memory, rows, "lm", size)])
        for arm, found in plain_arms(
            self, batch, [e.ids for e in batch], [self.memory_tokens(len(e.ids)) for e in batch]
        ):
            note(arm, found)
        wrong = self.shuffled(batch)
        if wrong is not None:
            note(SHUFFLED, [row[0] for row in compressor.score_targets(wrong, rows, "lm", size)])
        return [[one] for one in records]
