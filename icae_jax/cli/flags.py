"""Flags that several verbs share, their old spellings, and how results are printed."""

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icae_jax.inference.sampling import Sampling

BAD_INPUT = 2  # exit code

# Old spellings, which work for one more release.
_OLD_VERBS = {"train-base": ("train", "base")}
_OLD_FLAGS = ("--from-scratch",)


# ------------------------------------------------------------------------------------- spelling


def renamed(old: str, new: str) -> None:
    """Says on stderr that an old spelling was used."""
    print(f"note: {old} is now {new}; the old spelling goes with the next release", file=sys.stderr)


def normalised(argv: Sequence[str]) -> list[str]:
    """The arguments with flags in underscores, however they are spelt, and old verbs renamed."""
    arguments = list(argv)
    if arguments and arguments[0] in _OLD_VERBS:
        verb, *kind = _OLD_VERBS[arguments[0]]
        renamed(arguments[0], " ".join([verb, *kind]))
        arguments[:1] = [verb, *kind]
    return [_with_underscores(argument) for argument in arguments]


def _with_underscores(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or name.startswith("--config."):
        return argument
    spelt = "--" + name[2:].replace("-", "_")
    if name in _OLD_FLAGS:
        renamed(name, spelt)
    return spelt + equals + value


# ---------------------------------------------------------------------------------------- flags


def parser(verb: str, text: str) -> argparse.ArgumentParser:
    """The parser of `icae VERB`, whose help says `text`."""
    return argparse.ArgumentParser(prog=f"icae {verb}", description=text, allow_abbrev=False)


def config_flag(parser: argparse.ArgumentParser, shipped: str = "icae:pretrain") -> None:
    """`--config`, of every verb that takes a configuration; the fields are parsed separately.

    shipped: the example of the help.
    """
    parser.add_argument(
        "--config",
        metavar="FILE[:arg]",
        help="a configuration file with get_config(arg), or the name of a shipped one, "
        f"such as {shipped}",
    )


def fields_help(kind: type) -> str:
    """The fields of a configuration as --help lists them, with their defaults."""
    from icae_jax.training import config_file

    lines = [f"--config.{n}={v}" for n, v in config_file.default_fields(kind).items()]
    return "any field of the configuration; defaults, where the file does not set them:\n" + (
        textwrap.indent("\n".join(lines), "  ")
    )


def process_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the verbs that several processes run together."""
    add = parser.add_argument_group(
        "several processes (set by themselves on TPU slices and in Slurm jobs)"
    ).add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 serves the others")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which this is, from 0")


# `models.schemes.SCHEMES` behind the two plain ones; that module would import JAX too early.
BASE_DTYPES = ("float32", "bfloat16", "int8", "nf4", "int8+ends", "nf4+ends")
BASE_DTYPE_HELP = (
    "of the base: bfloat16 takes half of float32's memory (activations and memory are in it too), "
    "int8 a quarter, nf4 an eighth, +ends also of the embedding table and the head; by default "
    "float32, or what the base is stored in if that is quantised"
)


def base_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every verb that runs an adapter's base."""
    parser.add_argument(
        "--base",
        help="base model (folder, FILE.gguf, hub id, hub id:FILE.gguf or gs://…); "
        "by default the one that the adapter names",
    )
    parser.add_argument("--base_dtype", choices=BASE_DTYPES, metavar="DTYPE", help=BASE_DTYPE_HELP)


def mesh_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of the verbs that may use several devices."""
    parser.add_argument(
        "--mesh",
        help="devices of this host over which base and batches are split, such as "
        "fsdp=4,tensor=2; by default one device",
    )


def mesh(text: str | None) -> Any:
    """The `jax.sharding.Mesh` of this process's devices that --mesh asks for; None for one."""
    from icae_jax.runtime import sharding

    return sharding.local_mesh(sharding.parse(text)) if text else None


def json_flag(parser: argparse.ArgumentParser, text: str = "print one JSON object") -> None:
    """`--json`, of every verb that prints results."""
    parser.add_argument("--json", action="store_true", help=text)


def numbers(text: str) -> tuple[int, ...]:
    """The type of a flag that takes whole numbers joined by commas."""
    try:
        return tuple(int(number) for number in text.split(",") if number)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers such as 1,2,4"
        ) from error


def memory_parser(verb: str, text: str, required: bool = True) -> argparse.ArgumentParser:
    """The parser of a verb that decodes from a memory file or a store.

    required: whether it always does.
    """
    result = parser(verb, text)
    memory = result.add_mutually_exclusive_group(required=required).add_argument
    memory("--memory", help="memory file that `icae compress` wrote")
    memory("--store", help="folder of a store that `icae compress` filled")
    add = result.add_argument
    help_text = "only the text of this id in the memory file or store; may be given several times"
    add("--id", action="append", default=[], help=help_text)
    add(
        "--adapter",
        help="adapter (folder, workdir, checkpoint, hub id or gs://…); by default the one that the "
        "memory names",
    )
    base_flags(result)
    mesh_flag(result)
    add("--batch_size", type=int, default=16, help="texts decoded at once")
    add("--max_new_tokens", type=int, help="most tokens of an answer or a restored text")
    json_flag(result, "print one JSON object a line")
    return result


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")


def sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the verbs that decode answers: how their tokens are chosen."""
    from icae_jax.inference.sampling import GREEDY

    add = parser.add_argument_group("how tokens are chosen").add_argument
    help_text = "0, the default, takes the best token; higher draws more freely"
    add("--temperature", type=float, default=GREEDY.temperature, help=help_text)
    help_text = "draw from so many most likely tokens; 0, the default: from all"
    add("--top_k", type=int, default=GREEDY.top_k, help=help_text)
    help_text = "draw from the most likely tokens whose probabilities sum to this (default: 1)"
    add("--top_p", type=float, default=GREEDY.top_p, help=help_text)
    help_text = "draw only tokens of this part of the best one's probability (default: 0)"
    add("--min_p", type=float, default=GREEDY.min_p, help=help_text)
    help_text = "above 1: tokens of question and answer are less likely again (default: 1)"
    add("--repetition_penalty", type=float, default=GREEDY.repetition_penalty, help=help_text)
    add("--seed", type=int, default=GREEDY.seed, help="of the draws (default: 0)")
    help_text = "a text before which an answer ends; may be given several times"
    add("--stop", action="append", default=[], help=help_text)


def sampling(args: argparse.Namespace) -> "Sampling":
    """The `Sampling` that these flags ask for; UserError if one is out of its range."""
    from icae_jax.inference.sampling import Sampling

    return Sampling(**{name: getattr(args, name) for name in _SAMPLING})


# ------------------------------------------------------------------------------------- printing


def print_result(value: Any, as_json: bool, text: str) -> None:
    """Prints a result: `value` as one line of JSON, or `text`."""
    print(json.dumps(value, ensure_ascii=False) if as_json else text)


def tell_damaged(damaged: Sequence[Any], as_json: bool) -> int:
    """Says which entries of a store could not be read (`stored.Damaged`). Returns the exit code."""
    for entry_id, error in damaged:
        if as_json:
            print_result({"id": entry_id, "error": str(error)}, True, "")
        print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT if damaged else 0


def tell_kinds(verb: str, kinds: Mapping[str, str], argv: list[str]) -> int:
    """Lists a verb's kinds, `{kind: what it is}`. Returns the exit code: 0 for help."""
    asked = argv[:1] in (["-h"], ["--help"])
    print(
        f"usage: icae {verb} KIND [options]\n",
        *(f"  {kind:8} {text}" for kind, text in kinds.items()),
        f"\nicae {verb} KIND --help lists its options",
        sep="\n",
        file=sys.stdout if asked else sys.stderr,
    )
    return 0 if asked else BAD_INPUT
