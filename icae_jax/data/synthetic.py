"""A small world of made-up people: passages, questions, a tokenizer, and training documents.

Everything is a function of a seed; nothing is downloaded. A passage states a few facts about each
of two people, most of them of the same kinds (both have a trade, both play an instrument, …), so
that answering a question takes knowing *whose* fact is asked for. `passage_bits` says how much
there is to remember. The documents train a tiny base model.
"""

import itertools
import math
import random
import re
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from icae_jax.errors import UserError

UNK, BOS, EOS, REPEAT = "<unk>", "<s>", "</s>", "<repeat>"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Louis Maria Nils Olga Pavel"
)
LAST_NAMES = _words(
    "Abbott Baker Carter Dunn Ellis Fisher Grant Hayes Irwin Jensen Keller Lambert Mason Novak "
    "Olsen Parker"
)

# How a person is introduced, with the full name; every other sentence has the first name alone.
OPENINGS = ("Meet {first} {last}.", "Here comes {first} {last}.")

# Kinds of facts: two ways to state each, and its values. No value belongs to two kinds, so answers
# show which fact they came from. A value stands four words after its person's name, so a tiny model
# needs to look at few distances only.
KINDS = {
    "birthplace": (
        ("{name} was born in {value}.", "{name} grew up in {value}."),
        _words(
            "Paris London Rome Madrid Vienna Oslo Cairo Lima Tokyo Delhi Athens Dublin Lisbon "
            "Prague Warsaw Berlin"
        ),
    ),
    "trade": (
        ("{name} works as a {value}.", "{name} trained as a {value}."),
        _words(
            "tailor doctor painter lawyer farmer teacher nurse pilot judge cook miner sailor "
            "plumber singer writer banker"
        ),
    ),
    "pet": (
        ("{name} looks after a {value}.", "{name} lives with a {value}."),
        _words(
            "dog cat parrot rabbit hamster turtle goat pony lizard ferret snake hen duck donkey "
            "lamb pigeon"
        ),
    ),
    "instrument": (
        ("{name} practises on the {value}.", "{name} performs on the {value}."),
        _words(
            "violin piano flute cello harp drums guitar trumpet clarinet organ banjo oboe viola "
            "tuba lute horn"
        ),
    ),
    "favourite dish": (
        ("{name} likes to eat {value}.", "{name} loves to cook {value}."),
        _words(
            "rice soup bread cheese salad pasta beans fish pancakes mushrooms lentils noodles "
            "carrots eggs potatoes plums"
        ),
    ),
    "arrival year": (
        ("{name} came here in {value}.", "{name} moved here in {value}."),
        tuple(str(year) for year in range(1960, 1976)),
    ),
}
LAST_NAME = "last name"
QUESTION = "What is the {kind} of {name}?"
# What a question becomes for the model; the answer and `</s>` follow.
TEMPLATE = "Question: {question} Answer:"

FACTS = 3  # facts stated about each person in a passage
FEWEST_SHARED = 2  # at least so many of them are of kinds stated about the other person too


class _Fact(NamedTuple):
    """phrasing: which of the kind's ways to state it."""

    kind: str
    value: str
    phrasing: int


class _Person(NamedTuple):
    """opening: which of `OPENINGS` introduces them."""

    first: str
    last: str
    opening: int
    facts: list[_Fact]


# ----------------------------------------------------------------------------------------- passages


def _draw(
    rng: random.Random, facts: int, people: int = 2, fewest_shared: int | None = None
) -> list[_Person]:
    """Draws people with `facts` facts each.

    fewest_shared: the fewest kinds that each shares with the first person; by default all.
    """
    fewest = facts if fewest_shared is None else min(facts, fewest_shared)
    firsts, lasts = rng.sample(FIRST_NAMES, people), rng.sample(LAST_NAMES, people)
    drawn, taken = [], {kind: set() for kind in KINDS}
    kinds = rng.sample(sorted(KINDS), facts)
    for first, last in zip(firsts, lasts, strict=True):
        while drawn:
            # Rejection keeps all admissible pairs of kind sets equally likely, as `passage_bits`
            # counts them.
            kinds = rng.sample(sorted(KINDS), facts)
            if len({fact.kind for fact in drawn[0].facts} & set(kinds)) >= fewest:
                break
        own = []
        for kind in kinds:
            phrasings, values = KINDS[kind]
            value = rng.choice([v for v in values if v not in taken[kind]])
            taken[kind].add(value)  # no two people share a value
            own.append(_Fact(kind, value, rng.randrange(len(phrasings))))
        drawn.append(_Person(first, last, rng.randrange(len(OPENINGS)), own))
    return drawn


def _sentences(people: list[_Person]) -> list[tuple[str, tuple[str, ...]]]:
    """The sentences of a passage, each with its words that cannot be guessed."""
    sentences = []
    for first, last, opening, facts in people:
        sentences.append((OPENINGS[opening].format(first=first, last=last), (first, last)))
        sentences += [
            (KINDS[kind][0][phrasing].format(name=first, value=value), (value,))
            for kind, value, phrasing in facts
        ]
    return sentences


def _text(people: list[_Person]) -> str:
    return " ".join(sentence for sentence, _ in _sentences(people))


def _questions(people: list[_Person]) -> list[tuple[str, str]]:
    """(question, answer) for every fact and last name."""
    return [
        (QUESTION.format(kind=kind, name=person.first), answer)
        for person in people
        for kind, answer in [(LAST_NAME, person.last), *(fact[:2] for fact in person.facts)]
    ]


def passages(seed: int, count: int, people: int = 2) -> list[dict[str, Any]]:
    """`count` rows `{"context": text, "questions": [{"question": text, "answers": [text]}, …]}`.

    Row i depends on `seed`, i and `people` alone. The questions ask for every fact and every last
    name. people: in each passage; all share kinds of facts with the first.
    """
    rows = []
    for i in range(count):
        rng = random.Random(f"passage {seed} {i}")
        drawn = _draw(rng, FACTS, people, fewest_shared=FEWEST_SHARED)
        questions = [{"question": q, "answers": [a]} for q, a in _questions(drawn)]
        rows.append({"context": _text(drawn), "questions": questions})
    return rows


def passage_bits(people: int = 2) -> float:
    """Bits of information in a passage about so many people.

    This is log2 of how many distinct passages can be drawn; all are (nearly) equally likely.
    """
    sets = list(itertools.combinations(KINDS, FACTS))
    choices = 0
    for first in sets:
        like_it = [kinds for kinds in sets if len({*kinds} & {*first}) >= FEWEST_SHARED]
        for others in itertools.product(like_it, repeat=people - 1):
            stated = [kind for kinds in (first, *others) for kind in kinds]
            # No two people share a value of a kind.
            choices += math.prod(
                len(phrasings) ** stated.count(kind) * math.perm(len(values), stated.count(kind))
                for kind, (phrasings, values) in KINDS.items()
            )
    names = math.perm(len(FIRST_NAMES), people) * math.perm(len(LAST_NAMES), people)
    orders = math.factorial(FACTS) * len(OPENINGS)
    return math.log2(choices * names * orders**people)


# ---------------------------------------------------------------------------------------- tokenizer


def _pieces() -> list[str]:
    """Words and punctuation marks of everything the generator can say, sorted."""
    text = [*FIRST_NAMES, *LAST_NAMES, *OPENINGS, QUESTION, TEMPLATE, LAST_NAME]
    for kind, (phrasings, values) in KINDS.items():
        text += [kind, *phrasings, *values]
    words = re.sub(r"\{\w+\}", "", " ".join(text))
    return sorted({piece for word in words.split() for piece, _ in _marks().pre_tokenize_str(word)})


def _marks():
    return pre_tokenizers.Punctuation(behavior="isolated")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the generator's words; puts `<s>` in front as Llama's do.

    A word carries the space before it (as "▁word"), and a punctuation mark is a token of its own
    without one. So decoding gives back the text exactly, and a text tokenised in parts equals the
    whole.
    """
    marks, words = [], []
    for piece in _pieces():
        (words if piece.isalnum() else marks).append(piece)
    vocabulary = [UNK, BOS, EOS, REPEAT, *marks, *("▁" + word for word in words)]
    tokenizer = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token=UNK)
    )
    # A part that begins with a mark has no space to carry, so the sign for it is removed.
    no_space = pre_tokenizers.Split(Regex(r"▁(?=[^\w▁])"), "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), no_space, _marks()]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    # The spaces around <repeat> belong to it; otherwise they would decode to words of their own.
    tokenizer.add_special_tokens(
        [UNK, BOS, EOS, AddedToken(REPEAT, lstrip=True, rstrip=True, special=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------- what the base model is trained on

# If a tiny model starts with passages and questions, learning whose fact is whose takes hours: it
# gets stuck where it knows only the kind of a fact. It takes minutes if the model first learns to
# look up a word by the word before it (pairs), then facts by name and kind in short and long form
# (mentions), then as questions too (quiz).
WEIGHT = 1.0  # of what can be known: answers, mentions of known facts, copies
LITTLE = 0.05  # of what cannot be predicted, whose gradient is mostly noise

Document = list[tuple[str, float]]  # (text, weight of its tokens in the loss)


def _mentions(
    rng: random.Random, people: list[_Person], forms: dict[str, int | float], words: int
) -> Document:
    """Facts mentioned again and again, in the given forms, about `words` words in all.

    forms: `{form: share}` of "bare" (name, value), "short" (name, kind, value), "statement" and
    "question"; a first mention is never a question.
    """
    facts = [(p.first, fact.kind, fact.value) for p in people for fact in p.facts]
    if "bare" not in forms:
        facts += [(person.first, LAST_NAME, person.last) for person in people]
    new = rng.sample(facts, len(facts))
    parts, mentioned = [], set()
    while words > 0:
        first, kind, value = new.pop() if new else rng.choice(facts)
        form = rng.choices(list(forms), list(forms.values()))[0]
        if form == "question" and (first, kind) not in mentioned:
            form = "statement"
        end = "."
        if form == "bare":
            start = first
        elif form == "short":
            start = f"{first} {kind}"
        elif form == "statement":
            phrasings = OPENINGS if kind == LAST_NAME else KINDS[kind][0]
            start = (
                rng.choice(phrasings)
                .format(first=first, name=first, last="", value="")
                .removesuffix(" .")
            )
        else:
            start, end = TEMPLATE.format(question=QUESTION.format(kind=kind, name=first)), EOS
        parts += [
            (start, LITTLE),
            (value, WEIGHT if (first, kind) in mentioned else LITTLE),
            (end, LITTLE),
        ]
        mentioned.add((first, kind))
        words -= len(start.split()) + 2
    return parts


def _pairs(rng):
    return _mentions(rng, _draw(rng, 1, rng.choice((3, 4, 5))), {"bare": 1}, 44)


def _facts(rng):
    facts, people = rng.choice(((1, 3), (1, 4), (1, 3), (2, 2)))
    forms = {"short": 0.45, "statement": 0.55} | ({"bare": 0.3} if facts == 1 else {})
    return _mentions(rng, _draw(rng, facts, people), forms, 80)


def _quiz(rng):
    facts, people = rng.choice(((1, 3), (1, 4), (2, 2), (2, 3), (3, 2)))
    return _mentions(
        rng, _draw(rng, facts, people), {"short": 0.4, "statement": 0.35, "question": 0.25}, 110
    )


def _passage_questions(rng):
    people = _draw(rng, *rng.choice(((3, 2), (3, 2), (2, 2), (1, 3))), fewest_shared=FEWEST_SHARED)
    questions = _questions(people)
    parts = [(_text(people), LITTLE)]
    # Few questions, so that earlier answers hardly help.
    for question, answer in rng.sample(questions, 4):
        parts += [(TEMPLATE.format(question=question), LITTLE), (answer, WEIGHT), (EOS, LITTLE)]
    return parts


def _copy(rng, first_of):
    people = _draw(rng, rng.choice((1, 2, 3, 3)), 2, FEWEST_SHARED)
    return [(first_of(people), LITTLE), (REPEAT + BOS, 0.0), (_text(people) + EOS, WEIGHT)]


def _repeat(rng):
    return _copy(rng, _text)


def _notes(rng):
    """A passage from notes: names and values, and other words left out with one probability."""
    leave_out = rng.random()

    def noted(people):
        notes = []
        for sentence, needed in _sentences(people):
            words = [*sentence.removesuffix(".").split(), "."]
            notes += [word for word in words if word in needed or rng.random() >= leave_out]
        return " ".join(notes).replace(" .", ".")

    return _copy(rng, noted)


DOCUMENTS = {
    "pairs": _pairs,  # name, value; name, value; … the same again in any order
    "mentions": _facts,  # facts in short and in full, again and again
    "quiz": _quiz,  # the same with questions among them
    "questions": _passage_questions,  # a passage, then questions in the plain template
    "repeat": _repeat,  # a passage, <repeat>, the passage in <s> and </s>: teaches copying
    "notes": _notes,  # the same from notes: teaches writing out in full
}


def base_document(seed: int | str, kind: str) -> Document:
    """One document of a kind in `DOCUMENTS`, for plain language modelling.

    The parts are tokenised one by one without special tokens; `<s>` goes in front of each document.
    """
    if kind not in DOCUMENTS:
        raise UserError(f"kind of document is {kind!r}; choose from {', '.join(DOCUMENTS)}")
    return DOCUMENTS[kind](random.Random(f"{kind} {seed}"))
