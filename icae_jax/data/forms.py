"""The forms in which files and sets hold texts and questions, read into `Row`s.

A raw row is a dictionary, as JSON has it. A row of an unknown form is an error.
"""

from collections.abc import Iterable, Iterator

from icae_jax.data.rows import Row, placed
from icae_jax.errors import UserError, shown
from icae_jax.interop.hub.text import check_encodable

EXPECTED = (
    "expected text, or context, question and answers, or input, prompt and answer "
    "(icae_jax/data/README.md lists the other forms; a table's first line names its columns)"
)
QUESTION_FORMS = (  # the fields of the text, of the question and of its answer
    ("input", "prompt", "answer"),  # PwC
    ("input", "instruction", "output"),  # Alpaca
    ("context", "instruction", "response"),  # Dolly
)
CONTEXTS = ("context", "passage", "document")  # names of the text that `question` is about
TEXTS = ("document", "content", "context", "passage")  # names of a text without a question
CHATS = ("messages", "conversations")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
# How tables spell is_impossible.
IMPOSSIBLE = {
    "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False,
}  # fmt: skip
# All fields that are read; other columns of a table are skipped.
FIELDS = frozenset().union(
    ("id", "subset", "text", "data", "paragraphs", "qas"),
    ("question", "answer", "answers", "is_impossible", "system"),
    *QUESTION_FORMS,
    CONTEXTS,
    TEXTS,
    CHATS,
)
MOST_NAMES = 20  # in a message


def is_wrapper(raw: object) -> bool:
    """Whether a JSON value is not a row itself but holds rows as its `data`."""
    return (
        isinstance(raw, dict)
        and isinstance(raw.get("data"), list)
        and not raw.keys() & (FIELDS - {"data", "id"})
    )


def unwrapped(raw: object, where: str, number: str) -> Iterator[tuple[object, str, str]]:
    """Yields (raw row, its place, its number): the items of `{"data": […]}`, else `raw` itself."""
    if not is_wrapper(raw):
        yield raw, where, number
        return
    for i, item in enumerate(raw["data"]):
        yield item, f"{where}: item {i + 1}", f"{number}.{i}"


ANSWERS = ("answers", "answer", "is_impossible")


def parse(raw: object, where: str, default_id: str, unanswered: bool = False) -> list[Row]:
    """The `Row`s of one raw row: one per question of a SQuAD or MRQA paragraph, else one.

    unanswered: whether a row may have a question without a field for its answer. UserError names
    place and field.
    """
    raw = _with_answers(raw) if unanswered else raw
    with placed(where):
        return list(_parse(raw, where, default_id, ""))


def _with_answers(raw):
    """A raw row whose questions have a field for their answer, null where it was missing."""
    if not isinstance(raw, dict):
        return raw
    if "question" in raw and not raw.keys() & ANSWERS:
        raw = raw | {"answers": None}
    lists = (field for field in ("qas", "paragraphs") if isinstance(raw.get(field), list))
    return raw | {field: list(map(_with_answers, raw[field])) for field in lists}


def _parse(raw, where, default_id, subset):
    if not isinstance(raw, dict):
        raise UserError(
            f"a JSON {type(raw).__name__}, expected an object with text, or context, question and "
            "answers"
        )
    own_id, subset = name_of(raw, "id"), name_of(raw, "subset") or subset
    origin = (where, own_id or default_id, subset, bool(own_id))
    for text, question, answer in QUESTION_FORMS:
        if {text, question, answer} <= raw.keys():
            yield Row(text_of(raw, text), text_of(raw, question), (text_of(raw, answer),), *origin)
            return
    if "question" in raw and raw.keys() & ANSWERS:
        is_text = "text" in raw and not raw.keys() & set(CONTEXTS)
        context = "text" if is_text else _the_one(raw, CONTEXTS)
        yield Row(text_of(raw, context), text_of(raw, "question"), answers_of(raw), *origin)
    elif "text" in raw:  # whatever else it holds, such as the messages that it was made of
        yield Row(text_of(raw, "text"), None, None, *origin)
    elif "qas" in raw:
        yield from paragraph(raw, where, default_id, subset)
    elif isinstance(raw.get("paragraphs"), list):
        for number, item in enumerate(raw["paragraphs"]):
            with placed(f"paragraph {number + 1}"):
                place = f"{where}: paragraph {number + 1}"
                yield from _parse(item, place, f"{default_id}.{number}", subset)
    elif chat := next((field for field in CHATS if field in raw), None):
        yield Row(*_chat(raw, chat), *origin)
    elif raw.keys() & set(TEXTS) and not raw.keys() & {"question", "answer", "answers"}:
        yield Row(text_of(raw, _the_one(raw, TEXTS)), None, None, *origin)
    elif raw.keys() != {"header"}:  # the first line of MRQA's files
        raise UserError(f"fields {listed(sorted(raw))}; {EXPECTED}")


def listed(names: Iterable[object]) -> str:
    """Names of fields or columns in one line; only the first of them if there are many."""
    names = [" ".join(str(name).split())[:80] for name in names]
    return ", ".join(names[:MOST_NAMES] + ["…"] * (len(names) > MOST_NAMES)) or "none"


def _the_one(raw, names):
    """The one of several names that a row has."""
    present = [name for name in names if name in raw]
    if len(present) != 1:
        what = f"both {' and '.join(present)}" if present else "none"
        raise UserError(f"fields {listed(sorted(raw))}: {what} of {', '.join(names)}; {EXPECTED}")
    return present[0]


def _is_absent(value):
    return value is None or value != value  # NaN is what pandas writes for a missing value


def name_of(raw: dict, field: str) -> str:
    """An id or a subset, which may be a number; "" if there is none."""
    value = raw.get(field)
    name = "" if _is_absent(value) else str(value)
    check_encodable(name, field)
    return name


def text_of(raw: dict, field: str, name: str = "") -> str:
    """A text field, "" if it is null. name: what messages call it, by default the field.

    UserError if it is not a text or cannot be encoded.
    """
    value = raw.get(field)
    if _is_absent(value):
        return ""
    if not isinstance(value, str):
        numeric = "; write a number in quotes" if isinstance(value, int | float) else ""
        raise UserError(f"{name or field} is {type(value).__name__}, expected text{numeric}")
    check_encodable(value, name or field)
    return value


def answers_of(raw: dict) -> tuple[str, ...]:
    """The reference answers of a question: a list of texts, one text, or SQuAD's own forms.

    () if there are none. A question that is marked as impossible has none, whatever the field
    holds, as in SQuAD's own readers.
    """
    if _is_impossible(raw):
        return ()
    field = "answer" if _is_absent(raw.get("answers")) and "answer" in raw else "answers"
    value = raw.get(field)
    answers = _answer_text(value)
    if _is_absent(answers):
        return ()
    answers = [answers] if isinstance(answers, str) else answers
    if isinstance(answers, list):
        answers = [a for a in map(_answer_text, answers) if not _is_absent(a)]
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise UserError(
            f"{field} is {shown(value)}, expected a list of texts, or a text (a number in quotes)"
        )
    for answer in answers:
        check_encodable(answer, field)
    return tuple(answers)


def _answer_text(answer):
    """The `text` of an answer that is an object, None if the object is empty; else `answer`."""
    is_answer = isinstance(answer, dict) and ("text" in answer or not answer)
    return answer.get("text") if is_answer else answer


def _is_impossible(raw):
    value = raw.get("is_impossible")
    word = "" if _is_absent(value) else str(value).strip().lower().removesuffix(".0")
    if word not in IMPOSSIBLE:
        raise UserError(f"is_impossible is {str(value)[:80]!r}; expected true or false")
    return IMPOSSIBLE[word]


def paragraph(raw: dict, where: str, default_id: str, subset: str = "") -> Iterator[Row]:
    """Yields the rows of a SQuAD paragraph or of a line of MRQA: one text and its questions."""
    text, questions = text_of(raw, "context"), raw["qas"]
    if not isinstance(questions, list):
        raise UserError(f"qas is {shown(questions)}, expected a list of questions")
    for number, question in enumerate(questions):
        if not isinstance(question, dict):
            raise UserError(
                f"qas holds {shown(question)}, expected an object with question and answers"
            )
        if not question.keys() & ANSWERS:
            raise UserError(
                f"answers is missing in a question of qas; its fields are {listed(question)}"
            )
        # Not an id of the row's own: it names the question, while the text is one for all.
        row_id = name_of(question, "qid" if "qid" in question else "id")
        yield Row(
            text,
            text_of(question, "question"),
            answers_of(question),
            where,
            row_id or f"{default_id}.{number}",
            subset,
        )
    if not questions:
        yield Row(text, None, None, where, default_id, subset)


# -------------------------------------------------------------------------------------------- chats


def _chat(raw, field):
    """(text, question, answers) of a chat.

    The last reply is the answer, the user's message before it the question, all that precedes it
    the text. Without a reply the user's last message is a question without an answer; without a
    user there is only a text.
    """
    messages = [] if _is_absent(raw[field]) else raw[field]
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
        return _as_text(turns), None, None
    last = (replied or asked)[-1]
    return _as_text(turns[:last]), turns[last][1], (turns[last + 1][1],) if replied else ()


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


def _as_text(turns):
    """Messages as one text: a lone system message as it is, else lines `role: content`."""
    if len(turns) == 1 and turns[0][0] == "system":
        return turns[0][1]
    return "\n".join(f"{role}: {content}" for role, content in turns)
