"""`icae compress`: write texts into a memory file, or documents into a store."""

import argparse

from icae_jax import errors
from icae_jax.cli import flags
from icae_jax.errors import UserError

HELP = "write texts into a memory file, or documents into a store"
# Of a store alone, with what stands for each if it is not given.
STORE_FLAGS = {"dtype": None, "kv": False, "metadata": (), "prune": False}
STORE_FLAGS |= {"shards": None, "processes": 1, "process": 0}


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _parser() -> argparse.ArgumentParser:
    parser = flags.parser("compress", HELP)
    add = parser.add_argument
    help_text = "adapter folder, workdir, checkpoint, hub id, or gs://…; by default the one that "
    help_text += "an existing store names"
    add("--adapter", help=help_text)
    flags.base_flags(parser)
    add("--input", required=True, help="texts: JSON, tables, text files, a folder or glob of them")
    to = parser.add_mutually_exclusive_group(required=True).add_argument
    to("--output", help="memory file to write (.safetensors)")
    to("--store", help="folder of a store, new or not: what it has is skipped")
    size = parser.add_mutually_exclusive_group().add_argument
    help_text = "memory tokens per segment, if the adapter knows several; by default the most"
    size("--k", type=int, help=help_text)
    help_text = "memory tokens of a text; the nearest k that the adapter knows is taken, one for "
    help_text += "all texts of a memory file, one for each document of a store"
    size("--tokens", type=int, help=help_text)
    help_text = "context tokens per memory token; the nearest k is taken, as with --tokens"
    size("--ratio", type=float, help=help_text)
    flags.mesh_flag(parser)
    help_text = "texts compressed at once; with --store whole segments, or more shorter ones"
    add("--batch_size", type=int, default=16, help=help_text)
    help_text = "refuse empty texts, and documents that cannot be stored, instead of leaving them "
    help_text += "out"
    add("--strict", action="store_true", help=help_text)
    flags.json_flag(parser)
    _store_flags(parser)
    return parser


def _store_flags(parser: argparse.ArgumentParser) -> None:
    from icae_jax.inference.store import DTYPES

    add = parser.add_argument_group("with --store").add_argument
    help_text = "of the numbers on disk; by default the store's own, float32 for a new one"
    add("--dtype", choices=DTYPES, default=STORE_FLAGS["dtype"], help=help_text)
    help_text = (
        "also store the decoder's K/V of the template's head and the slots, so that nothing "
    )
    help_text += "of them is computed when they are read"
    add("--kv", action="store_true", help=help_text)
    help_text = "fields of a row to keep beside its memory, such as lang,url; by default what its "
    help_text += "field metadata holds"
    add(
        "--metadata", type=_words, default=STORE_FLAGS["metadata"], metavar="FIELDS", help=help_text
    )
    help_text = "remove the entries whose documents the input no longer has"
    add("--prune", action="store_true", help=help_text)
    add("--shards", metavar="URL", help="gs://…, s3://… or a folder for the shards of a new store")
    help_text = "how many processes share the input; they need not reach each other"
    add("--processes", type=int, default=STORE_FLAGS["processes"], metavar="N", help=help_text)
    help_text = "which of them this is; what others leave, process 0 takes into the index"
    add("--process", type=int, default=STORE_FLAGS["process"], metavar="I", help=help_text)


def run(argv: list[str]) -> int:
    """Runs the verb. Returns the exit code 0; UserError on bad input."""
    args = _parser().parse_args(argv)
    if args.output is None:
        if not args.store:
            raise UserError("--store is empty; give the folder of a store, new or not")
        return _to_store(args)
    given = [name for name, default in STORE_FLAGS.items() if getattr(args, name) != default]
    if given:
        raise UserError(f"--{given[0]} is for a --store, not for a memory file; leave it out")
    if not args.adapter:
        raise UserError("--adapter is not given; name what compresses")
    return _to_file(args)


def _to_store(args: argparse.Namespace) -> int:
    from icae_jax.inference.texts import Size
    from icae_jax.workflows import compress_store

    names = ("input", "store", "base", "base_dtype", "batch_size", "mesh", "strict", *STORE_FLAGS)
    request = compress_store.Request(
        adapter=args.adapter or "",
        size=Size(args.k, args.tokens, args.ratio),
        **{name: getattr(args, name) for name in names},
    )
    result = compress_store.compress_store(request)
    line = "{store}: {counted} stored, {unchanged:,} unchanged, {pruned:,} removed".format(
        counted=errors.counted(result["stored"], "documents"), **result
    )
    if result["metadata_changed"]:
        line += f", {result['metadata_changed']:,} with other metadata"
    if result["stored"]:
        line += (
            "; {context_tokens:,} tokens in {memory_tokens:,} memory tokens ({ratio:.2f}x), "
            "{bytes:,} bytes, {padding:.1%} padding, {seconds:.0f} s"
        ).format(**result)
    if result["problems"]:
        line += f"; {errors.counted(result['problems'], 'documents')} could not be stored"
    flags.print_result(result, args.json, line)
    return 0


def _to_file(args: argparse.Namespace) -> int:
    from icae_jax.data.sources import read_texts, with_ids
    from icae_jax.inference import loading, memory_file, texts

    memory_file.check_output(args.output)
    rows = with_ids(read_texts(args.input, "--input", "--strict" if args.strict else ""))
    mesh = flags.mesh(args.mesh)
    compressor = loading.load(args.adapter, args.base, dtype=args.base_dtype, mesh=mesh)
    memory = texts.compress_rows(
        compressor, rows, args.batch_size, args.k, tokens=args.tokens, ratio=args.ratio
    )
    compressor.save(args.output, memory, list(rows))

    summary = texts.summary(memory)
    line = (
        "{output}: {counted}, {context_tokens} tokens in {memory_tokens} memory tokens "
        "({ratio:.2f}x, k {k}), {bytes:,} bytes"
    ).format(output=args.output, counted=errors.counted(summary["texts"], "texts"), **summary)
    flags.print_result(summary | {"output": args.output}, args.json, line)
    return 0
