"""`continue`: the perplexity of what follows a context, behind its memory and in the controls.

After arXiv 2307.06945, tables 1 and 6. Perplexity is exp(-sum of log p(label) / number of labels)
over the labels of all texts. Labels are a continuation's tokens but the first, which is given in
every arm, since without a context nothing stands before it. So all arms have the same labels.
"""

from collections.abc import Iterator, Sequence

from icae_jax.evaluation import plain
from icae_jax.evaluation.examples import Example, Text, example
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.common import CUT, FULL, NONE, SHUFFLED, TUNED
from icae_jax.inference.reading import Score
from icae_jax.interop.prompts import start_ids
from icae_jax.objectives.targets import Target


def plain_arms(
    suite: common.Suite,
    batch: Sequence[Example],
    contexts: Sequence[Sequence[int]],
    cut_lengths: Sequence[int],
) -> Iterator[tuple[str, list[Score]]]:
    """Yields (arm, scores) of the base alone, and of the full context with the decoder's LoRA.

    contexts: each example's ids. cut_lengths: how many of its last tokens, which matter most to
    what follows, each cut context has.
    """
    compressor = suite.compressor
    start = start_ids(compressor.base.tokenizer)
    arms = {
        FULL: contexts,
        TUNED: contexts,
        CUT: [c[max(0, len(c) - n) :] for c, n in zip(contexts, cut_lengths, strict=True)],
        NONE: [()] * len(batch),
    }
    for arm, of_arm in arms.items():
        if suite.wants(arm):
            rows = [
                Target([*start, *context, *e.continuation], len(start) + len(context) + 1)
                for context, e in zip(of_arm, batch, strict=True)
            ]
            yield arm, plain.score(compressor, rows, suite.options.batch_size, suite.decoder(arm))


class Continue(common.Suite):
    """Contexts of each of `context_lengths`, all before the same continuation.

    By default the length is what one segment holds.
    """

    name = "continue"
    METRICS = ("perplexity",)
    ARMS = (FULL, TUNED, CUT, NONE, SHUFFLED)
    group_label = "context tokens"

    def examples(self, text: Text) -> list[Example] | str:
        """The text's front as context, the tokens after it as continuation."""
        ids = self.compressor.ids(text.text)
        lengths, most = self.options.context_lengths, self.options.continuation_tokens
        lengths = lengths or (self.segment,)
        longest, least = max(lengths), min(common.CONTINUATION_LEAST, most)
        if len(ids) < longest + least:
            return (
                f"texts shorter than {longest + least} tokens, "
                "a context and a continuation (see --context_lengths)"
            )
        rest = tuple(ids[longest : longest + most])
        return self.does_not_fit(longest, len(rest), longest + len(rest) + 1) or [
            example(
                text, ids[longest - n : longest], n, continuation=rest, group={"tokens": str(n)}
            )
            for n in lengths
        ]

    def main(self, records: Sequence[common.Record]) -> list[common.Record]:
        """Those of the longest context; all lengths together would be no setting of interest."""
        longest = str(max(int(r["group"]["tokens"]) for r in records))
        return [r for r in records if r["group"]["tokens"] == longest]

    def measure(self, batch: Sequence[Example]) -> list[list[common.Record]]:
        """One record for each example."""
        records = [common.record(e) for e in batch]
        rows = [[Target(list(e.continuation), 1)] for e in batch]

        def note(arm, losses, memory=None):
            for i, (record, loss) in enumerate(zip(records, losses, strict=True)):
                common.add(record, arm, perplexity=common.nats(loss))
                self.add_size(record, arm, memory, i)

        def losses_behind(memory):
            size = self.options.batch_size
            return [row[0] for row in self.compressor.score_targets(memory, rows, "lm", size)]

        for arm, memory in self.memories(self.framed(batch)):
            note(arm, losses_behind(memory), memory)
        contexts = [e.ids for e in batch]
        cut_lengths = [self.memory_tokens(len(ids)) for ids in contexts]
        for arm, losses in plain_arms(self, batch, contexts, cut_lengths):
            note(arm, losses)
        wrong = self.shuffled(batch)
        if wrong is not None:
            note(SHUFFLED, losses_behind(wrong), wrong)
        return [[record] for record in records]
