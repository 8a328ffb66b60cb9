"""`icae restore`: read the texts back out of a memory file."""

from icae_jax.cli import flags

HELP = "read the texts back out of a memory file"


def run(argv: list[str]) -> int:
    """Runs the verb. Returns the exit code 0; UserError on bad input."""
    from icae_jax.inference import loading

    args = flags.memory_parser("restore", HELP).parse_args(argv)
    mesh = flags.mesh(args.mesh)
    compressor, memory, ids = loading.load_with_memory(
        args.memory, args.adapter, args.base, dtype=args.base_dtype, mesh=mesh
    )
    texts = compressor.restore(memory, args.max_new_tokens, args.batch_size)
    for text_id, text in zip(ids, texts, strict=True):
        flags.print_result({"id": text_id, "text": text}, args.json, text)
    return 0
