"""The command line: `icae <verb>`, the same as `python -m icae_jax <verb>`."""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import select
import stat
import sys
import time
import traceback
import zlib

from icae_jax import cache, errors, files
from icae_jax.errors import UserError
from icae_jax.runtime import platforms

BAD_INPUT = 2
NOT_READ = 141  # what a shell says of a command whose output nobody reads any more


def load_raw(argv, need_workdir=True):
    """The nested dicts of `--config FILE[:arg] [--config.field=value …]`, and the workdir (None where none is given nor needed)."""
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "configuration file",
        flag_values=values,
        lock_config=True,
        sys_argv=["icae", *argv],
    )
    flags.DEFINE_string(
        "workdir", None, "where checkpoints, metrics and the result go", flag_values=values
    )
    named = next(
        (
            a.partition("=")[2] or b
            for a, b in zip(argv, [*argv[1:], ""], strict=True)
            if a.split("=")[0] == "--config"
        ),
        None,
    )
    if named is None:
        raise UserError(
            "--config is not given; give a configuration such as --config configs/icae.py"
        )
    path = named.partition(":")[0]
    if not errors.is_there(path, stat.S_ISREG):
        raise UserError(
            f"--config {path}: no such file; configurations are in the repository's configs/ folder (not in a wheel)"
        )
    try:
        _, *stray = values(["icae", *argv])
        if not hasattr(values.config, "to_dict"):
            raise TypeError(
                f"get_config of {path} returns {type(values.config).__name__}, not an ml_collections.ConfigDict"
            )
        raw = values.config.to_dict()
    except Exception as error:  # of the flags, or any of the file's own: it is the user's
        raise UserError(f"--config: {_told(error, path)}") from error
    if stray:
        raise UserError(f"{stray[0]!r} is no flag; fields are written --config.FIELD=VALUE")
    if need_workdir and not values.workdir:
        raise UserError(
            "--workdir is not given; give a folder for checkpoints, metrics and the result"
        )
    return raw, values.workdir and pathlib.Path(values.workdir)


def _told(error, path):
    """In one line what is wrong with the flags, or with a configuration file, and where in it."""
    inner = error
    while (
        isinstance(inner, KeyError | AttributeError)
        and inner.args
        and isinstance(inner.args[0], KeyError)
    ):
        inner = inner.args[0]
    lines = str(inner.args[0] if isinstance(inner, KeyError) and inner.args else inner).split("\n")
    lines = [line.strip() for line in lines if line.strip()] or [repr(error)]
    # ml_collections writes a whole traceback into what it says of a ValueError of the file's.
    told = (
        lines[-1]
        if any(line.startswith("Traceback") for line in lines)
        else ": ".join(line.removesuffix(":") for line in lines)
    )
    if isinstance(inner, KeyError) and told.startswith(
        "'"
    ):  # a field that the configuration has not, and perhaps what is meant
        return f"no field {told}"
    within = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.endswith(path)
    ]
    return f"{path}:{within[-1]}: {type(error).__name__}: {told}" if within else told


def load_config(kind, argv):
    """The frozen configuration of what `load_raw` reads, and the workdir."""
    from icae_jax.training.config import from_dict

    raw, workdir = load_raw(argv)
    return from_dict(kind, raw), workdir


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


def process_flags(parser):
    """The flags of the verbs that several processes run together."""
    add = parser.add_argument_group(
        "several processes (TPU slices and Slurm jobs are recognised without)"
    ).add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 serves the others")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which this is, from 0")


def _train(verb, argv, kind, make_task):
    """Trains what `make_task(configuration, workdir)` makes of a configuration of that kind, alone or as one of several processes."""
    from icae_jax.runtime import distributed
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
    process_flags(parser)
    parser.add_argument("--profile")
    parser.add_argument("--verbose", action="store_true")
    args, rest = parser.parse_known_args(argv)
    config, workdir = load_config(kind, rest)
    if args.profile and os.path.isfile(args.profile):
        raise UserError(f"--profile {args.profile} is a file; give a folder")
    with distributed.ending_together(BAD_INPUT):
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
        return train(
            config,
            make_task(config, workdir),
            workdir,
            profile=args.profile,
            verbosity=VERBOSE if args.verbose else NORMAL,
        )


def train_verb(argv):
    from icae_jax.training.compressor_task import CompressorTask
    from icae_jax.training.config import TrainConfig

    return _train(
        "train", argv, TrainConfig, lambda config, workdir: CompressorTask(config, workdir=workdir)
    )


def train_base_verb(argv):
    from icae_jax.training.base_task import BaseTask
    from icae_jax.training.config import BaseConfig

    return _train("train-base", argv, BaseConfig, lambda config, workdir: BaseTask(config))


def _parser(verb):
    return argparse.ArgumentParser(prog=f"icae {verb}", description=VERBS[verb][1])


def base_flags(parser):
    """The flags of every verb that runs an adapter's base."""
    parser.add_argument(
        "--base",
        help="base model (folder, hub id or gs://…); by default the one that the adapter names",
    )
    help_text = "of base, activations and memory; bfloat16 takes half the room"
    parser.add_argument(
        "--base_dtype", choices=("float32", "bfloat16"), default="float32", help=help_text
    )


def mesh_flag(parser):
    """The flag of the verbs that may use several devices."""
    parser.add_argument(
        "--mesh",
        help="this host's devices, to split base and batches over, such as fsdp=4,tensor=2; by default one",
    )


def _mesh(text):
    """The mesh over this process's devices that --mesh asks for; None for one device alone."""
    from icae_jax.runtime import sharding

    return sharding.local_mesh(sharding.parse(text)) if text else None


def _print(value, as_json, text):
    print(json.dumps(value, ensure_ascii=False) if as_json else text)


def compress_verb(argv):
    from icae_jax.data.sources import read_texts, with_ids
    from icae_jax.inference import memory_file
    from icae_jax.inference.compressor import load

    parser = _parser("compress")
    parser.add_argument(
        "--adapter",
        required=True,
        help="adapter folder, workdir of a training run, hub id, or gs://…",
    )
    base_flags(parser)
    parser.add_argument(
        "--input", required=True, help="texts: JSON, tables, text files, a folder or glob of them"
    )
    parser.add_argument("--output", required=True, help="memory file to write (.safetensors)")
    parser.add_argument(
        "--k",
        type=int,
        help="memory tokens a segment, where the adapter knows several; by default the most",
    )
    mesh_flag(parser)
    parser.add_argument("--batch_size", type=int, default=16, help="texts compressed at once")
    parser.add_argument(
        "--strict", action="store_true", help="refuse empty texts, which are left out otherwise"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    memory_file.check_output(args.output)
    rows = with_ids(read_texts(args.input, "--input", "--strict" if args.strict else ""))
    places = {
        text: i for i, text in enumerate(dict.fromkeys(row.text for row in rows.values()))
    }  # a text of several ids is read once
    wheres = {row.text: row.where for row in reversed(rows.values())}
    compressor = load(args.adapter, args.base, dtype=args.base_dtype, mesh=_mesh(args.mesh))
    memory = compressor.compress(
        list(places), args.batch_size, [wheres[text] for text in places], args.k
    )
    if len(rows) > len(places):
        memory = memory[[places[row.text] for row in rows.values()]]
    compressor.save(args.output, memory, ids=list(rows))
    tokens, kept, size = (
        int(memory.lengths.sum()),
        int(memory.tokens.sum()),
        int(memory.bytes.sum()),
    )
    summary = {
        "texts": len(rows),
        "context_tokens": tokens,
        "memory_tokens": kept,
        "ratio": tokens / kept,
        "bytes": size,
    }
    line = f"{args.output}: {len(rows)} texts, {tokens} tokens in {kept} memory tokens ({tokens / kept:.2f}x), {size:,} bytes"
    _print(summary | {"output": args.output}, args.json, line)
    return 0


def _memory_parser(verb):
    parser = _parser(verb)
    parser.add_argument("--memory", required=True, help="memory file that `icae compress` wrote")
    parser.add_argument(
        "--adapter",
        help="adapter (folder, hub id or gs://…); by default the one that the memory names",
    )
    base_flags(parser)
    mesh_flag(parser)
    parser.add_argument("--batch_size", type=int, default=16, help="texts decoded at once")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=None,
        help="most tokens of an answer or a restored text",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    return parser


def restore_verb(argv):
    from icae_jax.inference.compressor import load_with_memory

    args = _memory_parser("restore").parse_args(argv)
    compressor, memory, ids = load_with_memory(
        args.memory, args.adapter, args.base, args.base_dtype, _mesh(args.mesh)
    )
    texts = compressor.restore(memory, args.max_new_tokens, args.batch_size)
    for row_id, text in zip(ids, texts, strict=True):
        _print({"id": row_id, "text": text}, args.json, text)
    return 0


def ask_verb(argv):
    from icae_jax.inference import memory_file
    from icae_jax.inference.compressor import load_with_memory

    parser = _memory_parser("ask")
    parser.add_argument(
        "--question",
        required=True,
        action="append",
        help="put to every text in the memory; may be given many times",
    )
    parser.add_argument(
        "--id", action="append", help="ask only the text of this id; may be given many times"
    )
    args = parser.parse_args(argv)
    compressor, memory, ids = load_with_memory(
        args.memory, args.adapter, args.base, args.base_dtype, _mesh(args.mesh)
    )
    if args.id:
        keep = memory_file.rows_named(ids, args.id)
        memory, ids = memory[keep], [ids[i] for i in keep]
    answers = compressor.ask(
        memory, [args.question] * len(ids), args.max_new_tokens, args.batch_size
    )
    for row_id, row in zip(ids, answers, strict=True):
        for question, answer in zip(args.question, row, strict=True):
            _print({"id": row_id, "question": question, "answer": answer}, args.json, answer)
    return 0


def quickstart_verb(argv):
    began = time.perf_counter()  # importing takes seconds
    from icae_jax.workflows import quickstart

    return quickstart.main(_parser("quickstart"), argv, began)


def inspect_verb(argv):
    from icae_jax.workflows import inspection

    return inspection.main(_parser("inspect"), argv)


def prepare_verb(argv):
    from icae_jax.workflows import prepare

    return prepare.main(_parser("prepare"), argv)


def sweep_verb(argv):
    from icae_jax.workflows import sweep

    return sweep.main(_parser("sweep"), argv)


CONVERT = {
    "base": "a base model, into the hub's format or an Orbax copy",
    "adapter": "a trained compressor, from and to any format",
}


def _tell_kinds(verb, kinds, argv):
    """Says what kinds of a verb there are. Returns the exit code."""
    asked = bool(argv) and argv[0] in ("-h", "--help")
    lines = [f"  {kind:8} {text}" for kind, text in kinds.items()]
    text = "\n".join(
        [
            f"usage: icae {verb} KIND [options]",
            "",
            *lines,
            "",
            f"icae {verb} KIND --help lists its options",
        ]
    )
    print(text, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else BAD_INPUT


def convert_verb(argv):
    if not argv or argv[0] not in CONVERT:
        return _tell_kinds("convert", CONVERT, argv)
    from icae_jax.workflows import convert_adapter, convert_base

    parser = argparse.ArgumentParser(
        prog=f"icae convert {argv[0]}", description=f"convert {CONVERT[argv[0]]}"
    )
    return (convert_base if argv[0] == "base" else convert_adapter).main(parser, argv[1:])


def plan_verb(argv):
    from icae_jax.performance import plan

    return plan.main(_parser("plan"), argv)


BENCH = {"train": "a training step: time, FLOPs, memory, compilation, and where the time goes"}


def bench_verb(argv):
    if not argv or argv[0] not in BENCH:
        return _tell_kinds("bench", BENCH, argv)
    from icae_jax.performance import bench

    parser = argparse.ArgumentParser(
        prog=f"icae bench {argv[0]}", description=f"measure {BENCH[argv[0]]}", allow_abbrev=False
    )
    return bench.main(parser, argv[1:])


def evaluate_verb(argv):
    from icae_jax.evaluation import evaluate
    from icae_jax.runtime import distributed

    parser = _parser("evaluate")
    process_flags(parser)
    with distributed.ending_together(BAD_INPUT):
        return evaluate.main(parser, argv)


def cache_verb(argv):
    from icae_jax.data.tokens import CACHE_VERSION

    return cache.main(_parser("cache"), argv, CACHE_VERSION)


def export_verb(argv):
    from icae_jax.cli import export

    return export.main(_parser("export"), argv)


VERBS = {
    "quickstart": (
        quickstart_verb,
        "train a compressor in minutes on a small shipped base, and show what a memory is worth",
    ),
    "prepare": (
        prepare_verb,
        "make a data set of downloaded files, for training and evaluation to read",
    ),
    "train": (train_verb, "train a compressor: pretrain (AE + LM) or finetune (QA)"),
    "sweep": (sweep_verb, "train a configuration at several values of a field, and compare them"),
    "train-base": (train_base_verb, "train a small base model from scratch"),
    "compress": (compress_verb, "write texts into a memory file"),
    "restore": (restore_verb, "read the texts back out of a memory file"),
    "ask": (ask_verb, "answer questions from a memory file"),
    "plan": (plan_verb, "say what a configuration takes on a TPU slice, by compiling it for one"),
    "bench": (bench_verb, "measure a training step on the devices at hand"),
    "evaluate": (
        evaluate_verb,
        "measure a compressor by one of the papers' suites, with intervals and a report",
    ),
    "inspect": (
        inspect_verb,
        "say what a file or folder is, its sizes, its method, and which bases fit",
    ),
    "convert": (
        convert_verb,
        "convert base models and adapters between this package's formats and those of others",
    ),
    "export": (export_verb, "write memories as servers and transformers read them"),
    "cache": (
        cache_verb,
        "say what is kept on disk to be used again, and remove what was used least recently",
    ),
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


def keep_compiled():
    """Lets JAX keep compiled programs on disk, so that a command started again compiles nothing: in `files.cache_folder`/compiled, a folder
    for each kind of processor, whose instructions a program for CPUs is made of.

    JAX_COMPILATION_CACHE_DIR of the user's own is left alone, empty too, which keeps nothing; but JAX would warn of every program where it
    cannot be written.
    """
    cpus = pathlib.Path("/proc/cpuinfo")
    flags = (
        next(
            (
                line
                for line in cpus.read_text().splitlines()
                if line.startswith(("flags", "Features"))
            ),
            "",
        )
        if cpus.exists()
        else ""
    )
    kind = f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if own is None:
        folder = None
        with contextlib.suppress(UserError):  # no folder can be written: nothing is kept
            folder = files.cache_folder().absolute() / "compiled" / kind
        if folder and files.can_write(folder):
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
            cache.bound_compiled(folder)
    elif own and "://" not in own and not files.can_write(pathlib.Path(own)):
        if os.path.isdir(own) and os.access(own, os.R_OK | os.X_OK):
            os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = (
                "1e9"  # programs are read from there, and none is added
            )
        else:
            del os.environ["JAX_COMPILATION_CACHE_DIR"]
            print(
                f"$JAX_COMPILATION_CACHE_DIR {own}: cannot be written; programs are kept with the other caches",
                file=sys.stderr,
            )
            keep_compiled()


def set_up():
    """Tells libraries what they read as they are imported: every program calls it before anything imports JAX."""
    platforms.quiet_libraries()
    keep_compiled()


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
            TRAIN_HELP.format(
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
