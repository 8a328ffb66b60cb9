"""`icae bench train`, `icae bench ask` and `icae bench serve`."""

import argparse
import dataclasses

from icae_jax.cli import flags
from icae_jax.errors import UserError

HELP = "measure a training step, answers to questions, or a server, on the devices at hand"

KINDS = {
    "train": "a training step: time, FLOPs, memory, compilation, and where the time goes",
    "ask": "answers: time to the first token, tokens/s and memory, with a memory and without",
    "serve": "a server under load: throughput, latency, memory, and whether every answer is right",
}

TRAIN_EPILOG = (
    "The configuration is given as to icae train, --config FILE[:arg] [--config.field=value …]; "
    "no data is needed. A GGUF file or a folder with weights is loaded as base; a base known by "
    "its sizes alone gets random weights, which take the same time."
)


def run(argv: list[str]) -> int:
    """Measures and prints a report; returns 0."""
    if not argv or argv[0] not in KINDS:
        return flags.tell_kinds("bench", KINDS, argv)
    return {"train": _train, "ask": _ask, "serve": _serve}[argv[0]](argv[1:])


# ------------------------------------------------------------------------------------------- train


def _train(argv):
    args, rest = _train_flags().parse_known_args(argv)

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


def _train_flags():
    parser = argparse.ArgumentParser(
        prog="icae bench train",
        description=f"measure {KINDS['train']}.",
        epilog=TRAIN_EPILOG,
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


# --------------------------------------------------------------------------------------------- ask

ASK_EPILOG = (
    "Ways to answer: full, the base reads context and question; compress, the context is "
    "compressed and its memory asked; memory, the memory is at hand; kv, what the decoder sees of "
    "it is at hand (of methods whose memory is K/V that is the memory). Transformers' generate "
    "answers from the full context beside them, in a process of its own that takes turns with ours."
)


def _ask(argv):
    from icae_jax.performance import bench_ask, bench_ask_report

    args = vars(_ask_flags(bench_ask.Options, bench_ask.AGAINST).parse_args(argv))
    as_json = args.pop("json")
    report = bench_ask.bench(bench_ask.Options(**args))
    flags.print_result(report, as_json, bench_ask_report.text(report))
    return 0


def _ask_flags(options, against):
    """options: the dataclass whose fields the flags are, and which has their defaults."""
    parser = argparse.ArgumentParser(
        prog="icae bench ask",
        description=f"measure {KINDS['ask']}.",
        epilog=ASK_EPILOG,
        allow_abbrev=False,
    )
    add = parser.add_argument
    shown = "(default: %(default)s)"
    add("--adapter", help="adapter (folder, hub id or gs://…); by default an untrained one")
    flags.base_flags(parser)
    add("--method", help=f"of an untrained adapter {shown}")
    add("--k", type=int, help=f"memory tokens of a segment, of an untrained adapter {shown}")
    add("--ratio", type=float, help=f"tokens per memory token, of an untrained adapter {shown}")
    add("--contexts", type=flags.numbers, metavar="N,N,…", help="tokens of a context (512,2048)")
    add("--requests", type=flags.numbers, metavar="N,N,…", help="requests at once (1,8)")
    add(
        "--new_tokens",
        type=int,
        help="of each answer, with --throughput of the longest one; stop tokens are ignored "
        f"{shown}",
    )
    add("--rounds", type=int, help=f"the report has their median and range {shown}")
    add("--ways", type=_words, metavar="WAY,WAY,…", help="which are measured, by default all")
    add("--against", choices=against, help=f"what is measured beside ours {shown}")
    add(
        "--no_memory",
        dest="memory",
        action="store_false",
        help="leave out peak memory, for which every way runs once more in a process of its own",
    )
    add("--decoding", action="store_true", help="prompts of 128 tokens alone, without memories")
    add(
        "--throughput",
        type=int,
        metavar="N",
        help="N requests of different lengths: through an engine against one at a time",
    )
    add("--rows", type=int, help=f"of the engine of --throughput {shown}")
    add("--seed", type=int, help=f"of contexts and lengths {shown}")
    add("--save", metavar="FILE", help="write the report as JSON")
    flags.json_flag(parser)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    parser.set_defaults(**defaults)
    return parser


def _words(text):
    return tuple(word for word in text.split(",") if word)


# ------------------------------------------------------------------------------------------- serve

SERVE_EPILOG = (
    "A server is started on a free port of this machine and ended again, unless --url names one "
    "that runs; if that asks for a token, give it in ICAE_SERVE_TOKENS."
)


def _serve(argv):
    from icae_jax.performance import bench_serve, bench_serve_report

    args = vars(_serve_flags(bench_serve.Options).parse_args(argv))
    as_json = args.pop("json")
    report = bench_serve.bench(bench_serve.Options(**args))
    flags.print_result(report, as_json, bench_serve_report.text(report))
    return 0


def _serve_flags(options):
    """options: the dataclass whose fields the flags are, and which has their defaults."""
    parser = argparse.ArgumentParser(
        prog="icae bench serve",
        description=f"measure {KINDS['serve']}.",
        epilog=SERVE_EPILOG,
        allow_abbrev=False,
    )
    add = parser.add_argument
    shown = "(default: %(default)s)"
    add("--adapter", help="adapter (folder, hub id or gs://…); by default an untrained one")
    flags.base_flags(parser)
    add("--method", help=f"of an untrained adapter {shown}")
    add("--k", type=int, help=f"memory tokens of a segment, of an untrained adapter {shown}")
    add("--ratio", type=float, help=f"tokens per memory token, of an untrained adapter {shown}")
    add("--rows", type=int, help=f"of the server: requests that decode at once {shown}")
    add("--cache_mib", type=int, metavar="MIB", help=f"of the server, for memories {shown}")
    add("--url", help="a server that runs, in place of one that is started")
    add("--store", help="a store whose documents are asked about; by default one is made")
    help_text = "the store that is made also keeps the K/V that the decoder reads of a memory"
    add("--kv", action="store_true", help=help_text)
    add("--documents", type=int, metavar="N", help=f"of the store {shown}")
    add("--requests", type=int, metavar="N", help=f"of different kinds and lengths {shown}")
    add("--clients", type=int, metavar="N", help=f"that ask at once {shown}")
    add("--new_tokens", type=int, metavar="N", help=f"of the longest answer {shown}")
    add("--rounds", type=int, help=f"the report has their median and range {shown}")
    help_text = "N other requests after the rounds, while the server's memory is watched"
    add("--soak", type=int, metavar="N", help=help_text)
    help_text = "only how much sooner the first token of an answer from stored documents comes "
    help_text += "than of one from their full text"
    add("--first_token", action="store_true", help=help_text)
    add("--context_tokens", type=int, metavar="N", help=f"of a document of --first_token {shown}")
    add("--seed", type=int, help=f"of texts and lengths {shown}")
    add("--save", metavar="FILE", help="write the report as JSON")
    flags.json_flag(parser)
    parser.set_defaults(**{field.name: field.default for field in dataclasses.fields(options)})
    return parser
