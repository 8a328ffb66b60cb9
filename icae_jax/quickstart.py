"""`icae quickstart`: train a compressor on a small shipped base and show what a memory is worth, in one page."""

import html
import json
import pathlib
import runpy
import sys
import time

import numpy as np

from icae_jax.data import synthetic
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
TRAIN_SEED, HELD_OUT_SEED = 1, 2
TRAIN_PASSAGES = 20_000


def get_config(name, arg=None):
    """`get_config(arg)` of a file in configs/, as nested dicts."""
    path = CONFIGS / f"{name}.py"
    if not path.exists():
        raise ValueError(f"{path}: no such file; the quickstart needs the repository's configs/, so install with pip install -e .")
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


def measure(compressor, untrained, rows):
    """Scores on held-out passages: QA exact match in five arms, and restoration. Returns a dict of plain numbers and texts."""
    contexts = [row["context"] for row in rows]
    questions = [[q["question"] for q in row["questions"]] for row in rows]
    truth = [q["answers"][0] for row in rows for q in row["questions"]]
    memory = compressor.compress(contexts, batch_size=50)
    blank = untrained.compress(contexts, batch_size=50)
    wrong = memory[np.roll(np.arange(len(rows)), -1)]
    arms = {
        "full context": plain.answer(compressor, questions, contexts),
        "memory": compressor.ask(memory, questions, 8, batch_size=50),
        "no context": plain.answer(compressor, questions),
        "wrong memory": compressor.ask(wrong, questions, 8, batch_size=50),
        "untrained memory": untrained.ask(blank, questions, 8, batch_size=50),
    }
    qa = {arm: scores.exact_match([a for row in answers for a in row], truth) for arm, answers in arms.items()}
    restored = compressor.restore(memory, batch_size=50)
    unrestored = untrained.restore(blank, batch_size=50)
    return {
        "passages": len(rows),
        "questions": len(truth),
        "qa_exact_match": qa,
        "bleu": {"memory": scores.bleu(restored, contexts), "untrained memory": scores.bleu(unrestored, contexts)},
        "exact_passages": {
            "memory": scores.exact_match(restored, contexts),
            "untrained memory": scores.exact_match(unrestored, contexts),
        },
        "context_tokens": float(memory.lengths.mean()),
        "memory_tokens": float(memory.tokens.mean()),
        "ratio": float(memory.lengths.sum() / memory.tokens.sum()),
        "bytes": float(memory.bytes.mean()),
        "bits": synthetic.passage_bits(),
        "restored": restored,
    }


def _tables(result, losses):
    qa = [(arm, f"{value:.1f} %") for arm, value in result["qa_exact_match"].items()]
    ae = [
        ("memory", f"{losses['memory']['ae']:.3f}", f"{result['bleu']['memory']:.1f}", f"{result['exact_passages']['memory']:.0f} %"),
        ("wrong memory", f"{losses['wrong_memory']['ae']:.3f}", "", ""),
        (
            "untrained memory",
            f"{losses['untrained']['ae']:.3f}",
            f"{result['bleu']['untrained memory']:.1f}",
            f"{result['exact_passages']['untrained memory']:.0f} %",
        ),
    ]
    return (("what the decoder sees", "QA exact match"), qa), (("restoring from", "AE loss", "BLEU-4", "exact passages"), ae)


def _curve(workdir):
    """The loss curve of both phases, one after the other."""
    series, offset = {}, 0
    for phase in PHASES:
        lines = metrics.read(workdir / phase / "metrics.jsonl")
        for objective in ("ae", "lm", "qa"):
            train_points = [(offset + x["step"], x["train"][objective]) for x in lines if objective in x.get("train", {})]
            held_out = [(offset + x["step"], x["eval"]["memory"]) for x in lines if "eval" in x]
            eval_points = [(at, losses[objective]) for at, losses in held_out if objective in losses]
            for kind, points, dashed in (("training", train_points, False), ("held out", eval_points, True)):
                if points:
                    xs, ys = zip(*points, strict=True)
                    series[f"{phase}: {objective}, {kind}"] = (xs, ys, dashed)
        offset += max((x["step"] for x in lines), default=0)
    return report.curves(series, log=True)


def _examples(contexts, restored):
    """Two passages: the first that came back whole, and the first that did not (the latter is always shown where there is one)."""
    pairs = list(zip(contexts, restored, strict=True))
    whole = [p for p in pairs if p[0].strip() == p[1].strip()]
    broken = [p for p in pairs if p[0].strip() != p[1].strip()]
    return (broken[:1] + whole[:1] + broken[1:2] + whole[1:2])[:2]


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
            raise ValueError(f"--{name} is {value}; it must be at least 1")
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
        raise ValueError(f"{base}: the shipped base is not there; reinstall, or run with --from-scratch")

    # ------------------------------------------------------------------------------------- data, then the two phases
    raw = {phase: get_config("quickstart", phase) for phase in PHASES}
    data = workdir / "data"
    write_data(data, TRAIN_PASSAGES, args.held_out)
    configs = {}
    for phase in PHASES:
        raw[phase]["base"] = str(base)
        sources = {"train": str(data / "train.jsonl"), "eval": str(data / "held_out.jsonl"), "cache_dir": str(workdir / "cache")}
        raw[phase]["data"] |= sources
        if args.steps:
            raw[phase]["steps"] = args.steps
        if phase == "finetune":
            raw[phase]["init_from"] = str(workdir / "pretrain")
        configs[phase] = from_dict(TrainConfig, raw[phase])
        task = CompressorTask(configs[phase])
        if phase == "pretrain":
            c = configs[phase]
            untrained = adapters.Adapter(c.compression, c.lora, task.template, task.init(), str(base), task.base.fingerprint)
            untrained = Compressor(task.base, untrained, workdir)
        print(f"--- {phase}: {configs[phase].steps} steps", file=sys.stderr)
        code = train(configs[phase], task, workdir / phase)
        if code:
            return code

    # ---------------------------------------------------------------------------------------------------- the result
    adapter = workdir / "finetune" / adapters.IN_WORKDIR
    compressor = load(adapter)
    rows = synthetic.passages(HELD_OUT_SEED, args.held_out)
    result = measure(compressor, untrained, rows)
    lines = {phase: [x for x in metrics.read(workdir / phase / "metrics.jsonl") if "eval" in x] for phase in PHASES}
    losses = lines["finetune"][-1]["eval"] | {"untrained": lines["pretrain"][0]["eval"]["memory"]}
    (qa_header, qa), (ae_header, ae) = _tables(result, losses)

    example = rows[0]
    example_path, memory_path = data / "example.jsonl", workdir / "memory.safetensors"
    files.write_json(workdir / "results.json", {k: v for k, v in result.items() if k != "restored"} | {"losses": losses})
    with files.replacing_file(example_path) as tmp:
        tmp.write_text(json.dumps({"id": "example", "text": example["context"]}) + "\n", encoding="utf-8")
    commands = [
        f"icae compress --adapter {adapter} --input {example_path} --output {memory_path}",
        f'icae ask --memory {memory_path} --question "{example["questions"][1]["question"]}"',
        f"icae restore --memory {memory_path}",
    ]
    minutes = (time.perf_counter() - began) / 60
    facts = (
        f"{result['passages']} held-out passages of about {result['context_tokens']:.0f} tokens ({result['bits']:.0f} bits of information) "
        f"in {result['memory_tokens']:.0f} memory slots ({result['ratio']:.1f}x), {result['questions']} questions. "
        f"Steps: {configs['pretrain'].steps} + {configs['finetune'].steps}; {minutes:.1f} minutes."
    )
    shown = _examples([r["context"] for r in rows], result["restored"])
    page = workdir / "report.html"
    report.write(
        page,
        "icae quickstart: what a memory is worth",
        [
            f"<p>{facts}</p>",
            "<h2>Questions</h2>",
            report.table(qa_header, qa),
            "<p>Full context and no context: the base alone. Wrong memory: another passage's. Untrained: before training.</p>",
            "<h2>Restoring the text</h2>",
            report.table(ae_header, ae),
            *[
                f"<p>Original, then restored (lost words struck out, made-up words marked):</p>"
                f'<div class="text">{html.escape(original)}</div>{report.difference(original, text)}'
                for original, text in shown
            ],
            "<h2>Losses</h2>",
            _curve(workdir),
            "<h2>Next</h2>",
            f"<p>{html.escape(example['context'])}</p><pre>{html.escape(chr(10).join(commands))}</pre>",
        ],
    )
    print(f"\n{facts}\n\n{report.text_table(qa_header, qa)}\n\n{report.text_table(ae_header, ae)}\n")
    for original, text in shown:
        print(f"original  {original}\nrestored  {text}\n")
    print(f"report    {page.resolve()}\nadapter   {adapter}\n\nnext, about: {example['context']}\n")
    print("\n".join(f"  {c}" for c in commands))
    return 0
