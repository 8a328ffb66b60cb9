"""`icae restore`: read the texts back out of a memory file or a store."""

import argparse
from collections.abc import Sequence

from icae_jax.cli import flags

HELP = "read the texts back out of a memory file or a store"


def run(argv: list[str]) -> int:
    """Runs the verb. Returns the exit code 0; UserError on bad input."""
    from icae_jax.inference import loading, stored

    args = flags.memory_parser("restore", HELP).parse_args(argv)
    how = {"dtype": args.base_dtype, "mesh": flags.mesh(args.mesh)}
    limits = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
    if args.store:
        compressor, opened = loading.load_with_store(args.store, args.adapter, args.base, **how)
        damaged: list[stored.Damaged] = []
        for documents in stored.batches(opened, args.id, (), damaged):
            texts = stored.restore(compressor, documents, **limits)
            _print(args, [document.id for document in documents], texts)
        return flags.tell_damaged(damaged, args.json)
    compressor, memory, ids = loading.load_with_memory(
        args.memory, args.adapter, args.base, only_ids=args.id, **how
    )
    _print(args, ids, compressor.restore(memory, **limits))
    return 0


def _print(args: argparse.Namespace, ids: Sequence[str | int | float], texts: Sequence[str]):
    for text_id, text in zip(ids, texts, strict=True):
        flags.print_result({"id": text_id, "text": text}, args.json, text)
