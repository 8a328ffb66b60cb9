"""Which texts are evaluated: drawn by seed and content, set by set, with partners."""

import gzip
import json
import random

import pytest
from conftest import write_jsonl

from icae_jax.data.rows import Sieve
from icae_jax.evaluation import examples as drawn

ROWS = [{"id": f"t{i}", "text": f"text {i}"} for i in range(20)]
QA = [
    {
        "id": f"q{i}.{j}",
        "context": f"context {i}",
        "question": f"question {j} of {i} ?",
        "answers": [f"answer {j}", "another"],
    }
    for i in range(6)
    for j in range(1 + i)
]


class ByWords:
    """A suite that makes an example of every text whose words it can count, of as many tokens as
    its number says.
    """

    name = "counting"

    def examples(self, text):
        number = int(text.text.split()[-1])
        if number % 3 == 2:
            return "texts of a number that it does not like"
        return [
            drawn.example(text, range(1 + number % 4), part, questions=text.questions)
            for part in range(1 + number % 2)
        ]


def read(data, limit=0, seed=0):
    return drawn.read_texts(data, None, limit, seed)


def keys(sets):
    return {name: [text.key for text in texts] for name, texts in sets.items()}


@pytest.mark.parametrize("rows", [ROWS, QA], ids=["texts", "questions"])
def test_the_draw_is_of_seed_and_content_alone(rows, tmp_path):
    """Breaks when the order of the lines, the file's name or its packing choose the texts, or the
    seed does not.
    """
    shuffled = random.Random(0).sample(rows, len(rows))
    first, again = (
        write_jsonl(tmp_path / "a.jsonl", rows),
        write_jsonl(tmp_path / "b.jsonl", shuffled),
    )
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in shuffled).encode()))
    one, two, three = (
        next(iter(read(path).values())) for path in (f"x={first}", f"x={again}", f"x={packed}")
    )
    assert one == two == three and len(one) == len({text.key for text in one})
    assert [q.id for text in one for q in text.questions] == [
        q.id for text in two for q in text.questions
    ]
    other = next(iter(read(f"x={first}", seed=1).values()))
    assert [t.key for t in one] != [t.key for t in other] and sorted(t.key for t in one) == sorted(
        t.key for t in other
    )
    assert [t.id for t in one] != sorted(t.id for t in one)
    bare = [
        {k: v for k, v in row.items() if k != "id"} for row in shuffled
    ]  # known by the numbers of their lines
    assert [t.key for t in next(iter(read(write_jsonl(tmp_path / "d.jsonl", bare)).values()))] == [
        t.key for t in one
    ]


def test_the_draw_of_a_part_is_that_of_the_whole(tmp_path):
    """Breaks when a text's rank depends on which file it is in, or on what stands beside it."""
    whole = next(iter(read(write_jsonl(tmp_path / "whole.jsonl", ROWS)).values()))
    halves = read(
        f"{write_jsonl(tmp_path / 'a.jsonl', ROWS[:9])},"
        f"{write_jsonl(tmp_path / 'b.jsonl', ROWS[9:])}"
    )
    assert list(halves) == ["a", "b"]
    for texts in halves.values():
        ids = [text.id for text in texts]
        assert ids == [text.id for text in whole if text.id in ids]


def test_a_text_has_all_of_its_questions(tmp_path):
    """Breaks when questions on one text make several texts, lose an answer or their ids, or come in
    an order that the file decides.
    """
    texts = read(write_jsonl(tmp_path / "qa.jsonl", QA))["qa"]
    assert {t.text: len(t.questions) for t in texts} == {f"context {i}": i + 1 for i in range(6)}
    assert {q.id for t in texts for q in t.questions} == {row["id"] for row in QA}
    assert all(
        q.answers[1] == "another" and q.id[1:].split(".")[0] == t.text.split()[1]
        for t in texts
        for q in t.questions
    )


def test_names_of_sets(tmp_path):
    """Breaks when a set is not its file, its given name, or its rows' subset; or when files of one
    name become one set.
    """
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    a = write_jsonl(tmp_path / "one" / "dev.jsonl", ROWS[:2])
    b = write_jsonl(
        tmp_path / "two" / "dev.jsonl",
        [{**row, "subset": f"s{i % 2}"} for i, row in enumerate(ROWS[2:6])],
    )
    assert {name: len(texts) for name, texts in read(f"{a},{b}").items()} == {
        "one/dev": 2,
        "two/dev/s0": 2,
        "two/dev/s1": 2,
    }
    assert list(read(f"x={a},{b}")) == ["x", "dev/s0", "dev/s1"]
    assert drawn.named_sources(f"x={a},tfds:pwc:test") == {"x": a, "pwc:test": "tfds:pwc:test"}
    odd = write_jsonl(tmp_path / "k=4.jsonl", ROWS[:2])  # a name with = that is a file's own
    assert list(read(odd)) == ["k=4"]
    for data in (f"x={a},x={b}", f"{a},{a}"):
        with pytest.raises(
            ValueError, match="two sources have one name; give names, as in NAME=FILE,NAME=FILE"
        ):
            read(data)


def test_unanswerable_questions_and_empty_texts(tmp_path):
    """Breaks when one ends the evaluation, is asked, or takes its text's other questions along; or
    an answer of one's own is not heeded.
    """
    rows = [*QA[:3], {**QA[1], "id": "none", "question": "what ?", "answers": []}, {"text": " "}]
    path = write_jsonl(tmp_path / "qa.jsonl", rows)
    for no_answer in ("", "unanswerable"):
        sieve = Sieve(no_answer=no_answer)
        questions = {
            q.id: q.answers
            for text in drawn.read_texts(path, None, 0, 0, sieve)["qa"]
            for q in text.questions
        }
        assert (
            questions.pop("none", ()) == ((no_answer,) if no_answer else ()) and len(questions) == 3
        )
        assert len(sieve.left_out) == (1 if no_answer else 2)


def test_names_of_folders_globs_and_sets(tmp_path):
    """Breaks when a set is named by a pattern's stars, or a folder by nothing."""
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus" / "a.jsonl", ROWS[:2])
    for source in (f"{tmp_path}/corpus", f"{tmp_path}/corpus/", f"{tmp_path}/corpus/*.jsonl"):
        assert list(read(source)) == ["corpus"]
    assert drawn.named_sources("hf:org/name:test,gs://bucket/b/*.jsonl.gz") == {
        "org/name:test": "hf:org/name:test", "b": "gs://bucket/b/*.jsonl.gz"
    }  # fmt: skip


def test_ids_that_come_twice_are_numbered(tmp_path):
    """Breaks when two texts or two questions of a set cannot be told apart in the results."""
    rows = [
        {"id": "a", "text": "1"},
        {"id": "a", "text": "2"},
        {"id": "a#2", "text": "3"},
        {"id": "a", "text": "2"},
    ]
    assert sorted(t.id for t in read(write_jsonl(tmp_path / "t.jsonl", rows))["t"]) == [
        "a",
        "a#2",
        "a#2#2",
    ]
    rows = [
        {"id": "q", "context": f"c{i // 2}", "question": f"{i} ?", "answer": "x"} for i in range(4)
    ]
    found = read(
        f"{write_jsonl(tmp_path / 'q.jsonl', rows)},{write_jsonl(tmp_path / 'r.jsonl', rows)}"
    )
    for texts in found.values():
        assert sorted(q.id for t in texts for q in t.questions) == ["q", "q#2", "q#3", "q#4"]


def test_the_limit_is_of_each_set_and_unusable_texts_are_replaced(tmp_path):
    """Breaks when a limit is shared by sets, an unusable text takes a place, or its reason or
    number is lost.
    """
    sets = read(
        f"{write_jsonl(tmp_path / 'a.jsonl', ROWS)},{write_jsonl(tmp_path / 'b.jsonl', ROWS[:10])}",
        limit=4,
    )
    examples, left_out = drawn.make_examples(sets, 4, ByWords())
    for name, texts in sets.items():
        usable = [t for t in texts if int(t.text.split()[-1]) % 3 != 2]
        assert len(usable) > 4 and {e.id for e in examples if e.set == name} == {
            t.id for t in usable[:4]
        }
    passed = 0  # unusable texts before the fourth usable one of each set
    for texts in sets.values():
        usable = [int(t.text.split()[-1]) % 3 != 2 for t in texts]
        fourth = [i for i, is_usable in enumerate(usable) if is_usable][3]
        passed += usable[:fourth].count(False)
    assert passed and left_out == {"texts of a number that it does not like": passed}
    assert len({e.key for e in examples}) == len(examples), (
        "one text in two sets, or in two parts, is two examples"
    )
    every, left_out = drawn.make_examples(sets, 0, ByWords())
    assert (
        left_out == {"texts of a number that it does not like": 6 + 3}
        and len({(e.set, e.id) for e in every}) == 14 + 7
    )
    with pytest.raises(
        ValueError,
        match=r"--data has no text for --suite counting: 1 text of a number that it does not ",
    ):
        drawn.make_examples(read(write_jsonl(tmp_path / "c.jsonl", ROWS[2:3])), 0, ByWords())


def test_partners_are_of_another_text_and_stay(tmp_path):
    """Breaks when the control's memory is the text's own, depends on the order of the lines, or
    none is given where there is one.
    """
    made = []
    for seed in range(2):
        rows = random.Random(seed).sample(ROWS, len(ROWS))
        sets = read(f"x={write_jsonl(tmp_path / 'a.jsonl', rows)}")
        examples, _ = drawn.make_examples(sets, 0, ByWords())
        made.append({e.key: (e, e.partner) for e in examples})
        of = {}
        for e in examples:
            of.setdefault(e.ids, set()).add(e.cluster)
        assert all(e.partner and of[e.partner] - {e.cluster} for e in examples)
        assert [len(e.ids) for e in examples] == sorted(len(e.ids) for e in examples)
    assert made[0] == made[1] and len({e.cluster for e, _ in made[0].values()}) < len(made[0])
    twice = {
        "a": [drawn.Text("k", "1", "a", "text 1", ())],
        "b": [drawn.Text("k", "1", "b", "text 1", ())],
    }
    assert [e.partner for e in drawn.make_examples(twice, 0, ByWords())[0]] == [
        ()
    ] * 4  # the same text in two sets is no other text
    asked = [
        {"id": f"q{i}", "context": "text 4", "question": f"question {i} ?", "answers": ["one"]}
        for i in range(2)
    ]
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("a", asked[:1]), ("b", asked[1:]))
    ]
    examples, _ = drawn.make_examples(read(",".join(files)), 0, ByWords())
    assert len({e.cluster for e in examples}) == 2 and not any(
        e.partner for e in examples
    )  # nor with another question on it


def test_bad_input(tmp_path):
    good = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(
        ValueError, match="--limit is -1; give how many texts of each set to take, or 0 for all"
    ):
        read(good, limit=-1)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"--data .*empty\.jsonl: no rows; the data set is empty"):
        read(f"{good},{tmp_path / 'empty.jsonl'}")
    with pytest.raises(ValueError, match="the data source is empty"):
        read(" , ")
