"""`icae ask`: answer questions from a memory file."""

from icae_jax.cli import flags

HELP = "answer questions from a memory file"


def run(argv: list[str]) -> int:
    """Runs the verb. Returns the exit code 0; UserError on bad input."""
    from icae_jax.inference import loading

    parser = flags.memory_parser("ask", HELP)
    parser.add_argument(
        "--question",
        required=True,
        action="append",
        help="asked of every text in the memory; may be given several times",
    )
    parser.add_argument(
        "--id",
        action="append",
        default=[],
        help="ask only the text of this id; may be given several times",
    )
    args = parser.parse_args(argv)
    compressor, memory, ids = loading.load_with_memory(
        args.memory,
        args.adapter,
        args.base,
        dtype=args.base_dtype,
        mesh=flags.mesh(args.mesh),
        only_ids=args.id,
    )
    questions = [args.question] * len(ids)
    answers = compressor.ask(memory, questions, args.max_new_tokens, args.batch_size)
    for text_id, row in zip(ids, answers, strict=True):
        for question, answer in zip(args.question, row, strict=True):
            result = {"id": text_id, "question": question, "answer": answer}
            flags.print_result(result, args.json, answer)
    return 0
