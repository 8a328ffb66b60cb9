"""Results as printed and as a page: tables, figures by group, examples worst first, escaping."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from icae_jax.evaluation import page, report
from icae_jax.evaluation.suites import common

FACTS = ["adapter a<b>: icae", "seed 0"]


@pytest.fixture
def drawn(monkeypatch):
    """(kind, where along the x axis, arms, x label) of every figure that is drawn."""
    seen = []
    for kind, draw in (("lines", report.lines), ("bars", report.bars)):

        def spy(*args, kind=kind, draw=draw, **kw):
            if kind == "lines":
                at, arms, xlabel = (
                    {name: list(xs) for name, (xs, _) in args[0].items()},
                    list(args[0]),
                    args[1],
                )
            else:
                at, arms, xlabel = list(args[0]), list(args[1]), args[3] if len(args) > 3 else ""
            seen.append((kind, at, arms, xlabel))
            return draw(*args, **kw)

        monkeypatch.setattr(report, kind, spy)
    return seen


def found(mean, n=4):
    return {"mean": mean, "low": mean - 0.5, "high": mean + 0.5, "n": n}


def result(suite="autoencode", scores=None, groups=None, examples=(), **more):
    scores = scores or {
        "ae_loss": {"memory": found(1.25), "shuffled memory": found(4)},
        "bleu": {"memory": found(30.04, 3)},
    }
    return {
        "suite": suite,
        "scores": scores,
        "groups": groups or {},
        "examples": list(examples),
        **more,
    }


def example(i, score, made="the cat ran", **texts):
    texts = {"original": "the cat sat", "memory": made} | texts
    return {
        "id": f"t{i}",
        "set": "s",
        "group": {},
        "scores": {"bleu": {"memory": score}},
        "texts": texts,
        "ties": {},
    }


def written(tmp_path, of, label="context tokens"):
    page.write(tmp_path / "report.html", of, label, FACTS)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_printed_table():
    """Breaks when a score stands in another's column, an arm without a metric shifts its row, or an
    interval is not the score's.
    """
    lines = page.text(result()).splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == ["AE loss, nats/token", "BLEU-4", "n"]
    assert re.split(r"\s{2,}", lines[2]) == [
        "memory",
        "1.250 [0.750, 1.750]",
        "30.0 [29.5, 30.5]",
        "4",
    ]
    assert (
        lines[3].split() == ["shuffled", "memory", "4.000", "[3.500,", "4.500]", "4"]
        and len(lines) == 4
    )


def test_an_end_without_a_bound_is_a_dash():
    """Breaks when an interval that could not be told ends the command after all is measured."""
    scores = {"retention": {"memory": {"mean": 80.0, "low": 3.0, "high": None, "n": 3}}}
    assert "80.0 [3.0, –]" in page.text(result("qa", scores)) and page.figures(
        result("qa", scores), "set"
    )[0].startswith("<svg")


def test_groups_are_printed_and_drawn(drawn, tmp_path):
    """Breaks when a group of numbers is not drawn along them, sets are (whatever their names end
    in), or a missing arm ends the command.
    """
    values = {
        "1-100": {"ae_loss": {"memory": found(1)}},
        "101-200": {"ae_loss": {"memory": found(2), "full context": found(3)}},
    }
    of = result(
        scores={"ae_loss": {"memory": found(1.5), "full context": found(3)}},
        groups={"tokens": values},
    )
    assert "tokens 101-200" in page.text(of) and page.text(of).count("AE loss") == 3
    html = written(tmp_path, of)
    assert html.count("<svg") == 1 and "<th>tokens 101-200</th>" in html
    assert drawn.pop() == (
        "lines",
        {"memory": [100, 200], "full context": [200]},
        ["memory", "full context"],
        "context tokens",
    )

    for names in (("squad", "race"), ("train-1", "dev-1"), ("mrqa/2018-2", "mrqa/2019-2")):
        of = result(
            "qa",
            {"f1": {"memory": found(9)}},
            {"set": {name: {"f1": {"memory": found(9)}} for name in names}},
        )
        assert written(tmp_path, of, "set").count("<svg") == 1
        assert drawn.pop() == ("bars", list(names), ["memory"], "set") and not drawn

    one = result(
        "qa",
        {"f1": {"memory": found(9), "full context": found(8)}},
        {"set": {"squad": {"f1": {"memory": found(9)}}}},
    )
    assert "set squad" not in page.text(one) and "<th>set squad" not in written(tmp_path, one)
    assert drawn.pop() == ("bars", [""], ["memory", "full context"], "")
    # A metric that one group alone has, as perplexity in `ablate`, stands by itself.
    parts = {
        "continue": {"perplexity": {"a": found(5), "b": found(6)}},
        "autoencode": {"ae_loss": {"a": found(1), "b": found(2)}},
    }
    of = result(
        "ablate",
        {"perplexity": parts["continue"]["perplexity"], "ae_loss": parts["autoencode"]["ae_loss"]},
        {"measured": parts},
    )
    assert (
        len(page.figures(of, "measured on")) == 2
        and [d[:3] for d in drawn] == [("bars", [""], ["a", "b"])] * 2
    )


def test_an_arm_has_one_colour_on_a_page(monkeypatch):
    """Breaks when each figure of a page chooses its own colours."""
    seen = []
    bars = report.bars
    monkeypatch.setattr(
        report,
        "bars",
        lambda *args, colours=None, **kw: (
            seen.append(colours) or bars(*args, colours=colours, **kw)
        ),
    )
    page.figures(result(), "context tokens")
    assert len(seen) == 2 and seen[0] == seen[1] and set(seen[0]) == {"memory", "shuffled memory"}


def tokens(k):
    whole = {"memory": found(1.0)}
    return {
        "ae_loss": whole
        | {f"without token {j}": found(2 + j) for j in range(k)}
        | {f"first {j}": found(9 - j) for j in range(1, k)}
    }


def test_the_worth_of_tokens(drawn):
    """Breaks when the most missed token is not the one without which the loss is highest, or every
    token gets a line on the terminal.
    """
    text = page.text(result("tokens", tokens(20)))
    assert (
        "AE loss, nats/token: 1.000 with all tokens, 21.000 without token 19, 2.000 without token 0"
        in text
    )
    arms = [re.split(r"\s{2,}", line)[0] for line in text.splitlines()[2:8]]
    assert (
        arms == ["memory", "first 1", "first 2", "first 4", "first 8", "first 16"]
        and "without token 3" not in text
    )
    assert len(page.figures(result("tokens", tokens(20)), "")) == 2
    assert drawn[0][1]["one token hidden"] == list(range(20)) and drawn[1][1]["first tokens"] == [
        *range(1, 20),
        20,
    ]
    assert len(page.figures(result("tokens", tokens(1)), "")) == 1


def test_pairs(tmp_path):
    """Breaks when a difference loses its sign, or win and lose change places."""
    pair = {"a against b": {"difference": found(1.25), "win": 50.0, "lose": 30.0, "tie": 20.0}}
    of = result("ablate", {"f1": {"a": found(3), "b": found(2)}}, pairs={"f1": pair})
    text = page.text(of)
    assert re.split(r"\s{2,}", text.splitlines()[-1]) == [
        "a against b: F1",
        "+1.2 [+0.8, +1.8]",
        "50.0",
        "30.0",
        "20.0",
        "4",
    ]
    assert re.split(r"\s{2,}", text.splitlines()[-3].strip()) == [
        "difference",
        "win %",
        "lose %",
        "tie %",
        "n",
    ]
    html = written(tmp_path, of)
    assert "<td>a against b: F1</td>" in html and "<td>+1.2 [+0.8, +1.8]</td><td>50.0</td>" in html


def test_examples_are_shown_worst_first(tmp_path):
    """Breaks when the page shows only good examples, or one of them twice."""
    many = [
        example(i, float(score))
        for i, score in enumerate((50, 10, 90, 30, 70, 20, 80, 40, 60, 0, 100, 95))
    ]
    html = written(tmp_path, result(examples=many))
    shown = [int(i) for i in re.findall(r"<h3>s: t(\d+)</h3>", html)]
    scores = [many[i]["scores"]["bleu"]["memory"] for i in shown]
    assert (
        scores[:4] == [0, 10, 20, 30]
        and scores == sorted(scores)
        and scores[-1] == 100
        and len(set(shown)) == len(shown) == 8
    )
    few = re.findall(r"<h3>s: t(\d+)</h3>", written(tmp_path, result(examples=many[:3])))
    assert few == ["1", "0", "2"]
    # A loss is worst where it is highest.
    by_loss = [
        e | {"scores": {"answer_loss": {"memory": e["scores"]["bleu"]["memory"]}}} for e in many[:3]
    ]
    assert re.findall(r"<h3>s: t(\d+)</h3>", written(tmp_path, result(examples=by_loss))) == [
        "2",
        "0",
        "1",
    ]
    without_texts = [{**e, "texts": {}} for e in many]
    assert "<h2>Examples" not in written(tmp_path, result(examples=without_texts))


def test_differences_are_marked_against_the_right_text(tmp_path):
    """Breaks when an answer is held against the text, an arm's text against another's original, or
    an original is shown as an arm.
    """
    html = written(tmp_path, result(examples=[example(0, 1.0, **{"full context": "the cat sat"})]))
    assert (
        "the cat <del>sat</del> <ins>ran</ins>" in html
        and '<p>full context</p><div class="text">the cat sat</div>' in html
    )
    of = {"texts": {"question": "who ?", "answers": ["a dog", "dog"], "memory": "a cat"}}
    of["scores"] = {"f1": {"memory": 12.34}, "em": {"memory": 0.0}}
    html = written(tmp_path, result("qa", examples=[example(0, 1.0) | of]))
    assert (
        "<b>who ?</b> — a dog | dog" in html
        and "a <del>dog</del> <ins>cat</ins>" in html
        and "memory (F1 12.3, EM 0.0)" in html
    )
    texts = {
        "original, random": "sea sky",
        "random": "sea sun",
        "original, normal text": "a b",
        "normal text": "a b",
    }
    html = written(
        tmp_path,
        result(
            "memorise",
            examples=[example(0, 1.0) | {"texts": texts, "scores": {"bleu": {"random": 3.0}}}],
        ),
    )
    shown = html.partition("<h2>Examples")[2].split("<h2>")[0]
    assert (
        "sea <del>sky</del> <ins>sun</ins>" in shown
        and "a b</div>" in shown
        and "original" not in shown
    )


def test_nothing_is_taken_for_markup(tmp_path):
    """Breaks when a name, an id, a question or a text of the data can put markup into the page."""
    bad = "<script>alert('&')</script>"
    scores = {"f1": {bad: found(1), "memory": found(2)}}
    groups = {"set": {bad: scores, f"{bad}2": scores}}
    one = example(0, 1.0) | {"id": bad, "set": bad, "scores": {"f1": {bad: 1.0, "memory": 2.0}}}
    one["texts"] = {"question": bad, "answers": [bad], bad: bad, "memory": bad}
    pairs = {
        "f1": {
            f"{bad} against memory": {"difference": found(1), "win": 1.0, "lose": 1.0, "tie": 1.0}
        }
    }
    page.write(tmp_path / "p.html", result("qa", scores, groups, [one], pairs=pairs), bad, [bad])
    html = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<script" not in html and html.count("&lt;script&gt;") > 10
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        ElementTree.fromstring(svg)


def test_the_page_says_what_was_measured_and_what_was_published(tmp_path):
    """Breaks when facts or the papers' figures are lost, or the page needs a file beside it."""
    html = written(tmp_path, result())
    assert (
        "adapter a&lt;b&gt;: icae<br>seed 0" in html
        and "<title>icae evaluate: autoencode</title>" in html
    )
    assert (
        "<h2>Published figures</h2>" in html and "2307.06945" in html and "95 % intervals" in html
    )
    assert html.count("<svg") == 2 and not re.search(r"<link|src=|@import|href=\"http", html)
    assert "Published figures" not in written(
        tmp_path, result("span", {"perplexity": {common.MEMORY: found(3)}})
    )


def several_k(suite="qa", **more):
    """Results of memories of two sizes, a cascade and controls."""
    arms = ("memory", "memory k=2", "cascade", "full context", "shuffled memory")
    sizes = {
        arm: {"tokens": t, "bytes": 256.0 * t} for arm, t in zip(arms, (8, 4, 5.5), strict=False)
    }
    sizes |= {"full context": {"tokens": 0.0, "bytes": None}, "shuffled memory": sizes["memory"]}
    by_arm = {arm: found(10 * i) for i, arm in enumerate(arms)}
    scores = {"f1": by_arm, "em": by_arm, "rouge1": by_arm}
    return result(suite, scores, sizes=sizes, **more)


def test_sizes_stand_in_the_table():
    """Breaks when a size stands in another arm's row, or an arm without a memory is given one."""
    header, *rows = [line for line in page.text(several_k()).splitlines() if "---" not in line]
    assert re.split(r"\s{2,}", header.strip())[-3:] == ["memory tokens", "memory bytes", "n"]
    cells = {re.split(r"\s{2,}", row)[0]: re.split(r"\s{2,}", row)[4:] for row in rows}
    assert cells["memory"] == ["8", "2,048", "4"] and cells["memory k=2"] == ["4", "1,024", "4"]
    assert cells["cascade"] == ["5.5", "1,408", "4"] and cells["full context"] == ["4"]


def test_scores_are_drawn_against_tokens_and_bytes(monkeypatch, tmp_path):
    """Breaks when an arm is drawn at another's size or left out, the controls are no levels, or
    results of one size or of an earlier version, which have none, are not shown as before.
    """
    seen, draw = [], report.lines
    monkeypatch.setattr(report, "lines", lambda *a, **kw: (seen.append((a, kw)), draw(*a, **kw))[1])
    assert written(tmp_path, several_k(), "set").count("<svg") == 3 + 4
    assert [(args[1], args[2]) for args, _ in seen] == [
        (x, y) for y in ("F1", "EM") for x in ("memory tokens", "memory bytes")
    ]
    for (series, *_), how in seen:
        factor = 1 if series["memory"][0][0] == 4 else 256
        assert series == {
            "memory": ([4 * factor, 8 * factor], [(10, 9.5, 10.5), (0, -0.5, 0.5)]),
            "cascade": ([5.5 * factor], [(20, 19.5, 20.5)]),
        }
        assert how["levels"] == {"full context": (30, 29.5, 30.5)} and how["log_x"]
    seen.clear()
    one = several_k("autoencode")
    del one["scores"]["f1"]["memory k=2"], one["scores"]["em"], one["scores"]["rouge1"]
    earlier = several_k()
    del earlier["sizes"]
    assert (
        written(tmp_path, one).count("<svg") == 1 and written(tmp_path, earlier).count("<svg") == 3
    )
    assert not seen and "memory bytes" not in page.text(earlier)
