"""Every suite of `icae evaluate` on small models: the quickstart's adapters, and one of `launch/experiments/stories.sh` on a real base and text.

    icae quickstart --full
    launch/experiments/stories.sh DATA runs/stories4
    python launch/experiments/evaluation.py --workdir runs/evaluation --quickstart quickstart_full --stories runs/stories4 --data DATA

Trains the few variants that the ablations compare, then runs the suites one after another; run again, it continues. Each suite's folder
in the workdir holds results.json and report.html.
"""

import argparse
import json
import pathlib
import sys

from icae_jax.cli import main as cli

cli.set_up()  # before anything imports JAX

from icae_jax import files  # noqa: E402
from icae_jax.data import synthetic  # noqa: E402
from icae_jax.interop.hub import tokenizer as tokenizers  # noqa: E402
from icae_jax.workflows import quickstart  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
PASSAGE = 45  # tokens; texts of several passages are made of those of this length, so that segments are passages
SPANS = 4


def icae(*argv):
    """Runs one `icae` command, after printing it; leaves with its exit code where that is not 0."""
    argv = [str(a) for a in argv]
    print(f"\n$ icae {' '.join(argv)}\n", flush=True)
    code = cli.main(argv)
    if code:
        sys.exit(code)


# ------------------------------------------------------------------------------------------------------- the quickstart


def _asked(row):
    """A passage's questions with their answers, in plain text. A full stop ends them, as it ends sentences: a text cannot spell `</s>`."""
    return [
        synthetic.TEMPLATE.format(question=q["question"]) + f" {q['answers'][0]}."
        for q in row["questions"]
    ]


def _people(row):
    return {q["question"].rpartition(" of ")[2] for q in row["questions"]}


def write_texts(folder, count, seed=quickstart.HELD_OUT_SEED):
    """Held-out texts that go on behind their passages: one passage with its questions; four with two questions on each of them.

    In the latter no two passages tell of one name, and the questions come in the order of the passages, so that each number of joined
    segments can answer those on the last ones alone.
    """
    tokenizer = tokenizers.load_tokenizer(quickstart.SHIPPED_BASE)
    rows = synthetic.passages(seed, 20 * SPANS * count)
    rows = [
        row
        for row in rows
        if len(tokenizer(row["context"], add_special_tokens=False)["input_ids"]) == PASSAGE
    ]
    one = [" ".join([row["context"], *_asked(row)]) for row in rows[:count]]
    several, group = [], []
    for row in rows:
        if not any(_people(row) & _people(other) for other in group):
            group.append(row)
        if len(group) == SPANS:
            several.append(
                " ".join(
                    [r["context"] for r in group] + [q for r in group for q in _asked(r)[1::4]]
                )
            )
            group = []
    for name, texts in (("continued", one), ("spans", several[:count])):
        with files.replacing_file(folder / f"{name}.jsonl") as tmp:
            tmp.write_text(
                "".join(
                    json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)
                ),
                encoding="utf-8",
            )


def on_quickstart(trained, workdir, limit):
    """All suites on both of the quickstart's adapters; the ablation: its ICAE against one that was never pretrained."""
    base, held_out = quickstart.SHIPPED_BASE, trained / "data" / "held_out.jsonl"
    write_texts(workdir / "data", limit)
    scratch = workdir / "scratch"
    icae(
        "train", "--config", f"{ROOT}/configs/quickstart.py:finetune-icae", "--workdir", scratch, "--config.init_from=scratch",
        f"--config.base={base}", f"--config.data.train={trained}/data/train.jsonl", f"--config.data.eval={held_out}",
        f"--config.data.cache_dir={workdir}/cache",
    )  # fmt: skip
    runs = {
        "autoencode": [held_out],
        "continue": [workdir / "data" / "continued.jsonl", "--context_lengths", PASSAGE],
        "memorise": [held_out],
        "qa": [held_out, "--max_new_tokens", 8],
        "span": [workdir / "data" / "spans.jsonl", "--context_lengths", PASSAGE],
        "tokens": [held_out],
    }
    common = ["--base", base, "--limit", limit, "--batch_size", 50]
    for method in quickstart.METHODS:
        for suite, (data, *rest) in runs.items():
            out = workdir / f"quickstart-{method}-{suite}"
            icae(
                "evaluate",
                "--suite",
                suite,
                "--adapter",
                trained / method / "finetune",
                "--data",
                data,
                *common,
                *rest,
                "--out",
                out,
            )
    adapters = [
        "--adapter",
        f"pretrained={trained}/icae/finetune",
        "--adapter",
        f"not pretrained={scratch}",
    ]
    out = workdir / "quickstart-ablate"
    icae(
        "evaluate",
        "--suite",
        "ablate",
        *adapters,
        "--data",
        held_out,
        *common,
        "--k",
        11,
        "--max_new_tokens",
        8,
        "--out",
        out,
    )


# ------------------------------------------------------------------------------------------------------- the real base


def variants(data, workdir, steps):
    """Trains on TinyStories by AE alone, by LM alone, and by both; then each, and one that was not pretrained, on FairytaleQA."""
    shared = [
        f"--config.base={data}/stories260K", "--config.dtype=float32", "--config.remat=none", "--config.unroll=5",
        "--config.compression.k=8", "--config.compression.rate=4", "--config.lora.rank=32", "--config.lora.dropout=0.0",
        "--config.optimizer.warmup_steps=50",
        "--config.lora.targets=('q_proj','k_proj','v_proj','o_proj','gate_proj','up_proj','down_proj')",
        "--config.optimizer.schedule=cosine", "--config.optimizer.weight_decay=0.0", "--config.log_every=20", "--config.eval_every=100000",
        f"--config.data.cache_dir={workdir}/cache",
    ]  # fmt: skip
    for name, (ae, lm) in {"ae": (1.0, 0.0), "lm": (0.0, 1.0), "both": (0.5, 0.5)}.items():
        icae(
            "train", "--config", f"{ROOT}/configs/icae.py:pretrain", "--workdir", workdir / "pretrained" / name, *shared,
            f"--config.data.train={data}/tinystories/train.jsonl.gz", "--config.data.context_lengths=(32,64)",
            "--config.data.context_weights=(0.5,0.5)", f"--config.objectives.ae={ae}", f"--config.objectives.lm={lm}",
            "--config.batch_size=32", "--config.optimizer.learning_rate=3e-3", f"--config.steps={steps[0]}",
        )  # fmt: skip
    for name in ("scratch", "ae", "lm", "both"):
        start = "scratch" if name == "scratch" else workdir / "pretrained" / name
        icae(
            "train", "--config", f"{ROOT}/configs/icae.py:finetune", "--workdir", workdir / "finetuned" / name, *shared,
            f"--config.init_from={start}", f"--config.data.train={data}/fairytaleqa/train.jsonl.gz", "--config.data.context_lengths=(256,)",
            "--config.data.context_weights=()", "--config.batch_size=8", "--config.data.max_target_tokens=96",
            "--config.optimizer.learning_rate=2e-3", f"--config.steps={steps[1]}",
        )  # fmt: skip


def on_stories(trained, data, workdir, limit, steps):
    """All suites on an adapter of `launch/experiments/stories.sh`, held-out TinyStories and FairytaleQA; the ablation: what it was pretrained by."""
    variants(data, workdir, steps)
    texts, questions = (
        data / "tinystories" / "valid.jsonl.gz",
        data / "fairytaleqa" / "valid.jsonl.gz",
    )
    runs = {
        "autoencode": ["pretrain", texts, "--context_lengths", "16,32,64"],
        "continue": ["pretrain", texts, "--context_lengths", "32,64", "--continuation_tokens", 64],
        "memorise": ["pretrain", texts],
        "qa": ["finetune", questions, "--max_new_tokens", 32],
        "span": ["pretrain", texts, "--continuation_tokens", 64],
        "tokens": ["pretrain", texts],
    }
    common = ["--base", data / "stories260K", "--limit", limit]
    for suite, (phase, source, *rest) in runs.items():
        out = workdir / f"stories-{suite}"
        icae(
            "evaluate",
            "--suite",
            suite,
            "--adapter",
            trained / phase,
            "--data",
            source,
            *common,
            *rest,
            "--out",
            out,
        )
    for phase, source, rest in (
        ("pretrained", texts, ["--continuation_tokens", 64]),
        ("finetuned", questions, ["--max_new_tokens", 32]),
    ):
        names = [path.name for path in sorted((workdir / phase).iterdir())]
        adapters = [
            flag for name in names for flag in ("--adapter", f"{name}={workdir / phase / name}")
        ]
        icae(
            "evaluate",
            "--suite",
            "ablate",
            *adapters,
            "--data",
            source,
            *common,
            *rest,
            "--out",
            workdir / f"stories-ablate-{phase}",
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--workdir",
        required=True,
        type=pathlib.Path,
        help="where everything goes; run again, it continues",
    )
    parser.add_argument(
        "--quickstart", type=pathlib.Path, help="workdir of `icae quickstart --full`"
    )
    parser.add_argument("--stories", type=pathlib.Path, help="OUT of launch/experiments/stories.sh")
    parser.add_argument("--data", type=pathlib.Path, help="DATA of launch/experiments/stories.sh")
    parser.add_argument("--limit", type=int, default=100, help="texts of each set")
    parser.add_argument(
        "--steps",
        nargs=2,
        type=int,
        default=[300, 100],
        help="of the ablation's variants on stories: of both phases",
    )
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
