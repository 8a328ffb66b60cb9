"""What is evaluated: texts and questions, drawn by a seed whatever the order of a file's lines."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from icae_jax.data import places, sources
from icae_jax.data.rows import Sieve
from icae_jax.errors import UserError, counted

QUESTIONS_AT_ONCE = 8  # of one context; more become several examples, so that batches stay small


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with all of its reference answers. id: of the data's row."""

    id: str
    text: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """One text of a set with its questions.

    key: sha256 over its content. id: its row's, or its first question's. set: the source's name.
    """

    key: str
    id: str
    set: str
    text: str
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Example:
    """What one call measures: a context, and what is asked behind it.

    key: identifies it when a run is continued.
    cluster: the text it is from; examples of one text are resampled together.
    ids: the context's tokens, without special ones.
    group: `{kind: value}`, such as {"tokens": "1-100"}; each value has a table of its own.
    text: sha256 of the whole text, in whichever set and whatever is asked.
    partner: the ids of another text's context, whose memory is the control.
    """

    key: str
    cluster: str
    id: str
    set: str
    ids: tuple[int, ...]
    questions: tuple[Question, ...] = ()
    continuation: tuple[int, ...] = ()
    group: dict[str, str] = dataclasses.field(default_factory=dict)
    text: str = ""
    partner: tuple[int, ...] = ()


@runtime_checkable
class MakesExamples(Protocol):
    """The side of a suite that makes examples of texts."""

    name: str

    def examples(self, text: Text) -> list[Example] | str:
        """The examples of a text, or the reason why it cannot be used."""


def _hash(*items) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(str(item).encode() + b"\0")
    return digest.hexdigest()


def named_sources(data: str) -> dict[str, str]:
    """Sources by name from comma-joined `[NAME=]SOURCE` items.

    The default name is the file's, preceded by its folders' where two would be alike.
    """
    items = places.split_source(
        data, lambda item: item if pathlib.Path(item).exists() else item.partition("=")[2]
    )
    named = [
        item.partition("=")[::2] if "=" in item and not pathlib.Path(item).exists() else ("", item)
        for item in items
    ]

    def default(source, depth):
        if places.is_set(source):
            return source.partition(":")[2]
        path = pathlib.Path(source)
        if any(mark in path.name for mark in "*?["):  # a glob: its folder
            path = path.parent
        stem = path.name.partition(".")[0] or path.name
        return "/".join((*path.absolute().parts[-depth:-1], stem))

    for depth in range(1, 10):
        names = [name or default(source, depth) for name, source in named]
        if len(set(names)) == len(names):
            return dict(zip(names, (source for _, source in named), strict=True))
    raise UserError(
        f"--data {data}: two sources have one name; give names, as in NAME=FILE,NAME=FILE"
    )


def read_texts(
    data: str, tfds_dir: str | None, limit: int, seed: int, sieve: Sieve | None = None
) -> dict[str, list[Text]]:
    """All texts of each set, in an order that depends on the seed and the texts alone.

    A set is a source, or the rows of one that name the same `subset`. The caller takes as many
    from the front as it can use, up to `limit`. sieve: a `data.rows.Sieve` that decides which
    rows can be used. UserError where a source is empty or malformed.
    """
    if limit < 0:
        raise UserError(
            f"--limit is {limit}; give how many texts of each set to take, or 0 for all"
        )
    questions_of, seen_ids = {}, {}  # by (set, text), and by (set, kind of id)
    for name, source in named_sources(data).items():
        own_sieve = sieve.fresh() if sieve else Sieve()
        rows = sources.read_all(source, tfds_dir, own_sieve)
        own_sieve.check_some(rows, f"--data {source}")
        if sieve:
            sieve.add(own_sieve.left_out)
        for row in rows:
            set_name = f"{name}/{row.subset}" if row.subset else name
            _, questions = questions_of.setdefault((set_name, row.text), (row.id, []))
            if row.answers:
                row_id = _unused(seen_ids.setdefault((set_name, "questions"), {}), row.id)
                questions.append(Question(row_id, row.question, row.answers))
    sets = {}
    for (set_name, text), (row_id, questions) in questions_of.items():
        questions.sort(key=lambda q: (q.text, q.answers, q.id))  # whatever the order of the lines
        key = _hash(text, *((q.text, q.answers) for q in questions))
        text_id = questions[0].id if questions else row_id
        text_id = _unused(seen_ids.setdefault((set_name, "texts"), {}), text_id)
        sets.setdefault(set_name, []).append(Text(key, text_id, set_name, text, tuple(questions)))
    return {name: sorted(texts, key=lambda t: _hash(seed, t.key)) for name, texts in sets.items()}


def _unused(seen: dict[str, int], row_id: str) -> str:
    """The row's id, numbered where the set has had it before."""
    name = row_id
    while name in seen:
        seen[row_id] += 1
        name = f"{row_id}#{seen[row_id]}"
    seen[name] = 1
    return name


def make_examples(
    sets: dict[str, list[Text]], limit: int, suite: MakesExamples
) -> tuple[list[Example], dict[str, int]]:
    """The examples that a suite makes of the first usable texts of each set, `limit` of each.

    Returns them with `{reason: count}` of texts left out. UserError where no example is left.
    """
    examples, left_out = [], {}
    for texts in sets.values():
        used = 0
        for text in texts:
            if limit and used == limit:
                break
            of_text = suite.examples(text)
            if isinstance(of_text, str):
                left_out[of_text] = left_out.get(of_text, 0) + 1
                continue
            examples += of_text
            used += 1
    if not examples:
        why = "; ".join(counted(count, reason) for reason, count in left_out.items())
        raise UserError(f"--data has no text for --suite {suite.name}: {why}")
    return with_partners(examples), left_out


def example(text: Text, ids: Sequence[int], part: Any = "", **fields) -> Example:
    """An `Example` of a text. part: tells it from others of the same text."""
    key = _hash(text.key, text.set, part)
    ids = tuple(ids)
    return Example(key, text.key, text.id, text.set, ids, text=_hash(text.text), **fields)


def with_partners(examples: Sequence[Example]) -> list[Example]:
    """Examples in the order they run in, each with the next other text's context as partner.

    Neighbours are alike in their number of questions and length, so batches have little padding.
    """
    examples = sorted(examples, key=lambda e: (len(e.questions), len(e.ids), e.key))
    paired = []
    for i, own in enumerate(examples):
        others = (examples[(i + step) % len(examples)] for step in range(1, len(examples)))
        partner = next((other.ids for other in others if other.text != own.text), ())
        paired.append(dataclasses.replace(own, partner=partner))
    return paired
