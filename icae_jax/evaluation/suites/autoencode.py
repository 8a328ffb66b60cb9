"""`autoencode`: how well a text is restored, by its length and by the number of memory tokens.

After arXiv 2307.06945, figures 4 and 5 and table 6, and arXiv 2408.03094, figure 4.
"""

from icae_jax.evaluation import plain, scores
from icae_jax.evaluation.examples import example
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.common import FULL, SHUFFLED
from icae_jax.inference.compressor import SPARE
from icae_jax.objectives import targets

TEXT_METRICS = ("bleu", "rougeL", "exact_match", "prefix_match")


def text_scores(restored_text, restored_ids, text, ids):
    """The numbers of a restored text against the original, which is what its ids decode to."""
    return {
        "bleu": list(scores.bleu_counts(restored_text, text)),
        "rougeL": scores.rouge(restored_text, [text])["rougeL"],
        "exact_match": 100.0 * (restored_text.strip() == text.strip()),
        "prefix_match": scores.prefix_match(restored_ids, ids),
    }


def decode(compressor, ids):
    return compressor.base.tokenizer.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


class Autoencode(common.Suite):
    """AE loss with the memory and with another text's; the text restored greedily, of at most its own length and 16 tokens.

    The full context is the base alone, asked to copy: only where it was trained with a copying token (`compression.trigger_token`). It
    reads `<s>`, text, token, `<s>`, so that its labels are the text and `</s>`; behind a memory the second `<s>` may be a label too.
    """

    name = "autoencode"
    METRICS = ("ae_loss", *TEXT_METRICS)
    ARMS = (SHUFFLED, FULL)
    group_label = "context tokens"

    def __init__(self, compressor, options):
        super().__init__(compressor, options)
        token = compressor.config.trigger_token
        self.copy = compressor.base.tokenizer.convert_tokens_to_ids(token) if token else None

    def known_arms(self):
        return super().known_arms() - (set() if self.compressor.config.trigger_token else {FULL})

    def examples(self, text):
        """The text at each of the lengths; by default whole, or as much as one segment holds."""
        ids = self.compressor.ids(text.text)
        if not ids:
            return "texts without a token"
        wanted = self.options.context_lengths
        lengths = [n for n in wanted if n <= len(ids)] or (
            [] if wanted else [min(len(ids), self.segment)]
        )
        if not lengths:
            return f"texts shorter than the shortest of --context_lengths, {min(wanted)} tokens"
        longest = max(lengths)
        behind = longest + len(self.compressor.framing.start) + 2
        return self.does_not_fit(
            longest, behind, 2 * longest + 3 if self.copy is not None else 0
        ) or [
            example(text, ids[:n], n, group={"tokens": str(n) if wanted else common.bucket(n)})
            for n in lengths
        ]

    def measure(self, batch):
        compressor, size = self.compressor, self.options.batch_size
        contexts, records = self.framed(batch), [common.record(e) for e in batch]
        texts = [decode(compressor, e.ids) for e in batch]
        rows = [[targets.ae_target(context, compressor.framing)] for context in contexts]
        for one, text in zip(records, texts, strict=True):
            one["texts"]["original"] = text

        def note(arm, losses, restored):
            for i, (one, loss) in enumerate(zip(records, losses, strict=True)):
                common.add(one, arm, ae_loss=common.nats(loss))
                if restored:
                    start = list(compressor.framing.start)
                    ids = (
                        restored[i].ids[len(start) :]
                        if restored[i].ids[: len(start)] == start
                        else restored[i].ids
                    )
                    common.add(
                        one, arm, **text_scores(restored[i].text, ids, texts[i], batch[i].ids)
                    )
                    one["texts"][arm], one["ties"][arm] = restored[i].text, restored[i].ties

        for arm, memory in self.memories(contexts):
            losses = [row[0] for row in compressor.score_targets(memory, rows, "ae", size)]
            note(arm, losses, compressor.restore(memory, batch_size=size, details=True))
        wrong = self.shuffled(batch)
        if wrong is not None:
            note(
                SHUFFLED,
                [row[0] for row in compressor.score_targets(wrong, rows, "ae", size)],
                None,
            )
        if self.copy is not None and self.options.wants(FULL):
            start = plain.start_ids(compressor)
            prompts = [[*start, *e.ids, self.copy, *start] for e in batch]
            labelled = [
                targets.Target([*p, *e.ids, compressor.framing.eos], len(p))
                for p, e in zip(prompts, batch, strict=True)
            ]
            limits = [
                min(len(c) + SPARE, self.positions - len(p))
                for c, p in zip(contexts, prompts, strict=True)
            ]
            note(
                FULL,
                plain.score(compressor, labelled, size),
                plain.generate(compressor, prompts, limits, size),
            )
        return [[one] for one in records]
