"""Training steps of this package and of ICAE in PyTorch (`torch_icae.py`), side by side in one run.

    pip install torch==2.13.0 && pip install -e '.[bench]'   # torch first: no CUDA build
    python launch/benchmarks/compare.py --workdir runs/compare

Makes a random base and random tokens once and starts a process for each side, on the same cores
with the same environment. All sides must compute the same losses before any update; otherwise the
exit code is 1. Then the sides take turns, in reverse order every second round. Ratios are taken
within a round, so that a slow spell of the machine affects both sides. The sides:

| side      | what trains                                                      | contexts a step |
|-----------|------------------------------------------------------------------|-----------------|
| ours      | icae_jax, all objectives of a case in one step                   | --batch         |
| ours-1    | the same                                                         | 1               |
| reference | PyTorch as the reference implementation trains: one step for     | 1               |
|           | each objective or question                                       |                 |
| stronger  | PyTorch with one base, batches and no recomputation; one step    | --batch         |
|           | for each objective                                               |                 |

A context is one AE sample (ae), an AE and an LM sample (ae+lm), or one context with all its
questions (qa). CPU-seconds are those of all threads of a side's process; PyTorch's idle threads do
not spin (OMP_WAIT_POLICY, unless it is set). FLOPs: ours as XLA counts them (all arithmetic),
theirs as PyTorch does (matmuls, recomputed ones too), and the least that the mathematics requires
(`icae_jax.performance.flops`). There is no bound on seconds and ratios. Linux only.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that a checkout that is not installed works too

import problem  # noqa: E402
import sides  # noqa: E402

from icae_jax import files  # noqa: E402
from icae_jax.errors import UserError  # noqa: E402
from icae_jax.runtime import compiled  # noqa: E402

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # of losses before any update, relative
MEASURES = {"cpu_seconds": "CPU s", "wall_seconds": "wall s"}
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "peft")
NEEDED = ("torch", "peft")


# ------------------------------------------------------------------------------------ the processes


def work(side, workdir, sizes):
    """A side's process: answers requests from stdin, one JSON object a line, until they end."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not mix with the answers
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: sizes["threads"]])
    trainer = sides.make(side, workdir, sizes)
    for line in sys.stdin:
        request = json.loads(line)
        method, arguments = request["method"], request["arguments"]
        if method == "train":
            losses, wall, cpu = sides.timed(lambda arguments=arguments: trainer.train(*arguments))
            answer = {"wall_seconds": wall, "cpu_seconds": cpu, "losses": losses}
        else:
            answer = getattr(trainer, method)(*arguments)
        print(json.dumps(answer), file=out, flush=True)


def environment(sizes):
    """The environment variables of every side's process."""
    threads = str(sizes["threads"])
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "JAX_PLATFORMS": sizes["device"],
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the sides share an accelerator
        # As the `icae` command sets it.
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
        # PyTorch's idle threads would spin: twice the CPU-seconds in small models, and many times
        # that if other processes need the cores.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


class Side:
    """A side's process, seen from outside.

    Attributes:
      batch: contexts of one of its steps.
      contexts: contexts that it trains on in a round.
    """

    def __init__(self, name, workdir, sizes):
        command = [sys.executable, __file__, "--workdir", str(workdir)]
        command += ["--worker", name, "--sizes", json.dumps(sizes)]
        single = name in ("ours-1", "reference")
        self.name = name
        self.batch = 1 if single else sizes["batch"]
        self.contexts = sizes["one_by_one" if single else "contexts"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | environment(sizes), **pipes)

    def ask(self, method, *arguments):
        """What a method of the side (see `sides`) returns; `train`'s losses with its seconds.

        ChildProcessError if the process has ended.
        """
        request = json.dumps({"method": method, "arguments": arguments})
        try:
            print(request, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise ChildProcessError(
                f"side {self.name} ended with exit code {self.process.wait()}; "
                "its own message is above"
            )
        return json.loads(answer)

    def end(self):
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # a request that it never read
            self.process.stdin.close()
        self.process.stdout.close()


# ------------------------------------------------------------------------------------ the measuring


def disagreement(ours, theirs, bound):
    """The largest relative difference of two `{objective: loss}` and its objective.

    None if it is within the bound; NaN is not.
    """
    differences = {o: abs(ours[o] - theirs[o]) / abs(theirs[o]) for o in theirs}
    worst = max(differences, key=lambda o: (math.isnan(differences[o]), differences[o]))
    return None if differences[worst] <= bound else (differences[worst], worst)


def check(group, cases, bound):
    """Losses of all sides before any update, `{case: {side: {objective: nats}}}`.

    ArithmeticError if ours and theirs differ by more than the bound.
    """
    losses = {case: {} for case in cases}
    ours = [side for side in group if side.name.startswith("ours")]
    baselines = [side for side in group if side not in ours]
    for case, our in itertools.product(cases, ours):
        mine = losses[case][our.name] = our.ask("losses", case, our.batch)
        for other in baselines:
            theirs = other.ask("losses", case, our.batch)
            losses[case][f"{other.name} on {our.batch}"] = theirs
            worst = disagreement(mine, theirs, bound)
            if worst:
                difference, o = worst
                raise ArithmeticError(
                    f"case {case}: the {o} losses differ before any update: {our.name} "
                    f"{mine[o]:.6g}, {other.name} {theirs[o]:.6g}, {difference:.1e} apart "
                    f"(at most {bound:g})"
                )
    return losses


def measure(group, cases, rounds):
    """`{case: {side: losses and seconds per context}}` of each round, after one step to warm up."""
    for side in group:
        for case in cases:
            side.ask("train", case, side.batch)
    measured = []
    for number in range(rounds):
        turns = {case: {} for case in cases}
        for case in cases:
            for side in group if number % 2 == 0 else group[::-1]:
                answer = side.ask("train", case, side.contexts)
                seconds = {measure: answer[measure] / side.contexts for measure in MEASURES}
                turns[case][side.name] = answer | seconds
        measured.append(turns)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return measured


def summarise(measured, flops):
    """`{case: {side: …}}`: median seconds and FLOPs per context, and their ratios.

    Ratios of seconds to our sides are taken by round, with median, least and most; FLOPs are
    compared with ours and with the least.
    """
    result = {}
    for case in measured[0]:
        result[case] = {}
        for name in measured[0][case]:
            side = result[case][name] = {"flops": flops[case][name]["flops"], "ratios": {}}
            for measure in MEASURES:
                side[measure] = statistics.median(turn[case][name][measure] for turn in measured)
                for own in ("ours", "ours-1"):
                    if own in measured[0][case] and own != name:
                        spread = _spread(
                            [
                                turn[case][name][measure] / turn[case][own][measure]
                                for turn in measured
                            ]
                        )
                        side["ratios"].setdefault(own, {})[measure] = spread
            least, ours = flops[case]["ours"]["least"], flops[case]["ours"]["flops"]
            side["flops_to_least"] = side["flops"] and side["flops"] / least
            side["flops_to_ours"] = side["flops"] and ours and side["flops"] / ours
    return result


def _spread(ratios):
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "rounds": ratios,
    }


RATIOS = {  # column: our side, measure
    "CPU / ours": ("ours", "cpu_seconds"),
    "wall / ours": ("ours", "wall_seconds"),
    "CPU / ours-1": ("ours-1", "cpu_seconds"),
}


def table(summary):
    """The header and rows of the table that is printed."""

    def ratio(side, against, measure):
        spread = side["ratios"].get(against, {}).get(measure)
        return "{median:.2f} ({min:.2f}-{max:.2f})".format(**spread) if spread else ""

    def number(x, form=".2f"):
        return "-" if x is None else f"{x:{form}}"

    header = ["case", "side", *MEASURES.values(), "GFLOP", *RATIOS]
    header += ["FLOPs / ours", "FLOPs / least"]
    rows = [
        [
            case,
            name,
            *(f"{side[measure]:.4g}" for measure in MEASURES),
            number(side["flops"] and side["flops"] / 1e9, ".4g"),
            *(ratio(side, *columns) for columns in RATIOS.values()),
            number(side["flops_to_ours"]),
            number(side["flops_to_least"]),
        ]
        for case, by_side in summary.items()
        for name, side in by_side.items()
    ]
    return header, rows


def machine(sizes):
    """The processor, the cores used, the sides' environment, and the versions compared."""
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


# -------------------------------------------------------------------------------------- the command

# Flags by name: (default, least, help).
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
    """The parsed flags. Exits with 2 if one of them is not possible."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--workdir",
        required=True,
        type=pathlib.Path,
        help="new folder, or that of an earlier run with the same sizes",
    )
    for name, (default, _, text) in NUMBERS.items():
        text += "" if default is None else " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    text = "separated by commas (default: %(default)s)"
    parser.add_argument("--cases", default=",".join(sides.CASES), help=text)
    parser.add_argument("--sides", default=",".join(sides.SIDES), help=text)
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
                f"--{name} is {getattr(args, name)}; "
                f"choose from {','.join(known)}, each at most once"
            )
        setattr(args, name, [x for x in known if x in chosen])
    if "ours" not in args.sides or not {"reference", "stronger"} & set(args.sides):
        parser.error(
            f"--sides is {','.join(args.sides)}; "
            "give ours, which the others are compared with, and reference or stronger"
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
            f"the baseline needs {' and '.join(missing)}; "
            "pip install torch==2.13.0 && pip install -e '.[bench]'"
        )
    return args


def main():
    """Measures all sides, or is one of them. Returns the exit code."""
    args = flags()
    compiled.set_up()  # before anything imports JAX
    if args.worker:
        work(args.worker, args.workdir, args.sizes)
        return 0
    from icae_jax.evaluation import report

    not_sizes = ("workdir", "worker", "sizes")
    sizes = {name: value for name, value in vars(args).items() if name not in not_sizes}
    group = []
    try:
        problem.prepare(args.workdir, sizes)
        group += [Side(name, args.workdir, sizes) for name in args.sides]
        losses = check(group, args.cases, TOLERANCE[args.dtype])
        measured = measure(group, args.cases, args.rounds)
        # Before FLOPs are counted, which takes memory of its own.
        peaks = {side.name: side.ask("peak_bytes") for side in group}
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
    summary = summarise(measured, flops)
    raw = {"losses": losses, "rounds": measured, "flops": flops, "peak_bytes": peaks}
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
