"""The page of `icae serve` in a real browser: documents of the store, texts that would do harm."""

import pytest
from page_browser import browser
from page_server import Stand, serving

pytestmark = pytest.mark.nightly

ODD = "a/../b?c=1&d#e%2F 日本 <img src=x onerror=document.title='harm'>"
MARKUP = (
    "</textarea><img src=x onerror=\"document.title='harm'\"><script>document.title='harm'</script>"
)
OVERRIDE = "\u202eback to front\u2067"  # right-to-left override and isolate, never ended


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def stand(tab):
    made = Stand()
    with serving(made) as made.url:
        yield made
        assert tab.complaints() == []


def ids(tab):
    return tab.texts("#documents .choose .id")


def test_search_and_pages(tab, stand):
    """Breaks when a page is left out or shown twice, or a search goes on from another's page."""
    stand.with_store(23)
    tab.open(stand.url)
    tab.says("store-status", "Documents 1 to 10; there are more.")
    assert ids(tab) == [f"doc-{i:03}" for i in range(10)]
    tab.click("#previous")
    tab.click("#next")
    tab.says("store-status", "Documents 11 to 20")
    tab.click("#next")
    tab.says("store-status", "Documents 21 to 23.")
    assert ids(tab) == ["doc-020", "doc-021", "doc-022"]
    tab.click("#next")
    tab.click("#previous")
    tab.says("store-status", "Documents 11 to 20")
    assert ids(tab)[0] == "doc-010"
    tab.insert("search", "doc-01")
    tab.says("store-status", "Documents 1 to 10 with ids that begin with “doc-01”.")
    assert ids(tab)[0] == "doc-010" and not tab.shown("next")
    tab.insert("search", "x")
    tab.says("store-status", "No documents with ids that begin with “x”.")
    assert ids(tab) == []
    listed = [path for method, path, _ in stand.requests if "limit" in path]
    assert listed[0] == "/v1/memories?limit=10" and len(listed) == 6


def test_choosing_a_document(tab, stand):
    """Breaks when questions go to another memory, or a column pretends to know the text."""
    stand.with_store(3, writable=False)
    tab.open(stand.url)
    tab.says("store-status", "Documents 1 to 3.")
    assert not tab.shown("keep-choice") and tab.texts(".remove") == []
    tab.click("#documents li:nth-child(2) .choose")
    assert tab.text("memory-name") == "Document doc-001" and tab.focused() == "memory-heading"
    pressed = "return [...document.querySelectorAll('.choose')].map(e => e.ariaPressed)"
    assert tab.js(pressed) == ["false", "true", "false"]
    tab.restore()
    assert tab.contents("#restored") == [stand.texts["doc-001"]]
    assert "The original is not on this page" in tab.text("restore-status")
    memory, full, none = tab.ask("Who?")
    assert "a ferret" in memory and "a dog" in none
    assert full == "From the full text\nNot available: the document’s text is not on this page."
    assert [body.get("memory") for body in stand.bodies("/v1/chat/completions")] == [
        "doc-001",
        None,
    ]


def test_keeping_a_text(tab, stand):
    """Breaks when a text is not kept under its id, the list does not have it, or its text is
    forgotten.
    """
    stand.with_store(1)
    tab.open(stand.url)
    assert not tab.shown("keep-id")
    tab.click("#keep")
    tab.insert("keep-id", " new one ")
    tab.compress("a text to keep")
    body = stand.bodies("/v1/memories")[0]
    assert (body["keep"], body["id"]) == (True, "new one")
    tab.says("documents", "new one")
    assert tab.text("memory-name") == "Document new one"
    tab.click("#documents li:nth-child(2) .choose")  # its text is still here
    assert "a ferret, I think" in tab.ask("Who?")[1]
    tab.insert("keep-id", "")
    tab.compress("another")
    assert "id" not in stand.bodies("/v1/memories")[1] and len(stand.documents) == 3


def test_deleting_asks_first(tab, stand):
    """Breaks when a document goes without a yes, the wrong one goes, or its memory stays in use."""
    stand.with_store(11)
    tab.open(stand.url)
    tab.says("store-status", "Documents 1 to 10")
    tab.click("#documents li:nth-child(3) .choose")
    tab.click("#documents li:nth-child(3) .remove")
    assert tab.text("delete-about") == "doc-002 goes from the store for good."
    assert tab.focused() == "Keep it"
    tab.press("\ue00c")  # escape
    tab.until("!document.getElementById('delete-dialog').open")
    tab.until("document.activeElement.className === 'remove'")
    tab.click("#documents li:nth-child(3) .remove")
    tab.click("dialog button:not(.danger)")
    tab.until("!document.getElementById('delete-dialog').open")
    assert len(stand.documents) == 11 and not any(m == "DELETE" for m, *_ in stand.requests)
    tab.click("#documents li:nth-child(3) .remove")
    tab.click("dialog .danger")
    tab.says("announcer", "doc-002 is deleted.")
    assert "doc-002" not in stand.documents and "doc-002" not in ids(tab)
    assert tab.focused() == "store-heading"
    assert not tab.shown("memory") and tab.shown("ask-first") and not tab.shown("ask-form")
    stand.errors = {"DELETE /v1/memories/doc-000": (409, "The store is in use.")}
    tab.click("#documents .remove")
    tab.click("dialog .danger")
    tab.says("store-error", "Not deleted. The store is in use.")
    assert ids(tab)[0] == "doc-000"


def test_the_last_document_of_a_page(tab, stand):
    """Breaks when deleting it leaves an empty page."""
    stand.with_store(11)
    tab.open(stand.url)
    tab.says("store-status", "Documents 1 to 10")
    tab.click("#next")
    tab.says("store-status", "Documents 11 to 11.")
    tab.click("#documents .remove")
    tab.click("dialog .danger")
    tab.says("store-status", "Documents 1 to 10.")


def test_another_deletes_what_a_page_begins_behind(tab, stand):
    """Breaks when the list is stuck at a page that the server cannot find any more."""
    stand.with_store(25)
    tab.open(stand.url)
    tab.says("store-status", "Documents 1 to 10")
    tab.click("#next")
    tab.says("store-status", "Documents 11 to 20")
    tab.click("#next")
    tab.says("store-status", "Documents 21 to 25")
    del stand.documents["doc-009"]
    tab.click("#previous")
    tab.says("store-status", "Documents 1 to 10")
    assert ids(tab)[-1] == "doc-010" and not tab.shown("store-error")


def test_a_store_that_fails(tab, stand):
    """Breaks when an error of the list takes the rest of the page with it."""
    stand.with_store(3)
    stand.errors = {"GET /v1/memories": (500, "The store is damaged.")}
    tab.open(stand.url)
    tab.says("store-error", "No list. The store is damaged.")
    tab.compress("a text")
    assert "a ferret" in tab.ask("Who?")[0]


def test_texts_cannot_do_harm(tab, stand):
    """Breaks when a text, an answer, an id, a file's name or an error acts as markup."""
    stand.with_store(0)
    stand.write(ODD, "odd", 11, "store")
    stand.restored = lambda text: text + " " + MARKUP
    stand.answers = {"memory": MARKUP, "full": "<b>bold</b>", "none": OVERRIDE}
    tab.open(stand.url)
    title = tab.js("return document.title")
    tab.compress(MARKUP)
    tab.restore()
    assert tab.contents("#restored")[0].startswith(MARKUP)
    memory, full, _ = tab.ask(MARKUP)
    assert memory.split("\n")[1] == MARKUP and full.split("\n")[1] == "<b>bold</b>"
    assert tab.contents(".column:last-child .words") == [OVERRIDE]
    assert tab.texts("#history h3") == [MARKUP]
    assert ids(tab) == [ODD]
    tab.click(".choose")
    assert tab.text("memory-name") == f"Document {ODD}"
    tab.restore()
    assert tab.contents("#restored") == [f"odd {MARKUP}"]
    stand.errors = {"none": (400, MARKUP)}
    assert tab.ask("Who?")[2] == f"Without the text\nError: {MARKUP}"
    tab.click(".remove")
    assert ODD in tab.text("delete-about")
    tab.click("dialog .danger")
    tab.says("announcer", "is deleted")
    assert stand.documents == {}
    assert tab.js("return document.images.length + document.scripts.length") == 1  # its own script
    assert tab.js("return document.title") == title
