"""`icae convert base` and `icae convert adapter`."""

import argparse
import dataclasses
import json
import sys

from icae_jax.cli import flags
from icae_jax.errors import UserError

HELP = "convert base models and adapters between this package's formats and those of others"

KINDS = {
    "base": "a base model, into the hub's format or an Orbax copy",
    "adapter": "a trained compressor, from and to any format",
}


def run(argv: list[str]) -> int:
    """Runs `icae convert KIND`; returns the exit code."""
    if not argv or argv[0] not in KINDS:
        return flags.tell_kinds("convert", KINDS, argv)
    kind, *rest = argv
    parser = argparse.ArgumentParser(
        prog=f"icae convert {kind}", description=f"convert {KINDS[kind]}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return _base(parser, rest) if kind == "base" else _adapter(parser, rest)


def _base(parser, argv):
    from icae_jax.models.schemes import SCHEMES
    from icae_jax.workflows import convert_base

    add = parser.add_argument
    add(
        "--from",
        required=True,
        dest="source",
        metavar="PATH",
        help="folder, FILE.gguf, hub id (org/name or org/name@revision), hub id:FILE.gguf, or gs://…",
    )
    add("--to", required=True, metavar="DIR", help="new folder to write")
    add(
        "--format",
        choices=convert_base.FORMATS,
        help="hub: safetensors (default); orbax: loads faster on many hosts, and takes quantised "
        "weights (default for these)",
    )
    add(
        "--dtype",
        choices=(*convert_base.DTYPES, *SCHEMES),
        metavar="DTYPE",
        help=f"of the weights: {', '.join((*convert_base.DTYPES, *SCHEMES))} "
        "(default: the source's own; float32 of a quantised GGUF file, since fewer bits do not "
        "hold its numbers)",
    )
    args = parser.parse_args(argv)
    converted = convert_base.convert(args.source, args.to, args.format, args.dtype, progress=True)
    flags.print_result(dataclasses.asdict(converted), args.json, str(converted))
    return 0


def _adapter(parser, argv):
    """Exit code 2 also if restoring fails without --force."""
    from icae_jax.workflows import convert_adapter

    args = _adapter_flags(parser).parse_args(argv)
    if not args.push and (given := [f"--{n}" for n in ("private", "license") if getattr(args, n)]):
        raise UserError(f"{', '.join(given)} counts only with --push")

    def fields(kind):
        names = {field.name for field in dataclasses.fields(kind)}
        return {name: value for name, value in vars(args).items() if name in names}

    publication = None
    if args.push:
        publication = convert_adapter.Publication(args.push, args.private, args.license)
    options = convert_adapter.Options(
        **fields(convert_adapter.Options),
        publication=publication,
        unstated=convert_adapter.Unstated(**fields(convert_adapter.Unstated)),
    )

    def say(line):
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    result = convert_adapter.convert(options, say)
    for complaint in filter(None, (result.warning, result.refusal)):
        print(f"icae convert adapter: {complaint}", file=sys.stderr)
    if args.json:
        print(json.dumps(result.as_json(), ensure_ascii=False))
    return flags.BAD_INPUT if result.refusal else 0


def _adapter_flags(parser):
    from icae_jax.compression import method
    from icae_jax.objectives import targets
    from icae_jax.workflows import convert_adapter

    add = parser.add_argument
    add(
        "--from",
        dest="source",
        required=True,
        metavar="PATH",
        help="adapter folder, workdir, checkpoint, hub id, gs://…, tensors (safetensors, .pt)",
    )
    add("--base", required=True, help="the base model: folder, FILE.gguf, hub id, or gs://…")
    add("--to", metavar="DIR", help="folder to write; optional with --push")
    add(
        "--format",
        default="native",
        choices=convert_adapter.FORMATS,
        help="format to write (default: native, our adapter folder)",
    )
    add(
        "--text",
        metavar="FILE",
        help="texts to restore for the check (the first 8), instead of a built-in paragraph",
    )
    add(
        "--dtype",
        default="float32",
        choices=convert_adapter.DTYPES,
        help="of the tensors written, in formats other than native",
    )
    add("--base_dtype", choices=flags.BASE_DTYPES, metavar="DTYPE", help=flags.BASE_DTYPE_HELP)
    add(
        "--base_id",
        metavar="ORG/NAME",
        help="the base's hub id, which the adapter is to name instead of a folder",
    )
    add("--force", action="store_true", help="write, and push, even if restoring fails")
    add = parser.add_argument_group("the model hub").add_argument
    add(
        "--push",
        metavar="ORG/NAME",
        help="upload the adapter, native or peft, with a model card; makes the repository",
    )
    add("--private", action="store_true", help="make the repository private")
    add("--license", metavar="NAME", help="the adapter's licence, for the card: apache-2.0, …")
    add = parser.add_argument_group(
        "what tensors cannot tell; each format has a default, which is printed"
    ).add_argument
    add("--method", choices=tuple(method.METHODS))
    add("--alpha", type=float, help="LoRA's alpha; its scale is alpha / r")
    add("--rate", type=float, help="text tokens per memory token; --context_length is k times this")
    add("--context_length", type=int, help="most text tokens of a segment")
    add("--phase", choices=("pretrain", "finetune"))
    add("--template", choices=targets.TEMPLATES)
    add("--layout", help="position layout, if it is not its format's")
    return parser
