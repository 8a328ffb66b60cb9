"""The page of `icae serve` in a real browser: by keyboard, for screen readers, light and dark, on a
narrow screen. The rules are those of WCAG 2.2, level AA, as far as a script can check them.
"""

import re

import pytest
from page_browser import browser
from page_server import Stand, serving

pytestmark = pytest.mark.nightly

TEXT = "Karin works as a judge. Nils lives with a ferret, and with " + "averylongword" * 20 + "."
TAB, ENTER, SPACE, ESCAPE, SHIFT = "\ue004", "\ue007", " ", "\ue00c", "\ue008"
CONTROLS = {
    "button", "textbox", "searchbox", "combobox", "checkbox", "spinbutton", "link", "listbox",
    "toggle button",
}  # fmt: skip
# Contrast of every visible text, and of every control's edge, with what lies behind it.
CONTRASTS = """
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const rgba = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = (color) => {
        const [r, g, b] = rgba(color).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const color = getComputedStyle(node).backgroundColor;
            if (rgba(color)[3] === 255) return color;
        }
        return matchMedia("(prefers-color-scheme: dark)").matches ? "black" : "white";
    };
    const ratio = (a, b) => {
        const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
        return (x + 0.05) / (y + 0.05);
    };
    const found = [];
    for (const node of document.querySelectorAll("body *")) {
        if (!node.checkVisibility({visibilityProperty: true})) continue;
        const style = getComputedStyle(node);
        const own = [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim());
        const field = ["INPUT", "TEXTAREA", "SELECT"].includes(node.tagName);
        const what = node.id || `${node.tagName} ${node.className} ${node.textContent}`;
        if (own || field) found.push([what, ratio(style.color, behind(node)), 4.5]);
        if ((field || node.tagName === "BUTTON") && parseFloat(style.borderWidth)) {
            const edge = ratio(style.borderColor, behind(node.parentElement));
            found.push([`edge of ${what}`, edge, 3]);
        }
        if (style.fill !== "none" && node.tagName === "rect" && node.id === "memory-bar")
            found.push([what, ratio(style.fill, behind(node)), 3]);
    }
    return found;
"""
# What is wrong with ids, labels, headings and references.
STRUCTURE = """
    const wrong = [];
    const all = [...document.querySelectorAll("*")];
    const ids = all.map(e => e.id).filter(Boolean);
    for (const id of ids) if (ids.filter(i => i === id).length > 1) wrong.push(`id twice: ${id}`);
    for (const e of all) {
        for (const name of ["aria-labelledby", "aria-describedby", "for"])
            for (const id of (e.getAttribute(name) ?? "").split(" ").filter(Boolean))
                if (!document.getElementById(id)) wrong.push(`${name} leads nowhere: ${id}`);
        if (e.tabIndex > 0) wrong.push(`tabindex ${e.tabIndex}`);
        if (e.onclick && e.tagName !== "BUTTON") wrong.push(`${e.tagName} is clicked`);
    }
    const headings = all.filter(e => /^H[1-6]$/.test(e.tagName) && e.checkVisibility());
    let level = 0;
    for (const h of headings) {
        const next = Number(h.tagName[1]);
        if (next > level + 1) wrong.push(`h${next} behind h${level}: ${h.textContent}`);
        if (next === 1 && level) wrong.push("a second h1");
        level = next;
    }
    if (headings[0]?.tagName !== "H1") wrong.push("the first heading is no h1");
    if (document.documentElement.lang !== "en") wrong.push("no lang");
    if (!document.title) wrong.push("no title");
    if (document.querySelectorAll("main").length !== 1) wrong.push("not one main");
    return wrong;
"""
OUTLINE = """
    const style = getComputedStyle(document.activeElement);
    return style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth);
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def stand(tab):
    made = Stand()
    made.with_store(12)
    made.write("x" * 200, "long id", 11, "store")
    made.restored = lambda text: text.replace("judge", "big baker").replace(" Nils", "")
    with serving(made) as made.url:
        yield made
        assert tab.complaints() == []


def fill(tab, stand):
    """Brings everything that the page can show on it, errors too."""
    tab.compress(TEXT)
    tab.restore()
    stand.errors = {"none": (400, "There is no answer.")}
    stand.answers["full"] = "anotherverylongword" * 30
    tab.ask("Who is " + "verylong" * 30 + "?")
    stand.errors = {"POST /v1/memories": (500, "averylongerror" * 20)}
    tab.click("#keep")
    tab.insert("text", TEXT + "!")
    tab.click("#compress")
    tab.says("text-error", "Not compressed")
    tab.says("store-status", "Documents 1 to 10")
    tab.click("#next")
    tab.says("store-status", "Documents 11 to 13")
    stand.errors = {"GET /v1/memories": (500, "The store is damaged.")}
    tab.click("#previous")
    tab.says("store-error", "No list")
    assert tab.shown("memory-stale")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(tab, stand, scheme):
    """Breaks when a text has less than 4.5:1, or a control's edge less than 3:1."""
    tab.open(stand.url, prefers_color_scheme=scheme)
    fill(tab, stand)
    found = tab.js(CONTRASTS)
    ground = tab.js("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")
    tab.click(".remove")
    found += tab.js(CONTRASTS)
    names = " ".join(name for name, *_ in found)
    for part in ("DEL", "INS", "edge of text", "memory-stale", "Delete it", "memory-bar", "error"):
        assert part in names, part
    assert [row for row in found if row[1] < row[2]] == []


def test_structure_and_names(tab, stand):
    """Breaks when a control has no name, headings skip a level, an id is there twice, a label leads
    nowhere, or what happens is not told.
    """
    tab.open(stand.url)
    assert tab.js(STRUCTURE) == []
    fill(tab, stand)
    assert tab.js(STRUCTURE) == []
    controls = [(role, name) for role, name in tab.accessibility() if role in CONTROLS]
    assert len(controls) > 12 and {role for role, _ in controls} >= {"textbox", "searchbox"}
    assert [pair for pair in controls if not pair[1].strip()] == []
    names = [name for role, name in controls if role == "button"]
    removers = [name for name in names if name.startswith("Delete")]
    assert len(removers) == len(set(removers)) == 3
    regions = {(role, name) for role, name in tab.accessibility() if role in ("region", "main")}
    assert ("region", "Memory") in regions and ("region", "Questions") in regions
    polite = tab.js("return [...document.querySelectorAll('[role=status]')].map(e => e.id)")
    assert set(polite) >= {"text-status", "restore-status", "ask-status", "store-status"}
    stand.errors = {}
    tab.ask("Who?")
    tab.says("announcer", "Without the text: a dog")
    # Streamed texts are no live regions: they would be read out bit by bit.
    assert (
        tab.js("return document.querySelectorAll('[role=status] .words, [aria-live]').length") == 0
    )


def test_the_token_form_has_names(tab, stand):
    """Breaks when what is shown before anything else cannot be used with a screen reader."""
    stand.token = "s3cret"
    tab.open(stand.url)
    assert tab.js(STRUCTURE) == []
    assert ("textbox", "Token") in tab.accessibility()
    assert [row for row in tab.js(CONTRASTS) if row[1] < row[2]] == []


@pytest.mark.parametrize("width", [320, 360, 768, 1600])
def test_nothing_is_wider_than_the_screen(tab, stand, width):
    """Breaks when a long word, id, error or field makes the page scroll sideways."""
    tab.open(stand.url, width=width)
    widest = "return document.documentElement.scrollWidth"
    assert tab.js(widest) <= width
    fill(tab, stand)
    assert tab.js(widest) <= width
    columns = tab.js("return [...document.querySelectorAll('.column')].map(e => e.offsetTop)")
    assert (len(set(columns)) == 1) == (width >= 800)
    # Targets are large enough for a finger.
    sizes = tab.js(
        "return [...document.querySelectorAll('button')].filter(e => e.checkVisibility())"
        ".map(e => Math.min(e.offsetWidth, e.offsetHeight))"
    )
    assert min(sizes) >= 24
    tab.click(".remove")
    assert tab.js(widest) <= width
    right = "return document.querySelector('dialog').getBoundingClientRect().right"
    assert tab.js(right) <= width


def test_by_keyboard_alone(tab, stand):
    """Breaks when something cannot be reached or pressed without a mouse, or no focus is seen."""
    tab.open(stand.url)

    def forward(name):
        """Tabs until the element of this id, or of a text that begins so, has the focus."""
        for _ in range(60):
            tab.press(TAB)
            assert tab.js(OUTLINE) >= 2, f"the focus cannot be seen on {tab.focused()}"
            if tab.focused() == name or tab.focused().startswith(f"{name} "):
                return
        raise AssertionError(f"{name} is not reached")

    tab.press(TAB)
    assert tab.focused() == "Skip to the text"
    assert tab.js("return document.activeElement.getBoundingClientRect().top") >= 0
    tab.press(ENTER)
    assert tab.focused() == "main"
    forward("text")
    tab.press(TEXT)
    forward("file")
    forward("ratio-list")
    forward("keep")
    tab.press(SPACE)
    forward("keep-id")
    tab.press("a note")
    forward("compress")
    tab.press(ENTER)
    tab.says("text-status", "became")
    assert tab.focused() == "compress"
    forward("search")
    tab.press("doc-01", ENTER)
    tab.says("store-status", "with ids that begin with “doc-01”")
    forward("doc-011")
    tab.press(SPACE)
    assert tab.focused() == "memory-heading"
    forward("restore")
    tab.press(ENTER)
    tab.says("restore-status", "Restored in")
    assert tab.focused() == "restore"
    forward("restored")  # a long text must scroll by keyboard
    forward("question")
    tab.press("Who?", ENTER)
    tab.says("ask-status", "Answered.")
    assert tab.focused() == "question"
    forward("longest")
    forward("ask")
    stand.pause, stand.chunk = 0.05, 10
    tab.press(SPACE)
    forward("ask-stop")
    tab.press(SPACE)
    tab.says("ask-status", "Stopped.")
    assert tab.focused() == "question"
    stand.pause = 0
    forward("forget")
    tab.press(SPACE)
    assert tab.focused() == "question" and tab.texts("#history li") == []
    tab.js("document.getElementById('search').focus()")
    forward("Delete")
    tab.press(ENTER)
    assert tab.focused() == "Keep it"
    for _ in range(4):  # round and round within the dialogue, or to the browser's own controls
        tab.press(TAB)
        inside = "document.querySelector('dialog').contains(document.activeElement)"
        assert tab.js(f"return {inside} || document.activeElement === document.body")
    tab.press(ESCAPE)
    tab.until("!document.querySelector('dialog').open")
    assert tab.focused().startswith("Delete")
    for _ in range(80):  # out again at the end: no trap
        tab.press(TAB)
        if tab.focused() == "Skip to the text":
            break
    else:
        raise AssertionError("the page holds the keyboard")


def test_pages_of_the_store_keep_the_focus(tab, stand):
    """Breaks when who pages by keyboard is thrown to the top at the last page."""
    tab.open(stand.url)
    tab.says("store-status", "Documents 1 to 10")
    tab.js("document.getElementById('next').focus()")
    tab.press(ENTER)
    tab.says("store-status", "Documents 11 to 13")
    assert tab.focused() == "next"
    assert ("button", "Next") in tab.accessibility()


def test_reduced_motion(tab, stand):
    """Breaks when something moves for those who asked that nothing does."""
    stand.pause, stand.chunk, stand.answers["memory"] = 0.03, 20, "no " * 200
    animated = """
        const busy = document.querySelector(".busy .words");
        return [getComputedStyle(busy, "::after").animationName,
                getComputedStyle(document.getElementById("ask")).transitionDuration]
    """
    for motion, want in (("reduce", ["none", "0s"]), ("no-preference", ["blink", "0.15s"])):
        tab.open(stand.url, prefers_reduced_motion=motion)
        tab.compress(TEXT)
        tab.insert("question", "Who?")
        tab.click("#ask")
        tab.until("document.querySelector('.busy .words')?.textContent.length > 5")
        assert tab.js(animated) == want
        tab.click("#ask-stop")
        tab.says("ask-status", "Stopped.")
