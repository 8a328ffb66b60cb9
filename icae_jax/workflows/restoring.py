"""Checks a compressor by restoring texts: a wrong base, alpha or layout shows at once."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from icae_jax.evaluation import scores
from icae_jax.inference.compressor import Compressor

# Up to this ratio a text comes back nearly whole
# (arXiv 2307.06945, table 1; arXiv 2408.03094, table 7).
MILD_RATIO = 8

# The text of the check, and its control. Plain prose: no compressor restores random text.
PARAGRAPH = (
    "The ferry left the island shortly after seven, when the fog had lifted from the harbour and "
    "the last crates of apples were on board. Marta stood at the rail and counted the lighthouses "
    "along the coast, as her father had taught her when she was a child. There had been nine of "
    "them then; now there were six, and only two were still lit by a keeper. She wondered who "
    "would remember their names in twenty years, and she took out her notebook and wrote them "
    "down, one on each line, with the year it was built in."
)
CONTROL = (
    "A good loaf needs four things: flour, water, salt and time. The baker on our street starts "
    "his dough in the afternoon and lets it rest overnight in a cool cellar, so that the crust "
    "turns dark and the inside stays moist for days. In the morning he heats the oven with beech "
    "wood until the stones are white, sweeps out the ashes, and bakes forty loaves at once. By "
    "nine o'clock most of them are sold, and whoever comes later has to be content with rolls, or "
    "with yesterday's bread, which he gives away for half the price."
)


@dataclasses.dataclass(frozen=True)
class Restoring:
    """How well texts are restored.

    ae_loss: nats per token, given each text's own memory. control: given another text's memory.
    bleu: BLEU-4 in percent. ratio: text tokens per memory token.
    """

    ae_loss: float
    control: float
    bleu: float
    ratio: float

    @property
    def failed(self) -> bool:
        """Whether the texts are far from restored, as with a wrong base, alpha or layout.

        Another text's memory tells nothing, so only the difference to it counts. At mild ratios
        the text itself must come back.
        """
        informative = self.ae_loss <= self.control / 2
        return not (informative and (self.ratio > MILD_RATIO or self.bleu >= 70))

    def __str__(self):
        return (
            f"AE loss {self.ae_loss:.3f} nats per token "
            f"(behind another text's memory {self.control:.3f}), "
            f"BLEU-4 {self.bleu:.1f}, at {self.ratio:.1f}x"
        )


def measure(compressor: Compressor, texts: Sequence[str]) -> Restoring:
    """Restores texts, and scores each given another's memory (a single one given `CONTROL`'s)."""
    memory = compressor.compress(texts)
    if len(texts) == 1:
        other_memory = compressor.compress([CONTROL])
    else:
        other_memory = memory[np.roll(np.arange(len(texts)), 1)]

    def mean_loss(given):
        text_scores = compressor.score_restoring(given, texts)
        return -sum(s.log_prob for s in text_scores) / sum(s.tokens for s in text_scores)

    return Restoring(
        float(mean_loss(memory)),
        float(mean_loss(other_memory)),
        float(scores.bleu(compressor.restore(memory), texts)),
        float(np.mean(memory.ratio)),
    )
