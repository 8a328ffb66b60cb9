"""The first memory of a real LLM: SmolLM2-135M-Instruct on arXiv abstracts at 4x.

    python launch/experiments/smollm2.py --base SmolLM2-135M-Instruct.Q4_1.gguf --data DATA \
        --workdir runs/smollm2

DATA holds `arxiv/train.jsonl.gz` and `arxiv/valid.jsonl.gz`, one abstract a line (`text`). For each
method, 500x first: AE on windows of 64 tokens, then AE and LM on windows of 64 and 128. It runs for
hours at the lowest priority; the same command continues where it was stopped. `--summary` prints
the held-out losses so far and copies each phase's metrics.jsonl beside this script's README.
"""

import argparse
import pathlib
import shutil
import signal
import subprocess
import sys

from icae_jax.training import metrics

METHODS = ("x500", "icae")
RESULTS = pathlib.Path(__file__).parent / "smollm2"

COMMON = {
    "dtype": "float32",
    "remat": "none",
    "compression.k": 16,
    "compression.rate": 4,
    "compression.layout": "",
    "compression.trigger": "trained",
    "compression.trigger_token": "\n",  # behind it the base looks back; see README.md
    "lora.rank": 32,
    "lora.dropout": 0.0,
    "lora.targets": "('q_proj','k_proj','v_proj','o_proj','gate_proj','up_proj','down_proj')",
    "optimizer.weight_decay": 0.0,
    "data.context_weights": "()",
    "batch_size": 8,
    "log_every": 5,
    "eval_every": 50,
    "eval_examples": 24,
    "checkpoint_every": 50,
}

# By method: what both phases share. ICAE's rate is a guess that nothing was trained with yet.
OF_METHOD = {
    "x500": {"optimizer.learning_rate": 5e-4, "optimizer.warmup_steps": 20},
    "icae": {"optimizer.learning_rate": 2e-4, "optimizer.warmup_steps": 100},
}
PHASES = {
    "ae": {
        "objectives.ae": 1.0,
        "objectives.lm": 0.0,
        "data.context_lengths": "(64,)",
        "steps": 600,
    },
    "lm": {
        "objectives.ae": 0.5,
        "objectives.lm": 0.5,
        "data.context_lengths": "(64,128)",
        "steps": 1200,
    },
}


def main():
    """Trains what is missing. Returns the exit code of the last training."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--base", help="the GGUF file, or a folder in the hub's format")
    add("--data", type=pathlib.Path, help="folder with arxiv/{train,valid}.jsonl.gz")
    add("--workdir", required=True, type=pathlib.Path, help="the same command continues it")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    add("--summary", action="store_true", help="train nothing; print and copy what there is")
    args = parser.parse_args()
    if args.summary:
        return summarise(args.workdir)
    if not args.base or not args.data:
        parser.error("--base and --data are needed to train")
    for method in args.methods:
        for phase in PHASES:
            code = train(args, method, phase)
            if code:
                return code
    return summarise(args.workdir)


def train(args, method, phase):
    """Trains one phase of one method, unless it is done. Returns the exit code."""
    fields = {
        "base": args.base,
        "compression.method": method,
        "data.train": args.data / "arxiv" / "train.jsonl.gz",
        "data.eval": args.data / "arxiv" / "valid.jsonl.gz",
        **COMMON,
        **OF_METHOD[method],
        **PHASES[phase],
    }
    if phase == "lm":
        fields["init_from"] = args.workdir / f"{method}-ae"
    command = ["icae", "train", "--config", "icae:pretrain"]
    command += ["--workdir", str(args.workdir / f"{method}-{phase}")]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    return run_behind_others(command)


def summarise(workdir):
    """Prints the held-out losses of every phase, and copies its metrics. Returns 0."""
    for path in sorted(workdir.glob("*/metrics.jsonl")):
        print(f"{path.parent.name}: step, then AE and LM behind its memory and another text's")
        for row in metrics.read_lines(path):
            if "eval" in row:
                losses = (f"{n}: {x:.3f}" for kind in row["eval"].values() for n, x in kind.items())
                print(f"{row['step']:6}  {'  '.join(losses)}")
        RESULTS.mkdir(exist_ok=True)
        shutil.copyfile(path, RESULTS / f"{path.parent.name}.jsonl")
    return 0


def run_behind_others(command):
    """Runs a command at the lowest priority, and returns its exit code.

    Where Linux groups processes by session (autogroup), niceness counts within the group alone, so
    the command gets a session, whose group has a niceness of its own. What stops this process stops
    the command, which saves a checkpoint first.
    """
    child = subprocess.Popen(["nice", "-n", "19", *command], start_new_session=True)
    group = pathlib.Path(f"/proc/{child.pid}/autogroup")
    if group.exists():
        group.write_text("19", encoding="utf-8")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: child.terminate())
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
