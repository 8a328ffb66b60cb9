"""`memorise`: is a text understood or merely kept? Natural text against the same with every id raised by one, and against random ids.

After arXiv 2307.06945, table 3.
"""

import numpy as np

from icae_jax.evaluation.examples import example
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.autoencode import decode, text_scores
from icae_jax.objectives import targets

NORMAL, PATTERNED, RANDOM = "normal text", "patterned random", "random"


class Memorise(common.Suite):
    """Three contents of each text's length, each restored from the memory with the most tokens. Special ids are passed over."""

    name = "memorise"
    METRICS = ("ae_loss", "bleu", "prefix_match")
    ARMS = (NORMAL, PATTERNED, RANDOM)

    def __init__(self, compressor, options):
        super().__init__(compressor, options)
        self.most = self.one_length()
        special = set(compressor.base.tokenizer.all_special_ids)
        size = min(len(compressor.base.tokenizer), compressor.base.config.vocab_size)
        self.usual = np.asarray([i for i in range(size) if i not in special])

    def known_arms(self):
        """The contents: all of them are read from the one memory."""
        return set(self.ARMS)

    def examples(self, text):
        """The text, or as much of it as one segment holds, or `context_lengths` (one number) says."""
        ids = self.compressor.ids(text.text)
        if not ids:
            return "texts without a token"
        tokens = min(len(ids), self.most)
        return self.does_not_fit(tokens, tokens + len(self.compressor.framing.start) + 2) or [
            example(text, ids[:tokens], tokens)
        ]

    def contents(self, one):
        """`{arm: ids}`: the text's own; each id's successor; ids drawn anew, by the text alone."""
        after = np.searchsorted(self.usual, one.ids, side="right") % len(self.usual)
        drawn = np.random.default_rng(int(one.cluster[:16], 16)).choice(self.usual, len(one.ids))
        return {
            NORMAL: list(one.ids),
            PATTERNED: self.usual[after].tolist(),
            RANDOM: drawn.tolist(),
        }

    def measure(self, batch):
        compressor, size = self.compressor, self.options.batch_size
        records, contents = [common.record(e) for e in batch], [self.contents(e) for e in batch]
        for arm in self.ARMS:
            if not self.options.wants(arm):
                continue
            contexts = [compressor.framed(c[arm]) for c in contents]
            memory = compressor.compress_ids(contexts, size, self.choices[0])
            rows = [[targets.ae_target(context, compressor.framing)] for context in contexts]
            losses = compressor.score_targets(memory, rows, "ae", size)
            restored = compressor.restore(memory, batch_size=size, details=True)
            for one, content, loss, made in zip(records, contents, losses, restored, strict=True):
                start, text = list(compressor.framing.start), decode(compressor, content[arm])
                ids = made.ids[len(start) :] if made.ids[: len(start)] == start else made.ids
                found = text_scores(made.text, ids, text, content[arm])
                common.add(
                    one,
                    arm,
                    ae_loss=common.nats(loss[0]),
                    bleu=found["bleu"],
                    prefix_match=found["prefix_match"],
                )
                one["texts"] |= {f"original, {arm}": text, arm: made.text}
                one["ties"][arm] = made.ties
        return [[one] for one in records]
