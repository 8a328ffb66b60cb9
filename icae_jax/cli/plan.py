"""`icae plan`."""

import sys

from icae_jax.cli import flags

HELP = "estimate the memory and time of a configuration on a TPU slice, by compiling it for one"

EPILOG = (
    "The configuration is given as to icae train, --config FILE[:arg] [--config.field=value …]; "
    "no base, data or TPU is needed. Exit codes: 0 it fits, 1 it does not."
)


def run(argv: list[str]) -> int:
    """Prints a plan; returns 0 if it fits, 1 if it does not."""
    from icae_jax.performance import plan, plan_summary, programs, subject
    from icae_jax.training import config_file

    args, rest = _flags(programs.WHATS).parse_known_args(argv)
    config = subject.load_config(args.config, config_file.overrides(rest))
    options = plan.Options(
        args.topology,
        args.what,
        args.contexts_per_chip,
        args.context_length,
        args.search,
        args.exact,
    )
    result = plan.plan(options, config, lambda line: print(line, file=sys.stderr, flush=True))
    flags.print_result(result, args.json, plan_summary.text(result))
    return 0 if result["fits"] else 1


def _flags(programs):
    parser = flags.parser("plan", HELP)
    parser.description, parser.epilog = f"{HELP}.", EPILOG
    add = parser.add_argument
    flags.config_flag(parser)
    add("--topology", required=True, help="TPU slice, such as v5e:4x4, v5p:2x2x2, v6e:4x4")
    add(
        "--what",
        choices=programs,
        default="train",
        help="a training step, writing memories, or answering from them (default: %(default)s)",
    )
    add(
        "--contexts_per_chip",
        type=float,
        help="contexts of a microbatch on each chip (default: batch_size / accumulate over chips)",
    )
    add(
        "--context_length",
        type=int,
        help="tokens of a context (default: the longest of data.context_lengths)",
    )
    add("--search", action="store_true", help="find the most contexts per chip that fit")
    add(
        "--exact",
        action="store_true",
        help="compile with full effort, as a run does: several times slower, more exact memory",
    )
    add("--json", action="store_true", help="print one line of JSON")
    return parser
