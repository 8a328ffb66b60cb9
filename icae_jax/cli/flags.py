"""Flags that several verbs share."""

import argparse
import json
import sys

BAD_INPUT = 2


def process_flags(parser):
    """The flags of the verbs that several processes run together."""
    add = parser.add_argument_group(
        "several processes (TPU slices and Slurm jobs are recognised without)"
    ).add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 serves the others")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which this is, from 0")


def parser(verb, text):
    return argparse.ArgumentParser(prog=f"icae {verb}", description=text)


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


def mesh(text):
    """The mesh over this process's devices that --mesh asks for; None for one device alone."""
    from icae_jax.runtime import sharding

    return sharding.local_mesh(sharding.parse(text)) if text else None


def memory_parser(verb, text):
    result = parser(verb, text)
    result.add_argument("--memory", required=True, help="memory file that `icae compress` wrote")
    result.add_argument(
        "--adapter",
        help="adapter (folder, hub id or gs://…); by default the one that the memory names",
    )
    base_flags(result)
    mesh_flag(result)
    result.add_argument("--batch_size", type=int, default=16, help="texts decoded at once")
    result.add_argument(
        "--max_new_tokens",
        type=int,
        default=None,
        help="most tokens of an answer or a restored text",
    )
    result.add_argument("--json", action="store_true", help="print one JSON object a line")
    return result


def print_result(value, as_json, text):
    print(json.dumps(value, ensure_ascii=False) if as_json else text)


def tell_kinds(verb, kinds, argv):
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
