"""A real base in several formats: loading, training step, asking, perplexity, AE loss.

    python launch/benchmarks/real_base.py --workdir runs/real_base --base FILE.gguf \\
        --texts valid.jsonl.gz --adapter DIR

Every measurement is in a process of its own; of what takes time, formats take turns. Results are
kept in the workdir as they come, and what is there already is not measured again: a call with
another --count or other --formats adds to the table. --config.field=value go to `icae bench train`.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that a checkout that is not installed works too

from icae_jax.errors import UserError  # noqa: E402

PARTS = ("load", "quality", "speed")
DEFAULT_FORMATS = "float32,bfloat16,int8,nf4,int8+ends,nf4+ends"
MIB = 2**20
HEADER = (
    "base",
    "load, s",
    "peak of loading, MiB",
    "parameters, MiB",
    "training step, s",
    "ratio",
    "answer of 32 tokens, s",
    "ratio",
    "texts",
    "nats a token",
    "perplexity",
    "ratio",
    "AE, own memory",
    "ratio",
    "AE, another's",
)


class Results:
    """Measurements in `results.jsonl`, by their requests.

    A killed run leaves at most half of a last line, which is measured again.
    """

    def __init__(self, workdir):
        self.path, self.rows = workdir / "results.jsonl", []
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            self.path.write_text("".join(lines[:-1]))
            lines = lines[:-1]
        self.rows = [json.loads(line) for line in lines]

    def get(self, request, measure):
        """The result of a request, measured if it is not there."""
        for row in self.rows:
            if row["request"] == request:
                return row["result"]
        print(f"measuring {json.dumps(request)}", file=sys.stderr)
        self.rows.append({"request": request, "result": measure(request)})
        with open(self.path, "a") as out:
            out.write(json.dumps(self.rows[-1]) + "\n")
        return self.rows[-1]["result"]

    def of(self, **fields):
        """All results whose requests have these fields, oldest first."""
        rows = [row for row in self.rows if fields.items() <= row["request"].items()]
        return [row["result"] for row in rows]


# --------------------------------------------------------------------------------------- measuring


def in_process(request):
    """The result of a request of `base_measurements`."""
    from icae_jax.performance import worker

    folders = [str(ROOT), str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    arguments = {name: value for name, value in request.items() if name not in ("part", "turn")}
    return worker.run(
        "base_measurements",
        {"kind": request["part"], **arguments},
        {"PYTHONPATH": os.pathsep.join(filter(None, folders))},
    )


def measure(results, args, formats, overrides):
    """Whatever the flags ask for and is not in the results."""
    parts = (args.only,) if args.only else PARTS
    base, adapter = args.base, args.adapter
    if "quality" in parts:
        for form in formats:
            results.get(quality_request(args, form) | {"count": args.count}, in_process)
    for turn in range(args.turns):
        for form in formats:
            request = {"base": base, "form": form, "turn": turn}
            if "load" in parts:
                results.get({"part": "load"} | request, in_process)
            if "speed" in parts and adapter:
                more = {"texts": args.texts, "adapter": adapter, "window": args.window}
                results.get({"part": "ask"} | request | more, in_process)
    if "speed" in parts:
        request = {"part": "train", "base": base, "forms": formats, "turns": args.turns}
        results.get(request | {"config": args.config, "overrides": overrides}, train)


def quality_request(args, form):
    """A request for perplexity and AE loss, but for the number of texts."""
    return {
        "part": "quality",
        "base": args.base,
        "form": form,
        "texts": args.texts,
        "tokens": args.tokens,
        "adapter": args.adapter,
        "windows": args.windows,
        "window": args.window,
    }


def train(request):
    """`icae bench train --bases …`, two steps a turn, and its peak memory."""
    from icae_jax.performance import bench, bench_bases, subject

    config = subject.load_config(
        request["config"], {**request["overrides"], "base": request["base"]}
    )
    options = bench.Options(steps=2, repeats=request["turns"])
    return bench_bases.compare(request["forms"], options, config)


# ------------------------------------------------------------------------------------------- table


def estimate(numbers, digits):
    return f"{numbers.mean:.{digits}f} [{numbers.low:.{digits}f}, {numbers.high:.{digits}f}]"


def paired(sums, first, aggregate):
    """The ratio of two aggregates over the same texts, with its interval.

    sums, first: [nats, labels] of each text, of which the shorter list's are compared.
    """
    from icae_jax.evaluation import statistics as intervals

    pairs = [[*a, *b] for a, b in zip(sums, first, strict=False)]
    if any(pair[1] != pair[3] for pair in pairs):
        raise UserError("results are of other texts; give another --workdir")
    return intervals.estimate(
        pairs,
        lambda sums: aggregate(sums[..., :2]) / aggregate(sums[..., 2:]),
        intervals.resample(range(len(pairs)), 0),
    )


def timed(rows, first):
    """(median seconds, median ratio within a turn) as text."""
    if not rows:
        return "", ""
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(rows, first, strict=False)]
    seconds = statistics.median(row["seconds"] for row in rows)
    return f"{seconds:.3g}", f"{statistics.median(ratios):.2f}" if ratios else ""


def quality_cells(result, first):
    """Texts, nats, perplexity and AE losses of one format against the first's."""
    from icae_jax.evaluation import statistics as intervals

    if not result or not first:
        return [""] * 7
    n = len(result["base"])
    weights = intervals.resample(range(n), 0)
    cells = [
        str(n),
        f"{intervals.ratio(sum_of(result['base'])):.4f}",
        estimate(intervals.estimate(result["base"], intervals.perplexity, weights), 2),
        estimate(paired(result["base"], first["base"], intervals.perplexity), 4),
    ]
    if "own" not in result:
        return [*cells, "", "", ""]
    weights = intervals.resample(range(len(result["own"])), 0)
    own, other = (
        estimate(intervals.estimate(result[name], intervals.ratio, weights), 3)
        for name in ("own", "other")
    )
    return [
        *cells,
        own,
        estimate(paired(result["own"], first["own"], intervals.ratio), 4),
        other,
    ]


def sum_of(rows):
    return [sum(column) for column in zip(*rows, strict=True)]


def table(results, args, formats):
    """The rows of the table: all that the results hold of the formats."""

    def largest(form):
        rows = results.of(**quality_request(args, form))
        return max(rows, key=lambda row: len(row["base"]), default=None)

    def answers(form):
        return results.of(part="ask", base=args.base, form=form, adapter=args.adapter)

    first = formats[0]
    trained = (results.of(part="train", base=args.base) or [{"bases": {}}])[-1]["bases"]
    rows = []
    for form in formats:
        loads, step = results.of(part="load", base=args.base, form=form), trained.get(form)
        row = [form, timed(loads, [])[0]]
        for name in ("peak_bytes", "params_bytes"):
            values = [load[name] / MIB for load in loads]
            row.append(f"{statistics.median(values):,.0f}" if values else "")
        row.append(f"{step['seconds']['median']:.3g}" if step else "")
        row.append(f"{step['seconds_to_first']:.2f}" if step else "")
        row += timed(answers(form), answers(first))
        rows.append([*row, *quality_cells(largest(form), largest(first))])
    return rows


def markdown(header, rows):
    """A Markdown table without the columns that nothing is known of."""
    known = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(line[i]) for i in known) + " |" for line in lines)


# -------------------------------------------------------------------------------------------- main


def parse_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--workdir", required=True, type=pathlib.Path, help="folder of the results")
    add("--base", required=True, help="a GGUF file or a folder, in full precision")
    add("--texts", required=True, help="texts, as training takes them, such as valid.jsonl.gz")
    add("--adapter", default="", help="a compressor trained on this base")
    add("--formats", default=DEFAULT_FORMATS, help="ratios are to the first (%(default)s)")
    add("--only", choices=PARTS, help="this part alone; speed: training steps and answers")
    add("--count", type=int, default=100, help="texts for perplexity (%(default)s)")
    add("--tokens", type=int, default=128, help="tokens of each at most (%(default)s)")
    add("--windows", type=int, default=24, help="windows for the AE loss (%(default)s)")
    add("--window", type=int, default=64, help="tokens of a window (%(default)s)")
    add("--turns", type=int, default=3, help="measurements of what takes time (%(default)s)")
    add("--config", default="icae:pretrain", help="of the training step (%(default)s)")
    args, rest = parser.parse_known_args(argv)
    return args, rest


def main():
    from icae_jax.performance import bench_bases
    from icae_jax.training import config_file

    args, rest = parse_flags(None)
    try:
        overrides = config_file.overrides(rest)
        formats = args.formats.split(",")
        unknown = [form for form in formats if form not in bench_bases.FORMATS]
        if unknown or len(set(formats)) < len(formats):
            raise UserError(
                f"--formats is {args.formats!r}; give different ones of "
                f"{', '.join(bench_bases.FORMATS)}"
            )
        for name, least in (("count", 1), ("tokens", 2), ("windows", 2), ("window", 1)):
            if getattr(args, name) < least:
                raise UserError(f"--{name} is {getattr(args, name)}; give at least {least}")
        args.workdir.mkdir(parents=True, exist_ok=True)
        results = Results(args.workdir)
        measure(results, args, formats, overrides)
        print(markdown(HEADER, table(results, args, formats)))
    except UserError as error:
        print(f"{pathlib.Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
