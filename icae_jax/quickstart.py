"""`icae quickstart`: train both methods on a small shipped base and show what their memories are worth, in one page."""

import html
import json
import pathlib
import runpy
import sys
import time

import numpy as np

from icae_jax.data import synthetic
from icae_jax.errors import UserError
from icae_jax.evaluation import plain, report, scores
from icae_jax.inference.compressor import Compressor, load
from icae_jax.interop import adapter as adapters
from icae_jax.interop import files
from icae_jax.training import metrics
from icae_jax.training.base_task import BASE, BaseTask
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import BaseConfig, TrainConfig, from_dict
from icae_jax.training.train import train

SHIPPED_BASE = pathlib.Path(__file__).parent / "data" / "tiny_base"
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PHASES = ("pretrain", "finetune")
METHODS = {"icae": "ICAE", "x500": "500x"}  # and what the page calls them
TRAIN_SEED, HELD_OUT_SEED = 1, 2
TRAIN_PASSAGES = 12_000


def get_config(name, arg=None):
    """`get_config(arg)` of a file in configs/, as nested dicts."""
    path = CONFIGS / f"{name}.py"
    if not path.exists():
        raise UserError(f"{path}: no such file; the quickstart needs the repository's configs/, so install with pip install -e .")
    make = runpy.run_path(str(path))["get_config"]
    return (make(arg) if arg else make()).to_dict()


def write_data(folder, train_passages, held_out_passages):
    """Writes train.jsonl and held_out.jsonl, a line for each question, in the form that `data.sources` reads."""
    for name, seed, count in (("train", TRAIN_SEED, train_passages), ("held_out", HELD_OUT_SEED, held_out_passages)):
        path = folder / f"{name}.jsonl"
        if path.exists():  # a run that is continued keeps its data
            continue
        lines = []
        for row in synthetic.passages(seed, count):
            lines += [json.dumps({"context": row["context"], **question}) for question in row["questions"]]
        with files.replacing_file(path) as tmp:
            tmp.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(compressor, untrained, rows, k):
    """What memories of k tokens a segment are worth on held-out passages: (scores of QA and restoration with controls, restored texts)."""
    contexts = [row["context"] for row in rows]
    questions = [[q["question"] for q in row["questions"]] for row in rows]
    memory, blank = (c.compress(contexts, batch_size=50, k=k) for c in (compressor, untrained))
    wrong = memory[np.roll(np.arange(len(rows)), -1)]
    answers = {
        "memory": compressor.ask(memory, questions, 8, batch_size=50),
        "wrong memory": compressor.ask(wrong, questions, 8, batch_size=50),
        "untrained memory": untrained.ask(blank, questions, 8, batch_size=50),
    }
    restored, unrestored = compressor.restore(memory, batch_size=50), untrained.restore(blank, batch_size=50)
    return {
        "memory_tokens": float(memory.tokens.mean()),
        "ratio": float(memory.lengths.sum() / memory.tokens.sum()),
        "bytes": float(memory.bytes.mean()),
        "qa_exact_match": {arm: _right(given, rows) for arm, given in answers.items()},
        "bleu": {"memory": scores.bleu(restored, contexts), "untrained memory": scores.bleu(unrestored, contexts)},
        "exact_passages": scores.exact_match(restored, contexts),
    }, restored


def controls(compressor, rows):
    """QA exact match of the base alone, with the passage in its prompt and without."""
    questions = [[q["question"] for q in row["questions"]] for row in rows]
    contexts = [row["context"] for row in rows]
    arms = {"full context": plain.answer(compressor, questions, contexts), "no context": plain.answer(compressor, questions)}
    return {arm: _right(given, rows) for arm, given in arms.items()}


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


def _curve(workdir, largest):
    """Held-out losses of both methods, one phase after the other."""
    series = {}
    for method, name in METHODS.items():
        offset = 0
        for phase in PHASES:
            lines = [x for x in metrics.read(workdir / method / phase / "metrics.jsonl") if "eval" in x]
            for line in lines:
                for kind, losses in line["eval"].items():
                    what, _, k = kind.partition("_k")
                    for objective, value in losses.items() if what == "memory" else ():
                        label = f"{name}, {k or largest} tokens: {objective.upper()}"
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


def train_method(method, workdir, base, data, steps, compression=()):
    """Trains both phases of a method in `workdir`. data: the folder of `write_data`. steps: `{phase: steps}` other than the recipe's.

    compression: fields of the compression configuration to set. Returns (exit code, its `Compressor` before training).
    """
    untrained = None
    for phase in PHASES:
        raw = get_config("quickstart", f"{phase}-{method}")
        raw["base"] = str(base)
        raw["data"] |= {"train": str(data / "train.jsonl"), "eval": str(data / "held_out.jsonl"), "cache_dir": str(data / "cache")}
        raw["compression"] |= dict(compression)
        raw["steps"] = steps.get(phase, raw["steps"])
        if phase == "finetune":
            raw["init_from"] = str(workdir / "pretrain")
        c = from_dict(TrainConfig, raw)
        task = CompressorTask(c)
        if phase == "pretrain":  # with the choices of k that only the second phase may train, to be measured alike
            untrained = adapters.Adapter(c.compression, c.lora, task.template, task.init(), str(base), task.base.fingerprint)
            untrained = Compressor(task.base, untrained, workdir)
        print(f"--- {METHODS[method]}, {phase}: {c.steps} steps", file=sys.stderr)
        code = train(c, task, workdir / phase)
        if code:
            return code, untrained
    return 0, untrained


def compare(trained, rows):
    """Measures compressors side by side. trained: (method, workdir of `train_method`, its `Compressor` before training) of each.

    Returns (result as plain numbers, `{(method, k): restored texts}`), the most memory tokens first.
    """
    memories, restored = [], {}
    for method, workdir, untrained in trained:
        compressor = load(workdir / "finetune" / adapters.IN_WORKDIR)
        ends = [[x for x in metrics.read(workdir / phase / "metrics.jsonl") if "eval" in x][-1] for phase in PHASES]
        for k in compressor.config.choices:
            kind = "" if k == compressor.config.k else f"_k{k}"
            ae = {arm: ends[-1]["eval"][prefix + kind]["ae"] for arm, prefix in (("memory", "memory"), ("wrong memory", "wrong_memory"))}
            measured, restored[method, k] = measure(compressor, untrained, rows, k)
            memories.append({"method": method, "k": k, "steps": [end["step"] for end in ends], **measured, "ae_loss": ae})
    memories.sort(key=lambda m: -m["k"])
    tokenizer = compressor.base.tokenizer
    result = {
        "passages": len(rows),
        "questions": sum(len(row["questions"]) for row in rows),
        "context_tokens": float(np.mean([len(tokenizer(row["context"])["input_ids"]) for row in rows])),
        "bits": synthetic.passage_bits(),
        "qa_exact_match": controls(compressor, rows),
        "memories": memories,
    }
    return result, restored


def main(parser, argv):
    """Runs the quickstart in a workdir; run again, it continues or shows the result again. Returns an exit code."""
    parser.add_argument("--workdir", default="quickstart", help="where everything goes (default: ./quickstart)")
    parser.add_argument("--from-scratch", action="store_true", help="train the small base anew instead of using the shipped one")
    parser.add_argument("--steps", type=int, help="steps of each phase, to look at a shorter or longer run (default: the recipe's)")
    parser.add_argument("--held_out", type=int, default=100, help="held-out passages to measure on")
    args = parser.parse_args(argv)
    for name in ("steps", "held_out"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    began = time.perf_counter()
    workdir = pathlib.Path(args.workdir)

    # ------------------------------------------------------------------------------------------------------ the base
    base = SHIPPED_BASE
    if args.from_scratch:
        config = from_dict(BaseConfig, get_config("tiny_base"))
        code = train(config, BaseTask(config), workdir / "base_training")
        if code:
            return code
        base = workdir / "base_training" / BASE
    if not (base / "config.json").exists():
        raise UserError(f"{base}: the shipped base is not there; reinstall, or run with --from-scratch")

    # ------------------------------------------------------------------------- data, then the two phases of each method
    steps = {phase: args.steps for phase in PHASES} if args.steps else {}
    get_config("quickstart")  # is it there? Found out before anything is written
    data = workdir / "data"
    write_data(data, TRAIN_PASSAGES, args.held_out)
    rows = synthetic.passages(HELD_OUT_SEED, args.held_out)
    trained = []
    for method in METHODS:
        code, untrained = train_method(method, workdir / method, base, data, steps)
        if code:
            return code
        trained.append((method, workdir / method, untrained))

    # ---------------------------------------------------------------------------------------------------- the result
    result, restored = compare(trained, rows)
    header, table = summary_table(result)

    adapter = workdir / "icae" / "finetune" / adapters.IN_WORKDIR
    example = rows[0]
    example_path, memory_path = data / "example.jsonl", workdir / "memory.safetensors"
    files.write_json(workdir / "results.json", result)
    with files.replacing_file(example_path) as tmp:
        tmp.write_text(json.dumps({"id": "example", "text": example["context"]}) + "\n", encoding="utf-8")
    commands = [
        f"icae compress --adapter {adapter} --input {example_path} --output {memory_path}",
        f'icae ask --memory {memory_path} --question "{example["questions"][1]["question"]}"',
        f"icae restore --memory {memory_path}",
    ]
    minutes = (time.perf_counter() - began) / 60
    facts = (
        f"{result['passages']} held-out passages of about {result['context_tokens']:.0f} tokens ({result['bits']:.0f} bits each), "
        f"{result['questions']} questions, the same data and seed for both methods; {minutes:.1f} minutes."
    )
    contexts = [r["context"] for r in rows]
    arms = [(m["method"], m["k"]) for m in result["memories"]]
    shown = [(METHODS[method], k, *pair) for method, k in arms for pair in _examples(contexts, restored[method, k])]
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
                f"<p>{name}, {k} tokens</p>"
                f'<div class="text">{html.escape(original)}</div>{report.difference(original, text)}'
                for name, k, original, text in shown
            ],
            "<h2>Held-out losses</h2>",
            _curve(workdir, result["memories"][0]["k"]),
            "<h2>Next</h2>",
            f"<p>{html.escape(example['context'])}</p><pre>{html.escape(chr(10).join(commands))}</pre>",
        ],
    )
    print(f"\n{facts}\n\n{report.text_table(header, table)}\n")
    for (name, k), (original, text) in {(name, k): pair for name, k, *pair in reversed(shown)}.items():
        print(f"original        {original}\n{f'{name}, {k} tokens':16}{text}\n")
    print(f"report    {page.resolve()}\nadapter   {adapter}\n\nnext, about: {example['context']}\n")
    print("\n".join(f"  {c}" for c in commands))
    return 0
