"""Text of tokens as they come: whole characters only, and nothing of a stop text."""

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no whole character
OVERLAP = 8  # tokens that are decoded again, since a token's text may depend on those before it


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens."""
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(ids, **how)


class TextStream:
    """The text of a growing list of ids.

    Bytes of a character that is not complete are kept until it is; so is what may become a stop
    text. The pieces that are handed out, joined, are the text of all ids, up to a stop text.

    Attributes:
      text: all that was handed out.
      stopped_by: the stop text that ended it, "" if none did.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.text, self.stopped_by = "", ""
        self._ids: list[int] = []
        self._first, self._next = 0, 0  # ids from `_first` on are decoded; up to `_next` are out
        self._held = ""  # decoded, but perhaps the beginning of a stop text

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """Takes more ids; returns the text that is now certain. last: whether no more come."""
        if self.stopped_by:
            return ""
        self._ids += ids
        before = decoded(self.tokenizer, self._ids[self._first : self._next])
        now = decoded(self.tokenizer, self._ids[self._first :])
        if last or not now.endswith(INCOMPLETE):
            self._held += now[len(before) :]
            self._next = len(self._ids)
            self._first = max(self._first, self._next - OVERLAP)
            self._first = self._whole(self._first)
        piece = self._certain(last)
        self.text += piece
        return piece

    def _whole(self, first):
        """The last start up to `first` from which ids decode to whole characters."""
        while first and decoded(self.tokenizer, self._ids[first : self._next]).startswith(
            INCOMPLETE
        ):
            first -= 1
        return first

    def _certain(self, last):
        """Takes of what is held all that cannot belong to a stop text."""
        found = [(self._held.find(stop), stop) for stop in self.stops if stop in self._held]
        if found:
            at, self.stopped_by = min(found)
            piece, self._held = self._held[:at], ""
            return piece
        keep = 0
        if not last:
            keep = max(
                (
                    n
                    for stop in self.stops
                    for n in range(1, len(stop))
                    if self._held.endswith(stop[:n])
                ),
                default=0,
            )
        end = len(self._held) - keep
        piece, self._held = self._held[:end], self._held[end:]
        return piece
