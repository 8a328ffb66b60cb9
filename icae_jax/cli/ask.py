"""`icae ask`."""

from icae_jax.cli import flags

HELP = "answer questions from a memory file"


def run(argv):
    from icae_jax.inference import memory_file
    from icae_jax.inference.compressor import load_with_memory

    parser = flags.memory_parser("ask", HELP)
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
        args.memory, args.adapter, args.base, args.base_dtype, flags.mesh(args.mesh)
    )
    if args.id:
        keep = memory_file.rows_named(ids, args.id)
        memory, ids = memory[keep], [ids[i] for i in keep]
    answers = compressor.ask(
        memory, [args.question] * len(ids), args.max_new_tokens, args.batch_size
    )
    for row_id, row in zip(ids, answers, strict=True):
        for question, answer in zip(args.question, row, strict=True):
            flags.print_result(
                {"id": row_id, "question": question, "answer": answer}, args.json, answer
            )
    return 0
