"""The command line: `icae <verb>`, the same as `python -m icae_jax <verb>`."""

import os
import select
import sys

from icae_jax import errors
from icae_jax.cli import (
    ask,
    bench,
    cache,
    compress,
    convert,
    evaluate,
    export,
    inspect,
    plan,
    prepare,
    quickstart,
    restore,
    sweep,
    train,
)
from icae_jax.cli.flags import BAD_INPUT
from icae_jax.errors import UserError
from icae_jax.runtime import platforms
from icae_jax.runtime.compiled import set_up

NOT_READ = 141  # what a shell says of a command whose output nobody reads any more

VERBS = {
    "quickstart": (quickstart.run, quickstart.HELP),
    "prepare": (prepare.run, prepare.HELP),
    "train": (train.run, train.HELP),
    "sweep": (sweep.run, sweep.HELP),
    "train-base": (train.run_base, train.BASE_HELP),
    "compress": (compress.run, compress.HELP),
    "restore": (restore.run, restore.HELP),
    "ask": (ask.run, ask.HELP),
    "plan": (plan.run, plan.HELP),
    "bench": (bench.run, bench.HELP),
    "evaluate": (evaluate.run, evaluate.HELP),
    "inspect": (inspect.run, inspect.HELP),
    "convert": (convert.run, convert.HELP),
    "export": (export.run, export.HELP),
    "cache": (cache.run, cache.HELP),
}

WITHOUT_DEVICES = (
    "prepare",
    "cache",
    "sweep",
)  # verbs that JAX's settings do not concern; a sweep's points see for themselves
TRAIN_EXAMPLES = {"train": "configs/icae.py:pretrain", "train-base": "configs/tiny_base.py"}


def usage():
    lines = [
        "usage: icae VERB [options]",
        "",
        "Compress a language model's context into a few memory tokens.",
        "",
    ]
    lines += [f"  {name:12} {text}" for name, (_, text) in VERBS.items()]
    lines += [
        "",
        "icae VERB --help lists a verb's options; train and train-base take --config FILE --workdir DIR [--config.field=value …]",
    ]
    return "\n".join(lines)


def main(argv=None):
    """Runs one verb. Returns the exit code: 0 done, 2 bad input, 3 diverged, 75 saved after SIGTERM."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else BAD_INPUT
    if argv[0] not in VERBS:
        print(f"icae: no verb {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return BAD_INPUT
    if argv[0] in TRAIN_EXAMPLES and {"-h", "--help"} & set(argv):
        text = VERBS[argv[0]][1]
        print(
            train.TRAIN_HELP.format(
                verb=argv[0], text=text[0].upper() + text[1:], example=TRAIN_EXAMPLES[argv[0]]
            )
        )
        return 0
    try:
        set_up()
        if argv[0] not in WITHOUT_DEVICES:
            platforms.check()
        code = VERBS[argv[0]][0](argv[1:])
        if sys.stdout:  # None where the caller has closed it
            sys.stdout.flush()
        return code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return NOT_READ
        if absent := platforms.absent_devices(error):
            print(f"icae {argv[0]}: {absent}", file=sys.stderr)
            return BAD_INPUT
        if not errors.is_users(error):
            raise
        full = (
            ""
            if isinstance(error, UserError) or "free space" in str(error)
            else "; free space and run the same command again"
        )
        print(f"icae {argv[0]}: {error}{full}", file=sys.stderr)
        return BAD_INPUT


def _nobody_reads():
    """Whether standard output is a pipe that has no reader any more, as behind `| head`; what Python still holds of it is then dropped."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def command():
    """The `icae` command: `main`, started over once with huge pages for large buffers, which shorten a training step on CPUs by a fifth.

    glibc reads the setting when a process starts, so it cannot be made later. A setting of the user's own is left alone.
    """
    if sys.platform == "linux" and sys.executable and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return main()
