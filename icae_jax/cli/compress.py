"""`icae compress`."""

from icae_jax.cli import flags

HELP = "write texts into a memory file"


def run(argv):
    from icae_jax.data.sources import read_texts, with_ids
    from icae_jax.inference import memory_file
    from icae_jax.inference.compressor import load

    parser = flags.parser("compress", HELP)
    parser.add_argument(
        "--adapter",
        required=True,
        help="adapter folder, workdir of a training run, hub id, or gs://…",
    )
    flags.base_flags(parser)
    parser.add_argument(
        "--input", required=True, help="texts: JSON, tables, text files, a folder or glob of them"
    )
    parser.add_argument("--output", required=True, help="memory file to write (.safetensors)")
    parser.add_argument(
        "--k",
        type=int,
        help="memory tokens a segment, where the adapter knows several; by default the most",
    )
    flags.mesh_flag(parser)
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
    compressor = load(args.adapter, args.base, dtype=args.base_dtype, mesh=flags.mesh(args.mesh))
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
    flags.print_result(summary | {"output": args.output}, args.json, line)
    return 0
