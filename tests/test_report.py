"""The report: differences marked, markup escaped, figures inside the page."""

from icae_jax.evaluation import report


def test_differences_are_marked_word_by_word():
    marked = report.difference("Anna was born in Paris .", "Anna was born in <Rome> .")
    assert "Anna was born in <del>Paris</del> <ins>&lt;Rome&gt;</ins> ." in marked
    assert "<del>" not in report.difference("a b", "a b") and "<ins>" not in report.difference("a b", "a b")


def test_tables():
    assert report.table(["a", "b"], [["<x>", 1]]) == (
        "<table><tr><th>a</th><th>b</th></tr><tr><td>&lt;x&gt;</td><td>1</td></tr></table>"
    )
    assert report.text_table(["arm", "score"], [["memory", "97.5 %"]]).splitlines() == [
        "arm      score",
        "--------------",
        "memory  97.5 %",
    ]


def test_page_is_self_contained(tmp_path):
    svg = report.curves({"held out": ([1, 2, 3], [3.0, 2.0, 1.0], True)}, log=True)
    assert svg.startswith("<svg") and "held out" in svg
    path = tmp_path / "report.html"
    report.write(path, "a < b", ["<p>text</p>", svg])
    page = path.read_text()
    assert "<title>a &lt; b</title>" in page and "<p>text</p>" in page and "<svg" in page
    assert "<link" not in page and "src=" not in page
