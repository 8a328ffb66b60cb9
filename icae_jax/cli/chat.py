"""`icae chat`: a conversation over documents, in a terminal or through pipes."""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from icae_jax.cli import flags
from icae_jax.errors import UserError

if TYPE_CHECKING:
    from icae_jax.workflows.chat import Chat
    from icae_jax.workflows.chat_commands import Session
else:
    Chat = Session = object  # importing them imports JAX, which takes seconds

HELP = "chat about documents: files, or those of a store"
PROMPT = "> "
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# Control characters of a text could move the cursor, or change the terminal's settings.
_UNSEEN = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}


def _parser() -> argparse.ArgumentParser:
    parser = flags.parser("chat", HELP)
    add = parser.add_argument
    help_text = "documents: text, JSON, tables, a folder or glob of them; compressed once"
    add("files", nargs="*", metavar="FILE", help=help_text)
    help_text = "adapter folder, workdir, checkpoint, hub id or gs://…; by default the one that "
    help_text += "the store names"
    add("--adapter", help=help_text)
    flags.base_flags(parser)
    flags.mesh_flag(parser)
    add("--store", help="folder of a store that `icae compress` filled")
    help_text = "a document of the store; may be given several times: they are read together"
    add("--id", action="append", default=[], help=help_text)
    help_text = "context tokens per memory token of files and older turns; the nearest is taken"
    add("--ratio", type=float, help=help_text)
    add("--max_new_tokens", type=int, help="most tokens of an answer (default: 128)")
    help_text = "compress older turns when all have more tokens than this (default: when the "
    help_text += "base's positions are full)"
    add("--history_tokens", type=int, help=help_text)
    help_text = "file that keeps what was typed for the arrow keys, over sessions; by default none"
    add("--history_file", help=help_text)
    flags.sampling_flags(parser)
    flags.json_flag(parser, "print one JSON object for each line that was typed")
    return parser


def run(argv: list[str]) -> int:
    """Runs the verb. Returns 0, or 2 where a line that did not come from a terminal failed.

    UserError on bad input before the chat begins.
    """
    args = _parser().parse_args(argv)
    args.sampling = flags.sampling(args)
    if not args.adapter and not args.store:
        raise UserError("give --adapter, what compresses and reads, or --store, which names one")
    if args.id and not args.store:
        raise UserError(f"--id {args.id[0]} names a document of a store; give --store")
    with contextlib.ExitStack() as stack:
        return _converse(_session(args, stack), args)


def _session(args: argparse.Namespace, stack: contextlib.ExitStack) -> Session:
    """What answers. Files and ids are looked up before anything is loaded."""
    from icae_jax.inference import loading, store
    from icae_jax.workflows.chat import Chat
    from icae_jax.workflows.chat_commands import Session
    from icae_jax.workflows.chat_documents import read_files

    texts, opened = read_files(args.files), None
    how: dict[str, Any] = {"dtype": args.base_dtype, "mesh": flags.mesh(args.mesh)}
    if args.store:
        with store.open_store(args.store) as looked:
            looked.get(args.id)
        compressor, opened = loading.load_with_store(args.store, args.adapter, args.base, **how)
        stack.enter_context(opened)
    else:
        compressor = loading.load(args.adapter, args.base, **how)
    names = ("ratio", "max_new_tokens", "history_tokens", "sampling")
    options = {name: getattr(args, name) for name in names}
    return Session(Chat(compressor, texts, store=opened, ids=args.id, **options))


def _converse(session: Session, args: argparse.Namespace) -> int:
    """Answers line by line until the input ends. Returns the exit code."""
    typed, seen = sys.stdin.isatty(), sys.stdout.isatty() and not args.json
    if seen:
        for document in session.chat.documents:
            print(document)
        print(_dim("/help lists commands, Ctrl-C ends an answer, Ctrl-D the chat"))
    failed = False
    for line in _typed_lines(args.history_file) if typed else _piped_lines():
        if not line.strip():
            continue
        with _interruptible(session.chat):
            failed |= not _answer(session, line.rstrip("\n"), args.json, seen)
        if session.ended:
            break
    return flags.BAD_INPUT if failed and not typed else 0


def _answer(session: Session, line: str, as_json: bool, seen: bool) -> bool:
    """Prints what a line is answered with, as it comes. Returns whether it could be done."""
    chat, text = session.chat, ""
    command = line.startswith("/")
    result: dict[str, Any] = {"command" if command else "question": line.strip()}
    try:
        for piece in session.answer(line):
            text += piece
            if not as_json:
                print(piece.translate(_UNSEEN) if seen else piece, end="", flush=True)
    except UserError as error:
        if as_json:
            flags.print_result(result | {"error": str(error)}, True, "")
        elif text:
            print()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return False
    if as_json:
        result |= {"text": text} if command else _details(chat, text)
        flags.print_result(result, True, "")
    elif text or not command:
        print(flush=True)
    if seen and chat.stopped:
        print(_dim("[interrupted]"))
    if seen and not command:
        print(_dim(str(chat.status)), flush=True)
    return True


def _details(chat: Chat, text: str) -> dict[str, Any]:
    """What `--json` prints of an answer."""
    last = chat.last
    details = {"answer": text, "documents": [document.id for document in chat.documents]}
    if last is not None:  # None where it was ended before its first token
        details |= {"mean_log_prob": last.mean_log_prob, "stopped": last.stopped}
    return details | {"status": dataclasses.asdict(chat.status)}


def _dim(text: str) -> str:
    return text if os.environ.get("NO_COLOR") else f"{DIM}{text}{PLAIN}"


# ----------------------------------------------------------------------------------------- input


def _piped_lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error}") from error


def _typed_lines(history_file: str | None) -> Iterator[str]:
    """Lines that are typed, with editing and what was typed before on the arrow keys.

    Ctrl-C drops a line, Ctrl-D ends.
    """
    with _history(history_file):
        while True:
            try:
                # Where the output goes elsewhere, a prompt would be part of it.
                yield input(PROMPT if sys.stdout.isatty() else "")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()


@contextlib.contextmanager
def _history(path: str | None) -> Iterator[None]:
    try:
        import readline
    except ImportError:  # not on every system; lines are typed without it
        yield
        return
    if path is None:
        yield
        return
    try:
        if pathlib.Path(path).exists():
            readline.read_history_file(path)
        yield
        readline.write_history_file(path)
    except OSError as error:
        raise UserError(f"--history_file {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _interruptible(chat: Chat) -> Iterator[None]:
    """Within it Ctrl-C ends the text that comes, and nothing else.

    Not by an exception, which could leave the decoder's cache half updated.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: chat.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
