"""`icae bench train`."""

import argparse

from icae_jax.cli import flags
from icae_jax.errors import UserError

HELP = "measure a training step on the devices at hand"

KINDS = {"train": "a training step: time, FLOPs, memory, compilation, and where the time goes"}

EPILOG = (
    "The configuration is given as to icae train, --config FILE[:arg] [--config.field=value …]; "
    "no data is needed. A GGUF file or a folder with weights is loaded as base; a base known by "
    "its sizes alone gets random weights, which take the same time."
)


def run(argv: list[str]) -> int:
    """Measures and prints a report; returns 0."""
    if not argv or argv[0] not in KINDS:
        return flags.tell_kinds("bench", KINDS, argv)
    args, rest = _flags(argv[0]).parse_known_args(argv[1:])

    from icae_jax.performance import bench, bench_bases, bench_report, subject
    from icae_jax.training import config_file

    config = subject.load_config(args.config, config_file.overrides(rest))
    qa_tokens = growth = None
    if args.qa_tokens is not None:
        qa_tokens = _numbers(args.qa_tokens, "--qa_tokens", "24,8", 2)
    if args.growth is not None:
        growth = _numbers(args.growth, "--growth", "1,2,4,8")
    options = bench.Options(
        contexts=args.contexts,
        context_length=args.context_length,
        qa_tokens=qa_tokens,
        steps=args.steps,
        repeats=args.repeats,
        growth=growth or (),
        profile=args.profile,
        save=args.save,
        compare=args.compare,
    )
    if args.bases:
        report = bench_bases.compare(bench_bases.parse_formats(args.bases), options, config)
        flags.print_result(report, args.json, bench_bases.text(report))
        return 0
    report, profile = bench.bench(options, config)
    text = bench_report.text(report)
    if profile:
        text += (
            f"\n\n{profile}\n\ntrace in {args.profile}; "
            f"to look at it: pip install xprof, and xprof {args.profile}"
        )
    flags.print_result(report, args.json, text)
    return 0


def _numbers(text, flag, example, count=None):
    """The positive whole numbers of a flag such as "1,2,4"."""
    parts = text.split(",")
    if not all(p.isdigit() and int(p) for p in parts) or (count and len(parts) != count):
        raise UserError(
            f"{flag} is {text!r}; give {count or 'some'} positive whole numbers, such as {example}"
        )
    return tuple(int(p) for p in parts)


def _flags(kind):
    parser = argparse.ArgumentParser(
        prog=f"icae bench {kind}",
        description=f"measure {KINDS[kind]}.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    add = parser.add_argument
    flags.config_flag(parser)
    add("--contexts", type=int, help="contexts of a step, over microbatches (default: batch_size)")
    add(
        "--context_length",
        type=int,
        help="tokens of a context (default: the longest of data.context_lengths)",
    )
    add(
        "--qa_tokens",
        metavar="PROMPT,ANSWER",
        help="tokens of a question with its template, and of its answer with the stop token "
        "(default: arrays of data.max_target_tokens)",
    )
    add("--steps", type=int, default=10, help="steps of one measurement (default: %(default)s)")
    add(
        "--repeats",
        type=int,
        default=5,
        help="measurements; the report has their median and range (default: %(default)s)",
    )
    add(
        "--growth",
        metavar="N,N,…",
        help="measure these numbers of contexts too, and compare them with linear growth",
    )
    add(
        "--bases",
        metavar="FORMAT,FORMAT,…",
        help="compare the base in these formats, each in processes of its own that take turns: "
        f"{', '.join(flags.BASE_DTYPES)} (in place of config.dtype and config.quantize)",
    )
    add("--profile", metavar="DIR", help="trace some steps into DIR, and time each part of a step")
    add("--save", metavar="FILE", help="write the report as JSON")
    add(
        "--compare",
        metavar="FILE",
        help="compare with a saved report of the same configuration on the same devices",
    )
    add("--json", action="store_true", help="print one line of JSON")
    return parser
