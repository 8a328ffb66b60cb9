"""`tokens`: what each memory token is worth: the losses with one of them hidden, and with only the first few seen.

After arXiv 2408.03094: compressed tokens are not used equally. A hidden token is masked; the others stay at their positions.
"""

import numpy as np

from icae_jax.errors import UserError
from icae_jax.evaluation.examples import example
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.common import MEMORY
from icae_jax.evaluation.suites.qa import EMPTY_QUESTION
from icae_jax.objectives import targets

MOST = 32  # arms of each kind; of more memory tokens so many are taken, evenly


def without(j):
    return f"without token {j}"


def first(j):
    return f"first {j}"


class Tokens(common.Suite):
    """AE loss, and the loss of reference answers where there are questions, of one segment with the most memory tokens."""

    name = "tokens"
    METRICS = ("ae_loss", "answer_loss")
    ARMS = ()

    def __init__(self, compressor, options):
        if options.arms:
            raise UserError(
                f"--arms is {options.arms}; the arms of suite tokens are the memory's tokens, so leave it out"
            )
        super().__init__(compressor, options)
        self.most, k = self.one_length(), self.choices[0]
        self.hidden = np.unique(np.linspace(0, k - 1, min(k, MOST)).astype(int)).tolist()
        self.kept = [j + 1 for j in self.hidden if j + 1 < k]

    def examples(self, text):
        """The text, or as much of it as one segment holds; with its questions where it is whole."""
        ids = self.compressor.ids(text.text)
        if not ids:
            return "texts without a token"
        tokens = min(len(ids), self.most)
        questions = text.questions if tokens == len(ids) else ()
        if any(target.label_start < 1 for target in self._asked(questions)):
            return EMPTY_QUESTION
        behind = max(
            [
                tokens + 2,
                *(
                    len(t.ids) + len(self.compressor.adapter.template.head)
                    for t in self._asked(questions)
                ),
            ]
        )
        return self.does_not_fit(tokens, behind) or [
            example(text, ids[:tokens], tokens, questions=questions)
        ]

    def _asked(self, questions):
        template, ids = self.compressor.adapter.template, self.compressor.ids
        return [template.target(ids(q.text), ids(q.answers[0])) for q in questions]

    def measure(self, batch):
        compressor, size = self.compressor, self.options.batch_size
        contexts, records = self.framed(batch), [common.record(e) for e in batch]
        restore = [[targets.ae_target(context, compressor.framing)] for context in contexts]
        answer = [self._asked(e.questions) for e in batch]
        memory = compressor.compress_ids(contexts, size, self.choices[0])
        token = np.arange(memory.mask.shape[1]) % self.choices[0]
        arms = {MEMORY: token >= 0}
        arms |= {without(j): token != j for j in self.hidden} | {
            first(j): token < j for j in self.kept
        }
        for arm, seen in arms.items():
            part = memory.replace(mask=np.asarray(memory.mask) & seen)
            for one, found in zip(
                records, compressor.score_targets(part, restore, "ae", size), strict=True
            ):
                common.add(one, arm, ae_loss=common.nats(found[0]))
            asked = [i for i, of in enumerate(answer) if of]
            if asked:
                found = compressor.score_targets(
                    part[asked], [answer[i] for i in asked], "qa", size
                )
                for i, of in zip(asked, found, strict=True):
                    common.add(
                        records[i],
                        arm,
                        answer_loss=[sum(-s.log_prob for s in of), sum(s.tokens for s in of)],
                    )
        return [[one] for one in records]
