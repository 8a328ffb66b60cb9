"""`icae compress`: write texts into a memory file."""

from icae_jax import errors
from icae_jax.cli import flags

HELP = "write texts into a memory file"


def run(argv: list[str]) -> int:
    """Runs the verb. Returns the exit code 0; UserError on bad input."""
    from icae_jax.data.sources import read_texts, with_ids
    from icae_jax.inference import loading, memory_file, texts

    parser = flags.parser("compress", HELP)
    add = parser.add_argument
    add("--adapter", required=True, help="adapter folder, workdir, checkpoint, hub id, or gs://…")
    flags.base_flags(parser)
    add("--input", required=True, help="texts: JSON, tables, text files, a folder or glob of them")
    add("--output", required=True, help="memory file to write (.safetensors)")
    size = parser.add_mutually_exclusive_group().add_argument
    size(
        "--k",
        type=int,
        help="memory tokens per segment, if the adapter knows several; by default the most",
    )
    size(
        "--tokens",
        type=int,
        help="memory tokens of a text; the nearest k that the adapter knows is taken",
    )
    size(
        "--ratio",
        type=float,
        help="context tokens per memory token; the nearest k that the adapter knows is taken",
    )
    flags.mesh_flag(parser)
    add("--batch_size", type=int, default=16, help="texts compressed at once")
    add("--strict", action="store_true", help="refuse empty texts instead of leaving them out")
    flags.json_flag(parser)
    args = parser.parse_args(argv)

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
