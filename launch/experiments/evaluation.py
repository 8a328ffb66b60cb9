"""Runs every suite of `icae evaluate` on small models.

    icae quickstart --full
    launch/experiments/stories.sh DATA runs/stories4
    python launch/experiments/evaluation.py --workdir runs/evaluation \\
        --quickstart quickstart_full --stories runs/stories4 --data DATA

The models: the quickstart's adapters, and one of stories.sh on a real base and real text. Trains
the few variants that the ablations compare, then runs the suites one after another; the same
command continues. Each suite's folder in the workdir holds results.json and report.html.
"""

import argparse
import json
import pathlib
import sys

from icae_jax.runtime import compiled

compiled.set_up()  # before anything imports JAX

from icae_jax import files  # noqa: E402
from icae_jax.cli import main as cli  # noqa: E402
from icae_jax.data import synthetic  # noqa: E402
from icae_jax.interop.hub import tokenizer as tokenizers  # noqa: E402
from icae_jax.workflows import quickstart  # noqa: E402

PASSAGE = 45  # tokens of the passages that are joined, so that each is one segment
SPANS = 4  # passages in a joined text


def icae(*argv):
    """Prints and runs one `icae` command; exits with its code unless that is 0."""
    argv = [str(argument) for argument in argv]
    print(f"\n$ icae {' '.join(argv)}\n", flush=True)
    code = cli.main(argv)
    if code:
        sys.exit(code)


def train(config, workdir, **fields):
    """`icae train` with a shipped configuration and fields; `__` in a name stands for a dot."""
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    icae("train", "--config", config, "--workdir", workdir, *flags)


def evaluate(suite, out, adapters, data, *flags):
    """`icae evaluate` of one suite."""
    named = [word for adapter in adapters for word in ("--adapter", adapter)]
    icae("evaluate", "--suite", suite, *named, "--data", data, *flags, "--out", out)


# ----------------------------------------------------------------------------------- the quickstart


def _asked(row):
    """A passage's questions with their answers, as plain text.

    Each ends with a full stop, as sentences do, since a text cannot spell `</s>`.
    """
    return [
        synthetic.TEMPLATE.format(question=q["question"]) + f" {q['answers'][0]}."
        for q in row["questions"]
    ]


def _people(row):
    return {q["question"].rpartition(" of ")[2] for q in row["questions"]}


def write_texts(folder, count, seed=quickstart.HELD_OUT_SEED):
    """Writes held-out texts in which questions with answers follow passages.

    continued.jsonl: one passage with its questions. spans.jsonl: four passages with two questions
    on each. No two of the four share a name, and their questions follow in the same order, so that
    with any number of joined segments those on the last passages can be answered.
    """
    tokenizer = tokenizers.load_tokenizer(quickstart.SHIPPED_BASE)
    rows = [
        row
        for row in synthetic.passages(seed, 20 * SPANS * count)
        if len(tokenizer(row["context"], add_special_tokens=False)["input_ids"]) == PASSAGE
    ]
    continued = [" ".join([row["context"], *_asked(row)]) for row in rows[:count]]
    joined, group = [], []
    for row in rows:
        if not any(_people(row) & _people(other) for other in group):
            group.append(row)
        if len(group) == SPANS:
            contexts = [row["context"] for row in group]
            joined.append(" ".join(contexts + [q for row in group for q in _asked(row)[1::4]]))
            group = []
    for name, texts in (("continued", continued), ("spans", joined[:count])):
        rows = ({"id": str(i), "text": text} for i, text in enumerate(texts))
        with files.replacing_file(folder / f"{name}.jsonl") as tmp:
            tmp.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def on_quickstart(trained, workdir, limit):
    """All suites on both of the quickstart's adapters; ablates the pretraining of its ICAE."""
    base, held_out = quickstart.SHIPPED_BASE, trained / "data" / "held_out.jsonl"
    write_texts(workdir / "data", limit)
    scratch = workdir / "scratch"
    train(
        "quickstart:finetune-icae",
        scratch,
        init_from="scratch",
        base=base,
        data__train=trained / "data" / "train.jsonl",
        data__eval=held_out,
        data__cache_dir=workdir / "cache",
    )
    runs = {
        "autoencode": [held_out],
        "continue": [workdir / "data" / "continued.jsonl", "--context_lengths", PASSAGE],
        "memorise": [held_out],
        "qa": [held_out, "--max_new_tokens", 8],
        "span": [workdir / "data" / "spans.jsonl", "--context_lengths", PASSAGE],
        "tokens": [held_out],
    }
    common = ["--base", base, "--limit", limit, "--batch_size", 50]
    for method in quickstart.trained_methods():
        for suite, (data, *flags) in runs.items():
            out = workdir / f"quickstart-{method}-{suite}"
            evaluate(suite, out, [trained / method / "finetune"], data, *common, *flags)
    adapters = [f"pretrained={trained}/icae/finetune", f"not pretrained={scratch}"]
    flags = [*common, "--k", 11, "--max_new_tokens", 8]
    evaluate("ablate", workdir / "quickstart-ablate", adapters, held_out, *flags)


# ------------------------------------------------------------------------------------ the real base


def variants(data, workdir, steps):
    """Trains the ablation's variants: pretrained by AE, LM and both, then fine-tuned.

    Pretraining is on TinyStories, fine-tuning on FairytaleQA, which also starts from scratch.
    """
    shared = {
        "base": data / "stories260K",
        "dtype": "float32",
        "remat": "none",
        "unroll": 5,
        "compression__k": 8,
        "compression__rate": 4,
        "lora__rank": 32,
        "lora__dropout": 0.0,
        "lora__targets": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "optimizer__warmup_steps": 50,
        "optimizer__schedule": "cosine",
        "optimizer__weight_decay": 0.0,
        "log_every": 20,
        "eval_every": 100_000,
        "data__cache_dir": workdir / "cache",
    }
    for name, (ae, lm) in {"ae": (1.0, 0.0), "lm": (0.0, 1.0), "both": (0.5, 0.5)}.items():
        train(
            "icae:pretrain",
            workdir / "pretrained" / name,
            **shared,
            data__train=data / "tinystories" / "train.jsonl.gz",
            data__context_lengths="(32,64)",
            data__context_weights="(0.5,0.5)",
            objectives__ae=ae,
            objectives__lm=lm,
            batch_size=32,
            optimizer__learning_rate=3e-3,
            steps=steps[0],
        )
    for name in ("scratch", "ae", "lm", "both"):
        train(
            "icae:finetune",
            workdir / "finetuned" / name,
            **shared,
            init_from="scratch" if name == "scratch" else workdir / "pretrained" / name,
            data__train=data / "fairytaleqa" / "train.jsonl.gz",
            data__context_lengths="(256,)",
            data__context_weights="()",
            batch_size=8,
            data__max_target_tokens=96,
            optimizer__learning_rate=2e-3,
            steps=steps[1],
        )


def on_stories(trained, data, workdir, limit, steps):
    """All suites on an adapter of `stories.sh`; ablates the objectives of its pretraining."""
    variants(data, workdir, steps)
    texts = data / "tinystories" / "valid.jsonl.gz"
    questions = data / "fairytaleqa" / "valid.jsonl.gz"
    runs = {
        "autoencode": ["pretrain", texts, "--context_lengths", "16,32,64"],
        "continue": ["pretrain", texts, "--context_lengths", "32,64", "--continuation_tokens", 64],
        "memorise": ["pretrain", texts],
        "qa": ["finetune", questions, "--max_new_tokens", 32],
        "span": ["pretrain", texts, "--continuation_tokens", 64],
        "tokens": ["pretrain", texts],
    }
    common = ["--base", data / "stories260K", "--limit", limit]
    for suite, (phase, source, *flags) in runs.items():
        out = workdir / f"stories-{suite}"
        evaluate(suite, out, [trained / phase], source, *common, *flags)
    for phase, source, flags in (
        ("pretrained", texts, ["--continuation_tokens", 64]),
        ("finetuned", questions, ["--max_new_tokens", 32]),
    ):
        adapters = [f"{path.name}={path}" for path in sorted((workdir / phase).iterdir())]
        out = workdir / f"stories-ablate-{phase}"
        evaluate("ablate", out, adapters, source, *common, *flags)


def main():
    """Runs what the flags name. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    text = "output folder; the same command continues"
    add("--workdir", required=True, type=pathlib.Path, help=text)
    add("--quickstart", type=pathlib.Path, help="workdir of `icae quickstart --full`")
    add("--stories", type=pathlib.Path, help="OUT of launch/experiments/stories.sh")
    add("--data", type=pathlib.Path, help="DATA of launch/experiments/stories.sh")
    add("--limit", type=int, default=100, help="texts of each set (default: %(default)s)")
    text = "steps of both phases of the variants on stories (default: %(default)s)"
    add("--steps", nargs=2, type=int, default=[300, 100], help=text)
    args = parser.parse_args()
    if not (args.quickstart or args.stories):
        parser.error("give --quickstart, or --stories and --data, or all")
    if bool(args.stories) != bool(args.data):
        parser.error("--stories and --data go together")
    for folder in filter(None, (args.quickstart, args.stories, args.data)):
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder")
    if min(args.limit, *args.steps) < 1:
        parser.error("--limit and --steps must be at least 1")
    if args.quickstart:
        on_quickstart(args.quickstart, args.workdir, args.limit)
    if args.stories:
        on_stories(args.stories, args.data, args.workdir, args.limit, args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
