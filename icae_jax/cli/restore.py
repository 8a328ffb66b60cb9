"""`icae restore`."""

from icae_jax.cli import flags

HELP = "read the texts back out of a memory file"


def run(argv):
    from icae_jax.inference.compressor import load_with_memory

    args = flags.memory_parser("restore", HELP).parse_args(argv)
    compressor, memory, ids = load_with_memory(
        args.memory, args.adapter, args.base, args.base_dtype, flags.mesh(args.mesh)
    )
    texts = compressor.restore(memory, args.max_new_tokens, args.batch_size)
    for row_id, text in zip(ids, texts, strict=True):
        flags.print_result({"id": row_id, "text": text}, args.json, text)
    return 0
