"""`icae export KIND`: memories in the form that other programs read."""

import argparse

from icae_jax import errors
from icae_jax.cli import flags

HELP = "write memories as servers and transformers read them"
_OLD_KINDS = {"prompt-embeds": "prompt_embeds", "hf-cache": "hf_cache"}


def run(argv: list[str]) -> int:
    """Runs the verb. Returns the exit code 0; UserError on bad input."""
    if argv and argv[0] in _OLD_KINDS:
        new = _OLD_KINDS[argv[0]]
        flags.renamed(argv[0], new)
        argv = [new, *argv[1:]]
    args = _parser().parse_args(argv)
    args.run(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    from icae_jax.interop.export import hf_cache, prompt_embeds, reader

    parser = flags.parser("export", HELP)
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)

    text = "memories as prompt embeddings, in requests for vLLM"
    embeds = kinds.add_parser("prompt_embeds", help=text, description=text)
    _shared_flags(embeds, _prompt_embeds, prompt_embeds.DTYPES)
    add = embeds.add_argument
    add("--question", action="append", default=[], help="asked of every text; may be repeated")
    add("--restore", action="store_true", help="also write prompts that ask for the texts back")
    add(
        "--model",
        help="the server's name for what reads; by default none is named, or decoder_lora",
    )
    add("--url", default=prompt_embeds.URL, help="of the server; %(default)s by default")

    text = "memories as a filled cache for transformers' generate"
    cache = kinds.add_parser("hf_cache", help=text, description=text)
    _shared_flags(cache, _hf_cache, hf_cache.DTYPES)
    cache.add_argument(
        "--for",
        dest="objective",
        choices=tuple(reader.OBJECTIVES),
        default="ask",
        help="what the memory is for; %(default)s by default",
    )
    return parser


def _shared_flags(parser, run, dtypes):
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--memory", required=True, help="memory file that `icae compress` wrote")
    add("--to", required=True, help="folder to write, new or empty")
    help_text = "adapter folder, workdir, checkpoint, hub id or gs://…; by default the memory's"
    add("--adapter", help=help_text)
    flags.base_flags(parser)
    add("--id", action="append", default=[], help="only the text of this id; may be repeated")
    add("--dtype", choices=dtypes, default=dtypes[0], help="of the tensors; %(default)s by default")
    flags.json_flag(parser)


def _load(args):
    """(memories with their ids, what reads them); the output folder is checked before loading."""
    from icae_jax import files
    from icae_jax.inference import loading
    from icae_jax.interop.export.reader import NamedMemory, Reader

    files.check_new_folder(args.to)
    compressor, memory, ids = loading.load_with_memory(
        args.memory, args.adapter, args.base, dtype=args.base_dtype, only_ids=args.id
    )
    reader = Reader(compressor.base, compressor.adapter, compressor.decoder)
    return NamedMemory(memory, ids), reader


def _prompt_embeds(args):
    from icae_jax.interop.export import prompt_embeds

    errors.need_torch("prompt_embeds")
    named, reader = _load(args)
    requests = prompt_embeds.Requests(
        tuple(args.question), args.restore, args.model, args.url, args.dtype
    )
    written = prompt_embeds.save_prompt_embeds(args.to, named, reader, requests)
    if written.framing.note:
        errors.say(f"note: {written.framing.note}")
    count = written.requests
    flags.print_result(
        {"to": args.to, "requests": count, "texts": len(named.ids), "serve": written.serve},
        args.json,
        f"{args.to}: {errors.counted(count, 'requests')} of "
        f"{errors.counted(len(named.ids), 'texts')}. Serve them in {args.to} with\n"
        f"  {written.serve}\npython {args.to}/request.py --help sends one",
    )


def _hf_cache(args):
    from icae_jax.interop.export import hf_cache

    named, reader = _load(args)
    hf_cache.save_cache(args.to, named, reader, args.objective, args.dtype)
    flags.print_result(
        {"to": args.to, "texts": len(named.ids), "for": args.objective},
        args.json,
        f"{args.to}: the cache of {errors.counted(len(named.ids), 'texts')}, to {args.objective}; "
        f"python {args.to}/use_cache.py BASE reads it",
    )
