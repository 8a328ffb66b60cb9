"""`icae export KIND`: memories in the form that other programs read."""

import argparse

from icae_jax import errors
from icae_jax.cli import flags
from icae_jax.errors import UserError

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
    from icae_jax.interop.export import hf_cache, reader, vllm_requests

    parser = flags.parser("export", HELP)
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)

    text = "memories as prompt embeddings, in requests for vLLM"
    embeds = kinds.add_parser("prompt_embeds", help=text, description=text)
    _shared_flags(embeds, _prompt_embeds, vllm_requests.DTYPES)
    _request_flags(embeds)

    text = "memories as keys and values for a KV connector of vLLM, in requests for it"
    keys = kinds.add_parser("vllm_kv", help=text, description=text)
    _shared_flags(keys, _vllm_kv, vllm_requests.DTYPES, stores=True)
    _request_flags(keys)

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


def _request_flags(parser):
    from icae_jax.interop.export import vllm_requests

    add = parser.add_argument
    add("--question", action="append", default=[], help="asked of every text; may be repeated")
    add("--restore", action="store_true", help="also write prompts that ask for the texts back")
    add(
        "--model",
        help="the server's name for what reads; by default none is named, or decoder_lora",
    )
    add("--url", default=vllm_requests.URL, help="of the server; %(default)s by default")


def _shared_flags(parser, run, dtypes, stores=False):
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--memory", required=not stores, help="memory file that `icae compress` wrote")
    if stores:
        add("--store", help="store that `icae compress --store` wrote, in place of a memory file")
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


def _requests(args):
    from icae_jax.interop.export.vllm_requests import Requests

    return Requests(tuple(args.question), args.restore, args.model, args.url, args.dtype)


def _prompt_embeds(args):
    from icae_jax.interop.export import prompt_embeds

    errors.need_torch("prompt_embeds")
    requests = _requests(args)
    named, reader = _load(args)
    written = prompt_embeds.save_prompt_embeds(args.to, named, reader, requests)
    if written.framing.note:
        errors.say(f"note: {written.framing.note}")
    _print_requests(args, written, len(named.ids), {})


def _vllm_kv(args):
    from icae_jax.interop.export import vllm_kv

    if (args.memory is None) == (args.store is None):
        raise UserError("give one of --memory, a memory file, and --store, a store")
    requests = _requests(args)
    if args.memory:
        named, reader = _load(args)
        texts = [(name, named.memory[[row]]) for row, name in enumerate(named.ids)]
    else:
        texts, reader = _load_store(args)
    written = vllm_kv.save_vllm_kv(args.to, texts, reader, requests)
    _print_requests(args, written, written.texts, {"bytes": written.bytes})


def _load_store(args):
    """(each document's id with its memory, read when it is asked for; what reads them)."""
    from icae_jax import files
    from icae_jax.inference import loading
    from icae_jax.interop.export.reader import Reader

    files.check_new_folder(args.to)
    compressor, opened = loading.load_with_store(
        args.store, args.adapter, args.base, dtype=args.base_dtype
    )
    entries = opened.get(args.id) if args.id else opened.find()
    reader = Reader(compressor.base, compressor.adapter, compressor.decoder)
    return ((entry.id, entry.memory) for entry in entries), reader


def _print_requests(args, written, texts, more):
    """What an export for vLLM wrote, and how to serve it."""
    values = {"to": args.to, "requests": written.requests, "texts": texts, "serve": written.serve}
    flags.print_result(
        values | more,
        args.json,
        f"{args.to}: {errors.counted(written.requests, 'requests')} of "
        f"{errors.counted(texts, 'texts')}. Serve them in {args.to} with\n  {written.serve}\n"
        f"python {args.to}/request.py --help sends one",
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
