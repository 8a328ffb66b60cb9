"""Both methods at two ratios, one model each, on the quickstart's base and passages: a longer run of the quickstart's comparison.

    python launch/experiments/methods.py --workdir runs/methods

Trains every (method, number of memory tokens) for the same steps with the same seed and data, and prints the table.
"""

import argparse
import pathlib
import sys

from icae_jax.cli import main as cli

cli.set_up()  # before anything imports JAX

from icae_jax import files  # noqa: E402
from icae_jax.data import synthetic  # noqa: E402
from icae_jax.evaluation import report  # noqa: E402
from icae_jax.workflows import quickstart, quickstart_results  # noqa: E402

SEGMENT = 55  # text tokens, as in configs/quickstart.py


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--workdir",
        required=True,
        type=pathlib.Path,
        help="where everything goes; run again, it continues",
    )
    parser.add_argument(
        "--methods", nargs="+", default=["icae", "x500"], choices=list(quickstart.trained_methods())
    )
    parser.add_argument(
        "--k", nargs="+", type=int, default=[11, 2], help="memory tokens of a passage of 46"
    )
    parser.add_argument(
        "--steps",
        nargs=2,
        type=int,
        default=[400, 300],
        help="of restoring, and of restoring and answering",
    )
    parser.add_argument("--held_out", type=int, default=100, help="held-out passages to measure on")
    args = parser.parse_args()
    for name, least, most in (("k", 1, SEGMENT), ("steps", 1, None), ("held_out", 1, None)):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value < least or (most and value > most):
                parser.error(
                    f"--{name} is {value}; it must be at least {least}{f' and at most {most}' if most else ''}"
                )
    data, steps = args.workdir / "data", dict(zip(quickstart_results.PHASES, args.steps, strict=True))
    quickstart.write_data(data, quickstart.TRAIN_PASSAGES, args.held_out)
    base, trained = quickstart.load_base(quickstart.SHIPPED_BASE), []
    training = quickstart.Training(base, data, steps=steps)
    for k in args.k:
        for method in args.methods:
            workdir, fields = (
                args.workdir / f"{method}-{k}",
                {"k": k, "rate": SEGMENT / k, "k_choices": ()},
            )
            code, trained_method = training.train(method, workdir, fields)
            if code:
                return code
            trained.append(trained_method)
    result, _ = quickstart_results.compare(
        trained, synthetic.passages(quickstart.HELD_OUT_SEED, args.held_out)
    )
    files.write_json(args.workdir / "results.json", result)
    print(report.text_table(*quickstart_results.summary_table(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
