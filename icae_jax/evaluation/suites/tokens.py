"""`tokens`: what each memory token is worth: losses with one hidden, or with only the first few.

After arXiv 2408.03094, which finds that compressed tokens are not used equally. A hidden token is
masked; the others stay at their positions.
"""

from collections.abc import Sequence

import numpy as np

from icae_jax.errors import UserError
from icae_jax.evaluation.examples import Example, Question, Text, example
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.common import MEMORY
from icae_jax.evaluation.suites.qa import EMPTY_QUESTION
from icae_jax.inference.compressor import Compressor
from icae_jax.objectives import targets

MOST = 32  # arms of each kind; of more memory tokens so many are taken, evenly spread


def without(j: int | str) -> str:
    """The arm in which memory token j is hidden; of "", the arms' prefix."""
    return f"without token {j}"


def first(j: int | str) -> str:
    """The arm in which only the first j memory tokens are seen; of "", the arms' prefix."""
    return f"first {j}"


class Tokens(common.Suite):
    """AE loss of one segment at the largest k, and its reference answers' loss if it has any."""

    name = "tokens"
    METRICS = ("ae_loss", "answer_loss")
    ARMS = ()

    def __init__(self, compressor: Compressor, options: common.Options):
        if options.arms:
            raise UserError(
                f"--arms is {options.arms}; the arms of suite tokens are the memory's tokens, "
                "so leave it out"
            )
        super().__init__(compressor, options)
        self.most, k = self.one_length(), self.choices[0]
        self.hidden = np.unique(np.linspace(0, k - 1, min(k, MOST)).astype(int)).tolist()
        self.kept = [j + 1 for j in self.hidden if j + 1 < k]

    def examples(self, text: Text) -> list[Example] | str:
        """The text, cut to one segment; with its questions if it is whole."""
        ids = self.compressor.ids(text.text)
        if not ids:
            return "texts without a token"
        tokens = min(len(ids), self.most)
        questions = text.questions if tokens == len(ids) else ()
        answers = self._answer_targets(questions)
        if any(target.label_start < 1 for target in answers):
            return EMPTY_QUESTION
        head = len(self.compressor.adapter.template.head)
        behind = max([tokens + 2, *(head + len(target.ids) for target in answers)])
        return self.does_not_fit(tokens, behind) or [
            example(text, ids[:tokens], tokens, questions=questions)
        ]

    def _answer_targets(self, questions: Sequence[Question]) -> list[targets.Target]:
        """Each question with its first reference answer."""
        template, ids = self.compressor.adapter.template, self.compressor.ids
        return [template.target(ids(q.text), ids(q.answers[0])) for q in questions]

    def measure(self, batch: Sequence[Example]) -> list[list[common.Record]]:
        """One record for each example."""
        compressor, size = self.compressor, self.options.batch_size
        contexts, records = self.framed(batch), [common.record(e) for e in batch]
        ae_rows = [[targets.ae_target(context, compressor.framing)] for context in contexts]
        qa_rows = [self._answer_targets(e.questions) for e in batch]
        asked = [i for i, row in enumerate(qa_rows) if row]
        memory = compressor.compress_ids(contexts, size, self.choices[0])
        token = np.arange(memory.mask.shape[1]) % self.choices[0]
        arms = {MEMORY: token >= 0}
        arms |= {without(j): token != j for j in self.hidden}
        arms |= {first(j): token < j for j in self.kept}
        for arm, seen in arms.items():
            masked = memory.replace(mask=np.asarray(memory.mask) & seen)
            losses = compressor.score_targets(masked, ae_rows, "ae", size)
            for record, row in zip(records, losses, strict=True):
                common.add(record, arm, ae_loss=common.nats(row[0]))
            if asked:
                rows = [qa_rows[i] for i in asked]
                losses = compressor.score_targets(masked[asked], rows, "qa", size)
                for i, row in zip(asked, losses, strict=True):
                    nats, labels = map(sum, zip(*map(common.nats, row), strict=True))
                    common.add(records[i], arm, answer_loss=[nats, labels])
        return [[record] for record in records]
