"""`autoencode`: how well texts are restored, by their length and the number of memory tokens.

After arXiv 2307.06945, figures 4 and 5 and table 6, and arXiv 2408.03094, figure 4.
"""

from collections.abc import Sequence

from icae_jax.evaluation import plain, scores
from icae_jax.evaluation.examples import Example, Text, example
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.common import FULL, SHUFFLED, TUNED
from icae_jax.inference.compressor import SPARE, Compressor
from icae_jax.inference.reading import Generation
from icae_jax.interop.prompts import start_ids
from icae_jax.objectives import targets

TEXT_METRICS = ("bleu", "rougeL", "exact_match", "prefix_match")


def text_scores(
    restored_text: str, restored_ids: Sequence[int], text: str, ids: Sequence[int]
) -> dict[str, list[float] | float]:
    """The numbers of a restored text. text: the original, which its ids decode to."""
    return {
        "bleu": list(scores.bleu_counts(restored_text, text)),
        "rougeL": scores.rouge(restored_text, [text])["rougeL"],
        "exact_match": 100.0 * (restored_text.strip() == text.strip()),
        "prefix_match": scores.prefix_match(restored_ids, ids),
    }


def decode(compressor: Compressor, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens."""
    return compressor.base.tokenizer.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def restored_ids(compressor: Compressor, generation: Generation) -> Sequence[int]:
    """The ids of a restored text, without the start of text that the decoder may repeat."""
    start = list(compressor.framing.start)
    ids = generation.ids
    return ids[len(start) :] if ids[: len(start)] == start else ids


class Autoencode(common.Suite):
    """AE loss with the memory and with another text's, and the text restored greedily.

    The full context is the base alone, asked to copy, where it was trained with a copying token
    (`compression.trigger_token`). It reads `<s>`, text, token, `<s>`, so that its labels are the
    text and `</s>`; behind a memory the second `<s>` may be a label too.
    """

    name = "autoencode"
    METRICS = ("ae_loss", *TEXT_METRICS)
    ARMS = (SHUFFLED, FULL, TUNED)
    group_label = "context tokens"

    def __init__(self, compressor: Compressor, options: common.Options):
        super().__init__(compressor, options)
        token = compressor.config.trigger_token
        self.copy = compressor.base.tokenizer.convert_tokens_to_ids(token) if token else None

    def known_arms(self) -> set[str]:
        """All arms; the full context only with a copying token."""
        copies = self.compressor.config.trigger_token
        return super().known_arms() - (set() if copies else {FULL, TUNED})

    def examples(self, text: Text) -> list[Example] | str:
        """The text at each of the lengths; by default as much as one segment holds."""
        ids = self.compressor.ids(text.text)
        if not ids:
            return "texts without a token"
        wanted = self.options.context_lengths
        lengths = [n for n in wanted if n <= len(ids)]
        if wanted and not lengths:
            return f"texts shorter than the shortest of --context_lengths, {min(wanted)} tokens"
        whole = self.stored is not None  # a store holds memories of whole texts
        lengths = lengths or [len(ids) if whole else min(len(ids), self.segment)]
        longest = max(lengths)
        behind = longest + len(self.compressor.framing.start) + 2
        alone = 0 if self.copy is None else 2 * longest + 3
        return self.does_not_fit(longest, behind, alone) or [
            example(text, ids[:n], n, group={"tokens": str(n) if wanted else common.bucket(n)})
            for n in lengths
        ]

    def measure(self, batch: Sequence[Example]) -> list[list[common.Record]]:
        """One record for each example."""
        compressor, size = self.compressor, self.options.batch_size
        contexts, records = self.framed(batch), [common.record(e) for e in batch]
        texts = [decode(compressor, e.ids) for e in batch]
        rows = [[targets.ae_target(context, compressor.framing)] for context in contexts]
        for record, text in zip(records, texts, strict=True):
            record["texts"]["original"] = text

        def note(arm, losses, restored=None, memory=None):
            for i, (record, loss) in enumerate(zip(records, losses, strict=True)):
                common.add(record, arm, ae_loss=common.nats(loss))
                self.add_size(record, arm, memory, i)
                if restored:
                    ids = restored_ids(compressor, restored[i])
                    numbers = text_scores(restored[i].text, ids, texts[i], batch[i].ids)
                    common.add(record, arm, **numbers)
                    record["texts"][arm] = restored[i].text
                    record["ties"][arm] = restored[i].ties

        def losses_behind(memory):
            return [row[0] for row in compressor.score_targets(memory, rows, "ae", size)]

        for arm, memory in self.memories(contexts):
            restored = compressor.restore(memory, batch_size=size, details=True)
            note(arm, losses_behind(memory), restored, memory)
        wrong = self.shuffled(batch)
        if wrong is not None:
            note(SHUFFLED, losses_behind(wrong), memory=wrong)
        arms = [arm for arm in (FULL, TUNED) if self.copy is not None and self.wants(arm)]
        if arms:
            start = start_ids(compressor.base.tokenizer)
            prompts = [[*start, *e.ids, self.copy, *start] for e in batch]
            labelled = [
                targets.Target([*prompt, *e.ids, compressor.framing.eos], len(prompt))
                for prompt, e in zip(prompts, batch, strict=True)
            ]
            limits = [
                min(len(context) + SPARE, self.positions - len(prompt))
                for context, prompt in zip(contexts, prompts, strict=True)
            ]
            for arm in arms:
                decoder = self.decoder(arm)
                losses = plain.score(compressor, labelled, size, decoder)
                restored = plain.generate(compressor, prompts, limits, size, decoder=decoder)
                note(arm, losses, restored)
        return [[record] for record in records]
