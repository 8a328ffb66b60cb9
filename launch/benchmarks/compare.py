"""Training steps of this package and of ICAE in PyTorch (`torch_icae.py`), side by side in one run: seconds and FLOPs a context.

    pip install torch==2.13.0 && pip install -e '.[bench]'    # torch first, or pip draws a build with CUDA
    python launch/benchmarks/compare.py --workdir runs/compare

Makes a random base and random tokens once, starts a process for each side on the same cores with the same environment, and checks that
all of them compute the same losses before any update (exit code 1 where they do not). Then the sides take turns, round after round, every
second one in reverse order; ratios are taken within a round, so that what slows the machine down for a while slows both sides. The sides:

| side      | what trains                                                                     | contexts a step |
|-----------|---------------------------------------------------------------------------------|-----------------|
| ours      | icae_jax, all objectives of a case in one step                                  | --batch         |
| ours-1    | the same                                                                        | 1               |
| reference | PyTorch as the reference implementation trains: a step for each objective or question | 1         |
| stronger  | PyTorch with one base, batches, and no recomputation; a step for each objective | --batch         |

A context is one AE sample (ae), an AE and an LM sample (ae+lm), or one context with all its questions (qa). CPU-seconds are of all threads
of a side's process; PyTorch's do not spin while they wait (OMP_WAIT_POLICY, unless it is set). FLOPs: ours as XLA counts them (all
arithmetic), theirs as PyTorch does (matmuls, recomputed ones too), and the least that the mathematics asks for
(`icae_jax.performance.flops`). Seconds and ratios are measured, not judged: there is no bound. Linux only.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys

from icae_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # as `pip install -e` would, also where it was not run

import sides  # noqa: E402

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # of losses before any update, relative
MEASURES = {"cpu_seconds": "CPU s", "wall_seconds": "wall s"}
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "peft")
NEEDED = ("torch", "peft")
FREE = (
    "batch",
    "one_by_one",
    "rounds",
    "threads",
    "lora_rank",
    "device",
    "cases",
    "sides",
)  # change neither base nor tokens


# ------------------------------------------------------------------------------------------------------------ the problem


def prepare(workdir, sizes):
    """Writes `base/` (a random Llama in hub format), `problem.safetensors` (tokens and memory table) and `sizes.json`, last.

    The same sizes find all of it there. UserError where the folder holds something else.
    """
    from icae_jax import files

    told, made = workdir / "sizes.json", {name: sizes[name] for name in sizes if name not in FREE}
    if told.exists():
        differ = [
            f"{name} {old} (now {made.get(name)})"
            for name, old in files.read_json(told, "sizes").items()
            if old != made.get(name)
        ]
        if differ:
            raise UserError(
                f"--workdir {workdir} was made with {', '.join(differ)}; give these, or another folder"
            )
        return
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"--workdir {workdir} is not empty; give a new folder")
    import numpy as np
    import safetensors.numpy
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    s = sizes
    config = transformers.LlamaConfig(
        vocab_size=s["vocab"], hidden_size=s["hidden"], intermediate_size=s["intermediate"], num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"], num_key_value_heads=s["heads"], tie_word_embeddings=False, bos_token_id=1, eos_token_id=sides.EOS,
        max_position_embeddings=s["tokens"] + s["memory"] + max(s["tokens"], s["prompt"] + s["answer"]) + 2,
    )  # fmt: skip
    torch.manual_seed(s["seed"])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, s["dtype"]))
    model.save_pretrained(workdir / "base")
    rng = np.random.default_rng(s["seed"])
    shapes = {
        "context": (s["contexts"], s["tokens"]),
        "continuation": (s["contexts"], s["continuation"]),
        "prompt": (s["contexts"], s["questions"], s["prompt"]),
        "answer": (s["contexts"], s["questions"], s["answer"]),
    }
    arrays = {
        name: rng.integers(sides.EOS + 1, s["vocab"], shape, np.int32)
        for name, shape in shapes.items()
    }
    table = rng.standard_normal((s["memory"] + 3, s["hidden"]), np.float32)
    arrays["memory_table"] = table * np.float32(
        model.get_input_embeddings().weight.float().std().item()
    )
    safetensors.numpy.save_file(arrays, workdir / "problem.safetensors")
    files.write_json(told, made)


# ------------------------------------------------------------------------------------------------------- the processes


def work(side, workdir, sizes):
    """A side's process: answers requests, a JSON object a line, until there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: sizes["threads"]])
    it = sides.make(side, workdir, sizes)
    for line in sys.stdin:
        request = json.loads(line)
        what, arguments = request["do"], request["with"]
        if what == "train":
            losses, wall, cpu = sides.timed(lambda arguments=arguments: it.train(*arguments))
            answer = {"wall_seconds": wall, "cpu_seconds": cpu, "losses": losses}
        else:
            answer = getattr(it, what)(*arguments)
        print(json.dumps(answer), file=out, flush=True)


def environment(sizes):
    """What is set for every side's process."""
    threads = str(sizes["threads"])
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "JAX_PLATFORMS": sizes["device"],
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the sides share an accelerator
        "GLIBC_TUNABLES": os.environ.get(
            "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
        ),  # as the `icae` command has it
        # PyTorch's idle threads would spin: twice the CPU-seconds in small models, many times that where others want the cores.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


class Side:
    """A side's process, seen from outside. batch: contexts that one of its steps takes. contexts: those that it trains on in a round."""

    def __init__(self, name, workdir, sizes):
        command = [
            sys.executable,
            __file__,
            "--workdir",
            str(workdir),
            "--worker",
            name,
            "--sizes",
            json.dumps(sizes),
        ]
        single = name in ("ours-1", "reference")
        self.name, self.batch, self.contexts = (
            name,
            1 if single else sizes["batch"],
            sizes["one_by_one" if single else "contexts"],
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | environment(sizes), **pipes)

    def ask(self, what, *arguments):
        """The answer of one of a side's methods (`sides`); of `train` with its seconds. ChildProcessError where the process has ended."""
        try:
            print(json.dumps({"do": what, "with": arguments}), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise ChildProcessError(
                f"side {self.name} ended with exit code {self.process.wait()}; its own message is above"
            )
        return json.loads(answer)

    def end(self):
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # a request that it never read
            self.process.stdin.close()
        self.process.stdout.close()


# -------------------------------------------------------------------------------------------------------- the measuring


def disagreement(ours, theirs, bound):
    """(largest relative difference, its objective) of two `{objective: loss}` where it is above the bound, or not a number; else None."""
    apart = {o: abs(ours[o] - theirs[o]) / abs(theirs[o]) for o in theirs}
    worst = max(apart, key=lambda o: (apart[o] != apart[o], apart[o]))
    return None if apart[worst] <= bound else (apart[worst], worst)


def check(group, cases, bound):
    """Losses of all sides before any update, `{case: {side: {objective: nats}}}`; ArithmeticError where ours and theirs differ."""
    losses = {case: {} for case in cases}
    mine, theirs = (
        [side for side in group if side.name.startswith("ours") is own] for own in (True, False)
    )
    for case in cases:
        for our in mine:
            told = losses[case][our.name] = our.ask("losses", case, our.batch)
            for other in theirs:
                want = losses[case][f"{other.name} on {our.batch}"] = other.ask(
                    "losses", case, our.batch
                )
                worse = disagreement(told, want, bound)
                if worse:
                    apart, o = worse
                    pair = f"{our.name} {told[o]:.6g}, {other.name} {want[o]:.6g}, {apart:.1e} apart (at most {bound:g})"
                    raise ArithmeticError(
                        f"case {case}: the {o} losses differ before any update: {pair}"
                    )
    return losses


def measure(group, cases, rounds):
    """`[{case: {side: answer of train, seconds a context}}]`, an element a round; before it all are warmed up."""
    for side in group:
        for case in cases:
            side.ask("train", case, side.batch)
    taken = []
    for number in range(rounds):
        turns = {case: {} for case in cases}
        for case in cases:
            for side in group if number % 2 == 0 else group[::-1]:
                told = side.ask("train", case, side.contexts)
                turns[case][side.name] = told | {
                    measure: told[measure] / side.contexts for measure in MEASURES
                }
        taken.append(turns)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return taken


def summarise(taken, flops):
    """`{case: {side: …}}`: median seconds a context; of each measure the ratios to our sides by round, with median, least and most; and
    FLOPs a context, and their ratios to ours and to the least.
    """
    result = {}
    for case in taken[0]:
        result[case] = {}
        for side in taken[0][case]:
            told = result[case][side] = {"flops": flops[case][side]["flops"], "ratios": {}}
            for measure in MEASURES:
                told[measure] = statistics.median(turn[case][side][measure] for turn in taken)
                for own in (s for s in ("ours", "ours-1") if s in taken[0][case] and s != side):
                    ratios = [
                        turn[case][side][measure] / turn[case][own][measure] for turn in taken
                    ]
                    spread = {
                        "median": statistics.median(ratios),
                        "min": min(ratios),
                        "max": max(ratios),
                        "rounds": ratios,
                    }
                    told["ratios"].setdefault(own, {})[measure] = spread
            least, ours = flops[case]["ours"]["least"], flops[case]["ours"]["flops"]
            told["flops_to_least"] = told["flops"] and told["flops"] / least
            told["flops_to_ours"] = told["flops"] and ours and told["flops"] / ours
    return result


def table(summary):
    """Header and rows of what is printed."""

    def times(side, against, measure):
        r = side["ratios"].get(against, {}).get(measure)
        return f"{r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f})" if r else ""

    def number(x, form=".2f"):
        return "-" if x is None else f"{x:{form}}"

    header = [
        "case",
        "side",
        *MEASURES.values(),
        "GFLOP",
        "CPU / ours",
        "wall / ours",
        "CPU / ours-1",
        "FLOPs / ours",
        "FLOPs / least",
    ]
    rows = []
    for case, of in summary.items():
        for name, side in of.items():
            seconds = [f"{side[measure]:.4g}" for measure in MEASURES]
            ratios = [
                times(side, "ours", "cpu_seconds"),
                times(side, "ours", "wall_seconds"),
                times(side, "ours-1", "cpu_seconds"),
            ]
            flops = number(side["flops"] and side["flops"] / 1e9, ".4g")
            rows.append(
                [
                    case,
                    name,
                    *seconds,
                    flops,
                    *ratios,
                    number(side["flops_to_ours"]),
                    number(side["flops_to_least"]),
                ]
            )
    return header, rows


def machine(sizes):
    """The processor, how many cores were used, what was set for all sides, and the versions of what was compared."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        "unknown",
    )
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "cpu": model,
        "cores": sizes["threads"],
        "device": sizes["device"],
        "environment": environment(sizes),
        "versions": versions,
    }


# ------------------------------------------------------------------------------------------------------------- the command

# Flags by name: (default, least, what it is).
NUMBERS = {
    "hidden": (512, 2, "width of the base"),
    "layers": (8, 2, "its layers"),
    "heads": (8, 1, "its heads"),
    "intermediate": (1376, 1, "width of its MLPs"),
    "vocab": (32000, 8, "its vocabulary"),
    "tokens": (512, 2, "tokens of a context"),
    "memory": (128, 1, "memory tokens"),
    "lora_rank": (128, 1, "rank of LoRA"),
    "continuation": (512, 9, "tokens of a continuation, of which the first 8 carry no loss"),
    "questions": (8, 1, "questions on a context"),
    "prompt": (32, 1, "tokens of a question"),
    "answer": (32, 1, "tokens of an answer"),
    "batch": (8, 1, "contexts a step of ours and stronger"),
    "rounds": (5, 1, "rounds that are measured"),
    "contexts": (8, 1, "contexts that a side of such batches trains on in a round"),
    "one_by_one": (2, 1, "contexts that a side with one a step trains on in a round"),
    "threads": (None, 1, "cores that each side has (default: all)"),
    "seed": (0, 0, "of base and tokens"),
}


def flags(argv=None):
    """The parsed flags; exit code 2 where one of them will not do."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--workdir",
        required=True,
        type=pathlib.Path,
        help="new folder, or that of an earlier run with the same sizes",
    )
    for name, (default, _, what) in NUMBERS.items():
        said = "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", type=int, default=default, help=what + said)
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--cases",
        default=",".join(sides.CASES),
        help=f"separated by commas (default: {','.join(sides.CASES)})",
    )
    parser.add_argument(
        "--sides",
        default=",".join(sides.SIDES),
        help=f"separated by commas (default: {','.join(sides.SIDES)})",
    )
    parser.add_argument("--worker", choices=sides.SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return args
    cores = len(os.sched_getaffinity(0))
    args.threads = cores if args.threads is None else args.threads
    for name, (_, least, _) in NUMBERS.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    for name, known in (("cases", sides.CASES), ("sides", sides.SIDES)):
        chosen = getattr(args, name).split(",")
        unknown = [x for x in chosen if x not in known]
        if unknown or len(set(chosen)) < len(chosen):
            parser.error(
                f"--{name} is {getattr(args, name)}; choose from {','.join(known)}, each at most once"
            )
        setattr(args, name, [x for x in known if x in chosen])
    if "ours" not in args.sides or not {"reference", "stronger"} & set(args.sides):
        parser.error(
            f"--sides is {','.join(args.sides)}; give ours, which the others are compared with, and reference or stronger"
        )
    if args.threads > cores:
        parser.error(f"--threads is {args.threads}; this process may use {cores} cores")
    if args.hidden % (2 * args.heads):
        parser.error(
            f"--hidden is {args.hidden}; it must be a multiple of twice --heads ({args.heads})"
        )
    if args.one_by_one > args.contexts:
        parser.error(
            f"--one_by_one is {args.one_by_one}; it must be at most --contexts ({args.contexts})"
        )
    if args.contexts % args.batch:
        parser.error(
            f"--contexts is {args.contexts}; it must be a multiple of --batch ({args.batch})"
        )
    if args.continuation > args.tokens:
        parser.error(
            f"--continuation is {args.continuation}; it must be at most --tokens ({args.tokens})"
        )
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(
            f"the baseline needs {' and '.join(missing)}; pip install torch==2.13.0 && pip install -e '.[bench]'"
        )
    return args


def main():
    args = flags()
    if args.worker:
        work(args.worker, args.workdir, args.sizes)
        return 0
    from icae_jax import files
    from icae_jax.evaluation import report

    sizes = {
        name: value
        for name, value in vars(args).items()
        if name not in ("workdir", "worker", "sizes")
    }
    group = []
    try:
        prepare(args.workdir, sizes)
        group += [Side(name, args.workdir, sizes) for name in args.sides]
        losses = check(group, args.cases, TOLERANCE[args.dtype])
        taken = measure(group, args.cases, args.rounds)
        peaks = {
            side.name: side.ask("peak_bytes") for side in group
        }  # counting FLOPs takes memory of its own
        flops = {
            case: {side.name: side.ask("flops", case) for side in group} for case in args.cases
        }
    except UserError as error:
        print(f"{pathlib.Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    except (ArithmeticError, ChildProcessError) as error:
        print(f"{pathlib.Path(__file__).name}: {error}", file=sys.stderr)
        return 1
    finally:
        for side in group:
            side.end()
    summary = summarise(taken, flops)
    raw = {"losses": losses, "rounds": taken, "flops": flops, "peak_bytes": peaks}
    files.write_json(
        args.workdir / "compare.json",
        {"machine": machine(sizes), "sizes": sizes, "summary": summary, **raw},
    )
    print("Seconds and FLOPs a context; ratios: median (least-most) of the rounds.")
    print(report.text_table(*table(summary)))
    print(
        "Peak memory of a process, GiB: "
        + ", ".join(f"{name} {peak / 2**30:.2f}" for name, peak in peaks.items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
