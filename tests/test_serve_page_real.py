"""The page in a real browser before the real server, on the tiny base with a random adapter: both
speak the same interface.
"""

import numpy as np
import pytest
from page_browser import browser
from serve_helpers import WORDS, load, running, write_adapter

pytestmark = pytest.mark.nightly

TOKEN = "a-token-of-24-characters"
RATIOS = (4, 2)  # text tokens per memory token of the adapter below, whose segments hold 16


def text(seed, words=30):
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def compressor(tmp_path_factory, tiny_base):
    path = tmp_path_factory.mktemp("adapter") / "a"
    return load(write_adapter(path, tiny_base, k=4, k_choices=(2, 4)))


@pytest.fixture(scope="module")
def server(compressor, tmp_path_factory):
    """A server with an empty store and a token."""
    path = str(tmp_path_factory.mktemp("served") / "store")
    with running(compressor, path, tokens=[TOKEN]) as server:
        yield server


@pytest.fixture
def page(tab, server):
    """The page of the server, with its token; at the end nothing has failed or was refused."""
    tab.open(server.url)
    if tab.shown("token"):
        tab.insert("token-value", TOKEN)
        tab.click("#token button")
        tab.until("!document.getElementById('work').hidden")
    yield tab
    assert tab.complaints() == []


def answer(column):
    """The answer in a column's text, which may be empty."""
    lines = column.split("\n")
    return "" if "The answer is empty." in lines else lines[1]


def test_the_answers_are_those_of_the_server(page, server, compressor):
    """Breaks when page and server understand a request, a stream or a figure otherwise."""
    page.click("#ratio-list option:first-child")
    page.compress(text(0))
    memory = compressor.compress([text(0)], k=2)
    assert page.text("memory-facts").split("\n")[:4] == [
        "Text", f"{memory.lengths[0]} tokens", "Memory", f"{memory.tokens[0]} memory tokens",
    ]  # fmt: skip
    page.restore()
    shown = page.contents("#restored ins") + page.texts("#restored")
    assert shown and "came back" in page.text("restore-status")
    status, restored = server.post(f"/v1/memories/{cached(page, server)}/restore")
    assert status == 200
    # What is on the page and not crossed out is what came.
    script = "const e = document.getElementById('restored').cloneNode(true);"
    script += "e.querySelectorAll('del, .unseen').forEach(n => n.remove()); return e.textContent"
    assert page.js(script) == restored["text"]
    columns = page.ask("what did the cat see ?")
    fields = [{"memory": cached(page, server)}, {"context": text(0), "compress": False}, {}]
    for column, more in zip(columns, fields, strict=True):
        status, asked = server.chat("what did the cat see ?", max_tokens=64, **more)
        assert status == 200
        assert answer(column) == asked["choices"][0]["message"]["content"].strip()
        assert f"Read\n{asked['usage']['prompt_tokens']} tokens" in column
    assert f"Of these memory\n{memory.tokens[0]} for {memory.lengths[0]} of text" in columns[0]


def cached(page, server):
    """The id of the memory that the page made last."""
    script = "return performance.getEntriesByType('resource').map(e => e.name)"
    paths = [name for name in page.js(script) if name.endswith("/restore")]
    return paths[-1].split("/")[-2]


def test_documents_of_a_real_store(page, server):
    """Breaks when ids with slashes, spaces or letters beyond ASCII are lost between page and store,
    or a deleted one stays.
    """
    names = ["notes/one two", "日本 % ?x=1 #y", "zeta"]
    page.click("#keep")
    for seed, name in enumerate(names):
        page.insert("keep-id", name)
        page.insert("text", text(seed + 5))
        page.click("#compress")
        page.says("memory-name", name)
    page.says("store-status", "Documents 1 to 3.")
    assert sorted(page.texts("#documents .choose .id")) == sorted(names)
    page.insert("search", "日本 %")
    page.says("store-status", "Documents 1 to 1 with")
    page.click("#documents .choose")
    assert page.text("memory-name") == f"Document {names[1]}"
    page.restore()
    status, restored = server.post(
        "/v1/memories/%E6%97%A5%E6%9C%AC%20%25%20%3Fx%3D1%20%23y/restore"
    )
    assert status == 200 and page.contents("#restored") == [restored["text"]]
    assert "Not available" in page.ask("who ran ?")[1]
    page.click(".remove")
    page.click("dialog .danger")
    page.says("announcer", "is deleted")
    _, listed, _ = server.ask("GET", "/v1/memories")
    assert sorted(one["id"] for one in listed["data"]) == sorted(set(names) - {names[1]})


def test_what_the_server_refuses(page):
    """Breaks when its reason does not reach the person."""
    page.compress(text(1, 20))
    long = text(2, 400)  # more than the base has positions for, if it is not compressed
    page.compress(long)
    memory, full, _none = page.ask("who ran ?")
    assert "Error" not in memory
    assert full.startswith("From the full text\nError: ") and "256" in full
    page.insert("text", "the " * 200_000)
    page.click("#compress")
    page.says("text-error", "Not compressed. ")


def test_a_hang_up_frees_the_server(page, server):
    """Breaks when the server goes on for someone who pressed Stop."""
    page.compress(text(3))
    page.insert("longest", "200")
    page.insert("question", "who ran ?")
    page.click("#ask")
    page.until("document.querySelector('.column') !== null")
    page.click("#ask-stop")
    page.says("ask-status", "Stopped.")
    assert server.wait_idle()


def test_the_page_has_its_headers(server):
    """Breaks when the page's files can be framed, run foreign scripts, or are not served open."""
    for path in ("/", "/page/page.js", "/page/diff.js", "/page/icon.svg"):
        status, _, headers = server.ask("GET", path, headers={"Authorization": ""})
        assert status == 200
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
