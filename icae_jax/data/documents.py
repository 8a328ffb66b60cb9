"""Documents of a source, one by one: texts with ids and metadata, in bounded memory.

What is remembered of those that were read, to find repeated ids, is on disk.
"""

import hashlib
import itertools
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from icae_jax import errors
from icae_jax.data import sources
from icae_jax.data.rows import Row, Sieve

METADATA = "metadata"  # the field of a row that holds an object of the user's own
_CACHE_KIB = 16384  # of what is remembered, in memory


class Document(NamedTuple):
    """One text to be stored.

    Attributes:
        id: the row's own, else its number; prefixed by the file's name if a source has several.
        text: the text.
        where: file and line, for messages.
        metadata: the user's, as the row has it, not checked; None if it says nothing.
    """

    id: str
    text: str
    where: str
    metadata: object


class Documents:
    """The documents of a source, in order; to be iterated once.

    As `sources.with_ids` names them, without holding them: all rows with an id of their own are
    documents, repeated ones once; of rows without, such as a context with many questions, each text
    is one document, unless an earlier row had it.

    Args:
        source: what is read.
        fields: the fields of a row that are its metadata; by default what the row's field
            `metadata` holds.
        sieve: decides which rows can be used, and counts the others.
        refuse: told (document, why) of one that cannot be: its id is an earlier one's.

    Attributes:
        sieve: after iterating, with its counts.
    """

    def __init__(
        self,
        source: str,
        fields: Sequence[str] = (),
        sieve: Sieve | None = None,
        refuse: Callable[[Document, str], None] = lambda document, why: None,
    ):
        self.source, self.fields, self.refuse = source, tuple(fields), refuse
        self.sieve = Sieve(questions=False) if sieve is None else sieve
        # A file without a name, which goes when it is closed; beyond the cache it is on disk.
        self._seen = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for pragma in (f"cache_size=-{_CACHE_KIB}", "journal_mode=OFF", "synchronous=OFF"):
            self._seen.execute(f"PRAGMA {pragma}").fetchall()
        self._seen.execute(
            "CREATE TABLE seen (key BLOB PRIMARY KEY, text BLOB, place TEXT) WITHOUT ROWID"
        )

    def __iter__(self) -> Iterator[Document]:
        for row, raw in self._rows():
            text = _digest("text", row.text)
            document = Document(row.id, row.text, row.where, self._metadata(raw))
            if row.own_id:
                before = self._look_up(_digest("id", row.id))
                if before is None:
                    self._note(text, text, row.where)
                elif before[0] == text:
                    continue
                else:
                    self.refuse(document, f"its id is that of another text too ({before[1]})")
                    continue
            else:
                if self._look_up(text) is not None:
                    continue
                self._note(text, text, row.where)
                document = document._replace(id=self._free(row.id))
            self._note(_digest("id", document.id), text, row.where)
            yield document

    def __contains__(self, document_id: str) -> bool:
        """Whether a document of that id was read."""
        return self._look_up(_digest("id", document_id)) is not None

    def leave_out(self, document_id: str) -> None:
        """Counts a document as not read: nothing can be made of it."""
        self._seen.execute("DELETE FROM seen WHERE key = ?", (_digest("id", document_id),))

    def _rows(self) -> Iterator[tuple[Row, object]]:
        """The rows of the source. After a transient fault it is read again, up to where it was."""
        done, end = 0, object()
        wanted = self.fields or (METADATA,)
        fresh = self.sieve.fresh()
        rows = sources.read_with_raw(self.source, sieve=fresh, fields=wanted)

        def step():
            nonlocal rows, fresh
            try:
                return next(rows, end)
            except BaseException:
                fresh = self.sieve.fresh()
                again = sources.read_with_raw(self.source, sieve=fresh, fields=wanted)
                rows = itertools.islice(again, done, None)
                raise

        while (item := errors.retrying(step, f"reading {self.source}")) is not end:
            done += 1
            yield item
        self.sieve.add(fresh.left_out)

    def _metadata(self, raw):
        if not isinstance(raw, dict):
            return None
        if self.fields:
            return {name: raw[name] for name in self.fields if name in raw}
        return raw.get(METADATA)

    def _look_up(self, key):
        query = "SELECT text, place FROM seen WHERE key = ?"
        return self._seen.execute(query, (key,)).fetchone()

    def _note(self, key, text, place):
        self._seen.execute("INSERT OR REPLACE INTO seen VALUES (?, ?, ?)", (key, text, place))

    def _free(self, name):
        """The first of `name`, `name#2`, … that is no document's id yet."""
        names = itertools.chain([name], (f"{name}#{i}" for i in itertools.count(2)))
        return next(name for name in names if name not in self)

    def close(self) -> None:
        """Forgets what was read."""
        self._seen.close()


def _digest(kind, text):
    return hashlib.blake2b(text.encode(), digest_size=16, person=kind.encode()).digest()
