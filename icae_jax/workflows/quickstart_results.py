"""What the quickstart's memories are worth on held-out passages, as a table and a page."""

import dataclasses
import html
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from icae_jax.compression import method as methods
from icae_jax.data import synthetic
from icae_jax.evaluation import plain, report, scores
from icae_jax.inference.compressor import Compressor
from icae_jax.training import metrics

PHASES = {"pretrain": "restoring", "finetune": "answering"}  # with what is learned in each
BATCH = 25  # passages compressed and decoded at once; always, so that programs compile once
ANSWER_TOKENS = 8  # most tokens of an answer

Rows = Sequence[dict[str, Any]]  # passages as `data.synthetic` makes them
Result = dict[str, Any]  # the content of results.json
Restored = dict[tuple[str, int], list[str]]  # texts, by method and memory tokens


@dataclasses.dataclass(frozen=True)
class TrainedMethod:
    """A method after training. workdir: a folder per phase. untrained: as training began."""

    method: str
    workdir: pathlib.Path
    compressor: Compressor
    untrained: Compressor

    @property
    def steps(self) -> list[int]:
        """The steps trained in each phase."""
        return [
            max(line["step"] for line in metrics.read_lines(self.metrics_of(phase)))
            for phase in PHASES
        ]

    def metrics_of(self, phase: str) -> pathlib.Path:
        """The metrics of a phase."""
        return self.workdir / phase / "metrics.jsonl"


def title(method: str) -> str:
    """A method's name in print."""
    return methods.get(method).title


# --------------------------------------------------------------------------------------- measuring


def compare(trained: Sequence[TrainedMethod], rows: Rows) -> tuple[Result, Restored]:
    """Measures trained methods side by side, the most memory tokens first."""
    memories, restored = [], {}
    for one in trained:
        for k in one.compressor.config.choices:
            measured, texts = _measure(one, rows, k)
            memories.append({"method": one.method, "k": k, "steps": one.steps, **measured})
            restored[one.method, k] = texts
    memories.sort(key=lambda memory: -memory["k"])
    compressor = trained[0].compressor
    tokenizer = compressor.base.tokenizer
    lengths = [len(tokenizer(row["context"])["input_ids"]) for row in rows]
    result = {
        "passages": len(rows),
        "questions": sum(len(row["questions"]) for row in rows),
        "context_tokens": float(np.mean(lengths)),
        "bits": synthetic.passage_bits(),
        "qa_exact_match": _base_alone(compressor, rows),
        "memories": memories,
    }
    return result, restored


def _measure(trained, rows, k):
    """(scores of QA and restoring with their controls, restored texts) at k memory tokens."""
    compressor, untrained = trained.compressor, trained.untrained
    contexts, questions = [row["context"] for row in rows], questions_of(rows)
    memory = compressor.compress(contexts, batch_size=BATCH, k=k)
    wrong_memory = memory[np.roll(np.arange(len(rows)), -1)]
    untrained_memory = untrained.compress(contexts, batch_size=BATCH, k=k)
    answers = {
        arm: reader.ask(given, questions, ANSWER_TOKENS, batch_size=BATCH)
        for arm, reader, given in (
            ("memory", compressor, memory),
            ("wrong memory", compressor, wrong_memory),
            ("untrained memory", untrained, untrained_memory),
        )
    }
    restored = compressor.restore(memory, batch_size=BATCH)
    unrestored = untrained.restore(untrained_memory, batch_size=BATCH)
    losses = {}
    for arm, given in (("memory", memory), ("wrong memory", wrong_memory)):
        text_scores = compressor.score_restoring(given, contexts, batch_size=BATCH)
        tokens = sum(score.tokens for score in text_scores)
        losses[arm] = -sum(score.log_prob for score in text_scores) / tokens
    return {
        "memory_tokens": float(memory.tokens.mean()),
        "ratio": float(memory.lengths.sum() / memory.tokens.sum()),
        "bytes": float(memory.bytes.mean()),
        "qa_exact_match": {arm: _exact_match(given, rows) for arm, given in answers.items()},
        "bleu": {
            "memory": scores.bleu(restored, contexts),
            "untrained memory": scores.bleu(unrestored, contexts),
        },
        "exact_passages": scores.exact_match(restored, contexts),
        "ae_loss": losses,
    }, restored


def _base_alone(compressor, rows):
    """QA exact match of the base, with the passage in its prompt and without."""
    arms = {"full context": [row["context"] for row in rows], "no context": None}
    questions = questions_of(rows)
    return {
        arm: _exact_match(
            plain.answer(compressor, questions, contexts, ANSWER_TOKENS, 2 * BATCH), rows
        )
        for arm, contexts in arms.items()
    }


def questions_of(rows: Rows) -> list[list[str]]:
    """The questions of each passage."""
    return [[question["question"] for question in row["questions"]] for row in rows]


def _exact_match(answers, rows):
    truth = [question["answers"][0] for row in rows for question in row["questions"]]
    return scores.exact_match([answer for row in answers for answer in row], truth)


def first_answer(compressor: Compressor, rows: Rows) -> list[str]:
    """Lines that show a memory at work: what it answers and restores of a held-out passage."""
    rows = rows[:BATCH]
    memory = compressor.compress([row["context"] for row in rows], BATCH)
    answers = compressor.ask(memory, questions_of(rows), ANSWER_TOKENS, batch_size=BATCH)
    restored = compressor.restore(memory, batch_size=BATCH)
    return [
        f"  passage     {rows[0]['context']}",
        f"  its memory  {memory.tokens[0]} tokens for {memory.lengths[0]}, "
        f"{memory.bytes[0]:,} bytes; the passage is put away",
        f"  question    {rows[0]['questions'][1]['question']}",
        f"  answer      {answers[0][1]}",
        f"  restored    {restored[0]}",
    ]


# ------------------------------------------------------------------------------------------- table


def summary_table(result: Result) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows) as text: a column for each method and number of memory tokens."""
    memories = result["memories"]
    rows = [
        ("memory tokens", *(f"{m['memory_tokens']:.0f}" for m in memories)),
        ("ratio", *(f"{m['ratio']:.1f}x" for m in memories)),
        ("bytes of a memory", *(f"{m['bytes']:,.0f}" for m in memories)),
        ("training steps", *("+".join(map(str, m["steps"])) for m in memories)),
    ]
    for arm in ("full context", "memory", "no context", "wrong memory", "untrained memory"):
        of_base = result["qa_exact_match"].get(arm)
        matches = [m["qa_exact_match"].get(arm, of_base) for m in memories]
        rows.append((f"QA exact match, {arm}", *(f"{match:.1f} %" for match in matches)))
    for arm in ("memory", "wrong memory"):
        rows.append((f"AE loss, {arm}", *(f"{m['ae_loss'][arm]:.3f}" for m in memories)))
    for arm in ("memory", "untrained memory"):
        rows.append((f"BLEU-4, {arm}", *(f"{m['bleu'][arm]:.1f}" for m in memories)))
    rows.append(("restored exactly", *(f"{m['exact_passages']:.0f} %" for m in memories)))
    return ("", *(title(m["method"]) for m in memories)), rows


def facts(result: Result, minutes: float) -> str:
    """What was measured on what, in a sentence."""
    return (
        f"{result['passages']} held-out passages of about {result['context_tokens']:.0f} tokens "
        f"({result['bits']:.0f} bits each), {result['questions']} questions, the same data and "
        f"seed for all methods; {minutes:.1f} minutes since the start."
    )


# -------------------------------------------------------------------------------------------- page


def examples(result: Result, restored: Restored, rows: Rows) -> list[tuple[str, int, str, str]]:
    """(title, memory tokens, passage, restored) of two passages for each memory."""
    contexts = [row["context"] for row in rows]
    return [
        (title(memory["method"]), memory["k"], *pair)
        for memory in result["memories"]
        for pair in _two_passages(contexts, restored[memory["method"], memory["k"]])
    ]


def _two_passages(contexts, restored):
    """One that came back whole and one that did not, which is always shown if there is one."""
    pairs = list(zip(contexts, restored, strict=True))
    whole = [pair for pair in pairs if pair[0].strip() == pair[1].strip()]
    broken = [pair for pair in pairs if pair[0].strip() != pair[1].strip()]
    return (broken[:1] + whole[:1] + broken[1:2] + whole[1:2])[:2]


def write_page(
    path: pathlib.Path,
    trained: Sequence[TrainedMethod],
    result: Result,
    shown: Sequence[tuple[str, int, str, str]],
    facts_line: str,
    next_steps: tuple[str, Sequence[str]],
) -> None:
    """Writes the page. shown: of `examples`. next_steps: (a passage, commands that compress it)."""
    passage, commands = next_steps
    restored = [
        f'<p>{name}, {k} tokens</p><div class="text">{html.escape(original)}</div>'
        f"{report.difference(original, text)}"
        for name, k, original, text in shown
    ]
    parts = [
        f"<p>{facts_line}</p>",
        report.table(*summary_table(result)),
        "<p>Full context and no context: the base alone. Wrong memory: another passage's. "
        "Untrained: before training. AE loss: of restoring the text, in nats per token.</p>",
        "<h2>Restored texts</h2>",
        "<p>Original, then restored (lost words struck out, made-up words marked):</p>",
        *restored,
        "<h2>Losses while training</h2>",
        _curves(trained),
        "<h2>Next</h2>",
        f"<p>{html.escape(passage)}</p><pre>{html.escape(chr(10).join(commands))}</pre>",
    ]
    report.write(path, "icae quickstart: what a memory is worth", parts)


def _curves(trained):
    """Training losses, one phase after the other.

    Passages are repeated so seldom that these losses hold for new ones too.
    """
    series = {}
    for one in trained:
        largest, offset = max(one.compressor.config.choices), 0
        for phase in PHASES:
            lines = [x for x in metrics.read_lines(one.metrics_of(phase)) if "train" in x]
            for line in lines:
                for objective, loss in line["train"].items():
                    k = line.get("k", largest)
                    label = f"{title(one.method)}, {k} tokens: {objective.upper()}"
                    xs, ys, _ = series.setdefault(label, ([], [], objective == "qa"))
                    xs.append(offset + line["step"])
                    ys.append(loss)
            offset += max((x["step"] for x in lines), default=0)
    return report.curves(series, log=True)
