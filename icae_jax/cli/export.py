"""`icae export`: memories in the form that other programs read."""

from icae_jax import errors, files
from icae_jax.cli import flags
from icae_jax.inference import compressor as compressors
from icae_jax.inference import memory_file
from icae_jax.interop.export import serving

HELP = "write memories as servers and transformers read them"


def prompt_embeds(args):
    """Prompt embeddings for a vLLM server."""
    errors.need_torch("prompt-embeds")
    compressor, memory, ids = _load(args)
    count = serving.save_prompt_embeds(
        args.to,
        compressor,
        memory,
        ids,
        args.question,
        args.restore,
        args.dtype,
        args.model,
        args.url,
    )
    if compressor.adapter.template.name != "chat":
        print(
            f"note: the adapter was trained with template {compressor.adapter.template.name}, and in a chat the server frames the memory "
            "with its own; the prompts for completions are framed as trained"
        )
    print(
        f"{args.to}: {count} requests of {len(ids)} texts; python {args.to}/request.py --help sends one"
    )


def hf_cache(args):
    """A filled cache for transformers' generate."""
    compressor, memory, ids = _load(args)
    serving.save_cache(args.to, compressor, memory, ids, args.objective, args.dtype)
    print(
        f"{args.to}: the cache of {len(ids)} texts, to {args.objective}; python {args.to}/use_cache.py BASE reads it"
    )


def _load(args):
    """(`Compressor`, memory, ids) as the flags say, of the texts that --id names; the output is checked before anything is loaded."""
    files.check_new_folder(args.to)
    compressor, memory, ids = compressors.load_with_memory(
        args.memory, args.adapter, args.base, args.base_dtype
    )
    if args.id:
        keep = memory_file.rows_named(ids, args.id)
        memory, ids = memory[keep], [ids[row] for row in keep]
    return compressor, memory, ids


def run(argv):
    """Runs `icae export KIND`; returns the exit code 0. UserError on bad input."""
    parser = flags.parser("export", HELP)
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)

    def kind(name, run, text, dtypes):
        sub = kinds.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--memory", required=True, help="memory file that `icae compress` wrote")
        sub.add_argument("--to", required=True, help="folder to write, new or empty")
        sub.add_argument(
            "--adapter",
            help="adapter (folder, hub id or gs://…); by default the one that the memory names",
        )
        flags.base_flags(sub)
        sub.add_argument(
            "--id",
            action="append",
            default=[],
            help="only the text of this id; may be given many times",
        )
        sub.add_argument(
            "--dtype",
            choices=dtypes,
            default=dtypes[0],
            help=f"of the tensors; {dtypes[0]} by default",
        )
        return sub

    embeds = kind(
        "prompt-embeds",
        prompt_embeds,
        "ICAE memories as prompt embeddings, in requests for vLLM",
        serving.PROMPT_DTYPES,
    )
    embeds.add_argument(
        "--question", action="append", default=[], help="put to every text; may be given many times"
    )
    embeds.add_argument(
        "--restore", action="store_true", help="also write the prompts that ask for the texts back"
    )
    embeds.add_argument(
        "--model",
        help="the name under which the server knows the base; by default the base's folder",
    )
    embeds.add_argument("--url", default=serving.URL, help="of the server; %(default)s by default")
    cache = kind(
        "hf-cache",
        hf_cache,
        "memories as a filled cache for transformers' generate",
        serving.CACHE_DTYPES,
    )
    cache.add_argument(
        "--for",
        dest="objective",
        choices=tuple(serving.OBJECTIVES),
        default="ask",
        help="what the memory is for; %(default)s by default",
    )
    args = parser.parse_args(argv)
    args.run(args)
    return 0
