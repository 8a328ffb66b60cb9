"""`icae quickstart`."""

import json
import sys
import time

from icae_jax.cli import flags

HELP = "train a compressor in minutes on a small shipped base, and show what a memory is worth"


def run(argv: list[str]) -> int:
    """Runs the quickstart; returns the exit code of its trainings."""
    began = time.perf_counter()  # importing takes seconds
    from icae_jax.workflows import quickstart

    args = _flags().parse_args(argv)
    options = quickstart.Options(
        args.workdir, args.full, args.from_scratch, args.steps, args.held_out, args.verbose
    )
    print(quickstart.announcement(options), file=sys.stderr, flush=True)

    def say(text):
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    code, outcome = quickstart.run(options, say, began)
    if outcome:
        print(json.dumps(outcome.as_json()) if args.json else outcome.text())
    return code


def _flags():
    parser = flags.parser("quickstart", HELP)
    add = parser.add_argument
    add("--workdir", help="folder to write (default: ./quickstart, or ./quickstart_full)")
    add("--full", action="store_true", help="one model per method for 4x and 22x, trained longer")
    add("--from_scratch", action="store_true", help="train the small base instead of the shipped")
    add("--steps", type=int, help="steps of each phase (default: the recipe's)")
    add("--held_out", type=int, default=100, help="held-out passages to measure on")
    add("--verbose", action="store_true", help="print the whole training log")
    add("--json", action="store_true", help="print one JSON object")
    return parser
