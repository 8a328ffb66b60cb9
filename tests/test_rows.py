"""The forms of a row, errors that name place and field, and what is left out."""

import json
import re

import pytest

from icae_jax.data import forms, rows, sources
from icae_jax.errors import UserError

ONE = {
    "empty texts": "1 empty text",
    "empty questions": "1 empty question",
    "questions without an answer": "1 question without an answer",
}
QUESTION = {"context": "c", "question": "q"}


@pytest.mark.parametrize(
    ("raw", "row"),
    [
        ({"text": "t"}, ("t", None, None, "w", "0", "")),
        ({"text": "t", "id": 7}, ("t", None, None, "w", "7", "")),
        ({"text": "t", "id": "", "subset": "s"}, ("t", None, None, "w", "0", "s")),
        ({"text": "t", "id": None, "subset": None}, ("t", None, None, "w", "0", "")),
        ({"text": "t", "messages": 3}, ("t", None, None, "w", "0", "")),
        ({"document": "t", "summary": "s"}, ("t", None, None, "w", "0", "")),
        ({"input": "c", "prompt": "q", "answer": "a"}, ("c", "q", ("a",), "w", "0", "")),
        ({"instruction": "q", "input": "c", "output": "a"}, ("c", "q", ("a",), "w", "0", "")),
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "x"},
            ("c", "q", ("a",), "w", "0", ""),
        ),
        (
            QUESTION | {"answers": ["a", "b"], "id": "x", "subset": "s"},
            ("c", "q", ("a", "b"), "w", "x", "s"),
        ),
        (
            QUESTION | {"answers": {"text": ["a", "b"], "answer_start": [3]}},
            ("c", "q", ("a", "b"), "w", "0", ""),
        ),
        (
            QUESTION | {"answers": [{"text": "a", "answer_start": 3}, {"text": "b"}]},
            ("c", "q", ("a", "b"), "w", "0", ""),
        ),
        (
            QUESTION | {"answers": [{}, {"text": "a"}, {"text": None}]},
            ("c", "q", ("a",), "w", "0", ""),
        ),
        (QUESTION | {"answers": ["a", None]}, ("c", "q", ("a",), "w", "0", "")),
        (QUESTION | {"answer": "a"}, ("c", "q", ("a",), "w", "0", "")),
        (QUESTION | {"answer": "a", "answers": None}, ("c", "q", ("a",), "w", "0", "")),
        ({"document": "c", "question": "q", "answer": "a"}, ("c", "q", ("a",), "w", "0", "")),
        ({"context": "c"}, ("c", None, None, "w", "0", "")),
        ({"text": "c", "question": "q", "answer": "a"}, ("c", "q", ("a",), "w", "0", "")),
        (
            {"text": "t", "instruction": "q", "input": "c", "output": "a"},
            ("c", "q", ("a",), "w", "0", ""),
        ),
        ({"text": "t"} | QUESTION | {"answer": "a"}, ("c", "q", ("a",), "w", "0", "")),
        ({"text": "t", "question": "q"}, ("t", None, None, "w", "0", "")),
    ],
)
def test_rows_of_every_form(raw, row):
    """Breaks when a documented form is not read, or fields are mixed up."""
    (made,) = forms.parse(raw, "w", "0")
    assert made[:6] == row and made.own_id == bool(raw.get("id"))
    assert made.answer == (row[2] and "a")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1], "a JSON list, expected an object"),
        ({}, "fields none; expected text"),
        (
            {"context": "c", "title": "t", "document": "d"},
            "fields context, document, title: both document and context of",
        ),
        (
            QUESTION | {"answers": ["a"], "is_impossible": "perhaps"},
            "is_impossible is 'perhaps'; expected true or false",
        ),
        ({"text": 3}, "text is int, expected text; write a number in quotes"),
        ({"input": "c", "prompt": ["p"], "answer": "a"}, "prompt is list, expected text"),
        (QUESTION | {"answers": ["a", 3]}, r"answers is \['a', 3\], expected a list"),
        (
            QUESTION | {"answer": {"value": "a", "aliases": ["b"]}},
            r"answer is .'value': 'a', .*, expected a list of texts",
        ),
        (
            QUESTION | {"answers": [{"answer": "a"}]},
            r"answers is ..'answer': 'a'.., expected a list",
        ),
        (
            QUESTION | {"answer": 1984},
            "answer is 1984, expected a list of texts, or a text .a number in quotes",
        ),
        (
            QUESTION | {"document": "d", "answer": "a"},
            "fields answer, context, document, question: both context and document",
        ),
        ({"document": "d", "content": "c"}, "fields content, document: both document and content"),
        ({"document": "d", "question": "q"}, "fields document, question; expected text"),
        (
            {"context": "c", "qas": [{"question": "q"}]},
            "answers is missing in a question of qas; its fields are question",
        ),
        ({"context": "c", "qas": ["q"]}, "qas holds 'q', expected an object"),
        ({f"key\n{i}": {} for i in range(10000)}, r"fields key 0, key 1, .*, …; expected text"),
        (
            {"messages": [{"role": ["user"], "content": "x"}]},
            r"messages holds a message of role .*user",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": ["text"]}]}]},
            "messages holds a part of type",
        ),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            "messages holds a part of type 'str'; only text",
        ),
        ({"messages": '[{"role":\n "user"}]'}, "messages is .*, expected a list of messages"),
        ({"context": "c", "qas": "a\nb"}, "qas is .*, expected a list of questions"),
        ({"paragraphs": [{"text": "t"}, {"words": 1}]}, "paragraph 2: fields words; expected"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages holds a message of role 'tool'; expected system",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages holds a part of type 'image_url'; only text",
        ),
        ({"conversations": ["x"]}, r"conversations is \['x'\], expected a list of messages"),
    ],
)
def test_bad_rows_name_place_and_field(raw, message):
    """Breaks when a bad row is skipped, or its error does not say where and what is wrong."""
    with pytest.raises(UserError, match=f"^a.jsonl:3: {message}") as error:
        forms.parse(raw, "a.jsonl:3", "2")
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


SQUAD = {
    "version": "v2.0",
    "data": [
        {"title": "a", "paragraphs": [{"context": "c", "qas": [
            {"id": "i", "question": "q", "answers": [{"text": "a", "answer_start": 0}],
             "is_impossible": False},
            {"id": "j", "question": "r", "answers": [], "is_impossible": True,
             "plausible_answers": [{"text": "x"}]},
        ]}]},
        {"title": "b", "paragraphs": [
            {"context": "d", "qas": [{"question": "s", "is_impossible": True}]},
            {"context": "e", "qas": []},
        ]},
    ],
}  # fmt: skip


def test_squad_as_it_is_published():
    """Breaks when SQuAD's nesting is not read, plausible answers count as right, a text with many
    questions becomes many memories, or a question's place is lost.
    """
    made = [row for raw in forms.unwrapped(SQUAD, "w", "0") for row in forms.parse(*raw)]
    assert [row[:3] for row in made] == [
        ("c", "q", ("a",)),
        ("c", "r", ()),
        ("d", "s", ()),
        ("e", None, None),
    ]
    assert [row.id for row in made] == ["i", "j", "0.1.0.0", "0.1.1"] and made[
        2
    ].where == "w: item 2: paragraph 1"
    assert list(sources.with_ids(made)) == ["i", "0.1.0.0", "0.1.1"]


@pytest.mark.parametrize(
    "impossible", [True, "true", "TRUE", "1", 1, "yes", False, "false", "0", 0.0, "No", "", None]
)
def test_an_impossible_question_has_no_answer(impossible):
    """Breaks when an answer beside is_impossible is trained on, or the text "false" counts as
    true.
    """
    beside = {"answers": ["a"], "is_impossible": impossible}
    nested = {"context": "c", "qas": [{"question": "q"} | beside]}
    for raw in (QUESTION | beside, nested):
        (row,) = forms.parse(raw, "w", "0")
        assert row[:3] == (
            "c",
            "q",
            () if str(impossible).lower() in ("true", "1", "yes") else ("a",),
        )


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    ("raw", "row"),
    [
        (
            {"messages": chat(("system", "text"), ("user", "q"), ("assistant", "a"))},
            ("text", "q", ("a",)),
        ),
        (
            {
                "messages": chat(
                    ("user", "h"),
                    ("assistant", "b"),
                    ("user", "q"),
                    ("assistant", "a"),
                    ("user", "bye"),
                )
            },
            ("user: h\nassistant: b", "q", ("a",)),
        ),
        ({"messages": chat(("user", "q"), ("assistant", "a"))}, ("", "q", ("a",))),
        ({"messages": chat(("system", "text"), ("user", "q"))}, ("text", "q", ())),
        ({"messages": chat(("assistant", "a"))}, ("assistant: a", None, None)),
        ({"messages": []}, ("", None, None)),
        ({"messages": None}, ("", None, None)),
        (
            {"messages": chat(("System", "text"), ("User", "q"), ("Assistant", None))},
            ("text", "q", ("",)),
        ),
        (
            {
                "messages": chat(
                    ("system", [{"type": "text", "text": "te"}, {"type": "text", "text": "xt"}]),
                    ("user", "q"),
                )
            },
            ("text", "q", ()),
        ),
        (
            {
                "system": float("nan"),
                "messages": chat(
                    ("user", "h"), ("assistant", "b"), ("user", "q"), ("assistant", "a")
                ),
            },
            ("user: h\nassistant: b", "q", ("a",)),
        ),
        (
            {
                "system": "s",
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            },
            ("s", "q", ("a",)),
        ),
    ],
)
def test_chats(raw, row):
    """Breaks when the last reply is not the answer, earlier messages are lost, or the text contains
    the reply.
    """
    (made,) = forms.parse(raw, "w", "0")
    assert made[:3] == row


@pytest.mark.parametrize(
    "spelled",
    [
        '{"text": "\\ud83d"}',
        '{"content": "\\ud83d"}',
        '{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        '{"context": "c", "qas": [{"question": "\\udc00", "answers": []}]}',
        '{"context": "c", "question": "q", "answers": [{"text": "\\ud83d"}]}',
        '{"instruction": "q", "input": "c", "output": "\\ud83d"}',
    ],
)
def test_half_a_surrogate_pair_is_refused_in_every_form(spelled):
    """Breaks when half a surrogate pair, which JSON can spell, passes in some form."""
    with pytest.raises(UserError, match=r"^w: .*is not valid text: .*half of a surrogate pair"):
        forms.parse(json.loads(spelled), "w", "0")


NAN = float("nan")
TAKEN = [
    # raw row; the row as it is taken, or None; why something of it was left out
    ({"text": " "}, None, rows.EMPTY_TEXT),
    ({"text": None}, None, rows.EMPTY_TEXT),
    ({"text": NAN}, None, rows.EMPTY_TEXT),
    ({"instruction": "q", "input": "", "output": "a"}, None, rows.EMPTY_TEXT),
    (QUESTION | {"answers": []}, ("c", "q", ()), rows.NO_ANSWER),
    (QUESTION | {"answers": None}, ("c", "q", ()), rows.NO_ANSWER),
    (QUESTION | {"answers": {"text": [], "answer_start": []}}, ("c", "q", ()), rows.NO_ANSWER),
    (QUESTION | {"answers": [""], "is_impossible": True}, ("c", "q", ()), rows.NO_ANSWER),
    (QUESTION | {"is_impossible": True}, ("c", "q", ()), rows.NO_ANSWER),
    (QUESTION | {"answer": ""}, ("c", "q", ()), rows.NO_ANSWER),
    ({"context": "c", "question": None, "answer": "a"}, ("c", None, ()), rows.EMPTY_QUESTION),
    (QUESTION | {"answers": ["", "a"]}, ("c", "q", ("a",)), None),
    ({"text": "t"}, ("t", None, None), None),
]


@pytest.mark.parametrize(("raw", "taken", "reason"), TAKEN)
def test_what_cannot_be_used_is_left_out_and_counted(raw, taken, reason):
    """Breaks when an empty row ends a run, is used, or is left out silently; or when strict mode
    lets it pass.
    """
    (row,) = forms.parse(raw, "f:1", "0")
    sieve = rows.Sieve()
    made = sieve.take(row)
    assert (made and (made.text, made.question or None, made.answers)) == taken
    assert sieve.left_out == ({reason: (1, "f:1")} if reason else {})
    assert str(sieve) == (f"{ONE[reason]} (the first: f:1)" if reason else "")
    strict = rows.Sieve("--strict")
    if reason:
        with pytest.raises(UserError, match=r"^f:1: the (text|question) .*without --strict$"):
            strict.take(row)
    else:
        assert strict.take(row) == made


def test_an_answer_of_ones_own():
    """Breaks when no_answer replaces existing answers, or answers an empty question."""
    sieve = rows.Sieve(no_answer="none")
    made = [
        sieve.take(forms.parse(QUESTION | more, "w", "0")[0])
        for more in ({"answers": []}, {"answer": "a"}, {"question": "", "answer": ""})
    ]
    assert [row.answers for row in made] == [("none",), ("a",), ()] and list(sieve.left_out) == [
        rows.EMPTY_QUESTION
    ]
    for bad in (" ", "\ud83d"):
        with pytest.raises(UserError, match=r"^--no_answer is"):
            rows.check_no_answer(bad, "--no_answer")


def test_who_reads_texts_alone_asks_for_no_answers():
    """Breaks when compressing refuses or counts a text because a question about it has no
    answer.
    """
    sieve = rows.Sieve("--strict", questions=False)
    assert sieve.take(forms.parse(QUESTION | {"answers": []}, "w", "0")[0])[:3] == ("c", None, None)
    with pytest.raises(UserError, match=re.escape("w: the text is empty")):
        sieve.take(forms.parse({"text": ""}, "w", "0")[0])
