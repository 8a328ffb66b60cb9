"""The values of a JSON file: one a line, or arrays and objects over any number of lines.

No more than one row is in memory at a time.
"""

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterator

from icae_jax.data import reading
from icae_jax.data.unpacking import CHUNK
from icae_jax.errors import UserError

LITERAL = 10  # characters that the longest JSON word or escape takes; a block may end within one


def _object(pairs):
    """A JSON object. UserError if a field has two values: which one counts depends on readers."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        for name, value in pairs:
            if value != fields[name] and value == value:
                raise UserError(
                    f"field {name!r} stands in one object twice, with two values; remove one"
                )
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_BLANKS = re.compile(r"[ \t\r\n]*")


def decode_line(line: bytes) -> object:
    """The JSON value of a line. UserError if it has none, says why."""
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error})") from error


def first_line(file: io.BufferedReader, most: int) -> object:
    """The JSON value of a file's first line that is not blank, None if the line is not a value."""
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


def values(file: io.BufferedReader, path: str, most: int) -> Iterator[tuple[object, int, int]]:
    """Yields (value, its line, its number) of a JSON file.

    The number counts lines of JSON lines, else values, from 0. The file is as from
    `reading.open_text`. UserError if it is not valid JSON or a row is longer than `most` bytes; the
    message names file and line.
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
            # bytes.isspace knows ASCII blanks only
            if not line.decode("utf-8", "replace").strip():
                continue
            if number > before + 1 or not isinstance(error.__cause__, json.JSONDecodeError):
                raise UserError(f"{path}:{number}: {error}") from error
            yield from _from_first_line(file, path, most, line, number, error)
            return
        yield value, number, number - 1


def _skip_blank_lines(file):
    """Skips blanks, returns how many lines they end."""
    lines = 0
    while start := file.peek(1):
        blank = len(start) - len(start.lstrip())
        lines += file.read(blank).count(b"\n")
        if blank < len(start):
            break
    return lines


def _from_first_line(file, path, most, line, number, error):
    """Reads on if the first line is not a value: an object over several lines, or an error."""
    rest = _values(_Text(file, path, most, number, line))
    try:
        first = next(rest)
    except UserError as other:
        here = f"{path}:{number}: "
        also = f"; nor is there an object over several lines: {other}"
        if str(other).startswith(here):
            also = ""
        raise UserError(f"{here}{error}{also}") from other
    yield first
    yield from rest


class _Text:
    """The text of a file, read in blocks.

    What is still to be parsed begins with `buffer[at:]`, whose first character is in line `line`.
    """

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
        """Reads another block, as long as the buffer, so that the buffer doubles.

        UserError if a row is longer than it may be.
        """
        held = len(self.buffer) - self.at
        reading.check_size(held, f"{self.path}:{self.line}", self.most)
        block = self._file.read(max(CHUNK, held))
        self.ended = not block
        self._append(block, self.ended)

    def next(self):
        """The next character that is not blank, "" at the end."""
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
        """The JSON value that begins at `at`, and its line."""
        while True:
            line = self.line
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                near_end = error.pos >= len(self.buffer) - LITERAL
                cut = near_end or error.msg.startswith("Unterminated string")
                if self.ended or not cut:
                    wrong = self.line + self.buffer.count("\n", self.at, error.pos)
                    raise UserError(f"{self.path}:{wrong}: not valid JSON ({error.msg})") from error
            except UserError as error:
                raise UserError(f"{self.path}:{line}: {error}") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.path}:{line}: not valid JSON ({error})") from error
            else:
                has_end = isinstance(value, dict | list | str)
                cut = end == len(self.buffer) and not has_end  # such as 12 of 123
                if self.ended or not cut:
                    reading.check_size(end - self.at, f"{self.path}:{line}", self.most)
                    self._advance(end)
                    return value, line
            self.more()


def _values(text):
    """Yields (value, its line, its number) of values in a row; the items of arrays one by one."""
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
                what = "the file ends within an array"
                if character:
                    what = f"{character!r}, expected , or ]"
                raise UserError(f"{text.path}:{text.line}: not valid JSON ({what})")
            text.skip()
            if character == "]":
                break
            text.next()
