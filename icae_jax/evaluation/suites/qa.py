"""`qa`: answers from the memory against answers from the full context, a cut one, none, and another text's memory.

After arXiv 2408.03094 (tables of F1 / EM and of what is retained of the full context's F1), and the ROUGE rows of IC-Former on PwC.
"""

from icae_jax.evaluation import plain, scores, statistics
from icae_jax.evaluation.examples import QUESTIONS_AT_ONCE, example
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.common import CUT, FULL, NONE, SHUFFLED
from icae_jax.objectives.targets import Target

EMPTY_QUESTION = "texts with a question of no tokens, which the template puts no words round"


class Qa(common.Suite):
    """Greedy answers, scored against every reference answer, and the loss of the first reference answer with its end.

    The base alone is asked in the same template with the text in the memory's place, less trained tokens (`plain_template`: another one).
    """

    name = "qa"
    METRICS = ("f1", "em", "rouge1", "rouge2", "rougeL", "answer_loss")
    ARMS = (FULL, CUT, NONE, SHUFFLED)
    group_label = "set"

    def __init__(self, compressor, options):
        super().__init__(compressor, options)
        self.plain = plain.template_of(compressor, options.plain_template)

    def examples(self, text):
        """The text with its questions, a few at a time."""
        if not text.questions:
            return "texts without a question"
        ids = self.compressor.ids(text.text)
        if not ids:
            return "texts without a token"
        template = self.compressor.adapter.template
        asked = [self.compressor.ids(q.text) for q in text.questions]
        prompts = [template.prompt(q) for q in asked]
        if self.options.wants(NONE):
            prompts += [plain.prompt(self.compressor, self.plain, (), q) for q in asked]
        if not all(prompts):
            return EMPTY_QUESTION
        # Room for the reference answers and their end; a longer answer is cut where the positions end.
        answers = [max(len(self.compressor.ids(a)) for a in q.answers) + 1 for q in text.questions]
        behind = max(
            len(template.head) + len(template.prompt(q)) + a
            for q, a in zip(asked, answers, strict=True)
        )
        alone, cut = (
            max(
                len(plain.prompt(self.compressor, self.plain, part, q)) + a
                for q, a in zip(asked, answers, strict=True)
            )
            for part in (ids, ids[: self.memory_tokens(len(ids))])
        )
        parts = [
            text.questions[at : at + QUESTIONS_AT_ONCE]
            for at in range(0, len(text.questions), QUESTIONS_AT_ONCE)
        ]
        return self.does_not_fit(len(ids), behind, alone, cut) or [
            example(text, ids, at, questions=part, group={"set": text.set})
            for at, part in enumerate(parts)
        ]

    def measure(self, batch):
        compressor, size = self.compressor, self.options.batch_size
        template = compressor.adapter.template
        records = [[common.record(e, q) for q in e.questions] for e in batch]
        texts = [[q.text for q in e.questions] for e in batch]
        asked = [[compressor.ids(q.text) for q in e.questions] for e in batch]
        truth = [[compressor.ids(q.answers[0]) for q in e.questions] for e in batch]
        rows = [
            [template.target(q, a) for q, a in zip(*pair, strict=True)]
            for pair in zip(asked, truth, strict=True)
        ]
        for of, e in zip(records, batch, strict=True):
            for one, q in zip(of, e.questions, strict=True):
                one["texts"] |= {"question": q.text, "answers": list(q.answers)}

        def note(arm, answers, losses):
            for of, e, given, found in zip(records, batch, answers, losses, strict=True):
                for one, q, answer, loss in zip(of, e.questions, given, found, strict=True):
                    numbers = {
                        "f1": scores.squad_f1(answer.text, q.answers),
                        "em": scores.squad_em(answer.text, q.answers),
                    }
                    common.add(
                        one,
                        arm,
                        **numbers,
                        **scores.rouge(answer.text, q.answers),
                        answer_loss=common.nats(loss),
                    )
                    one["texts"][arm], one["ties"][arm] = answer.text, answer.ties

        def behind(arm, memory):
            answers = compressor.ask(memory, texts, self.options.max_new_tokens, size, details=True)
            note(arm, answers, compressor.score_targets(memory, rows, "qa", size))

        for arm, memory in self.memories(self.framed(batch)):
            behind(arm, memory)
        contexts = {
            FULL: [e.ids for e in batch],
            CUT: [e.ids[: self.memory_tokens(len(e.ids))] for e in batch],
            NONE: [()] * len(batch),
        }
        for arm, given in contexts.items():
            if self.options.wants(arm):
                prompts = [
                    [plain.prompt(compressor, self.plain, c, q) for q in of]
                    for c, of in zip(given, asked, strict=True)
                ]
                note(arm, *self._alone(prompts, truth))
        wrong = self.shuffled(batch)
        if wrong is not None:
            behind(SHUFFLED, wrong)
        return records

    def _alone(self, prompts, truth):
        """(answers, losses) of the base alone, nested as the prompts are."""
        flat = [
            (prompt, answer)
            for of in zip(prompts, truth, strict=True)
            for prompt, answer in zip(*of, strict=True)
        ]
        limits = [
            min(self.options.max_new_tokens, self.positions - len(prompt)) for prompt, _ in flat
        ]
        size, stop = (
            self.options.batch_size,
            self.plain.stop,
        )  # each prompt holds a whole context, so no more of them than contexts
        answers = iter(
            plain.generate(self.compressor, [prompt for prompt, _ in flat], limits, size, stop)
        )
        losses = iter(
            plain.score(
                self.compressor,
                [Target([*prompt, *answer, stop], len(prompt)) for prompt, answer in flat],
                size,
            )
        )
        return [[next(answers) for _ in of] for of in prompts], [
            [next(losses) for _ in of] for of in prompts
        ]


def retention(records, resample):
    """`{arm: Estimate}` of the F1 retained of the full context's, the unweighted mean over sets, and the sets that count for none.

    resample: bootstrap weights of some records. Empty where no set's full context scores above 0, or that arm was left out.
    """
    sets = {}
    for one in records:
        if FULL in one["sums"].get("f1", {}):
            sets.setdefault(one["set"], []).append(one)
    if not any(one["sums"]["f1"][FULL][0] for of in sets.values() for one in of):
        return {}, sorted(sets)
    found, left_out = {}, []
    for arm in next(iter(sets.values()))[0]["sums"]["f1"]:
        if arm == FULL:
            continue
        per_set = {name: ([r["sums"]["f1"][arm][0] for r in of], [r["sums"]["f1"][FULL][0] for r in of], resample(of, i))
                   for i, (name, of) in enumerate(sorted(sets.items()))}  # fmt: skip
        found[arm], left_out = statistics.retention(per_set)
    return found, left_out
