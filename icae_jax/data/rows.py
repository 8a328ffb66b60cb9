"""Texts with their questions, and which of them can be used.

A row whose text, question or answer is empty is left out and counted, or is an error where the user
asks for one. `data.forms` makes rows of what files hold.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Sized

from icae_jax.errors import UserError, counted
from icae_jax.interop.hub.text import check_encodable


class Row(typing.NamedTuple):
    """One text, perhaps with one question about it and all the question's reference answers.

    Attributes:
      text: the text.
      question: None for a text alone.
      answers: None without a question, () for a question that cannot be used.
      where: file and line, or set and row, for messages.
      id: the row's own id, else its number; prefixed by the file's name if a source has several.
      subset: the row's own subset, or "".
      own_id: whether the data gives the id.
    """

    text: str
    question: str | None
    answers: tuple[str, ...] | None
    where: str
    id: str
    subset: str = ""
    own_id: bool = False

    @property
    def answer(self) -> str | None:
        """The first reference answer, which training uses; None without one."""
        return self.answers[0] if self.answers else None


@contextlib.contextmanager
def placed(where: str) -> Iterator[None]:
    """Prefixes the message of a `UserError` with the place of the row."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


EMPTY_TEXT = "empty texts"
EMPTY_QUESTION = "empty questions"
NO_ANSWER = "questions without an answer"
TEXT_WITHOUT_TOKENS = "texts without tokens"
QUESTION_WITHOUT_TOKENS = "questions without tokens"
ANSWER_WITHOUT_TOKENS = "answers without tokens"
_SINGULAR = {
    EMPTY_TEXT: "the text is empty",
    EMPTY_QUESTION: "the question is empty",
    NO_ANSWER: "the question has no answer",
    TEXT_WITHOUT_TOKENS: "the text has no tokens",
    QUESTION_WITHOUT_TOKENS: "the question has no tokens",
    ANSWER_WITHOUT_TOKENS: "the answer has no tokens",
}


@dataclasses.dataclass(frozen=True)
class Sieve:
    """Decides which rows can be used, and counts the others.

    Attributes:
      strict: the flag or field by which the user asks for an error instead; "" if not set.
      no_answer: the answer given to unanswerable questions; "" leaves such questions out, while
        their texts stay.
      blank: whether white space alone counts as empty.
      questions: whether questions are wanted at all.
      left_out: `{reason: (count, place of the first)}`.
    """

    strict: str = ""
    no_answer: str = ""
    blank: bool = True
    questions: bool = True
    left_out: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)

    def fresh(self) -> "Sieve":
        """The same sieve before it counted anything."""
        return dataclasses.replace(self, left_out={})

    def count(self, reason: str, where: str, count: int = 1) -> None:
        """Counts what is left out. UserError if the user asked for one."""
        if self.strict:
            place = f"{where}: " if where else ""
            raise UserError(
                f"{place}{_SINGULAR[reason]}; mend or remove it, or leave such rows out, without "
                f"{self.strict}"
            )
        before, first = self.left_out.get(reason, (0, where))
        self.left_out[reason] = (before + count, first)

    def add(self, left_out: dict[str, typing.Any]) -> None:
        """Adds what another sieve left out."""
        for reason, (count, where) in left_out.items():
            self.count(reason, where, count)

    def _is_empty(self, text):
        return not (text.strip() if self.blank else text)

    def take(self, row: Row) -> Row | None:
        """The usable part of a row; None if its text is empty.

        The answers are () if the question cannot be used.
        """
        if self._is_empty(row.text):
            self.count(EMPTY_TEXT, row.where)
            return None
        if row.question is None or not self.questions:
            return row._replace(question=None, answers=None)
        answers = tuple(answer for answer in row.answers if not self._is_empty(answer))
        if not answers and self.no_answer:
            answers = (self.no_answer,)
        if self._is_empty(row.question):
            self.count(EMPTY_QUESTION, row.where)
            answers = ()
        elif not answers:
            self.count(NO_ANSWER, row.where)
        return row._replace(answers=answers)

    @property
    def counts(self) -> dict[str, int]:
        """`{reason and place of the first: count}`."""
        return {
            f"{reason} (the first: {where})": count
            for reason, (count, where) in self.left_out.items()
        }

    def __str__(self) -> str:
        return "; ".join(counted(count, reason) for reason, count in self.counts.items())

    def check_some(self, rows: Sized | int, what: str) -> None:
        """UserError if there are no rows (or a count of 0). what: the source as users name it."""
        if not rows:
            reason = f"all were left out: {self}" if self.left_out else "the data set is empty"
            raise UserError(f"{what}: no rows; {reason}")


def check_no_answer(text: str, flag: str) -> None:
    """UserError if the answer to unanswerable questions is blank; "" means that none is set.

    flag: the flag or field that sets it.
    """
    if text and not text.strip():
        raise UserError(
            f"{flag} is {text!r}; give words such as 'unanswerable', or nothing to leave such "
            "questions out"
        )
    check_encodable(text, flag)
