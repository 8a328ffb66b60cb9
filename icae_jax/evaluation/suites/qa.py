"""`qa`: answers from the memory against the full context, a cut one, none, and a wrong memory.

After arXiv 2408.03094 (tables of F1 and EM, and of how much of the full context's F1 is retained),
and the ROUGE rows of IC-Former on PwC.
"""

from collections.abc import Callable, Sequence

from icae_jax.errors import UserError
from icae_jax.evaluation import plain, scores, statistics
from icae_jax.evaluation.examples import QUESTIONS_AT_ONCE, Example, Text, example
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.common import CASCADE, CUT, FULL, NONE, SHUFFLED, TUNED
from icae_jax.inference import cascade
from icae_jax.inference.compressor import Compressor
from icae_jax.objectives.targets import Target

EMPTY_QUESTION = "texts with a question of no tokens, which the template puts no words round"


class Qa(common.Suite):
    """Greedy answers scored against all reference answers, and the loss of the first of them.

    The base alone is asked in the same template without its trained tokens, the text in the
    memory's place (`plain_template`: in another template). With `ladder` an arm more answers by the
    cascade; its sizes are those of all memories that it read for a question.
    """

    name = "qa"
    METRICS = ("f1", "em", "rouge1", "rouge2", "rougeL", "answer_loss")
    ARMS = (FULL, TUNED, CUT, NONE, SHUFFLED, CASCADE)
    group_label = "set"

    def __init__(self, compressor: Compressor, options: common.Options):
        if CASCADE in options.arms and not options.ladder:
            raise UserError(f"--arms {CASCADE} needs a ladder; give --ladder, such as 2,8,32")
        super().__init__(compressor, options)
        self.plain = plain.template_of(compressor, options.plain_template)
        self.ladder = ()
        if options.ladder:
            self.ladder = cascade.checked(options.ladder, compressor.config, "--ladder")
            self.most_k = max(self.most_k, self.ladder[-1])

    def known_arms(self) -> set[str]:
        """All arms; the cascade only with a ladder."""
        return super().known_arms() - (set() if self.options.ladder else {CASCADE})

    def examples(self, text: Text) -> list[Example] | str:
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
            prompts += [plain.prompt(self.compressor.base, self.plain, (), q) for q in asked]
        if not all(prompts):
            return EMPTY_QUESTION
        # Room for the reference answers and their end; longer answers are cut at the last position.
        room = [max(len(self.compressor.ids(a)) for a in q.answers) + 1 for q in text.questions]
        behind = max(
            len(template.head) + len(template.prompt(q)) + n
            for q, n in zip(asked, room, strict=True)
        )
        alone, cut = (
            max(
                len(plain.prompt(self.compressor.base, self.plain, context, q)) + n
                for q, n in zip(asked, room, strict=True)
            )
            for context in (ids, ids[: self.memory_tokens(len(ids))])
        )
        starts = range(0, len(text.questions), QUESTIONS_AT_ONCE)
        return self.does_not_fit(len(ids), behind, alone, cut) or [
            example(text, ids, i, questions=questions, group={"set": text.set})
            for i, questions in enumerate(
                text.questions[start : start + QUESTIONS_AT_ONCE] for start in starts
            )
        ]

    def measure(self, batch: Sequence[Example]) -> list[list[common.Record]]:
        """One record for each question."""
        compressor, size = self.compressor, self.options.batch_size
        template = compressor.adapter.template
        records = [[common.record(e, q) for q in e.questions] for e in batch]
        texts = [[q.text for q in e.questions] for e in batch]
        asked = [[compressor.ids(q.text) for q in e.questions] for e in batch]
        truth = [[compressor.ids(q.answers[0]) for q in e.questions] for e in batch]
        rows = [
            [template.target(q, a) for q, a in zip(*of_example, strict=True)]
            for of_example in zip(asked, truth, strict=True)
        ]
        questions = [
            (record, question)
            for of_example, e in zip(records, batch, strict=True)
            for record, question in zip(of_example, e.questions, strict=True)
        ]
        for record, question in questions:
            record["texts"] |= {"question": question.text, "answers": list(question.answers)}

        def note_answers(arm, answers):
            """Nested as the questions are."""
            answers = [answer for row in answers for answer in row]
            for (record, question), answer in zip(questions, answers, strict=True):
                common.add(
                    record,
                    arm,
                    f1=scores.squad_f1(answer.text, question.answers),
                    em=scores.squad_em(answer.text, question.answers),
                    **scores.rouge(answer.text, question.answers),
                )
                record["texts"][arm], record["ties"][arm] = answer.text, answer.ties

        def note(arm, answers, losses, memory=None):
            """Answers and losses are nested as the questions are."""
            note_answers(arm, answers)
            for i, (of_example, of_losses) in enumerate(zip(records, losses, strict=True)):
                for record, loss in zip(of_example, of_losses, strict=True):
                    common.add(record, arm, answer_loss=common.nats(loss))
                    self.add_size(record, arm, memory, i)

        def ask(arm, memory):
            answers = compressor.ask(memory, texts, self.options.max_new_tokens, size, details=True)
            note(arm, answers, compressor.score_targets(memory, rows, "qa", size), memory)

        for arm, memory in self.memories(self.framed(batch)):
            ask(arm, memory)
        if self.ladder and self.wants(CASCADE):
            answers, bytes_per_token = self._cascade(batch, texts)
            note_answers(CASCADE, answers)
            for of_example, of_answers in zip(records, answers, strict=True):
                for record, answer in zip(of_example, of_answers, strict=True):
                    read = answer.tokens_read
                    record["sizes"][CASCADE] = [read, read * bytes_per_token]
        contexts = {
            FULL: [e.ids for e in batch],
            TUNED: [e.ids for e in batch],
            CUT: [e.ids[: self.memory_tokens(len(e.ids))] for e in batch],
            NONE: [()] * len(batch),
        }
        for arm, of_arm in contexts.items():
            if self.wants(arm):
                prompts = [
                    [plain.prompt(compressor.base, self.plain, context, q) for q in of_example]
                    for context, of_example in zip(of_arm, asked, strict=True)
                ]
                note(arm, *self._alone(prompts, truth, self.decoder(arm)))
        wrong = self.shuffled(batch)
        if wrong is not None:
            ask(SHUFFLED, wrong)
        return records

    def _cascade(self, batch, texts):
        """Answers by the cascade, nested as the questions are, and bytes of a memory token."""
        options, contexts = self.options, self.framed(batch)
        rungs = self.compressor.compress_ids_ladder(contexts, self.ladder, options.batch_size)
        answers = self.compressor.ask(
            rungs,
            texts,
            options.max_new_tokens,
            options.batch_size,
            details=True,
            threshold=options.threshold,
        )
        return answers, rungs[0].bytes_per_token

    def _alone(self, prompts, truth, decoder):
        """(answers, losses) of a decoder without a memory, nested as the prompts are."""
        flat = [
            (prompt, answer)
            for of_example in zip(prompts, truth, strict=True)
            for prompt, answer in zip(*of_example, strict=True)
        ]
        most, stop = self.options.max_new_tokens, self.plain.stop
        limits = [min(most, self.positions - len(prompt)) for prompt, _ in flat]
        # Each prompt holds a whole context, so no more of them at once than contexts.
        size = self.options.batch_size
        flat_prompts = [prompt for prompt, _ in flat]
        answers = plain.generate(self.compressor, flat_prompts, limits, size, stop, decoder)
        rows = [Target([*prompt, *answer, stop], len(prompt)) for prompt, answer in flat]
        losses = iter(plain.score(self.compressor, rows, size, decoder))
        answers = iter(answers)
        return tuple(
            [[next(flat_results) for _ in of_example] for of_example in prompts]
            for flat_results in (answers, losses)
        )


def retention(
    records: Sequence[common.Record], resample: Callable, full: str = FULL
) -> tuple[dict[str, statistics.Estimate], list[str]]:
    """How much of the full context's F1 each arm retains: the unweighted mean over sets.

    Returns estimates by arm, and the sets left out, whose full context scores 0. No estimates
    where that arm was left out, or scores 0 in all sets. resample: draws bootstrap weights. full:
    the arm of the full context.
    """
    sets = {}
    for record in records:
        if full in record["sums"].get("f1", {}):
            sets.setdefault(record["set"], []).append(record)
    if not any(record["sums"]["f1"][full][0] for of_set in sets.values() for record in of_set):
        return {}, sorted(sets)
    retained, left_out = {}, []
    for arm in next(iter(sets.values()))[0]["sums"]["f1"]:
        if arm == full:
            continue
        per_set = {}
        for i, (name, of_set) in enumerate(sorted(sets.items())):
            # Progress that an earlier version left may lack an arm.
            with_arm = [r for r in of_set if arm in r["sums"]["f1"]]
            f1 = ([r["sums"]["f1"][a][0] for r in with_arm] for a in (arm, full))
            if with_arm:
                per_set[name] = (*f1, resample(with_arm, i))
        retained[arm], left_out = statistics.retention(per_set)
    return retained, left_out
