"""The report: differences marked, markup escaped, figures inside the page and drawn as told."""

import itertools
import re
import time
import warnings
import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from icae_jax.evaluation import report
from icae_jax.evaluation.statistics import Estimate

ARMS = [
    "full context",
    "no context",
    "memory",
    "wrong memory",
    "untrained memory",
    "first tokens",
    "500x",
]


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure that is drawn, to ask what stands in them."""
    seen, svg = [], report._svg
    monkeypatch.setattr(
        report,
        "_svg",
        lambda figure, axes, *rest: (seen.append((figure, axes)), svg(figure, axes, *rest))[1],
    )
    return seen


def estimates(count, start=1.0):
    return [Estimate(start + i, start + i - 0.5, start + i + 0.25, 10) for i in range(count)]


def overlap(labels, renderer):
    """Whether two neighbouring labels, as drawn, cover one another."""
    boxes = [x.get_window_extent(renderer) for x in labels if x.get_text()]
    return any(a.x1 > b.x0 for a, b in itertools.pairwise(boxes))


def test_differences_are_marked_word_by_word():
    """Breaks when a changed word is not marked, an unchanged one is, or text turns into markup."""
    marked = report.difference("Anna was born in Paris .", "Anna was born in <Rome> .")
    assert "Anna was born in <del>Paris</del> <ins>&lt;Rome&gt;</ins> ." in marked
    assert "<del>" not in report.difference("a b", "a b") and "<ins>" not in report.difference(
        "a b", "a b"
    )


def test_differences_keep_line_breaks():
    """Breaks when a text of several lines becomes one, or when a line break lost or made up goes
    unmarked.
    """
    assert (
        report.difference("a b\nc\n\nd", "a  b\r\nc\n\nd")
        == '<div class="text">a b <br> c <br> <br> d</div>'
    )
    assert report.difference("a\nb", "a b") == '<div class="text">a <del>⏎</del> b</div>'
    assert report.difference("a b", "a\nb") == '<div class="text">a <ins>⏎<br></ins> b</div>'


def test_differences_of_long_texts():
    """Breaks when common words in long texts are dropped as junk, or when a page of text takes more
    than seconds.
    """
    original = " ".join(f"the w{i}" for i in range(2000))
    began = time.perf_counter()
    marked = report.difference(original, original.replace("w999 ", "x "))
    assert time.perf_counter() - began < 20
    assert (
        re.findall(r"<(?:del|ins)>.*?</", marked) == ["<del>w999</", "<ins>x</"]
        and marked.count("the") == 2000
    )


def test_tables():
    """Breaks when cells are not escaped or columns do not line up."""
    assert report.table(["a", "b"], [["<x>", 1]]) == (
        "<table><tr><th>a</th><th>b</th></tr><tr><td>&lt;x&gt;</td><td>1</td></tr></table>"
    )
    assert report.text_table(["arm", "score"], [["memory", "97.5 %"]]).splitlines() == [
        "arm      score",
        "--------------",
        "memory  97.5 %",
    ]


def test_page_is_self_contained(tmp_path):
    """Breaks when the page needs a file beside it, or when two figures in it share the names of
    their parts.
    """
    svg = report.curves({"held out": ([1, 2, 3], [3.0, 2.0, 1.0], True)}, log=True)
    assert svg.startswith("<svg") and "held out" in svg
    path = tmp_path / "report.html"
    bars = report.bars(["a", "b"], {"memory": estimates(2)}, "F1 (%)")
    report.write(path, "a < b", ["<p>text</p>", svg, bars])
    page = path.read_text()
    assert "<title>a &lt; b</title>" in page and "<p>text</p>" in page and "<svg" in page
    assert "<link" not in page and "src=" not in page
    assert not set(re.findall(r'<g id="([^"]*)"', page))


def test_figures_are_the_same_bytes_each_time():
    """Breaks when a date, a random name or what was drawn before gets into a figure."""

    def draw():
        band = report.lines(
            {a: (range(9), estimates(9)) for a in ARMS},
            "memory token",
            "loss",
            log=True,
            title="t",
            caption="c",
        )
        return (
            band,
            report.bars(ARMS, {a: estimates(7) for a in ARMS}, "F1"),
            report.curves({"a": ([1, 2], [1, 2], False)}),
        )

    first = draw()
    assert first == draw() and "<metadata>" not in "".join(first)


def test_figures_are_readable_without_seeing_them():
    """Breaks when a figure loses its caption or its name for screen readers, or is no well-formed
    markup.
    """
    svg = report.lines(
        {"a & b": ([1, 2], estimates(2))}, "x", "y <nats>", title="T", caption="what < it shows"
    )
    root = ElementTree.fromstring(svg)
    assert (
        root.tag == "figure" and root[-1].tag == "figcaption" and root[-1].text == "what < it shows"
    )
    assert (
        root[0].attrib["role"] == "img" and root[0].attrib["aria-label"] == "T y <nats> by x: a & b"
    )
    assert "a & b" in [
        x.text for x in root.iter() if x.tag.endswith("}text")
    ]  # letters, not outlines


ODD = [
    "5$_a_$6",
    r"\$x^2$",
    "$",
    "_under",
    "a\nb",
    r"C:\new\frac{1}{",
    "日本 & <b>",
    "x^2_$",
    "$\\undefined$",
]


def test_names_stand_in_figures_as_they_are():
    """Breaks when a name is set as a formula, or fails as one after hours of measuring, or a legend
    leaves it out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = [
            report.bars(
                ODD, {name: estimates(len(ODD)) for name in ODD}, "y $_1$", "x_$^$", title="$t$"
            ),
            report.lines(
                {name: ([1, 2], estimates(2)) for name in ODD}, "x_$^$", "y $_1$", title="$t$"
            ),
            report.curves(
                {name: ([1, 2], [1, 2], False) for name in ODD}, "x_$^$", "y $_1$", title="$t$"
            ),
        ]
    for svg in figures:
        root = ElementTree.fromstring(svg)
        texts = [
            "".join(x.itertext()).replace("\u200b", "")
            for x in root.iter()
            if x.tag.endswith("}text")
        ]
        for shown in (
            *(part for name in ODD for part in name.split("\n")),
            "x_$^$",
            "y $_1$",
            "$t$",
        ):
            assert shown in texts, (shown, texts)
        assert (
            root.attrib["aria-label"].startswith("$t$ y $_1$ by x_$^$: 5$_a_$6, ")
            and "_under" in root.attrib["aria-label"]
        )


def test_lines_draw_means_and_bands(drawn):
    """Breaks when the band is not from low to high, or the line is not the mean."""
    report.lines({"memory": ([1, 4, 16], estimates(3))}, "memory tokens", "loss")
    axes = drawn[-1][1]
    assert axes.lines[0].get_ydata().tolist() == [1, 2, 3] and axes.lines[
        0
    ].get_xdata().tolist() == [1, 4, 16]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in band} >= {(1, 0.5), (1, 1.25), (16, 2.5), (16, 3.25)}


def test_bars_draw_means_from_zero(drawn):
    """Breaks when bars start above 0, stand over the wrong group, or a missing value is drawn."""
    report.bars(
        ["a", "b"],
        {"memory": [Estimate(80, 70, 85, 9), None], "no context": [(60, 50, 61), (90, 80, 99)]},
        "F1 (%)",
    )
    axes = drawn[-1][1]
    assert [
        (round(p.get_x() + p.get_width() / 2), p.get_y(), p.get_height()) for p in axes.patches
    ] == [(0, 0, 80), (0, 0, 60), (1, 0, 90)]
    assert axes.get_ylim()[0] == 0
    ends = {tuple(y for _, y in s) for c in axes.collections for s in c.get_segments()}
    assert ends == {(70, 85), (50, 61), (80, 99)}


@pytest.mark.parametrize("count", [1, 11, 128])
def test_figures_of_any_length(drawn, count):
    """Breaks when labels along the axis cover each other, or the legend the data, with one memory
    token or with many.
    """
    report.lines({a: (range(1, count + 1), estimates(count)) for a in ARMS}, "memory token", "loss")
    report.bars([f"token {i}" for i in range(count)], {"memory": estimates(count)}, "loss")
    report.bars(
        ["ArxivQA", "SQuAD", "RelationExtraction", "HotpotQA", "RACE"],
        {a: estimates(5) for a in ARMS},
        "F1 (%)",
    )
    for figure, axes in drawn:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        labels = axes.get_xticklabels()
        assert 1 <= len(labels) <= 20
        assert labels[0].get_rotation() > 0 or not overlap(labels, renderer)
        assert (
            axes.get_legend().get_window_extent(renderer).x0 > axes.get_window_extent(renderer).x1
        )


def test_single_position_is_drawn_as_bars(drawn):
    """Breaks when one position is drawn as lines without length."""
    report.lines(
        {"a": ([16], estimates(1)), "b": ([16], estimates(1, 3.0))},
        "memory tokens",
        "perplexity",
        log=True,
    )
    axes = drawn[-1][1]
    assert [p.get_height() for p in axes.patches] == [1, 3] and axes.get_xlabel() == "memory tokens"
    assert [x.get_text() for x in axes.get_xticklabels()] == ["16"]


def test_an_arm_keeps_its_colour(drawn):
    """Breaks when an arm's colour depends on its place, when two arms of a figure share one, or
    when figures ignore a page's palette.
    """
    colours = report.palette(ARMS)
    assert len(set(colours.values())) == len(ARMS)
    assert all(
        report.palette([name])[name] == report.palette(["x", name])[name]
        for name in report.CONTROLS
    )
    assert (
        report.palette(["memory"])["memory"] == report.palette(["full context", "memory"])["memory"]
    )
    names = [f"arm {i}" for i in range(20)]  # more arms than colours
    assert (
        set(report.palette(names)) == set(names)
        and len(set(report.palette(names[:9]).values())) == 9
    )
    report.lines({"500x": ([1, 2], estimates(2))}, "x", "y", colours=colours)
    report.bars(["a"], {"500x": estimates(1)}, "y", colours=colours)
    assert (
        to_hex(drawn[0][1].lines[0].get_color())
        == to_hex(drawn[1][1].patches[0].get_facecolor())
        == colours["500x"].lower()
    )


def test_log_axis_shows_plain_numbers(drawn):
    """Breaks when the log axis has no ticks to read, as over less than a factor of ten."""
    for ys in ([1.5, 1.2], [3.0, 0.01]):
        report.curves({"a": ([1, 2], ys, False)}, log=True)
        figure, axes = drawn[-1]
        figure.canvas.draw()
        low, high = axes.get_ylim()
        shown = [x.get_text() for x in axes.get_yticklabels() if low <= x.get_position()[1] <= high]
        assert len(shown) >= 3 and all(float(x) > 0 for x in shown)


def test_series_that_do_not_fit_are_refused():
    """Breaks when values are drawn over the wrong positions."""
    with pytest.raises(ValueError, match="memory: 3 positions and 2 values"):
        report.lines({"memory": ([1, 2, 3], estimates(2))}, "x", "y")
    with pytest.raises(ValueError, match="memory: 1 values for 2 groups"):
        report.bars(["a", "b"], {"memory": estimates(1)}, "y")


def test_levels_cross_a_logarithmic_axis(drawn):
    """Breaks when a level is not drawn over the whole width at its height, or the axis has ticks of
    powers only.
    """
    series = {"memory": ([8, 64], estimates(2))}
    svg = report.lines(series, "tokens", "F1", levels={"full context": (3.5, 3, 4)}, log_x=True)
    ((figure, axes),) = drawn
    line = next(line for line in axes.lines if line.get_label() == "full context")
    assert axes.get_xscale() == "log" and axes.get_yscale() == "linear"
    assert list(line.get_ydata()) == [3.5, 3.5] and line.get_linestyle() == "--"
    assert line.get_transform() == axes.get_yaxis_transform("grid")
    FigureCanvasAgg(figure).draw()
    assert {"10", "20", "50"} <= {label.get_text() for label in axes.get_xticklabels()}
    assert "full context" in svg
