"""`icae train`."""

import argparse
import os
import sys

from icae_jax.cli import flags
from icae_jax.errors import UserError

BASE_HELP = "train a small base model from scratch"
HELP = "train a compressor: pretrain (AE + LM) or finetune (QA)"


TRAIN_HELP = """usage: icae {verb} --config FILE[:arg] --workdir DIR [--config.field=value …]

{text}.

  --config FILE[:arg]     a configuration with get_config(arg), such as {example}
  --workdir DIR           checkpoints, metrics and the result; the same command continues what is there
  --config.field=value    any field of the configuration, such as --config.steps=1000
  --profile DIR           trace a few steps into DIR, for XProf (`icae bench train` also sums a trace up)
  --verbose               list every array of parameters

Several processes are one run, on one DIR that all of them see. TPU slices and Slurm jobs are recognised; elsewhere each is told:
  --coordinator HOST:PORT where process 0 serves the others
  --processes N           how many there are
  --process I             which this is, from 0

exit codes: 0 done, 2 bad input or a full disk, 3 diverged, 75 saved after SIGTERM; 1 anything else, with its traceback (134 where JAX ends
a process because another has failed, whose output says why). Started again, the same command continues"""


def _train(verb, argv, kind, make_task, make_meter=lambda task: None):
    """Trains what `make_task(configuration, workdir)` makes of a configuration of that kind, alone or as one of several processes."""
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

    parser = argparse.ArgumentParser(prog=f"icae {verb}", add_help=False, allow_abbrev=False)
    flags.process_flags(parser)
    parser.add_argument("--profile")
    parser.add_argument("--verbose", action="store_true")
    args, rest = parser.parse_known_args(argv)
    config, workdir = config_file.load_config(kind, rest)
    if args.profile and os.path.isfile(args.profile):
        raise UserError(f"--profile {args.profile} is a file; give a folder")
    with distributed.ending_together(flags.BAD_INPUT):
        distributed.start(args.coordinator, args.processes, args.process)
        if finished(config, workdir):
            print(ALREADY.format(workdir=workdir, steps=config.steps), file=sys.stderr)
            return DONE
        if distributed.agreed(workdir.is_dir()):
            with distributed.only_writer(
                workdir, "--workdir"
            ):  # before anything is loaded: does another run train there?
                pass
        distributed.check_agreement(
            shared_by_processes(config)
        )  # before what is loaded depends on it
        task = make_task(config, workdir)
        return train(
            config,
            task,
            workdir,
            meter=make_meter(task),
            profile=args.profile,
            verbosity=VERBOSE if args.verbose else NORMAL,
        )


def run(argv):
    from icae_jax.performance.utilisation import Meter
    from icae_jax.training.compressor_task import CompressorTask
    from icae_jax.training.config import TrainConfig

    return _train(
        "train",
        argv,
        TrainConfig,
        lambda config, workdir: CompressorTask(config, workdir=workdir),
        Meter,
    )


def run_base(argv):
    from icae_jax.training.base_task import BaseTask
    from icae_jax.training.config import BaseConfig

    return _train("train-base", argv, BaseConfig, lambda config, workdir: BaseTask(config))
