"""Compares both methods at two ratios, one model each, on the quickstart's base and passages.

    python launch/experiments/methods.py --workdir runs/methods

Trains a model for every method and number of memory tokens, with the same steps, seed and data, and
prints the quickstart's table.
"""

import argparse
import pathlib
import sys

from icae_jax.runtime import compiled

compiled.set_up()  # before anything imports JAX

from icae_jax import files  # noqa: E402
from icae_jax.data import synthetic  # noqa: E402
from icae_jax.evaluation import report  # noqa: E402
from icae_jax.workflows import quickstart, quickstart_results  # noqa: E402

SEGMENT = 55  # text tokens, as in configs/quickstart.py


def main():
    """Trains and compares. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--workdir",
        required=True,
        type=pathlib.Path,
        help="output folder; the same command continues",
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
        help="steps of restoring, and of restoring and answering",
    )
    parser.add_argument("--held_out", type=int, default=100, help="held-out passages to measure on")
    args = parser.parse_args()
    for name, least, most in (("k", 1, SEGMENT), ("steps", 1, None), ("held_out", 1, None)):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value < least or (most and value > most):
                bounds = f"at least {least}" + (f" and at most {most}" if most else "")
                parser.error(f"--{name} is {value}; it must be {bounds}")
    data = args.workdir / "data"
    steps = dict(zip(quickstart_results.PHASES, args.steps, strict=True))
    quickstart.write_data(data, quickstart.TRAIN_PASSAGES, args.held_out)
    base = quickstart.load_base(quickstart.SHIPPED_BASE)
    training, trained = quickstart.Training(base, data, steps=steps), []
    for k in args.k:
        for method in args.methods:
            workdir = args.workdir / f"{method}-{k}"
            fields = {"k": k, "rate": SEGMENT / k, "k_choices": ()}
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
