"""`icae ask`: answer questions from a memory file, a store, or texts by a ladder of memories."""

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from icae_jax.cli import flags
from icae_jax.errors import UserError

if TYPE_CHECKING:
    from icae_jax.inference.reading import Generation
else:
    Generation = object  # importing it imports JAX, which takes seconds

HELP = "answer questions from a memory file or a store, or from texts by a ladder of memories"


def _parser() -> argparse.ArgumentParser:
    from icae_jax.inference.cascade import LIKELY

    parser = flags.memory_parser("ask", HELP, required=False)
    add = parser.add_argument
    help_text = "asked of every text; may be given several times"
    add("--question", required=True, action="append", help=help_text)
    help_text = "with --store: read the documents of --id together, as one memory"
    add("--join", action="store_true", help=help_text)
    flags.sampling_flags(parser)
    add = parser.add_argument_group("texts in place of a memory file").add_argument
    add("--input", help="texts: JSON, tables, text files, a folder or glob of them")
    help_text = "rising memory tokens per segment, such as 2,8,32: the answer is that of the first "
    help_text += "at which it is likely enough, or of the last"
    add("--ladder", type=flags.numbers, default=(), help=help_text)
    help_text = "log-probability of an answer's tokens, in the mean, that is likely enough "
    help_text += f"(default: {LIKELY:.3f}, probability 0.9)"
    add("--threshold", type=float, help=help_text)
    return parser


def run(argv: list[str]) -> int:
    """Runs the verb. Returns the exit code 0; UserError on bad input."""
    args = _parser().parse_args(argv)
    args.sampling = flags.sampling(args)  # checked before anything is loaded
    if sum(map(bool, (args.memory, args.store, args.input))) != 1:
        raise UserError("give one of --memory, a memory file, --store, a store, and --input, texts")
    if args.join and not (args.store and args.id):
        raise UserError("--join reads documents of a store together; give --store and their --id")
    if not args.input:
        if args.ladder:
            what = "a memory" if args.store else "a memory file"
            raise UserError(f"--ladder {args.ladder}: {what} has its k; give --input, texts")
        if args.threshold is not None:
            raise UserError(f"--threshold {args.threshold} counts only with --input and --ladder")
        if args.store:
            return _from_store(args)
        _from_memory(args)
    else:
        _from_texts(args)
    return 0


def _from_memory(args: argparse.Namespace) -> None:
    from icae_jax.inference import loading

    compressor, memory, ids = loading.load_with_memory(
        args.memory,
        args.adapter,
        args.base,
        dtype=args.base_dtype,
        mesh=flags.mesh(args.mesh),
        only_ids=args.id,
    )
    questions = [args.question] * len(ids)
    answers = compressor.ask(memory, questions, details=True, **_limits(args))
    _print(args, ids, answers)


def _limits(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "batch_size", "sampling")
    return {name: getattr(args, name) for name in names}


def _from_store(args: argparse.Namespace) -> int:
    from icae_jax.inference import loading, stored

    compressor, opened = loading.load_with_store(
        args.store, args.adapter, args.base, dtype=args.base_dtype, mesh=flags.mesh(args.mesh)
    )
    limits = _limits(args)
    if args.join:
        memory = stored.joined(compressor, opened.get(args.id))
        answers = compressor.ask(memory, [args.question], details=True, **limits)
        _print(args, [args.id], answers)
        return 0
    damaged: list[stored.Damaged] = []
    named = len(opened) > 1 and len(args.id) != 1  # whose answer it is
    for documents in stored.batches(opened, args.id, compressor.adapter.template.head, damaged):
        answers = stored.ask(compressor, documents, args.question, **limits)
        _print(args, [document.id for document in documents], answers, named)
    return flags.tell_damaged(damaged, args.json)


def _from_texts(args: argparse.Namespace) -> None:
    from icae_jax.data.sources import read_texts, with_ids
    from icae_jax.inference import cascade, loading

    if not args.adapter or not args.ladder or args.id:
        raise UserError("--input needs --adapter and --ladder, such as 2,8,32, and takes no --id")
    rows = with_ids(read_texts(args.input, "--input", ""))
    mesh = flags.mesh(args.mesh)
    compressor = loading.load(args.adapter, args.base, dtype=args.base_dtype, mesh=mesh)
    answers = compressor.ask(
        [row.text for row in rows.values()],
        [args.question] * len(rows),
        details=True,
        **_limits(args),
        ladder=args.ladder,
        threshold=cascade.LIKELY if args.threshold is None else args.threshold,
    )
    _print(args, rows, answers)


def _print(
    args: argparse.Namespace,
    ids: Iterable[str | int | list[str]],
    answers: Iterable[Iterable[Generation]],
    named: bool = False,
) -> None:
    """Prints the answers of each text: as JSON with what was read for them.

    ids: of each text, a list where several were read together. named: whether an answer begins with
    its text's id.
    """
    for text_id, row in zip(ids, answers, strict=True):
        for question, answer in zip(args.question, row, strict=True):
            result = {"id": text_id, "question": question, "answer": answer.text}
            result |= {"k": answer.k, "tokens_read": answer.tokens_read}
            result |= {"mean_log_prob": answer.mean_log_prob}
            read = f"\t(k {answer.k}, {answer.tokens_read} memory tokens read)"
            text = (f"{text_id}\t" if named else "") + answer.text
            flags.print_result(result, args.json, text + (read if args.ladder else ""))
