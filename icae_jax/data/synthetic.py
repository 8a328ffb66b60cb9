"""A small world of made-up people: passages, questions, a tokenizer, and the documents a tiny base model is trained on.

Everything is a function of a seed, nothing is downloaded. A passage tells a few facts about each of two people, most of them of
the same kinds (both have a trade, both play something ...), so that a question is answered only by who has not lost track of
*whose* fact is asked for. `passage_bits` says how much there is to remember.
"""

import itertools
import math
import random
import re

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

UNK, BOS, EOS, REPEAT = "<unk>", "<s>", "</s>", "<repeat>"

FIRST_NAMES = [
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Louis", "Maria",
    "Nils", "Olga", "Pavel", "Rosa", "Simon", "Tara", "Umar", "Vera", "Walter", "Xenia", "Yusuf", "Zoe", "Adam", "Bella",
    "Carl", "Diana", "Emil", "Flora", "Gustav",
]
LAST_NAMES = [
    "Abbott", "Baker", "Carter", "Dunn", "Ellis", "Fisher", "Grant", "Hayes", "Irwin", "Jensen", "Keller", "Lambert",
    "Mason", "Novak", "Olsen", "Parker", "Quinn", "Reed", "Stone", "Turner", "Underwood", "Vogel", "Weber", "Young",
    "Ziegler", "Archer", "Bishop", "Conrad", "Draper", "Engel", "Fowler", "Gibson",
]

# How a person is brought in, with the full name; every other sentence has the first name alone.
OPENINGS = ("Meet {first} {last}.", "Here comes {first} {last}.")

# One row a kind of fact: the question and its reverse (whose answer is the first name), two ways to state it, and the values.
# No value belongs to two kinds: an answer then shows which fact it came from. Questions end with the name, and a value stands
# four words after the name it belongs to, so that a tiny model needs to look at few distances.
KINDS = {
    "city": (
        ("What is the birthplace of {name}?", "Whose birthplace is {value}?"),
        ("{name} was born in {value}.", "{name} grew up in {value}."),
        "Paris London Rome Madrid Vienna Oslo Cairo Lima Tokyo Delhi Athens Dublin Lisbon Prague Warsaw Berlin".split(),
    ),
    "trade": (
        ("What is the trade of {name}?", "Whose trade is {value}?"),
        ("{name} works as a {value}.", "{name} trained as a {value}."),
        "tailor doctor painter lawyer farmer teacher nurse pilot judge cook miner sailor plumber singer writer banker".split(),
    ),
    "pet": (
        ("What is the pet of {name}?", "Whose pet is {value}?"),
        ("{name} looks after a {value}.", "{name} lives with a {value}."),
        "dog cat parrot rabbit hamster turtle goat pony lizard ferret snake hen duck donkey lamb pigeon".split(),
    ),
    "music": (
        ("What is the instrument of {name}?", "Whose instrument is {value}?"),
        ("{name} practises on the {value}.", "{name} performs on the {value}."),
        "violin piano flute cello harp drums guitar trumpet clarinet organ banjo oboe viola tuba lute horn".split(),
    ),
    "food": (
        ("What is the favourite dish of {name}?", "Whose favourite dish is {value}?"),
        ("{name} likes to eat {value}.", "{name} loves to cook {value}."),
        "rice soup bread cheese salad pasta beans fish pancakes mushrooms lentils noodles carrots eggs potatoes plums".split(),
    ),
    "year": (
        ("What is the arrival year of {name}?", "Whose arrival year is {value}?"),
        ("{name} came here in {value}.", "{name} moved here in {value}."),
        [str(year) for year in range(1960, 1976)],
    ),
}
NAME_QUESTIONS = ("What is the last name of {name}?", "Whose last name is {value}?")

FACTS = 3  # facts told about each person in a full-sized passage
FEWEST_SHARED = 2  # of these, so many at least are of kinds told about the other person too
TEMPLATE = "Question: {question} Answer:"  # what a question becomes for the model; the answer and `</s>` follow


# ------------------------------------------------------------------------------------------------------------ passages


def _shared(facts):
    return min(facts, FEWEST_SHARED)


def _draw(rng, facts, count=2):
    """`count` people: `[(first, last, opening, [(kind, value, phrasing), ...]), ...]`."""
    firsts = rng.sample(FIRST_NAMES, count)
    lasts = rng.sample(LAST_NAMES, count)
    while True:  # rejection keeps every admissible pair of kind sets equally likely, as passage_bits counts them
        sets = [rng.sample(sorted(KINDS), facts) for _ in range(2)]
        if len(set(sets[0]) & set(sets[1])) >= _shared(facts):
            break
    if count > 2:  # a crowd is told the same kinds of facts: knowing the kind alone is then worth little
        sets = [rng.sample(sets[0], facts) for _ in range(count)]
    people, taken = [], {kind: set() for kind in KINDS}
    for first, last, kinds in zip(firsts, lasts, sets):
        told = []
        for kind in kinds:
            _, phrasings, values = KINDS[kind]
            value = rng.choice([v for v in values if v not in taken[kind]])  # never another person's value
            taken[kind].add(value)
            told.append((kind, value, rng.randrange(len(phrasings))))
        people.append((first, last, rng.randrange(len(OPENINGS)), told))
    return people


def _sentences(people):
    """The sentences of a passage, each with the words that say what cannot be guessed: `[(text, words), ...]`."""
    out = []
    for first, last, opening, told in people:
        out.append((OPENINGS[opening].format(first=first, last=last), (first, last)))
        out += [(KINDS[kind][1][phrasing].format(name=first, value=value), (value,)) for kind, value, phrasing in told]
    return out


def _text(people):
    return " ".join(sentence for sentence, _ in _sentences(people))


def _questions(people, reverse=False):
    """`[(question, answer), ...]`; reverse: the fact is given and the person asked for."""
    out = []
    for first, last, _, told in people:
        for questions, value in [(NAME_QUESTIONS, last), *((KINDS[kind][0], value) for kind, value, _ in told)]:
            out.append((questions[reverse].format(name=first, value=value), first if reverse else value))
    return out


def passages(seed, count, facts=FACTS):
    """`count` rows `{"context": text, "questions": [{"question": text, "answers": [text]}, ...]}`.

    Row i depends on `seed`, `facts` and i alone. Each passage tells `facts` facts about each of two people; the questions ask
    for every one of them and for both last names.
    """
    if not 1 <= facts <= len(KINDS):
        raise ValueError(f"facts is {facts}; each person can have 1 to {len(KINDS)}")
    rows = []
    for i in range(count):
        people = _draw(random.Random(f"passage {seed} {facts} {i}"), facts)
        questions = [{"question": q, "answers": [a]} for q, a in _questions(people)]
        rows.append({"context": _text(people), "questions": questions})
    return rows


def passage_bits(facts=FACTS):
    """Bits of information in a passage: log2 of how many distinct ones `passages` can draw (all equally likely, or nearly)."""
    choices = 0
    for one, two in itertools.product(itertools.combinations(KINDS, facts), repeat=2):
        if len(set(one) & set(two)) < _shared(facts):
            continue
        told = math.prod(len(KINDS[kind][1]) * len(KINDS[kind][2]) for kind in one)
        # The second person's value differs from the first person's where they share the kind.
        told *= math.prod(len(KINDS[kind][1]) * (len(KINDS[kind][2]) - (kind in one)) for kind in two)
        choices += told
    names = math.perm(len(FIRST_NAMES), 2) * math.perm(len(LAST_NAMES), 2)
    return math.log2(choices * names * (math.factorial(facts) * len(OPENINGS)) ** 2)


# ----------------------------------------------------------------------------------------------------------- tokenizer


def _pieces():
    """Words and marks of everything the generator can say, sorted."""
    text = [*FIRST_NAMES, *LAST_NAMES, *OPENINGS, *NAME_QUESTIONS, TEMPLATE]
    for questions, phrasings, values in KINDS.values():
        text += [*questions, *phrasings, *values]
    words = re.sub(r"\{\w+\}", "", " ".join(text)).split()
    return sorted({piece for word in words for piece, _ in _marks().pre_tokenize_str(word)})


def _marks():
    return pre_tokenizers.Punctuation(behavior="isolated")


def build_tokenizer():
    """A word-level `PreTrainedTokenizerFast` over the generator's words, which puts `<s>` in front as Llama's tokenizers do.

    A word carries the space before it (as "▁word"), a mark of punctuation is a token of its own without one, so that decoding
    gives back the text exactly, and a text tokenised in parts equals the whole.
    """
    marks, words = [], []
    for piece in _pieces():
        (words if piece.isalnum() else marks).append(piece)
    vocabulary = [UNK, BOS, EOS, REPEAT, *marks, *("▁" + word for word in words)]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always"), _marks()])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    # The spaces round <repeat> belong to it; they would otherwise come out as words of their own.
    tokenizer.add_special_tokens([UNK, BOS, EOS, AddedToken(REPEAT, lstrip=True, rstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNK, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


# ------------------------------------------------------------------------------------- what the base model is trained on

DOCUMENTS = ("questions", "whose", "retelling", "repeat", "notes", "passages")


def _notes(rng, people):
    """A passage as somebody might note it down: names and values stay, every other word is left out with one probability."""
    leave_out = rng.random()
    words = []
    for sentence, kept in _sentences(people):
        words += [w for w in sentence.replace(".", " .").split() if w in kept or rng.random() >= leave_out]
    return " ".join(words).replace(" .", ".")


def base_documents(seed, count, kind, facts=FACTS, people=2):
    """`count` documents of one kind for plain language modelling, each a list of `(text, weight of its tokens in the loss)`.

    kind: "questions": a passage, then all its questions in the plain template with their answers;
        "whose": the same with the questions turned round: the fact is given, the name asked for;
        "retelling": a passage, then its facts in another order (whose fact it is must be known, as for the questions, but is
        asked for six times in a few words);
        "repeat": a passage, `<repeat>`, the passage again with `<s>` and `</s>` around it (teaches copying);
        "notes": the passage's names and values with a random share of the other words, `<repeat>`, the passage (teaches
        writing out in full what stands there in short);
        "passages": passages in a row.
    What cannot be foretold (a passage read for the first time) has little weight: its gradient is mostly noise.
    The parts are tokenised one by one without special tokens, `<s>` goes in front of each document.
    """
    if kind not in DOCUMENTS:
        raise ValueError(f"kind is {kind!r}; choose from {', '.join(DOCUMENTS)}")
    out = []
    for i in range(count):
        rng = random.Random(f"document {seed} {kind} {facts} {people} {i}")
        told = _draw(rng, facts, people)
        text = _text(told)
        if kind in ("questions", "whose"):
            parts = [(text, 0.1)]
            questions = _questions(told, reverse=kind == "whose")
            rng.shuffle(questions)
            for question, answer in questions:
                parts += [(TEMPLATE.format(question=question), 0.1), (answer + EOS, 1.0)]
        elif kind == "retelling":
            parts = [(text, 0.1)]
            facts_told = [(sentence, kept[0]) for sentence, kept in _sentences(told) if len(kept) == 1]
            rng.shuffle(facts_told)
            for sentence, value in facts_told:
                start, _, end = sentence.rpartition(" " + value)
                parts += [(start, 0.1), (value + end, 1.0)]
        elif kind == "passages":
            more = (_text(_draw(rng, facts)) for _ in range(2))
            parts = [(" ".join((text, *more)), 0.1)]
        else:
            first = text if kind == "repeat" else _notes(rng, told)
            parts = [(first, 0.1 if kind == "repeat" else 0.0), (REPEAT + BOS, 0.0), (text + EOS, 1.0)]
        out.append(parts)
    return out
