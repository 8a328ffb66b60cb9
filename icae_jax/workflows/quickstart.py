"""`icae quickstart`: train both methods on a small shipped base and show what their memories are worth, in one page."""

import copy
import html
import json
import pathlib
import sys
import time

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from icae_jax import files, lock
from icae_jax.data import synthetic
from icae_jax.errors import UserError
from icae_jax.evaluation import plain, report, scores
from icae_jax.inference.compressor import Compressor
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.performance.utilisation import Meter
from icae_jax.runtime import sharding
from icae_jax.training import config_file, metrics
from icae_jax.training.base_task import BASE, BaseTask
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import BaseConfig, TrainConfig
from icae_jax.training.train import NORMAL, QUIET, VERBOSE, train

SHIPPED_BASE = pathlib.Path(__file__).parents[1] / "data" / "tiny_base"
PHASES = {"pretrain": "restoring", "finetune": "answering"}  # and what is learned in it
METHODS = {
    "x500": "500x",
    "icae": "ICAE",
}  # and what the page calls them; in this order, the sooner trained first
QUICK, FULL = "4x", ""  # recipes of the configuration quickstart: at one ratio, or at both
TRAIN_SEED, HELD_OUT_SEED = 1, 2
TRAIN_PASSAGES, QUICK_PASSAGES = 12_000, 4_000
SHOWN_EVERY = 50  # steps of training, after which a restored sentence is shown
BATCH = (
    25  # passages compressed and decoded at once, always, so that every program is compiled once
)


def phase_config(phase, method, recipe, fields):
    """The configuration of a phase of a method, with the fields that the quickstart sets."""
    arg = "-".join(filter(None, (phase, method, recipe)))
    return config_file.load(TrainConfig, f"quickstart:{arg}", fields)


def write_data(folder, train_passages, held_out_passages):
    """Writes train.jsonl and held_out.jsonl, a line for each question, in the form that `data.sources` reads."""
    for name, seed, count in (
        ("train", TRAIN_SEED, train_passages),
        ("held_out", HELD_OUT_SEED, held_out_passages),
    ):
        path = folder / f"{name}.jsonl"
        if path.exists():  # a run that is continued keeps its data
            continue
        lines = []
        for row in synthetic.passages(seed, count):
            lines += [
                json.dumps({"context": row["context"], **question}) for question in row["questions"]
            ]
        with files.replacing_file(path) as tmp:
            tmp.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(compressor, untrained, rows, k):
    """What memories of k tokens a segment are worth on held-out passages: (scores of QA and restoration with controls, restored texts)."""
    contexts = [row["context"] for row in rows]
    questions = _questions(rows)
    memory, blank = (c.compress(contexts, batch_size=BATCH, k=k) for c in (compressor, untrained))
    wrong = memory[np.roll(np.arange(len(rows)), -1)]
    answers = {
        "memory": compressor.ask(memory, questions, 8, batch_size=BATCH),
        "wrong memory": compressor.ask(wrong, questions, 8, batch_size=BATCH),
        "untrained memory": untrained.ask(blank, questions, 8, batch_size=BATCH),
    }
    restored, unrestored = (
        compressor.restore(memory, batch_size=BATCH),
        untrained.restore(blank, batch_size=BATCH),
    )
    losses = {}
    for arm, read in (("memory", memory), ("wrong memory", wrong)):
        found = compressor.score_restoring(read, contexts, batch_size=BATCH)
        losses[arm] = -sum(score.log_prob for score in found) / sum(score.tokens for score in found)
    return {
        "memory_tokens": float(memory.tokens.mean()),
        "ratio": float(memory.lengths.sum() / memory.tokens.sum()),
        "bytes": float(memory.bytes.mean()),
        "qa_exact_match": {arm: _right(given, rows) for arm, given in answers.items()},
        "bleu": {
            "memory": scores.bleu(restored, contexts),
            "untrained memory": scores.bleu(unrestored, contexts),
        },
        "exact_passages": scores.exact_match(restored, contexts),
        "ae_loss": losses,
    }, restored


def controls(compressor, rows):
    """QA exact match of the base alone, with the passage in its prompt and without."""
    arms = {"full context": [row["context"] for row in rows], "no context": None}
    return {
        arm: _right(plain.answer(compressor, _questions(rows), contexts, 8, 2 * BATCH), rows)
        for arm, contexts in arms.items()
    }


def _questions(rows):
    return [[q["question"] for q in row["questions"]] for row in rows]


def _right(answers, rows):
    truth = [q["answers"][0] for row in rows for q in row["questions"]]
    return scores.exact_match([a for row in answers for a in row], truth)


def summary_table(result):
    """(header, rows) as text cells of what `compare` returns: a column for each method and number of memory tokens."""
    memories = result["memories"]
    rows = [
        ("memory tokens", *(f"{m['memory_tokens']:.0f}" for m in memories)),
        ("ratio", *(f"{m['ratio']:.1f}x" for m in memories)),
        ("bytes of a memory", *(f"{m['bytes']:,.0f}" for m in memories)),
        ("training steps", *("+".join(map(str, m["steps"])) for m in memories)),
    ]
    for arm in ("full context", "memory", "no context", "wrong memory", "untrained memory"):
        right = [result["qa_exact_match"].get(arm, m["qa_exact_match"].get(arm)) for m in memories]
        rows.append((f"QA exact match, {arm}", *(f"{value:.1f} %" for value in right)))
    for arm in ("memory", "wrong memory"):
        rows.append((f"AE loss, {arm}", *(f"{m['ae_loss'][arm]:.3f}" for m in memories)))
    for arm in ("memory", "untrained memory"):
        rows.append((f"BLEU-4, {arm}", *(f"{m['bleu'][arm]:.1f}" for m in memories)))
    rows.append(("restored exactly", *(f"{m['exact_passages']:.0f} %" for m in memories)))
    return ("", *(METHODS[m["method"]] for m in memories)), rows


def _curves(workdir, largest):
    """Training losses of both methods, one phase after the other. Passages are seen so seldom that they tell of new ones too."""
    series = {}
    for method, name in METHODS.items():
        offset = 0
        for phase in PHASES:
            lines = [
                x for x in metrics.read_lines(workdir / method / phase / "metrics.jsonl") if "train" in x
            ]
            for line in lines:
                for objective, value in line["train"].items():
                    label = f"{name}, {line.get('k', largest)} tokens: {objective.upper()}"
                    xs, ys, _ = series.setdefault(label, ([], [], objective == "qa"))
                    xs.append(offset + line["step"])
                    ys.append(value)
            offset += max((x["step"] for x in lines), default=0)
    return report.curves(series, log=True)


def _examples(contexts, restored):
    """Two passages: the first that came back whole, and the first that did not (the latter is always shown where there is one)."""
    pairs = list(zip(contexts, restored, strict=True))
    whole = [p for p in pairs if p[0].strip() == p[1].strip()]
    broken = [p for p in pairs if p[0].strip() != p[1].strip()]
    return (broken[:1] + whole[:1] + broken[1:2] + whole[1:2])[:2]


def _sentence(text):
    """The second sentence of a text, which tells the first fact; of a text with fewer, the last."""
    sentences = text.split(". ")
    return sentences[min(1, len(sentences) - 1)].strip()


def show_restored(compressor, rows, say):
    """A `watch` of `train`: after every `SHOWN_EVERY` steps says a sentence of a held-out passage beside what its memory gives back."""
    contexts = [row["context"] for row in rows[:BATCH]]

    def watch(step, trained):
        if step % SHOWN_EVERY:
            return
        present = copy.copy(compressor)
        present.trained = trained
        restored = present.restore(present.compress(contexts, BATCH), batch_size=BATCH)
        whole = sum(a == b.strip() for a, b in zip(contexts, restored, strict=True))
        say(
            f"step {step:3}   {_sentence(contexts[0])} → {_sentence(restored[0])}   ({whole} of {len(contexts)} passages came back whole)"
        )

    return watch


def load_base(source):
    """A base as all of the quickstart's trainings have it, read once."""
    placement = sharding.Placement(sharding.make_mesh(), bases.sizes(source))
    return bases.load_base(source, jnp.float32, placement.parameter)


def train_method(
    method, workdir, base, data, steps, compression=(), *, recipe=FULL, verbosity=NORMAL, rows=()
):
    """Trains both phases of a method in `workdir`, on a base of `load_base`. data: the folder of `write_data`. steps: `{phase: steps}`
    other than the recipe's.

    compression: fields of the compression configuration to set. recipe: `QUICK` or `FULL`. rows: held-out passages, of which a restored
    sentence is shown now and then. Returns (exit code, its `Compressor` or None, its `Compressor` before training).
    """
    untrained = None
    for phase, learned in PHASES.items():
        fields = {
            "base": base.path,
            "data.train": str(data / "train.jsonl"),
            "data.eval": str(data / "held_out.jsonl"),
            "data.cache_dir": str(data / "cache"),
        }
        fields |= {f"compression.{name}": value for name, value in dict(compression).items()}
        if phase in steps:
            fields["steps"] = steps[phase]
        if phase == "finetune":
            fields["init_from"] = str(workdir / "pretrain")
        c = phase_config(phase, method, recipe, fields)
        task = CompressorTask(c, base)
        if (
            phase == "pretrain"
        ):  # with the choices of k that only the second phase may train, to be measured alike
            untrained = adapters.Adapter(
                c.compression, c.lora, task.template, task.init(), base.path, base.fingerprint
            )
            untrained = Compressor(base, untrained, workdir, mesh=task.placement.mesh)
        watch = (
            show_restored(untrained, rows, lambda text: tqdm.write(text, file=sys.stderr))
            if len(rows)
            else None
        )
        code = train(
            c,
            task,
            workdir / phase,
            verbosity=verbosity,
            title=f"{METHODS[method]}, {learned}",
            watch=watch,
            meter=Meter(task),
        )
        if code:
            return code, None, untrained
    folder = workdir / phase / adapters.IN_WORKDIR
    adapter = adapters.load_adapter(folder, base)
    return 0, Compressor(base, adapter, folder, mesh=task.placement.mesh), untrained


def compare(trained, rows):
    """Measures compressors side by side. trained: (method, its workdir, its `Compressor`, the one before training) of each, see
    `train_method`.

    Returns (result as plain numbers, `{(method, k): restored texts}`), the most memory tokens first.
    """
    memories, restored = [], {}
    for method, workdir, compressor, untrained in trained:
        steps = [
            max(line["step"] for line in metrics.read_lines(workdir / phase / "metrics.jsonl"))
            for phase in PHASES
        ]
        for k in compressor.config.choices:
            measured, restored[method, k] = measure(compressor, untrained, rows, k)
            memories.append({"method": method, "k": k, "steps": steps, **measured})
    memories.sort(key=lambda m: -m["k"])
    tokenizer = compressor.base.tokenizer
    result = {
        "passages": len(rows),
        "questions": sum(len(row["questions"]) for row in rows),
        "context_tokens": float(
            np.mean([len(tokenizer(row["context"])["input_ids"]) for row in rows])
        ),
        "bits": synthetic.passage_bits(),
        "qa_exact_match": controls(compressor, rows),
        "memories": memories,
    }
    return result, restored


def first_answer(compressor, rows):
    """Lines that show a memory at work: a held-out passage, a question, and what is answered and restored from the memory alone."""
    part = rows[:BATCH]
    memory = compressor.compress([row["context"] for row in part], BATCH)
    answers = compressor.ask(memory, _questions(part), 8, batch_size=BATCH)
    restored = compressor.restore(memory, batch_size=BATCH)
    return [
        f"  passage     {part[0]['context']}",
        f"  its memory  {memory.tokens[0]} tokens for {memory.lengths[0]}, {memory.bytes[0]:,} bytes; the passage is put away",
        f"  question    {part[0]['questions'][1]['question']}",
        f"  answer      {answers[0][1]}",
        f"  restored    {restored[0]}",
    ]


PLAN = """\
Trains {methods} on a small shipped base: passages of 46 tokens are written into memories of {k} tokens, restored, and asked about.
On 2 CPU cores without other load: {times}.
At the end: a table beside the controls, and {workdir}/report.html. Stopped in the middle, the same command continues.
"""
TIMES = {
    QUICK: "the first answer within 2 minutes, all of it within 5 (--full: memories of 2 tokens as well, 10 minutes)",
    FULL: "the first answer within 4 minutes, all of it within 10",
}


def main(parser, argv, began=None):
    """Runs the quickstart in a workdir; run again, it continues or shows the result again. Returns an exit code.

    began: when the command was started (`time.perf_counter`), by default now.
    """
    parser.add_argument(
        "--workdir",
        help="where everything goes (default: ./quickstart, with --full ./quickstart_full)",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="one model of each method for 4x and 22x, trained longer",
    )
    parser.add_argument(
        "--from_scratch",
        action="store_true",
        help="train the small base anew instead of using the shipped one",
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="steps of each phase, to look at a shorter or longer run (default: the recipe's)",
    )
    parser.add_argument("--held_out", type=int, default=100, help="held-out passages to measure on")
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="say all that training says, its parameters and checkpoints too",
    )
    args = parser.parse_args(argv)
    for name, least in (
        ("steps", 1),
        ("held_out", 2),
    ):  # two: each is measured with the other's memory too
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    began = time.perf_counter() if began is None else began
    workdir = pathlib.Path(args.workdir or ("quickstart_full" if args.full else "quickstart"))
    recipe, verbosity = FULL if args.full else QUICK, VERBOSE if args.verbose else QUIET
    if not (SHIPPED_BASE / "config.json").exists() and not args.from_scratch:
        raise UserError(
            f"{SHIPPED_BASE}: the shipped base is not there; reinstall, or run with --from_scratch"
        )
    config = phase_config("pretrain", "x500", recipe, {"base": "-", "data.train": "-"})
    ks = " and ".join(map(str, sorted(config.compression.choices, reverse=True)))
    print(
        PLAN.format(
            methods=" and ".join(METHODS.values()), k=ks, times=TIMES[recipe], workdir=workdir
        ),
        file=sys.stderr,
        flush=True,
    )
    with lock.only_writer(workdir, "--workdir"):
        return _run(args, workdir, recipe, verbosity, began)


def _run(args, workdir, recipe, verbosity, began):
    """The quickstart itself, once it is known what is asked for. Returns an exit code."""

    def minutes():
        return (time.perf_counter() - began) / 60

    # ------------------------------------------------------------------------------------------------------ the base
    base = SHIPPED_BASE
    if args.from_scratch:
        config = config_file.load(BaseConfig, "tiny_base")
        code = train(
            config,
            BaseTask(config),
            workdir / "base_training",
            verbosity=verbosity,
            title="the base",
        )
        if code:
            return code
        base = workdir / "base_training" / BASE

    # ------------------------------------------------------------------------- data, then the two phases of each method
    steps = dict.fromkeys(PHASES, args.steps) if args.steps else {}
    base = load_base(base)
    data = workdir / "data"
    write_data(
        data, TRAIN_PASSAGES if args.full else min(TRAIN_PASSAGES, QUICK_PASSAGES), args.held_out
    )
    rows = synthetic.passages(HELD_OUT_SEED, args.held_out)
    trained = []
    for method in METHODS:
        code, *compressors = train_method(
            method,
            workdir / method,
            base,
            data,
            steps,
            recipe=recipe,
            verbosity=verbosity,
            rows=rows,
        )
        if code:
            return code
        if not trained:
            lines = first_answer(compressors[0], rows)
            print(
                "\n".join(
                    [
                        f"\nThe first answer from a memory, after {minutes():.1f} minutes:",
                        *lines,
                        "",
                    ]
                ),
                flush=True,
            )
        trained.append((method, workdir / method, *compressors))

    # ---------------------------------------------------------------------------------------------------- the result
    result, restored = compare(trained, rows)
    header, table = summary_table(result)

    adapter = workdir / "icae" / "finetune" / adapters.IN_WORKDIR
    example = rows[0]
    example_path, memory_path = data / "example.jsonl", workdir / "memory.safetensors"
    files.write_json(workdir / "results.json", result)
    with files.replacing_file(example_path) as tmp:
        tmp.write_text(
            json.dumps({"id": "example", "text": example["context"]}) + "\n", encoding="utf-8"
        )
    commands = [
        f"icae compress --adapter {adapter} --input {example_path} --output {memory_path}",
        f'icae ask --memory {memory_path} --question "{example["questions"][1]["question"]}"',
        f"icae restore --memory {memory_path}",
    ]
    facts = (
        f"{result['passages']} held-out passages of about {result['context_tokens']:.0f} tokens ({result['bits']:.0f} bits each), "
        f"{result['questions']} questions, the same data and seed for both methods; {minutes():.1f} minutes since the start."
    )
    contexts = [r["context"] for r in rows]
    arms = [(m["method"], m["k"]) for m in result["memories"]]
    shown = [
        (METHODS[method], k, *pair)
        for method, k in arms
        for pair in _examples(contexts, restored[method, k])
    ]
    page = workdir / "report.html"
    report.write(
        page,
        "icae quickstart: what a memory is worth",
        [
            f"<p>{facts}</p>",
            report.table(header, table),
            "<p>Full context and no context: the base alone. Wrong memory: another passage's. Untrained: before training. "
            "AE loss: of restoring the text, in nats per token.</p>",
            "<h2>Restored texts</h2>",
            "<p>Original, then restored (lost words struck out, made-up words marked):</p>",
            *[
                f'<p>{name}, {k} tokens</p><div class="text">{html.escape(original)}</div>{report.difference(original, text)}'
                for name, k, original, text in shown
            ],
            "<h2>Losses while training</h2>",
            _curves(workdir, result["memories"][0]["k"]),
            "<h2>Next</h2>",
            f"<p>{html.escape(example['context'])}</p><pre>{html.escape(chr(10).join(commands))}</pre>",
        ],
    )
    print(f"\n{facts}\n\n{report.text_table(header, table)}\n")
    for (name, k), (original, text) in {
        (name, k): pair for name, k, *pair in reversed(shown)
    }.items():
        print(f"original        {original}\n{f'{name}, {k} tokens':16}{text}\n")
    print(f"report    {page.resolve()}\nadapter   {adapter}\n\nnext, about: {example['context']}\n")
    print("\n".join(f"  {c}" for c in commands))
    return 0
