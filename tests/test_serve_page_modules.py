"""Parts of the page's scripts on their own, run by a real browser: the comparison of texts, and the
reading of streams that are cut anywhere.
"""

import random

import pytest
from page_browser import browser
from page_server import Stand, serving

pytestmark = pytest.mark.nightly

COMPARE = """
    return args[0].map(([a, b]) => {
        const runs = m.differences(m.pieces(a), m.pieces(b));
        return runs.map(({kind, text, words}) => [kind, text, words]);
    });
"""
# The events of a byte string that comes in chunks which end at the given places.
PARSE = """
    const [bytes, cuts] = args;
    const body = new ReadableStream({
        start(controller) {
            let from = 0;
            for (const cut of [...cuts, bytes.length]) {
                controller.enqueue(new Uint8Array(bytes.slice(from, cut)));
                from = cut;
            }
            controller.close();
        },
    });
    const events = [];
    for await (const data of m.serverEvents(body)) events.push(data);
    return events;
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as tab, serving(Stand()) as url:
        tab.open(url)
        yield tab


def sides(runs):
    """The two texts that runs are of."""
    before = "".join(text for kind, text, _ in runs if kind != "added")
    after = "".join(text for kind, text, _ in runs if kind != "left out")
    return before, after


def changed(runs):
    return sum(words for kind, _, words in runs if kind != "same")


@pytest.mark.parametrize("before, after, want", [
    ("", "", []),
    ("a b", "a b", [["same", "a b", 2]]),
    ("", "a b", [["added", "a b", 2]]),
    ("a b", "", [["left out", "a b", 2]]),
    ("a cat sat", "a dog sat",
     [["same", "a ", 1], ["left out", "cat", 1], ["added", "dog", 1], ["same", " sat", 1]]),
    ("one two three", "uno due three",
     [["left out", "one two", 2], ["added", "uno due", 2], ["same", " three", 1]]),
    ("the end.", "the end!", [["same", "the end", 2], ["left out", ".", 1], ["added", "!", 1]]),
    ("日本語", "日木語",
     [["same", "日", 1], ["left out", "本", 1], ["added", "木", 1], ["same", "語", 1]]),
    ("naïve", "naive", [["left out", "naïve", 1], ["added", "naive", 1]]),
    ("a\nb", "a b", [["same", "a", 1], ["left out", "\n", 0], ["added", " ", 0], ["same", "b", 1]]),
])  # fmt: skip
def test_small_texts(tab, before, after, want):
    """Breaks when words, punctuation, spaces or scripts without spaces are cut otherwise."""
    assert tab.imported("diff.js", COMPARE, [[before, after]]) == [want]


def test_random_texts(tab):
    """Breaks when a comparison loses or invents a word, or finds more changes than needed."""
    rng = random.Random(0)
    pairs, least = [], []
    for _ in range(400):
        before = rng.choices("abcd", k=rng.randrange(12))
        after = rng.choices("abcd", k=rng.randrange(12))
        pairs.append([" ".join(before), " ".join(after)])
        least.append(shortest(before, after))
    found = tab.imported("diff.js", COMPARE, pairs)
    assert [list(sides(runs)) for runs in found] == pairs
    # Spaces are pieces too, so a shortest edit of pieces may change a few words more.
    assert all(changed(runs) >= n for runs, n in zip(found, least, strict=True))
    assert sum(map(changed, found)) <= 1.2 * sum(least)


def shortest(a, b):
    """Words left out and added by the shortest edit."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        above, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(above[j] if x == y else 1 + min(above[j + 1], row[j]))
    return row[-1]


def test_long_texts(tab):
    """Breaks when texts that differ in more words than one pass takes are compared wrongly, or
    hardly at all.
    """
    rng = random.Random(1)
    words = [f"w{rng.randrange(5000)}" for _ in range(9000)]
    some = [w if rng.random() < 0.9 else f"x{i}" for i, w in enumerate(words)]
    other = [f"y{i}" for i in range(9000)]
    texts = (some, other, some[400:], words[::-1])
    pairs = [[" ".join(words), " ".join(text)] for text in texts]
    found = tab.imported("diff.js", COMPARE, pairs)
    assert [list(sides(runs)) for runs in found] == pairs
    replaced = sum(w.startswith("x") for w in some)
    assert 2 * replaced <= changed(found[0]) <= 2.2 * replaced
    assert changed(found[1]) == 18_000
    assert 2 * replaced <= changed(found[2]) <= 2.4 * replaced + 400


def test_first_pieces(tab):
    """Breaks when a text that is cut loses something between its two parts."""
    texts = ["", "a", "a b c d", " a,b "]
    body = "return args[0].map(([text, n]) => m.firstPieces(text, n))"
    found = tab.imported("diff.js", body, [[text, n] for text in texts for n in range(9)])
    for (first, rest), (text, n) in zip(
        found, [(t, n) for t in texts for n in range(9)], strict=True
    ):
        assert "".join(first) + rest == text and len(first) <= n
        assert not rest or len(first) == n


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_streams_cut_anywhere(tab, end):
    """Breaks when an event is lost, doubled or torn where a chunk ends: in a character, a field's
    name, or between the two characters of a line's end.
    """
    lines = [": hello", "", 'data: {"a": "é日🙂"}', "", "event: x", "data:two", "data: lines", "",
             "", "data: [DONE]", "", ""]  # fmt: skip
    data = list(end.join(lines).encode())
    want = ['{"a": "é日🙂"}', "two\nlines", "[DONE]"]
    cuts = [[i] for i in range(len(data))] + [list(range(1, len(data))), []]
    body = f"const run = async (args) => {{ {PARSE} }}; const found = [];\n"
    body += "for (const cuts of args[1]) found.push(await run([args[0], cuts]));\nreturn found;"
    assert tab.imported("client.js", body, data, cuts) == [want] * len(cuts)
    assert tab.imported("client.js", PARSE, list(b"data: a\n\ndata: b"), []) == ["a"]
