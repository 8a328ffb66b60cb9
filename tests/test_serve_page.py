"""The page of `icae serve` in a real browser, before a stand-in for the server: what it sends, what
it shows, and what it does when things go wrong.
"""

import pytest
from page_browser import browser
from page_server import Stand, serving

pytestmark = pytest.mark.nightly

TEXT = "Meet Karin. Karin works as a judge. Nils came here in 1970. Nils lives with a ferret."
CHAT, MEMORIES = "/v1/chat/completions", "/v1/memories"
# Puts a file on an element as if it were dropped there; says whether the page took it.
DROP = """
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(arguments[1])], arguments[2]));
    const event = (kind) => new DragEvent(
        kind, {bubbles: true, cancelable: true, dataTransfer: data});
    const target = document.querySelector(arguments[0]);
    target.dispatchEvent(event("dragover"));
    return !target.dispatchEvent(event("drop"));
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def stand(tab):
    """A stand-in, with `url`; at the end no script has failed and nothing was refused."""
    made = Stand()
    with serving(made) as made.url:
        yield made
        made.pause = 0
        assert tab.complaints() == []


# -------------------------------------------------------------------------------- text and memory


def test_a_pasted_text_becomes_a_memory(tab, stand):
    """Breaks when another text is sent, it is kept unasked, or its sizes are wrong."""
    text = f"{TEXT}\n\nNaïve “quotes”, 日本 & <b>."
    tab.open(stand.url)
    assert not tab.shown("memory") and not tab.shown("questions") and not tab.shown("store")
    tab.compress(text)
    assert stand.bodies(MEMORIES) == [
        {"text": text, "keep": False, "ratio": pytest.approx(46 / 11)}
    ]
    tokens = len(text.split())
    assert tokens == 22
    facts = tab.text("memory-facts").split("\n")
    assert facts == [
        "Text", f"{tokens} tokens", "Memory", "11 memory tokens", "Ratio", "2x",
        "Size", "7,040 bytes",
    ]  # fmt: skip
    width = tab.js("return document.getElementById('memory-bar').getAttribute('width')")
    assert float(width) == pytest.approx(100 * 11 / tokens)
    assert not tab.shown("memory-stale")
    tab.insert("text", text + " More.")
    assert tab.shown("memory-stale")


def test_files_are_dropped_and_chosen(tab, stand, tmp_path):
    """Breaks when a file is not read as UTF-8, another kind of file is taken, or one that misses
    the text replaces the page.
    """
    tab.open(stand.url)
    assert tab.js(DROP, "#text", list("naïve 日本".encode()), "a.txt")
    tab.says("text-status", "Read a.txt: 8 characters.")
    assert tab.js("return document.getElementById('text').value") == "naïve 日本"
    assert tab.js(DROP, "header", list(b"elsewhere"), "b.txt")
    tab.says("text-status", "Read b.txt")
    assert tab.js(DROP, "#text", [0xFF, 0xFE, 0x00], "c.png")
    tab.says("text-error", "c.png is not a UTF-8 text.")
    assert tab.js("return document.getElementById('text').value") == "elsewhere"
    (tmp_path / "d.txt").write_text(TEXT)
    tab.driver.find_element("id", "file").send_keys(str(tmp_path / "d.txt"))
    tab.says("text-status", "Read d.txt")
    assert not tab.shown("text-error")
    tab.click("#compress")
    tab.says("text-status", "became")
    assert stand.bodies(MEMORIES)[0]["text"] == TEXT


def test_an_empty_text_is_not_sent(tab, stand):
    """Breaks when blanks reach the server, or the focus stays away from what is to be mended."""
    tab.open(stand.url)
    tab.insert("text", " \n")
    tab.click("#compress")
    tab.says("text-error", "There is no text yet.")
    assert tab.focused() == "text" and stand.bodies(MEMORIES) == []


def test_the_ratios_that_an_adapter_knows(tab, stand):
    """Breaks when one cannot be chosen, another is sent, or a choice is offered where there is
    none.
    """
    tab.open(stand.url)
    assert tab.texts("#ratio-list option") == [
        "23x: 2 tokens for 46 of text", "4.2x: 11 tokens for 46 of text",
    ]  # fmt: skip
    tab.click("#ratio-list option:first-child")
    tab.compress(TEXT)
    assert stand.bodies(MEMORIES)[-1]["ratio"] == 23 and "2 memory tokens" in tab.text("memory")

    stand.compressor["memory_tokens_per_segment"] = [11]
    tab.open(stand.url)
    assert not tab.shown("ratio-choice") and not tab.shown("ratio-free")
    only = "Every 46 tokens of text become 11 memory tokens, about 4.2x fewer."
    assert tab.text("ratio-only") == only
    tab.compress(TEXT)
    assert "ratio" not in stand.bodies(MEMORIES)[-1]

    stand.compressor["memory_tokens_per_segment"] = None
    tab.open(stand.url)
    tab.compress(TEXT)
    assert "ratio" not in stand.bodies(MEMORIES)[-1]
    tab.insert("ratio-number", "5.75")
    tab.compress(TEXT)
    assert stand.bodies(MEMORIES)[-1]["ratio"] == 5.75 and "8 memory tokens" in tab.text("memory")


# ------------------------------------------------------------------------------------- restoring


def test_differences_are_marked(tab, stand):
    """Breaks when a mark is missing, on the wrong side, one of colour alone, or counted wrongly."""
    stand.restored = lambda text: text.replace("a judge", "a big baker").replace(" lives", "")
    tab.open(stand.url)
    tab.compress(TEXT)
    tab.restore()
    assert tab.contents("#restored del") == ["[left out: judge] ", "[left out: lives ] "]
    assert tab.contents("#restored ins") == ["[added: big baker] "]
    # What is seen of it are the words alone, crossed out or underlined.
    line = "return getComputedStyle(document.querySelector(arguments[0])).textDecorationLine"
    assert tab.js(line, "#restored del") == "line-through"
    assert tab.js(line, "#restored ins") == "underline"
    assert tab.shown("legend")
    # "." counts as a word: 4 of these, and 15 others.
    told = "19 of the original’s 21 words came back. Missing: 2, new: 2."
    assert told in tab.text("restore-status")
    stand.finish = "length"
    tab.restore()
    assert "at the limit of tokens" in tab.text("restore-status")


def test_an_exact_text_has_no_marks(tab, stand):
    """Breaks when a stream that is cut within characters and line ends gives another text."""
    stand.chunk, text = 1, "naïve “日本”\nسلام 🙂 e\u0301"
    tab.open(stand.url)
    tab.compress(text)
    tab.restore()
    assert "It equals the original." in tab.text("restore-status")
    assert tab.contents("#restored") == [text] and not tab.shown("legend")


def test_restored_text_streams(tab, stand):
    """Breaks when nothing is shown before everything has come."""
    stand.chunk, stand.pause = 40, 0.01
    tab.open(stand.url)
    tab.compress(TEXT * 20)
    tab.click("#restore")
    tab.until("document.getElementById('restored').textContent.length > 5")
    assert tab.text("restore-status") == "Restoring …"
    assert len(tab.contents("#restored")[0]) < len(TEXT * 20)
    tab.click("#restore-stop")
    tab.says("restore-status", "Stopped.")
    assert tab.shown("restored") and not tab.shown("restore-error")


def test_a_long_text_stays_usable(tab, stand):
    """Breaks when a megabyte that comes back changed blocks the page, or a comparison that was cut
    is not named.
    """
    words = [f"w{i * 7919 % 9973}" for i in range(170_000)]
    text = " ".join(words)
    assert len(text) > 900_000
    stand.restored = lambda text: " ".join(w + "x" * (i % 3 == 0) for i, w in enumerate(words))
    tab.open(stand.url)
    tab.js("document.getElementById('text').value = arguments[0]", text)
    tab.click("#compress")
    tab.says("text-status", "became")
    tab.restore()
    assert stand.bodies(MEMORIES)[0]["text"] == text
    assert "Only the first 20,000 words and spaces are compared." in tab.text("restore-status")
    assert 3000 < len(tab.contents("#restored del")) <= 3400
    assert tab.contents("#restored")[0].endswith(words[-1])
    assert tab.ask("Who?")[1].startswith("From the full text\na ferret, I think")
    assert stand.bodies(CHAT)[1]["context"] == text


# ------------------------------------------------------------------------------------- questions


def test_a_question_is_asked_in_three_ways(tab, stand):
    """Breaks when a column asks something else, or shows another's answer or figures."""
    stand.chunk = 3
    tab.open(stand.url)
    tab.compress(TEXT)
    memory, full, none = tab.ask("Who?")
    common = {
        "model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "stream": True,
        "stream_options": {"include_usage": True}, "max_tokens": 64,
    }  # fmt: skip
    assert stand.bodies(CHAT) == [
        common | {"memory": "mem-0"}, common | {"context": TEXT, "compress": False}, common,
    ]  # fmt: skip
    assert memory.startswith("From memory\na ferret\nFirst token\n")
    assert full.startswith("From the full text\na ferret, I think\nFirst token\n")
    assert none.startswith("Without the text\na dog\nFirst token\n")
    assert "Of these memory\n11 for 46 of text" in memory and "Of these" not in full + none
    for column in (memory, full, none):
        assert "Read\n24 tokens" in column and "Answer\n3 tokens" in column
        figures = column.split("\n")
        first, total = (figures[figures.index(name) + 1] for name in ("First token", "Total"))
        assert 0 <= milliseconds(first) <= milliseconds(total) < 20_000
    tab.insert("longest", "5")
    tab.ask("What?")
    tab.insert("longest", "")
    tab.ask("What?")
    assert [body.get("max_tokens") for body in stand.bodies(CHAT)[3:]] == [5] * 3 + [None] * 3


def milliseconds(text):
    number, unit = text.split()
    return float(number) * {"ms": 1, "s": 1000}[unit]


def test_times_are_those_of_the_stream(tab, stand):
    """Breaks when the first token's time is the whole answer's, or nothing streams."""
    stand.chunk, stand.pause, stand.answers = 60, 0.02, dict.fromkeys(stand.answers, "no " * 20)
    tab.open(stand.url)
    tab.compress(TEXT)
    column = tab.ask("Who?")[0].split("\n")
    first, total = (milliseconds(column[column.index(n) + 1]) for n in ("First token", "Total"))
    assert 0 < 2 * first < total and total > 500


def test_errors_stay_in_their_column(tab, stand):
    """Breaks when one answer's error hides another's answer, its reason, or what had come."""
    stand.errors = {"full": (400, "The text is longer than 512 positions.")}
    stand.broken, stand.answers["none"] = {"none"}, "so far and " * 20
    tab.open(stand.url)
    tab.compress(TEXT)
    memory, full, none = tab.ask("Who?")
    assert "a ferret\n" in memory and "Error" not in memory
    assert full == "From the full text\nError: The text is longer than 512 positions."
    assert "so far" in none and "Error: The connection was closed before" in none
    stand.errors, stand.broken = {"memory": (429, "The queue is full.")}, set()
    memory, full, none = tab.ask("Who?")
    assert memory == "From memory\nError: The queue is full. Try again in 7 s."
    assert "a ferret, I think" in full and "so far" in none


def test_answers_can_be_stopped(tab, stand):
    """Breaks when the server is not told, later columns are asked all the same, or no further
    question can be.
    """
    stand.chunk, stand.pause, stand.answers = 20, 0.02, dict.fromkeys(stand.answers, "no " * 300)
    tab.open(stand.url)
    tab.compress(TEXT)
    assert not tab.shown("ask-stop")
    tab.insert("question", "Who?")
    tab.click("#ask")
    tab.until("document.querySelector('.column .words')?.textContent.length > 5")
    tab.click("#ask")  # does nothing meanwhile
    tab.click("#ask-stop")
    tab.says("ask-status", "Stopped.")
    assert tab.focused() == "question" and not tab.shown("ask-stop")
    assert [text.split("\n")[-1] for text in tab.texts(".column")][1:] == ["Stopped."] * 2
    assert len(stand.bodies(CHAT)) == 1
    stand.pause, stand.answers = 0, {"memory": "a", "full": "b", "none": "c"}
    assert [text.split("\n")[1] for text in tab.ask("What?")] == ["a", "b", "c"]
    assert stand.closed == ["memory"]


def test_history(tab, stand):
    """Breaks when earlier answers go, the newest is not first, or clearing leaves some."""
    tab.open(stand.url)
    tab.compress(TEXT)
    tab.ask("First?")
    stand.answers["memory"] = "a hen"
    tab.ask("Second?")
    assert tab.texts("#history h3") == ["Second?", "First?"]
    assert tab.texts(".column:first-child .words") == ["a hen", "a ferret"]
    tab.click("#forget")
    assert tab.texts("#history li") == [] and tab.focused() == "question"


# ----------------------------------------------------------------------- the token, and what fails


def test_a_token_is_asked_for(tab, stand):
    """Breaks when a wrong token is kept, the right one is asked for twice, or a request that was
    refused is lost.
    """
    stand.token = "s3cret"
    tab.open(stand.url)
    assert tab.shown("token") and not tab.shown("work")
    assert tab.focused() == "token-heading"
    tab.insert("token-value", "wrong")
    tab.click("#token button")
    tab.says("token-error", "does not accept")
    assert tab.focused() == "token-value"
    tab.insert("token-value", "two words €")
    tab.click("#token button")
    tab.says("token-error", "only letters")
    tab.insert("token-value", "s3cret")
    tab.click("#token button")
    tab.until("!document.getElementById('work').hidden")
    assert not tab.shown("token")
    assert tab.js("return {...sessionStorage}") == {"icae.token": "s3cret"}
    assert tab.js("return localStorage.length + document.cookie.length") == 0
    tab.open(stand.url)
    assert tab.shown("work") and not tab.shown("token")
    tab.compress(TEXT)
    stand.token = "an0ther"  # while the page is open
    tab.insert("question", "Who?")
    tab.click("#ask")
    tab.until("!document.getElementById('token').hidden")
    tab.insert("token-value", "an0ther")
    tab.click("#token button")
    tab.says("ask-status", "Answered.")
    assert tab.focused() == "ask"
    assert [text.split("\n")[1] for text in tab.texts(".column")] == [
        "a ferret", "a ferret, I think", "a dog",
    ]  # fmt: skip


def test_waiting_for_a_token_can_be_stopped(tab, stand):
    """Breaks when a request that waits for a token cannot be given up."""
    tab.open(stand.url)
    stand.token = "s3cret"
    tab.insert("text", TEXT)
    tab.click("#compress")
    tab.until("!document.getElementById('token').hidden")
    tab.click("#compress-stop")
    tab.says("text-status", "Stopped.")


def test_a_server_that_is_not_ready(tab, stand):
    """Breaks when the page has no way on but to be loaded again, or says nothing."""
    stand.errors = {"GET /v1/models": (503, "The server is warming up.")}
    tab.open(stand.url)
    assert tab.text("page-error") == "The model is not known yet. The server is warming up."
    stand.errors = {}
    tab.click("#retry")
    tab.until("!document.getElementById('work').hidden")
    assert not tab.shown("page-error") and not tab.shown("retry")


def test_refused_texts_and_a_server_that_went_away(tab):
    """Breaks when the reason is not told, or a text is lost."""
    stand = Stand()
    with serving(stand) as url:
        tab.open(url)
        stand.errors = {"POST /v1/memories": (413, "The body is larger than 8 MiB.")}
        tab.insert("text", TEXT)
        tab.click("#compress")
        tab.says("text-error", "Not compressed. The body is larger than 8 MiB.")
        stand.errors = {}
        tab.compress(TEXT)
        assert not tab.shown("text-error")
        stand.errors = {"restore": (404, "There is no memory mem-0.")}
        tab.click("#restore")
        gone = "There is no memory mem-0. Compress the text again."
        tab.says("restore-error", f"Not restored. {gone}")
        stand.errors = {"memory": (404, "There is no memory mem-0.")}
        assert tab.ask("Who?")[0] == f"From memory\nError: {gone}"
        assert not tab.shown("restored-part")
    tab.click("#restore")
    tab.says("restore-error", "Not restored. The server does not answer.")
    assert (
        tab.ask("Who?")[2]
        == "Without the text\nError: The server does not answer. Is it still running?"
    )
    assert tab.js("return document.getElementById('text').value") == TEXT
    assert tab.complaints() == []


def test_compressing_can_be_stopped(tab, stand):
    """Breaks when a slow compression holds the page."""
    stand.pause = 3
    tab.open(stand.url)
    tab.insert("text", TEXT)
    tab.click("#compress")
    tab.says("text-status", "Compressing")
    tab.click("#compress-stop")
    tab.says("text-status", "Stopped.")
    assert not tab.shown("memory") and tab.focused() == "compress"
