"""The files of `icae serve`'s page: what they refer to is there and served, nothing comes from
elsewhere, nothing is inline, and the wheel has them.
"""

import html.parser
import re

import pytest
import setuptools
from conftest import ROOT
from page_server import PAGE

FILES = sorted(path for path in PAGE.iterdir() if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
NAMESPACES = {"http://www.w3.org/2000/svg"}


class Page(html.parser.HTMLParser):
    """Tags of a page: `(name, attributes, text behind it)`."""

    def __init__(self):
        super().__init__()
        self.tags = []
        self.feed((PAGE / "index.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append([tag, dict(attrs), ""])

    def handle_data(self, data):
        if self.tags:
            self.tags[-1][2] += data


@pytest.fixture(scope="module")
def tags():
    return Page().tags


def test_nothing_comes_from_elsewhere():
    """Breaks when a file names an address of another server."""
    assert len(FILES) >= 4
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        addresses = set(re.findall(r"""(?:\w+:)?//[\w.-]+\.[^\s"'`)]+""", text)) - NAMESPACES
        assert not addresses, path.name
        assert not re.search(r"@import|url\(", text), path.name


def test_nothing_is_inline(tags):
    """Breaks when a script, style or handler stands in the page, which the server's
    Content-Security-Policy would refuse.
    """
    for tag, attributes, text in tags:
        assert tag != "style" and "style" not in attributes
        assert tag != "base" and not [name for name in attributes if name.startswith("on")]
        if tag == "script":
            assert attributes["type"] == "module" and not text.strip()
        assert not any((value or "").startswith("javascript:") for value in attributes.values())


def test_data_never_become_markup():
    """Breaks when a script turns text into elements or code."""
    for path in SCRIPTS:
        unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
        unsafe += r"|createContextualFragment|DOMParser|setHTML|srcdoc|localStorage|cookie"
        assert not re.search(unsafe, path.read_text(encoding="utf-8")), path.name


def test_references_lead_to_files(tags):
    """Breaks when the page asks for a file that is not there, or a file is asked for by none."""
    used = {"index.html"}
    for _, attributes, _ in tags:
        for name in ("src", "href"):
            target = attributes.get(name)
            if target and not target.startswith("#"):
                assert target.startswith("page/"), target  # also below a proxy's prefix
                used.add(target.removeprefix("page/"))
    ids = {attributes["id"] for _, attributes, _ in tags if "id" in attributes}
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        used |= set(re.findall(r'from "\./([\w.]+)"', text))
        assert set(re.findall(r'byId\("([\w-]+)"\)', text)) <= ids, path.name
        assert not re.search(r"""["'`]/v1""", text), path.name
    assert used == {path.name for path in FILES}


def test_the_server_serves_them():
    """Breaks when a file of the page is not among those that the server hands out."""
    pytest.importorskip("fastapi")
    from icae_jax.server import api

    assert {path.name for path in FILES} == set(api.PAGE_FILES)
    for name, kind in api.PAGE_FILES.items():
        if name.endswith(".js"):  # a browser runs no module of another type
            assert kind.startswith("text/javascript")


def test_the_wheel_has_them(monkeypatch):
    """Breaks when an installed package has no page."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__file__": "setup.py"})
    package = ROOT / "icae_jax"
    packed = {f for glob in given["package_data"]["icae_jax"] for f in package.glob(glob)}
    assert set(FILES) <= packed


def test_colours_are_named_once():
    """Breaks when a rule has a colour of its own, which the dark scheme would not change."""
    text = (PAGE / "page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    names = set(re.findall(r"(--[\w-]+):", light))
    assert names == set(re.findall(r"(--[\w-]+):", dark))
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) == names
    rest = text.replace(light, "").replace(dark, "")
    assert re.findall(r"#[0-9a-f]{3,8}\b(?=[;\s])", rest) == []
