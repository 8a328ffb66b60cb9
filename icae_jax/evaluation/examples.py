"""What is evaluated: texts and their questions, drawn from sources by a seed, the same ones whatever the order of the lines."""

import dataclasses
import hashlib
import pathlib

from icae_jax.data import places, sources
from icae_jax.data.rows import Sieve
from icae_jax.errors import UserError

QUESTIONS_AT_ONCE = (
    8  # of one context; more of them make several examples, so that a batch stays small
)


@dataclasses.dataclass(frozen=True)
class Question:
    """id: of the data's row. answers: all reference answers."""

    id: str
    text: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """One text of a source with its questions. key: sha256 over what is in it. id: its row's, or its first question's. set: its source."""

    key: str
    id: str
    set: str
    text: str
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Example:
    """What one call measures: a context, and what is asked behind it.

    key: what it is known by when a run is continued. cluster: the text it is from; examples of one text are resampled together. ids: the
    context's tokens, without special ones. group: `{kind: value}`, parts that have a table of their own, such as {"tokens": "1-100"}.
    text: sha256 of the whole text, whatever is asked of it and in whichever set. partner: the context of an example of another text, whose
    memory is the control.
    """

    key: str
    cluster: str
    id: str
    set: str
    ids: tuple[int, ...]
    questions: tuple[Question, ...] = ()
    continuation: tuple[int, ...] = ()
    group: dict = dataclasses.field(default_factory=dict)
    text: str = ""
    partner: tuple[int, ...] = ()


def _hash(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode() + b"\0")
    return digest.hexdigest()


def named_sources(data):
    """`{name: source}` of comma-joined sources: `NAME=SOURCE`, or by default the file's name (with its folder's, where two are alike)."""
    given = places.split_source(
        data, lambda item: item if pathlib.Path(item).exists() else item.partition("=")[2]
    )
    named = [
        item.partition("=")[::2] if "=" in item and not pathlib.Path(item).exists() else ("", item)
        for item in given
    ]

    def default(source, parts):
        if places.is_set(source):
            return source.partition(":")[2]
        path = pathlib.Path(source)
        if any(mark in path.name for mark in "*?["):  # a glob: its folder
            path = path.parent
        stem = path.name.partition(".")[0] or path.name
        return "/".join((*path.absolute().parts[-parts:-1], stem))

    for parts in range(1, 10):
        names = [name or default(source, parts) for name, source in named]
        if len(set(names)) == len(names):
            return dict(zip(names, (source for _, source in named), strict=True))
    raise UserError(
        f"--data {data}: two sources have one name; give names, as in NAME=FILE,NAME=FILE"
    )


def read(data, tfds_dir, limit, seed, sieve=None):
    """`Text`s of the sources in `data`, every set's in an order that the seed and the texts alone decide.

    A set is a source, or a part of one whose rows name a `subset`. limit: how many texts of each set are wanted, 0 for all; the caller
    takes as many of the front as it can use. sieve: `data.rows.Sieve`, which rows can be used. Returns `{set: [Text, …]}`. UserError where
    a source is empty or malformed.
    """
    if limit < 0:
        raise UserError(
            f"--limit is {limit}; give how many texts of each set to take, or 0 for all"
        )
    found, seen = {}, {}  # seen: the ids of a set's texts, and of its questions
    for name, source in named_sources(data).items():
        own = sieve.fresh() if sieve else Sieve()
        rows = sources.read_all(source, tfds_dir, own)
        own.check_some(rows, f"--data {source}")
        if sieve:
            sieve.add(own.left_out)
        for row in rows:
            where = f"{name}/{row.subset}" if row.subset else name
            _, questions = found.setdefault((where, row.text), (row.id, []))
            if row.answers:
                questions.append(
                    Question(
                        _unused(seen.setdefault((where, "questions"), {}), row.id),
                        row.question,
                        row.answers,
                    )
                )
    sets = {}
    for (where, text), (row_id, questions) in found.items():
        questions.sort(key=lambda q: (q.text, q.answers, q.id))  # whatever the order of the lines
        key = _hash(text, *((q.text, q.answers) for q in questions))
        row_id = _unused(
            seen.setdefault((where, "texts"), {}), questions[0].id if questions else row_id
        )
        sets.setdefault(where, []).append(Text(key, row_id, where, text, tuple(questions)))
    return {where: sorted(texts, key=lambda t: _hash(seed, t.key)) for where, texts in sets.items()}


def _unused(seen, row_id):
    """The row's id, with a number where the set has had it before."""
    name = row_id
    while name in seen:
        seen[row_id] += 1
        name = f"{row_id}#{seen[row_id]}"
    seen[name] = 1
    return name


def make(sets, limit, suite):
    """(`Example`s, `{reason: count}` of texts left out) that a suite makes of the first usable texts of each set.

    suite: `suite.examples(text)` gives a list of `Example`s, or the reason why a text cannot be used. UserError where none is left.
    """
    examples, left_out = [], {}
    for texts in sets.values():
        used = 0
        for text in texts:
            if limit and used == limit:
                break
            made = suite.examples(text)
            if isinstance(made, str):
                left_out[made] = left_out.get(made, 0) + 1
                continue
            examples += made
            used += 1
    if not examples:
        why = "; ".join(f"{count} x {reason}" for reason, count in left_out.items())
        raise UserError(f"--data has no text for --suite {suite.name}: {why}")
    return with_partners(examples), left_out


def example(text, ids, part="", **rest):
    """An `Example` of a text. part: what tells it from others of the same text."""
    return Example(
        _hash(text.key, text.set, part),
        text.key,
        text.id,
        text.set,
        tuple(ids),
        text=_hash(text.text),
        **rest,
    )


def with_partners(examples):
    """Examples in the order in which they are run, alike in questions and length; each with the context of the next one of another text."""
    examples = sorted(examples, key=lambda e: (len(e.questions), len(e.ids), e.key))
    result = []
    for i, one in enumerate(examples):
        others = (examples[(i + step) % len(examples)] for step in range(1, len(examples)))
        partner = next((other.ids for other in others if other.text != one.text), ())
        result.append(dataclasses.replace(one, partner=partner))
    return result
