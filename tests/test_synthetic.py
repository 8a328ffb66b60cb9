"""The made-up world: reproducible, answerable, tokenised without loss."""

import collections
import math
import re

import pytest

from icae_jax.data import synthetic

ROWS = synthetic.passages(3, 200)
OF_TWO = (  # what the quickstart and its base were made with
    "Meet Pavel Keller. Pavel loves to cook eggs. Pavel works as a painter. "
    "Pavel lives with a lizard. Here comes Felix Jensen. Felix practises on the tuba. "
    "Felix works as a banker. Felix loves to cook salad."
)


def test_passages_are_a_function_of_the_seed_and_differ():
    assert synthetic.passages(3, 5) == ROWS[:5]
    contexts = {row["context"] for row in ROWS} | {
        row["context"] for row in synthetic.passages(4, 200)
    }
    assert len(contexts) == 400


def test_every_answer_stands_beside_its_person_and_needs_the_name():
    """Breaks when the kind of fact alone tells the answer: both people have facts of most kinds."""
    shared = 0
    for row in ROWS:
        sentences = re.split(r"(?<=\.) ", row["context"])
        asked = collections.defaultdict(set)
        for item in row["questions"]:
            kind, name = re.fullmatch(r"What is the (.+) of (\w+)\?", item["question"]).groups()
            (answer,) = item["answers"]
            assert any(
                name in s.rstrip(".").split() and answer in s.rstrip(".").split() for s in sentences
            )
            asked[kind].add((name, answer))
        assert len(row["questions"]) == 2 * (synthetic.FACTS + 1)
        both = [kind for kind, pairs in asked.items() if len(pairs) == 2]
        assert len(both) >= synthetic.FEWEST_SHARED + 1  # last names too
        assert all(len({answer for _, answer in asked[kind]}) == 2 for kind in both)
        shared += sum(len(asked[kind]) for kind in both)
    assert shared / sum(len(row["questions"]) for row in ROWS) > 0.7


def test_passages_about_more_people():
    """Breaks when two people share a name or a value, or a passage about two is not what it was."""
    assert ROWS[0]["context"] == OF_TWO and synthetic.passages(3, 1, people=2) == ROWS[:1]
    for row in synthetic.passages(3, 50, people=4):
        asked = [item["question"].removeprefix("What is the ") for item in row["questions"]]
        kinds = collections.defaultdict(set)
        for question in asked:
            kind, name = question.rstrip("?").rsplit(" of ", 1)
            kinds[name].add(kind)
        answers = [answer for item in row["questions"] for answer in item["answers"]]
        assert len(kinds) == 4 and len({*answers}) == len(answers) == 4 * (synthetic.FACTS + 1)
        (first, *others) = kinds.values()
        assert all(len(first & other) > synthetic.FEWEST_SHARED for other in others)


def test_bits_of_a_passage():
    """Breaks when the generator's tables and the count of its passages disagree."""
    bits = synthetic.passage_bits()
    assert bits == pytest.approx(60.4323, abs=1e-4)
    # Of one person: names, opening, three of six kinds in any order, two phrasings of 16 values.
    alone = 16 * 16 * 2 * 20 * 6 * 32**3
    assert synthetic.passage_bits(people=1) == pytest.approx(math.log2(alone))
    # A third person's passage is at most one of a person alone, less what others have taken.
    assert math.log2(alone) - 5 < synthetic.passage_bits(people=3) - bits < math.log2(alone)
    names = synthetic.FIRST_NAMES
    try:
        synthetic.FIRST_NAMES = (*names, *(n + "a" for n in names))
        more = synthetic.passage_bits()
    finally:
        synthetic.FIRST_NAMES = names
    n = len(names)
    assert 2 ** (more - bits) == pytest.approx(2 * n * (2 * n - 1) / (n * (n - 1)))


def test_the_tokenizer_loses_nothing():
    tokenizer = synthetic.build_tokenizer()
    texts = [row["context"] for row in ROWS] + [
        q["question"] for row in ROWS for q in row["questions"]
    ]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    one, two = texts[0], texts[1]
    assert (
        tokenizer(one + " " + two)["input_ids"]
        == tokenizer(one)["input_ids"] + tokenizer(two, add_special_tokens=False)["input_ids"]
    )
    ids = tokenizer(f"{one} {synthetic.REPEAT} {one}")["input_ids"]
    assert ids == [
        *tokenizer(one)["input_ids"],
        tokenizer.convert_tokens_to_ids(synthetic.REPEAT),
        *tokenizer(one)["input_ids"][1:],
    ]


def _names(text):
    return set(re.findall(r"[A-Z]\w+|\d+", text))


@pytest.mark.parametrize("kind", synthetic.DOCUMENTS)
def test_base_documents(kind):
    """Breaks when what cannot be known has full weight, or what can be known has not."""
    tokenizer = synthetic.build_tokenizer()
    documents = [synthetic.base_document(i, kind) for i in range(50)]
    assert (
        documents[7] == synthetic.base_document(7, kind) and len({str(d) for d in documents}) == 50
    )
    for parts in documents:
        full = [(i, text) for i, (text, weight) in enumerate(parts) if weight == synthetic.WEIGHT]
        assert full and all(
            tokenizer.unk_token_id not in tokenizer(text)["input_ids"] for text, _ in parts
        )
        for i, text in full:
            before = " ".join(t for t, _ in parts[:i])
            if kind in ("repeat", "notes"):
                assert _names(text) and _names(text) <= _names(before) | {"Meet", "Here"}
            else:
                assert text in before.replace(".", " ").split()


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind of document is 'odd'; choose from pairs"):
        synthetic.base_document(0, "odd")
