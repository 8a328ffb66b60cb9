"""`memorise`: is a text understood, or memorised? Natural text against shifted and random ids.

After arXiv 2307.06945, table 3: the same text, with every id raised by one, and ids at random.
"""

from collections.abc import Sequence

import numpy as np

from icae_jax.evaluation.examples import Example, Text, example
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.autoencode import decode, restored_ids, text_scores
from icae_jax.inference.compressor import Compressor
from icae_jax.objectives import targets

NORMAL, PATTERNED, RANDOM = "normal text", "patterned random", "random"


class Memorise(common.Suite):
    """Restores three contents of each text's length from the memory at the largest k."""

    name = "memorise"
    METRICS = ("ae_loss", "bleu", "prefix_match")
    ARMS = (NORMAL, PATTERNED, RANDOM)

    def __init__(self, compressor: Compressor, options: common.Options):
        super().__init__(compressor, options)
        self.most = self.one_length()
        special = set(compressor.base.tokenizer.all_special_ids)
        size = min(len(compressor.base.tokenizer), compressor.base.config.vocab_size)
        self.usual = np.asarray([i for i in range(size) if i not in special])

    def known_arms(self) -> set[str]:
        """The contents: all of them are restored from the one memory."""
        return set(self.ARMS)

    def examples(self, text: Text) -> list[Example] | str:
        """The text, cut to one segment or to the one length of `context_lengths`."""
        ids = self.compressor.ids(text.text)
        if not ids:
            return "texts without a token"
        tokens = min(len(ids), self.most)
        return self.does_not_fit(tokens, tokens + len(self.compressor.framing.start) + 2) or [
            example(text, ids[:tokens], tokens)
        ]

    def contents(self, example: Example) -> dict[str, list[int]]:
        """By arm: the text's ids; each id's successor; ids drawn by the text alone.

        Special ids are skipped.
        """
        usual = self.usual
        after = np.searchsorted(usual, example.ids, side="right") % len(usual)
        rng = np.random.default_rng(int(example.cluster[:16], 16))
        return {
            NORMAL: list(example.ids),
            PATTERNED: usual[after].tolist(),
            RANDOM: rng.choice(usual, len(example.ids)).tolist(),
        }

    def measure(self, batch: Sequence[Example]) -> list[list[common.Record]]:
        """One record for each example."""
        compressor, size = self.compressor, self.options.batch_size
        records, contents = [common.record(e) for e in batch], [self.contents(e) for e in batch]
        for arm in filter(self.options.wants, self.ARMS):
            contexts = [compressor.framed(by_arm[arm]) for by_arm in contents]
            memory = compressor.compress_ids(contexts, size, self.choices[0])
            rows = [[targets.ae_target(context, compressor.framing)] for context in contexts]
            losses = compressor.score_targets(memory, rows, "ae", size)
            restored = compressor.restore(memory, batch_size=size, details=True)
            for i, (record, by_arm, loss, generation) in enumerate(
                zip(records, contents, losses, restored, strict=True)
            ):
                text, ids = decode(compressor, by_arm[arm]), restored_ids(compressor, generation)
                numbers = text_scores(generation.text, ids, text, by_arm[arm])
                numbers = {name: numbers[name] for name in ("bleu", "prefix_match")}
                common.add(record, arm, ae_loss=common.nats(loss[0]), **numbers)
                record["texts"] |= {f"original, {arm}": text, arm: generation.text}
                record["ties"][arm] = generation.ties
                self.add_size(record, arm, memory, i)
        return [[record] for record in records]
