"""The command line: `icae VERB`, the same as `python -m icae_jax VERB`."""

import os
import select
import sys
from collections.abc import Sequence

import icae_jax
from icae_jax import errors
from icae_jax.cli import (
    ask,
    bench,
    cache,
    chat,
    compress,
    convert,
    evaluate,
    export,
    flags,
    inspect,
    plan,
    prepare,
    quickstart,
    restore,
    serve,
    store,
    sweep,
    train,
)
from icae_jax.cli.flags import BAD_INPUT
from icae_jax.errors import UserError
from icae_jax.runtime import platforms
from icae_jax.runtime.compiled import set_up

NOT_READ = 141  # what a shell reports of a command that SIGPIPE ended

VERBS = {
    "quickstart": (quickstart.run, quickstart.HELP),
    "prepare": (prepare.run, prepare.HELP),
    "train": (train.run, train.HELP),
    "sweep": (sweep.run, sweep.HELP),
    "compress": (compress.run, compress.HELP),
    "restore": (restore.run, restore.HELP),
    "ask": (ask.run, ask.HELP),
    "chat": (chat.run, chat.HELP),
    "store": (store.run, store.HELP),
    "serve": (serve.run, serve.HELP),
    "plan": (plan.run, plan.HELP),
    "bench": (bench.run, bench.HELP),
    "evaluate": (evaluate.run, evaluate.HELP),
    "inspect": (inspect.run, inspect.HELP),
    "convert": (convert.run, convert.HELP),
    "export": (export.run, export.HELP),
    "cache": (cache.run, cache.HELP),
}

# These run without devices, so JAX's settings do not matter; a sweep's runs check them.
WITHOUT_DEVICES = ("prepare", "cache", "sweep")
WITH_KINDS = ("bench", "convert", "export", "store")
TRAINING = ("train", "quickstart", "sweep", "bench")


def usage() -> str:
    """What `icae --help` prints."""
    verbs = "\n".join(f"  {name:12} {text}" for name, (_, text) in VERBS.items())
    return f"""usage: icae VERB [KIND] [options]

Compress a language model's context into a few memory tokens.

{verbs}

icae help VERB, or icae VERB --help, lists a verb's options; icae --version prints the version.
On a CPU, {" and ".join(TRAINING)} restart themselves with huge pages when they begin, which saves
a fifth of a step."""


def command_name(argv: Sequence[str]) -> str:
    """The command of these arguments, with its KIND: "icae compress", "icae convert base"."""
    has_kind = argv[0] in WITH_KINDS or list(argv[:2]) == ["train", "base"]
    kinds = [word for word in argv[1:2] if has_kind and not word.startswith("-")]
    return " ".join(["icae", argv[0], *kinds])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns the exit code: 0 done, 2 bad input or a full disk, 3 diverged, 75 saved after SIGTERM.
    Errors of any other kind are raised.
    """
    argv = flags.normalised(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    if argv[:1] == ["--version"]:
        print(icae_jax.__version__)
        return 0
    verb = argv[0] if argv else "--help"
    if verb not in VERBS and verb not in ("-h", "--help"):
        print(f"icae: no verb {verb!r}\n\n{usage()}", file=sys.stderr)
        return BAD_INPUT
    try:
        if verb in VERBS:
            set_up()
            if verb not in WITHOUT_DEVICES:
                platforms.check()
            code = VERBS[verb][0](argv[1:])
        else:
            print(usage())
            code = 0 if argv else BAD_INPUT
        if sys.stdout:  # None where the caller has closed it
            sys.stdout.flush()
        return code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_unread():
            return NOT_READ
        message = platforms.absent_devices(error)
        if not message:
            if not errors.is_users(error):
                raise
            message = str(error)
            if not isinstance(error, UserError) and "free space" not in message:  # a full disk
                message += "; free space and run the same command again"
        print(f"{command_name(argv or [verb])}: {message}", file=sys.stderr)
        return BAD_INPUT


def _output_is_unread() -> bool:
    """Whether standard output is a pipe without a reader, as behind `| head`.

    What Python still holds of the output is dropped then.
    """
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def command() -> int:
    """The `icae` command: `main`, after a restart with huge pages where that pays.

    Huge pages for large buffers shorten a training step on CPUs by a fifth. glibc reads the setting
    only when a process starts. A GLIBC_TUNABLES of the user's own is left alone.
    """
    trains = {*sys.argv[1:2]} & {*TRAINING, "train-base"}
    if (
        trains
        and sys.platform == "linux"
        and sys.executable
        and "GLIBC_TUNABLES" not in os.environ
        and platforms.cpu_only()
    ):
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return main()
