"""The objects of a JSON file: one a line, or arrays and objects over as many lines as they take. No more than one row is held at a time."""

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterator

from icae_jax.data import reading
from icae_jax.errors import UserError

LITERAL = 10  # characters of the longest word of JSON, and of an escape, that a piece of text may end within


def _object(pairs):
    """A JSON object. UserError where a field stands in it twice, with two values: readers take the last, or the first."""
    made = dict(pairs)
    if len(made) < len(pairs):
        for name, value in pairs:
            if value != made[name] and value == value:
                raise UserError(
                    f"field {name!r} stands in one object twice, with two values; remove one"
                )
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_BLANKS = re.compile(r"[ \t\r\n]*")


def decode_line(line: bytes) -> object:
    """The JSON value of a line. UserError says what is wrong with it."""
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error})") from error


def first_line(file: io.BufferedReader, most: int) -> object:
    """The JSON value of a file's first line that is not blank, None where it is none by itself."""
    _skip_blank_lines(file)
    try:
        return decode_line(file.readline(most + 1))
    except UserError:
        return None


def seems_lines(text: str) -> bool:
    """Whether a text's first line is a JSON object."""
    first = text.lstrip()[:1] == "{" and text.lstrip().split("\n", 1)[0]
    try:
        return bool(first) and isinstance(_DECODER.decode(first), dict)
    except (ValueError, RecursionError):
        return False


def read(file: io.BufferedReader, path: str, most: int) -> Iterator[tuple[object, int, int]]:
    """Yields (value, its line, its number): in JSON lines the line's, counted from 0, else the value's. UserError names file and line.

    file: as `reading.open_text` gives it. most: bytes of a row at most.
    """
    before = _skip_blank_lines(file)
    if file.peek(1)[:1] == b"[":
        yield from _values(_Text(file, path, most, before + 1))
        return
    for number, line in reading.numbered_lines(file, path, most, before + 1):
        if line.isspace():
            continue
        try:
            value = decode_line(line)
        except UserError as error:
            if not line.decode("utf-8", "replace").strip():  # blanks that are none to bytes
                continue
            if number > before + 1 or not isinstance(error.__cause__, json.JSONDecodeError):
                raise UserError(f"{path}:{number}: {error}") from error
            yield from _from_first_line(file, path, most, line, number, error)
            return
        yield value, number, number - 1


def _skip_blank_lines(file):
    """Reads up to the first character; returns the number of lines before its own."""
    lines = 0
    while start := file.peek(1):
        blank = len(start) - len(start.lstrip())
        lines += file.read(blank).count(b"\n")
        if blank < len(start):
            break
    return lines


def _from_first_line(file, path, most, line, number, error):
    """Reads on where the first line is no row by itself: an object over several lines, or a row that is malformed."""
    values = _values(_Text(file, path, most, number, line))
    try:
        first = next(values)
    except UserError as other:
        here = f"{path}:{number}: "
        also = (
            ""
            if str(other).startswith(here)
            else f"; nor is there an object over several lines: {other}"
        )
        raise UserError(f"{here}{error}{also}") from other
    yield first
    yield from values


class _Text:
    """The text of a file, read piece by piece: the part from `at` on is `buffer[at:]`, and `line` is that of its first character."""

    def __init__(self, file, path, most, line, start=b""):
        self._file, self.path, self.most, self.line = file, path, most, line
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.buffer, self.at, self.ended = "", 0, False
        self._append(start)

    def _append(self, block, final=False):
        try:
            self.buffer = self.buffer[self.at :] + self._decoder.decode(block, final)
        except UnicodeDecodeError as error:
            line = (
                self.line
                + self.buffer.count("\n", self.at)
                + error.object[: error.start].count(b"\n")
            )
            raise UserError(f"{self.path}:{line}: not UTF-8 ({error}); save it as UTF-8") from error
        self.at = 0

    def more(self):
        """Reads on, as much as there is already. UserError where a row is longer than it may be."""
        held = len(self.buffer) - self.at
        reading.check_size(held, f"{self.path}:{self.line}", self.most)
        block = self._file.read(max(reading.CHUNK, held))
        self.ended = not block
        self._append(block, self.ended)

    def next(self):
        """The next character but blanks, "" at the end."""
        while True:
            self._advance(_BLANKS.match(self.buffer, self.at).end())
            if self.at < len(self.buffer) or self.ended:
                return self.buffer[self.at : self.at + 1]
            self.more()

    def _advance(self, to):
        self.line += self.buffer.count("\n", self.at, to)
        self.at = to

    def skip(self):
        self._advance(self.at + 1)

    def value(self):
        """The JSON value that begins here, and its line."""
        while True:
            line = self.line
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut = (
                    error.msg.startswith("Unterminated string")
                    or error.pos >= len(self.buffer) - LITERAL
                )
                if self.ended or not cut:
                    wrong = self.line + self.buffer.count("\n", self.at, error.pos)
                    raise UserError(f"{self.path}:{wrong}: not valid JSON ({error.msg})") from error
            except UserError as error:
                raise UserError(f"{self.path}:{line}: {error}") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.path}:{line}: not valid JSON ({error})") from error
            else:
                cut = end == len(self.buffer) and not isinstance(
                    value, dict | list | str
                )  # such as 12 of 123
                if self.ended or not cut:
                    reading.check_size(end - self.at, f"{self.path}:{line}", self.most)
                    self._advance(end)
                    return value, line
            self.more()


def _values(text):
    """Values one after another, the items of arrays each by itself."""
    numbers = itertools.count()
    while (character := text.next()) != "":
        if character != "[":
            value, line = text.value()
            yield value, line, next(numbers)
            continue
        text.skip()
        if text.next() == "]":
            text.skip()
            continue
        while True:
            value, line = text.value()
            yield value, line, next(numbers)
            character = text.next()
            if character not in (",", "]"):
                what = (
                    f"{character!r}, expected , or ]"
                    if character
                    else "the file ends within an array"
                )
                raise UserError(f"{text.path}:{text.line}: not valid JSON ({what})")
            text.skip()
            if character == "]":
                break
            text.next()
