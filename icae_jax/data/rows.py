"""From one raw row of a file or a set to texts with questions: the forms that are read, and what of them cannot be used.

A raw row is a dictionary, as JSON has it. A row of another form is an error; one whose text, question or answer is empty is left out,
and counted.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Iterable, Iterator

from icae_jax.errors import UserError, shown
from icae_jax.interop.hub.text import check_encodable

EXPECTED = (
    "expected text, or context, question and answers, or input, prompt and answer (README.md, Data, lists the other forms; a table's "
    "first line names its columns)"
)
QUESTION_FORMS = (  # the fields of the text, of the question and of its answer
    ("input", "prompt", "answer"),  # PwC
    ("input", "instruction", "output"),  # Alpaca
    ("context", "instruction", "response"),  # Dolly
)
CONTEXTS = ("context", "passage", "document")  # names of the text that `question` is about
TEXTS = ("document", "content", "context", "passage")  # of a text alone, where it is the only one
IMPOSSIBLE = {
    "true": True,
    "1": True,
    "yes": True,
    "false": False,
    "0": False,
    "no": False,
    "": False,
}  # is_impossible, as tables write it
MOST_NAMES = 20  # in an error
CHATS = ("messages", "conversations")
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
# Every field that is read, of tables whose other columns need not be.
FIELDS = frozenset(
    {
        "text",
        "id",
        "subset",
        "question",
        "answer",
        "answers",
        "is_impossible",
        "qas",
        "paragraphs",
        "data",
        "system",
    }
    | {name for form in QUESTION_FORMS for name in form}
    | {*CONTEXTS, *TEXTS, *CHATS}
)


class Row(typing.NamedTuple):
    """One text, perhaps with one question on it and all its reference answers.

    answers: None without a question, () for a question that cannot be used. where: file and line (or set and row), for errors. id: the
    row's own, or its number, behind the file's name where a source holds several. subset: the row's own, or "". own_id: whether the data
    gives the id.
    """

    text: str
    question: str | None
    answers: tuple[str, ...] | None
    where: str
    id: str
    subset: str = ""
    own_id: bool = False

    @property
    def answer(self):
        """The first reference answer, which training uses; None without one."""
        return self.answers[0] if self.answers else None


@contextlib.contextmanager
def placed(where: str) -> Iterator[None]:
    """Puts the place of a raw row in front of what is said of it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


# ------------------------------------------------------------------------------------------------------------- left out

EMPTY_TEXT, EMPTY_QUESTION, NO_ANSWER = (
    "empty texts",
    "empty questions",
    "questions without an answer",
)
TEXT_WITHOUT_TOKENS, QUESTION_WITHOUT_TOKENS, ANSWER_WITHOUT_TOKENS = (
    f"{w} without tokens" for w in ("texts", "questions", "answers")
)
_SINGLE = {
    EMPTY_TEXT: "the text is empty",
    EMPTY_QUESTION: "the question is empty",
    NO_ANSWER: "the question has no answer",
    TEXT_WITHOUT_TOKENS: "the text has no tokens",
    QUESTION_WITHOUT_TOKENS: "the question has no tokens",
    ANSWER_WITHOUT_TOKENS: "the answer has no tokens",
}


@dataclasses.dataclass(frozen=True)
class Sieve:
    """Which rows can be used; counts what cannot. left_out: `{reason: (how many, where the first stands)}`.

    strict: the flag or field by which the user asks for an error instead, "" where it is not set. no_answer: the answer of questions that
    have none, "" to leave such questions out; their texts stay. blank: whether white space alone counts as empty. questions: whether they
    are wanted at all.
    """

    strict: str = ""
    no_answer: str = ""
    blank: bool = True
    questions: bool = True
    left_out: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)

    def fresh(self) -> "Sieve":
        """The same that has counted nothing yet."""
        return dataclasses.replace(self, left_out={})

    def count(self, reason: str, where: str, count: int = 1) -> None:
        """Counts what is left out. UserError where the user asked for it."""
        if self.strict:
            place = f"{where}: " if where else ""
            raise UserError(
                f"{place}{_SINGLE[reason]}; mend or remove it, or leave such rows out, without {self.strict}"
            )
        before, first = self.left_out.get(reason, (0, where))
        self.left_out[reason] = (before + count, first)

    def add(self, left_out: dict[str, tuple[int, str]]) -> None:
        """Counts what another left out."""
        for reason, (count, where) in left_out.items():
            self.count(reason, where, count)

    def _empty(self, text):
        return not (text.strip() if self.blank else text)

    def take(self, row: Row) -> Row | None:
        """The row as far as it can be used, its answers () where its question cannot; None where its text is empty."""
        if self._empty(row.text):
            self.count(EMPTY_TEXT, row.where)
            return None
        if row.question is None or not self.questions:
            return row._replace(question=None, answers=None)
        answers = tuple(a for a in row.answers if not self._empty(a)) or (
            (self.no_answer,) if self.no_answer else ()
        )
        if self._empty(row.question):
            self.count(EMPTY_QUESTION, row.where)
            answers = ()
        elif not answers:
            self.count(NO_ANSWER, row.where)
        return row._replace(answers=answers)

    @property
    def counts(self) -> dict[str, int]:
        """`{reason, with the first place: how many}`."""
        return {
            f"{reason} (the first: {where})": count
            for reason, (count, where) in self.left_out.items()
        }

    def __str__(self) -> str:
        return "; ".join(f"{count} {reason}" for reason, count in self.counts.items())

    def check_some(self, rows: object, what: str) -> None:
        """UserError where no rows (or a count of none) are left, which says why. what: the source, as the user named it."""
        if not rows:
            raise UserError(
                f"{what}: no rows; {f'all were left out: {self}' if self.left_out else 'the data set is empty'}"
            )


def check_no_answer(text: str, flag: str) -> None:
    """UserError where the answer of questions that have none is no text. flag: what sets it; "" sets none."""
    if text and not text.strip():
        raise UserError(
            f"{flag} is {text!r}; give words such as 'unanswerable', or nothing to leave such questions out"
        )
    check_encodable(text, flag)


# ---------------------------------------------------------------------------------------------------------------- forms


def is_wrapper(raw: object) -> bool:
    """Whether a JSON value is no row, but holds rows as its `data`."""
    return (
        isinstance(raw, dict)
        and isinstance(raw.get("data"), list)
        and not raw.keys() & (FIELDS - {"data", "id"})
    )


def unwrapped(raw: object, where: str, number: str) -> Iterator[tuple[object, str, str]]:
    """Yields (raw row, its place, its number): the items of `{"data": […]}`, as SQuAD's files are, or else what is given."""
    if not is_wrapper(raw):
        yield raw, where, number
        return
    for i, item in enumerate(raw["data"]):
        yield item, f"{where}: item {i + 1}", f"{number}.{i}"


def parse(raw: object, where: str, default_id: str) -> list[Row]:
    """The `Row`s of one raw row: of most forms one, of SQuAD's and MRQA's paragraphs one a question. UserError names place and field."""
    with placed(where):
        return list(_parse(raw, where, default_id, ""))


def _parse(raw, where, default_id, subset):
    if not isinstance(raw, dict):
        raise UserError(
            f"a JSON {type(raw).__name__}, expected an object with text, or context, question and answers"
        )
    own, subset = name_of(raw, "id"), name_of(raw, "subset") or subset
    tail = (where, own or default_id, subset, bool(own))
    for text, question, answer in QUESTION_FORMS:
        if {text, question, answer} <= raw.keys():
            yield Row(text_of(raw, text), text_of(raw, question), (text_of(raw, answer),), *tail)
            return
    if "question" in raw and raw.keys() & {"answers", "answer", "is_impossible"}:
        about = "text" if "text" in raw and not raw.keys() & set(CONTEXTS) else _only(raw, CONTEXTS)
        yield Row(text_of(raw, about), text_of(raw, "question"), answers_of(raw), *tail)
    elif "text" in raw:  # whatever else it holds, such as the messages that it was made of
        yield Row(text_of(raw, "text"), None, None, *tail)
    elif "qas" in raw:
        yield from paragraph(raw, where, default_id, subset)
    elif isinstance(raw.get("paragraphs"), list):
        for number, item in enumerate(raw["paragraphs"]):
            with placed(f"paragraph {number + 1}"):
                yield from _parse(
                    item, f"{where}: paragraph {number + 1}", f"{default_id}.{number}", subset
                )
    elif chat := next((field for field in CHATS if field in raw), None):
        yield Row(*_chat(raw, chat), *tail)
    elif raw.keys() & set(TEXTS) and not raw.keys() & {"question", "answer", "answers"}:
        yield Row(text_of(raw, _only(raw, TEXTS)), None, None, *tail)
    elif raw.keys() != {"header"}:  # the first line of MRQA's files
        raise UserError(f"fields {listed(sorted(raw))}; {EXPECTED}")


def listed(names: Iterable[str]) -> str:
    """Names of fields or columns in one line, the first of them where there are many."""
    names = [" ".join(str(name).split())[:80] for name in names]
    return ", ".join(names[:MOST_NAMES] + ["…"] * (len(names) > MOST_NAMES)) or "none"


def _only(raw, names):
    """Which one of several names a row has."""
    present = [name for name in names if name in raw]
    if len(present) != 1:
        what = f"both {' and '.join(present)}" if present else "none"
        raise UserError(f"fields {listed(sorted(raw))}: {what} of {', '.join(names)}; {EXPECTED}")
    return present[0]


def _absent(value):
    return value is None or value != value  # NaN, which pandas writes for what is missing


def name_of(raw: dict, field: str) -> str:
    """An id or a subset, which may be a number; "" where there is none."""
    value = raw.get(field)
    name = "" if _absent(value) else str(value)
    check_encodable(name, field)
    return name


def text_of(raw: dict, field: str, name: str = "") -> str:
    """A text field, "" where it is null. UserError where it is none, or cannot be encoded. name: how to call it, by default the field."""
    value = raw.get(field)
    if _absent(value):
        return ""
    if not isinstance(value, str):
        numeric = "; write a number in quotes" if isinstance(value, int | float) else ""
        raise UserError(f"{name or field} is {type(value).__name__}, expected text{numeric}")
    check_encodable(value, name or field)
    return value


def answers_of(raw: dict) -> tuple[str, ...]:
    """The reference answers of a question, () where it has none: texts in a list, one text, or SQuAD's own forms.

    A question that is said to be impossible has none, whatever stands there, as SQuAD's readers have it.
    """
    if _is_impossible(raw):
        return ()
    field = "answer" if _absent(raw.get("answers")) and "answer" in raw else "answers"
    value = raw.get(field)
    answers = _answer_text(value)
    if _absent(answers):
        return ()
    answers = [answers] if isinstance(answers, str) else answers
    if isinstance(answers, list):
        answers = [a for a in map(_answer_text, answers) if not _absent(a)]
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise UserError(
            f"{field} is {shown(value)}, expected a list of texts, or a text (a number in quotes)"
        )
    for answer in answers:
        check_encodable(answer, field)
    return tuple(answers)


def _answer_text(answer):
    """What an object that is an answer, or several, has as its text, None where it is empty; anything else, such as an object of other
    fields, as it is."""
    return (
        answer.get("text")
        if isinstance(answer, dict) and ("text" in answer or not answer)
        else answer
    )


def _is_impossible(raw):
    value = raw.get("is_impossible")
    word = "" if _absent(value) else str(value).strip().lower().removesuffix(".0")
    if word not in IMPOSSIBLE:
        raise UserError(f"is_impossible is {str(value)[:80]!r}; expected true or false")
    return IMPOSSIBLE[word]


def paragraph(raw: dict, where: str, default_id: str, subset: str = "") -> Iterator[Row]:
    """Yields the rows of a paragraph of SQuAD, or of a line of MRQA: one text and its questions."""
    text, questions = text_of(raw, "context"), raw["qas"]
    if not isinstance(questions, list):
        raise UserError(f"qas is {shown(questions)}, expected a list of questions")
    for number, question in enumerate(questions):
        if not isinstance(question, dict):
            raise UserError(
                f"qas holds {shown(question)}, expected an object with question and answers"
            )
        if not question.keys() & {"answers", "answer", "is_impossible"}:
            raise UserError(
                f"answers is missing in a question of qas; its fields are {listed(question)}"
            )
        own = name_of(question, "id") if "qid" not in question else name_of(question, "qid")
        # The id is the question's: the text is one, whatever is asked of it.
        yield Row(
            text,
            text_of(question, "question"),
            answers_of(question),
            where,
            own or f"{default_id}.{number}",
            subset,
        )
    if not questions:
        yield Row(text, None, None, where, default_id, subset)


def _chat(raw, field):
    """(text, question, answers) of a chat: the last reply is the answer, the user's message before it the question, what came before the
    text. Without a reply the last message of the user has no answer; without a user there is a text alone.
    """
    messages = [] if _absent(raw[field]) else raw[field]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError(
            f"{field} is {shown(messages)}, expected a list of messages with role and content"
        )
    system = text_of(raw, "system")
    turns = [("system", system)] if system else []
    turns += [(_role(m, field), _content(m, field)) for m in messages]
    roles = [role for role, _ in turns]
    asked = [i for i, role in enumerate(roles) if role == "user"]
    replied = [i for i in asked if roles[i + 1 : i + 2] == ["assistant"]]
    if not asked:
        return _written(turns), None, None
    at = (replied or asked)[-1]
    return _written(turns[:at]), turns[at][1], (turns[at + 1][1],) if replied else ()


def _role(message, field):
    role = message.get("role", message.get("from"))
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise UserError(
            f"{field} holds a message of role {shown(role)}; expected {', '.join(ROLES)}"
        )
    return known


def _content(message, field):
    name = "content" if "content" in message else "value"
    parts = message.get(name)
    if not isinstance(parts, list):
        return text_of(message, name, f"{field}: {name}")
    kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in parts]
    other = next((kind for kind in kinds if kind != "text"), None)
    if other is not None or None in kinds:
        raise UserError(f"{field} holds a part of type {shown(other)}; only text is read")
    return "".join(text_of(part, "text", f"{field}: {name}") for part in parts)


def _written(turns):
    """Messages as one text: a system message alone as it is, several as lines `role: content`."""
    if len(turns) == 1 and turns[0][0] == "system":
        return turns[0][1]
    return "\n".join(f"{role}: {content}" for role, content in turns)
