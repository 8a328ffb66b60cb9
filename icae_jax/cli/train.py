"""`icae train` and `icae train base`."""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from icae_jax import errors
from icae_jax.cli import flags
from icae_jax.errors import UserError

HELP = "train a compressor: pretrain (AE + LM) or finetune (QA); or train a small base"
COMPRESSOR = "Train a compressor: pretrain (AE + LM) or finetune (QA)."
BASE = "Train a small base model from scratch."

EXIT_CODES = """exit codes: 0 done, 2 bad input or a full disk, 3 diverged, 75 saved after SIGTERM;
1 anything else, with its traceback (134 where JAX ends a process because another has failed, whose
output says why). Started again, the same command continues."""


def parser(kind: type, base: bool) -> argparse.ArgumentParser:
    """The flags of `icae train`, or of `icae train base`; --help lists the fields of `kind`."""
    result = argparse.ArgumentParser(
        prog="icae train base" if base else "icae train",
        description=BASE if base else f"{COMPRESSOR} `icae train base --help`: a small base.",
        epilog=f"{flags.fields_help(kind)}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config FILE[:arg] --workdir DIR [--config.field=value …]",
        allow_abbrev=False,
    )
    flags.config_flag(result, "tiny_base" if base else "icae:pretrain")
    result.add_argument(
        "--workdir",
        metavar="DIR",
        help="checkpoints, metrics and the result, seen by every process; the same command "
        "continues what is there",
    )
    result.add_argument(
        "--profile",
        metavar="DIR",
        help="trace a few steps into DIR, for XProf (`icae bench train` also sums a trace up)",
    )
    result.add_argument("--verbose", action="store_true", help="list every array of parameters")
    flags.process_flags(result)
    return result


def run(argv: list[str]) -> int:
    """Trains a compressor, or with `base` as the first argument a base. Returns the exit code."""
    if argv[:1] == ["base"]:
        from icae_jax.training.base_task import BaseTask
        from icae_jax.training.config import BaseConfig

        args, overrides = _parsed(parser(BaseConfig, base=True), argv[1:])
        return _train(args, overrides, BaseConfig, lambda config, workdir: BaseTask(config))

    from icae_jax.performance.utilisation import Meter
    from icae_jax.training.compressor_task import CompressorTask
    from icae_jax.training.config import TrainConfig

    def make_task(config, workdir):
        return CompressorTask(config, workdir=workdir)

    args, overrides = _parsed(parser(TrainConfig, base=False), argv)
    return _train(args, overrides, TrainConfig, make_task, Meter)


def _parsed(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, dict[str, str | bool]]:
    """The flags and the configuration's overrides."""
    from icae_jax.training import config_file

    args, rest = parser.parse_known_args(argv)
    return args, config_file.overrides(rest)


def _train(
    args: argparse.Namespace,
    overrides: dict[str, str | bool],
    kind: type,
    make_task: Callable[[Any, pathlib.Path], Any],
    make_meter: Callable[[Any], Any] = lambda task: None,
) -> int:
    """Trains what `make_task(config, workdir)` makes, alone or as one of several processes."""
    from icae_jax.runtime import distributed
    from icae_jax.training import config_file
    from icae_jax.training.train import (
        ALREADY,
        DONE,
        NORMAL,
        VERBOSE,
        finished,
        shared_by_processes,
        train,
    )

    if not args.workdir:
        raise UserError(
            "--workdir is not given; give a folder for checkpoints, metrics and the result"
        )
    config = config_file.load(kind, args.config, overrides)
    workdir = pathlib.Path(args.workdir)
    if args.profile and os.path.isfile(args.profile):
        raise UserError(f"--profile {args.profile} is a file; give a folder")
    with distributed.ending_together(flags.BAD_INPUT):
        distributed.start(args.coordinator, args.processes, args.process)
        if finished(config, workdir):
            print(
                ALREADY.format(workdir=workdir, steps=errors.counted(config.steps, "steps")),
                file=sys.stderr,
            )
            return DONE
        if distributed.agreed(workdir.is_dir()):
            # Before anything is loaded: refuse a workdir that another run trains in.
            with distributed.only_writer(workdir, "--workdir"):
                pass
        # Before anything is loaded that depends on it.
        distributed.check_agreement(shared_by_processes(config))
        task = make_task(config, workdir)
        return train(
            config,
            task,
            workdir,
            meter=make_meter(task),
            profile=args.profile,
            verbosity=VERBOSE if args.verbose else NORMAL,
        )
