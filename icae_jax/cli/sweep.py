"""`icae sweep`."""

import json
import pathlib
import sys

from icae_jax.cli import flags

HELP = "train a configuration at several values of a field, and compare them"

EPILOG = (
    "--config.field=value: a field of all points, as with icae train; {point} in it stands for the "
    "point's name. Exit codes: 0 every point is done or diverged, 1 some failed (the same command "
    "continues), 2 bad input, 75 stopped by SIGTERM."
)


def run(argv: list[str]) -> int:
    """Trains a sweep, or writes its jobs, or sums up what there is; returns the exit code."""
    from icae_jax.training import config_file
    from icae_jax.workflows import sweep as sweeps
    from icae_jax.workflows import sweep_results

    args, rest = _flags().parse_known_args(argv)
    overrides = config_file.overrides(rest)
    sweep = sweeps.Sweep(args.config, args.sweep, pathlib.Path(args.workdir), overrides)
    if args.jobs:
        jobs, left, text = sweeps.write_jobs(sweep, pathlib.Path(args.jobs))
        flags.print_result({"jobs": [str(job) for job in jobs], "left": left}, args.json, text)
        return 0
    code = 0
    if args.table:
        results = sweeps.sum_up(sweep)
    else:
        code, results = sweeps.train_sweep(sweep, lambda line: print(line, file=sys.stderr))
    if results and args.json:
        print(json.dumps(results, ensure_ascii=False))
    elif results:
        print(sweep_results.text(sweep.workdir, results))
    return code


def _flags():
    parser = flags.parser("sweep", HELP)
    parser.epilog = EPILOG
    add = parser.add_argument
    add(
        "--config",
        required=True,
        metavar="FILE[:arg]",
        help="a configuration file with sweep_NAME(add)",
    )
    add("--sweep", required=True, metavar="NAME", help="which sweep of the file")
    add(
        "--workdir",
        required=True,
        help="the points' folders and the results; the same command continues what is there",
    )
    add("--json", action="store_true", help="print one JSON object")
    add = parser.add_mutually_exclusive_group().add_argument
    add(
        "--jobs",
        metavar="DIR",
        help="train nothing, write a shell file for each point, always under the same number",
    )
    add("--table", action="store_true", help="train nothing, sum up what is there")
    return parser
