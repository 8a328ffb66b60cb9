"""What is typed into a chat: questions, and commands that begin with a slash."""

import itertools
import os
from collections.abc import Iterator

from icae_jax import files
from icae_jax.errors import UserError, shown
from icae_jax.workflows import chat_documents
from icae_jax.workflows.chat import Chat
from icae_jax.workflows.chat_documents import one_line

COMMANDS = {
    "/docs": "the documents that are read: tokens, memory tokens, ratio, bytes",
    "/docs PREFIX": "documents of the store whose ids begin so",
    "/add ID|FILE": "read a document of the store, or compress a file and read it",
    "/drop ID": "no longer read a document",
    "/restore [ID]": "the text of a document, or of all, read back from memory",
    "/ratio [R]": "known ratios; compress texts and older turns again at the nearest to R",
    "/history": "the turns, and which of them are in memory",
    "/clear": "forget all turns",
    "/save FILE": "write all turns into a new text file",
    "/help": "this list",
    "/quit": "end",
}
LISTED = 20  # entries of a store that `/docs PREFIX` shows
SHOWN = 70  # characters of a question or answer that `/history` shows


class Session:
    """Takes what is typed, line by line; yields the text to print.

    Attributes:
      chat: what answers.
      ended: whether `/quit` was typed.
    """

    def __init__(self, chat: Chat):
        self.chat, self.ended = chat, False

    def answer(self, line: str) -> Iterator[str]:
        """The answer to a question, or what a command says, as it comes; no newline at its end.

        A line that begins with a slash is a command; with a blank before it, a question. UserError,
        and the chat is as before, if it cannot be done.
        """
        self.chat.stopped = False
        if not line.startswith("/"):
            return self.chat.ask(line.strip())
        name, _, argument = line.strip().partition(" ")
        run = {
            "/docs": self._docs,
            "/add": self._add,
            "/drop": self._drop,
            "/restore": self._restore,
            "/ratio": self._ratio,
            "/history": self._history,
            "/clear": self._clear,
            "/save": self._save,
            "/help": self._help,
            "/quit": self._quit,
        }.get(name)
        if run is None:
            raise UserError(f"{shown(name)} is no command; /help lists them")
        return run(argument.strip())

    # Commands take what follows their name, and yield text.

    def _help(self, argument):
        width = max(map(len, COMMANDS))
        yield "\n".join(f"{name:{width}}  {text}" for name, text in COMMANDS.items())

    def _quit(self, argument):
        self.ended = True
        yield from ()

    def _docs(self, prefix):
        if not prefix:
            yield "\n".join(map(str, self.chat.documents)) or "no documents; /add reads one"
            return
        if self.chat.store is None:
            raise UserError(f"/docs {prefix}: no store is open; start with --store")
        found = list(itertools.islice(self.chat.store.find(prefix=prefix), LISTED + 1))
        lines = [
            f"{one_line(entry.id)}: {entry.tokens:,} tokens in {entry.memory_tokens:,} memory "
            f"tokens ({entry.ratio:.1f}x), {entry.bytes:,} bytes"
            for entry in found[:LISTED]
        ]
        if len(found) > LISTED:
            lines.append("… and more; a longer beginning finds fewer")
        yield "\n".join(lines) or f"the store has no document whose id begins with {shown(prefix)}"

    def _add(self, name):
        chat, before = self.chat, self.chat.k
        _needed("/add", name, "a document of the store or a file")
        if chat.store is not None and name in chat.store:
            added = chat.add(ids=[name])
        elif chat.store is not None and not os.path.exists(name):
            raise UserError(
                f"/add {name}: no document of the store, and no file; /docs PREFIX finds ids"
            )
        else:
            added = chat.add(chat_documents.read_files([name], "/add"))
        yield "\n".join(map(str, added))
        if chat.k != before:
            yield f"\ntexts have {chat.k} memory tokens per segment now, as the store's documents"

    def _drop(self, document_id):
        _needed("/drop", document_id, "a document")
        self.chat.drop(document_id)
        yield f"{one_line(document_id)} is no longer read"

    def _restore(self, document_id):
        chat = self.chat
        ids = [document_id] if document_id else [document.id for document in chat.documents]
        if not ids:
            raise UserError("/restore: no document is read; /add reads one")
        for i, text_id in enumerate(ids):
            if len(ids) > 1:
                yield f"{'' if not i else chr(10)}{one_line(text_id)}: "
            yield from chat.restore(text_id)
            if chat.stopped:
                return

    def _ratio(self, argument):
        chat = self.chat
        if not argument:
            known = chat_documents.known_ratios(chat.compressor)
            now = chat.compressor.config.segment_tokens / chat.k
            yield f"now {now:.1f}x ({chat.k} memory tokens per segment); known: {known}"
            return
        try:
            ratio = float(argument)
        except ValueError as error:
            raise UserError(f"/ratio {argument}: give a number, such as /ratio 4") from error
        chat.set_ratio(ratio)
        lines = [str(document) for document in chat.documents]
        if any(document.entry is not None for document in chat.documents):
            lines.append("documents of the store keep the ratio that they were stored with")
        elif not lines:
            now = chat.compressor.config.segment_tokens / chat.k
            lines.append(f"{now:.1f}x for what is compressed from now on")
        yield "\n".join(lines)

    def _history(self, argument):
        forgotten, compressed = self.chat.split
        lines = []
        for i, turn in enumerate(self.chat.turns):
            where = "forgotten" if i < forgotten else "memory" if i < compressed else "full"
            lines.append(f"{i + 1} {where:9} {_short(turn.question)} → {_short(turn.answer)}")
        yield "\n".join(lines) or "no turns yet"

    def _clear(self, argument):
        self.chat.clear()
        yield "all turns are forgotten"

    def _save(self, path):
        _needed("/save", path, "a file")
        if os.path.lexists(path):
            raise UserError(f"/save {path}: it is there already; give a new file")
        text = "".join(f"> {turn.question}\n{turn.answer}\n\n" for turn in self.chat.turns)
        try:
            files.write_text(path, text)
        except OSError as error:
            raise UserError(
                f"/save {path}: {error.strerror or error}; give another file"
            ) from error
        yield f"{len(self.chat.turns)} turns in {path}"


def _needed(command, argument, what):
    if not argument:
        raise UserError(f"{command} needs {what}; /help lists what each command takes")


def _short(text):
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"
