"""`icae serve`: answer over HTTP, as OpenAI's servers do, from memories."""

import argparse
import dataclasses
import importlib.util

from icae_jax.cli import flags
from icae_jax.errors import UserError

HELP = "serve answers from memories over HTTP, with OpenAI's interface and a page"
NEEDED = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client")


def run(argv: list[str]) -> int:
    """Runs the verb. Returns the exit code 0; UserError on bad input."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is not installed; pip install 'icae_jax[serve]'")
    from icae_jax.server.options import Options

    args = _parser(Options).parse_args(argv)
    args.cors = tuple(args.cors or ())
    options = Options(**vars(args))

    from icae_jax.server import serve

    return serve.serve(options)


def _parser(options: type) -> argparse.ArgumentParser:
    """options: the dataclass whose fields the flags are, and which has their defaults."""
    parser = flags.parser("serve", HELP)
    add = parser.add_argument
    shown = "(default: %(default)s)"
    add(
        "--adapter",
        help="adapter (folder, workdir, checkpoint, hub id or gs://…); by default the one that the "
        "store names",
    )
    flags.base_flags(parser)
    flags.mesh_flag(parser)
    add("--store", help="folder of documents; made if it is not there")
    add("--read_only", action="store_true", help="only read the store, which others may fill")
    add("--model_name", help="what requests call the model (default: base and method)")

    add = parser.add_argument_group("address and safety").add_argument
    add("--host", help=f"address to listen on; a public one needs tokens {shown}")
    add("--port", type=int, help=f"0 takes a free one {shown}")
    help_text = "a file with a bearer token on each line; tokens may also be in the environment, "
    add("--token_file", metavar="FILE", help=help_text + "ICAE_SERVE_TOKENS")
    help_text = (
        "origin whose pages may ask, such as https://example.org; may be given several times"
    )
    add("--cors", action="append", metavar="ORIGIN", help=help_text)
    help_text = "file for a line of JSON a request, without texts; none for none (default: stderr)"
    add("--access_log", metavar="FILE", help=help_text)

    add = parser.add_argument_group("limits").add_argument
    add("--rows", type=int, help=f"requests that decode at once {shown}")
    add("--queue", type=int, help=f"requests that may wait; more are told 429 {shown}")
    add("--timeout", type=float, metavar="SECONDS", help=f"that a request may take {shown}")
    add("--max_body_mib", type=float, metavar="MIB", help=f"of a request {shown}")
    help_text = "of a text (default: what the base has positions for)"
    add("--max_context_tokens", type=int, metavar="N", help=help_text)
    help_text = f"of an answer where the request does not say {shown}"
    add("--max_new_tokens", type=int, metavar="N", help=help_text)
    add("--cache_mib", type=int, metavar="MIB", help=f"of memories kept for the next use {shown}")
    help_text = f"that running requests may take to end after SIGTERM {shown}"
    add("--grace", type=float, metavar="SECONDS", help=help_text)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    parser.set_defaults(**defaults | {"cors": None})  # argparse appends to it
    return parser
