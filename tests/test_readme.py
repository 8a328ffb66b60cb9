"""Every command in every README is one that its program takes, and every link leads somewhere."""

import argparse
import pathlib
import re
import runpy
import shlex
import sys

import pytest

from icae_jax.cli import main as cli
from icae_jax.errors import UserError
from icae_jax.training import config_file
from icae_jax.training.config import BaseConfig, TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    and (path.parent / path.name).relative_to(ROOT).parts[0]
    in ("README.md", "configs", "icae_jax", "launch", "tests")
)
FRONT_PAGE_LINES = 220
# Programs that are not ours: that they are spelled right is all that can be said.
OTHERS = {"pip", "cp", "python3", ".", "git", "cd", "export", "sbatch", "ruff", "pytest", "curl", "ls"}


class Parsed(Exception):
    """Raised in place of running a program, when its arguments have been understood."""


class Wrong(Exception):
    """A command that its program would refuse."""


# --------------------------------------------------------------------------------- reading a page


def commands(text: str) -> list[str]:
    """The commands of a page: lines of its bash blocks, and `icae …` between backticks."""
    lines = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        block = re.sub(r"\\\n\s*", " ", block)
        variables = dict(re.findall(r'^(\w+)="([^"]*)"', block, re.MULTILINE))
        for line in block.splitlines():
            line = re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), line)
            line = " ".join(shlex.quote(word) for word in shlex.split(line, comments=True))
            if line and not re.match(r"\w+=", line):
                lines += re.split(r" '?&&'? ", line)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`((?:icae|python|launch/\S+) [^`\n]+)`", prose)
    return lines + [span.replace("[", "").replace("]", "") for span in spans]


def links(text: str) -> list[str]:
    """The targets of a page's links."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: pathlib.Path, text: str) -> list[str]:
    """The links of a page that lead nowhere in this repository."""
    wrong = []
    for link in links(text):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            wrong.append(link)
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            wrong.append(link)
    return wrong


# ------------------------------------------------------------------------------ trying a command


@pytest.fixture
def parsing(monkeypatch):
    """Programs end with `Parsed` or `Wrong` where they would begin to work."""

    def parse_args(self, args=None, namespace=None):
        _, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        raise Parsed

    def error(self, message):
        if "are required" in message:  # a span of prose may name a part of a command
            raise Parsed
        raise Wrong(message)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "error", error)


def try_icae(argv):
    """`Wrong` where the `icae` command would refuse these arguments."""
    if not argv or argv[0] in ("VERB", "help") or "…" in argv[0]:
        return
    if argv[0] not in cli.VERBS:
        raise Wrong(f"no verb {argv[0]}")
    argv = [word for word in argv if word != "…"]
    try_configuration(argv)
    if argv[0] in ("train", "sweep", "plan", "bench"):
        argv = [word for word in argv if not word.startswith("--config.")]
    try:
        cli.VERBS[argv[0]].run(argv[1:])
    except Parsed:
        return
    except UserError as error:
        raise Wrong(str(error)) from error
    except SystemExit:
        return
    raise Wrong("was run, not parsed")


def try_configuration(argv):
    """`Wrong` where `--config NAME[:arg]` or a field is unknown, or a value is of another type."""
    named = [word for flag, word in zip(argv, argv[1:], strict=False) if flag == "--config"]
    fields = [word for word in argv if word.startswith("--config.") and "field" not in word]
    if not named or named[0].startswith(("my_configs/", "FILE", "NAME")):
        return
    kind = BaseConfig if argv[:2] == ["train", "base"] else TrainConfig
    fallbacks = {"base": "B", "data.train": "D", "init_from": "I"} if kind is TrainConfig else {}
    try:
        config_file.load(kind, named[0], config_file.overrides(fields), fallbacks)
    except UserError as error:
        raise Wrong(str(error)) from error


def try_command(line, monkeypatch):
    """`Wrong` where a line of a README is no command that its program takes."""
    words = shlex.split(line)
    if "…" in words[:2]:
        return
    program, rest = words[0], words[1:]
    if program == "bash":
        program, rest = rest[0], rest[1:]
    if program == "icae":
        try_icae(rest)
    elif program == "python" and rest[0].endswith(".py"):
        if rest[0].startswith(("launch/", "tests/")):
            try_script(ROOT / rest[0], rest[1:], monkeypatch)
    elif program.startswith("launch/"):
        try_launcher(ROOT / program, rest)
    elif program not in OTHERS:
        raise Wrong(f"what is {program}?")


def try_script(path, argv, monkeypatch):
    """`Wrong` where a Python script is absent or would refuse these arguments."""
    if not path.is_file():
        raise Wrong(f"no file {path.relative_to(ROOT)}")
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    monkeypatch.syspath_prepend(str(path.parent))
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Parsed:
        return
    raise Wrong("was run, not parsed")


def try_launcher(path, argv):
    """`Wrong` where a shell script is absent or has not all of these flags, or its command is."""
    if not path.is_file():
        raise Wrong(f"no file {path.relative_to(ROOT)}")
    text = path.read_text()
    own, command = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    for number, word in enumerate(own):
        if word in cli.VERBS:  # slurm.sbatch takes a verb and its flags
            own, command = own[:number], ["icae", *own[number:]]
            break
    for word in own:
        if word.startswith("--") and not re.search(rf"{re.escape(word.split('=')[0])}\b", text):
            raise Wrong(f"{path.name} has no {word}")
    if command[:1] == ["icae"]:
        try_icae(command[1:])


# ------------------------------------------------------------------------------------------ tests


def page_name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    """Breaks when a file or a heading that a README points to is moved or renamed."""
    assert broken(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_are_understood(page, parsing, monkeypatch):
    """Breaks when a README shows a verb, flag, configuration, field or script that is not there."""
    wrong = {}
    for line in commands(page.read_text(encoding="utf-8")):
        try:
            try_command(line, monkeypatch)
        except Wrong as error:
            wrong[line] = str(error)
    assert wrong == {}


@pytest.mark.parametrize(
    "line",
    [
        "icae compres --adapter A",
        "icae compress --adapter A --inputs x --output y",
        "icae train --config icae:pretrain --workdir W --config.compression.kk=3",
        "icae train --config icae:pretrain --workdir W --config.compression.k=many",
        "icae train --config icae:nothing_7b --workdir W",
        "icae train --config absent.py --workdir W",
        "icae convert adapter --frm A --to B",
        "icae export prompt_embed --memory M --to D",
        "python launch/experiments/absent.py",
        "python launch/experiments/methods.py --wrkdir W",
        "launch/tpu_pod.sh --nme x -- icae train",
        "launch/tpu_pod.sh --name x -- icae trane",
        "bash launch/slurm.sbatch --dry_run train --config icae:nothing_7b --workdir W",
        "icea train",
    ],
)
def test_a_wrong_command_is_seen(line, parsing, monkeypatch):
    """Breaks when the test of the commands could not fail."""
    with pytest.raises(Wrong):
        try_command(line, monkeypatch)


def test_a_broken_link_is_seen(tmp_path):
    """Breaks when the test of the links could not fail."""
    (tmp_path / "b.md").write_text("# A heading: `x`\n")
    text = "[1](b.md#a-heading-x) [2](b.md#none) [3](c.md) [4](#here) [5](https://x.y)\n## Here\n"
    (tmp_path / "a.md").write_text(text)
    assert broken(tmp_path / "a.md", text) == ["b.md#none", "c.md"]


def test_pages_are_read():
    """Breaks when the commands of the pages are no longer found at all."""
    found = [line for page in PAGES for line in commands(page.read_text(encoding="utf-8"))]
    assert sum(line.startswith("icae ") for line in found) > 40
    assert any("--config icae:pretrain" in line and "data.eval" in line for line in found)


def test_every_folder_has_a_page():
    """Breaks when a folder of the package, or a front-page folder, has no README."""
    folders = {path.parent for path in (ROOT / "icae_jax").rglob("__init__.py")}
    builders = ROOT / "icae_jax" / "data" / "builders"
    without = {
        str(folder.relative_to(ROOT))
        for folder in folders | {ROOT / name for name in ("configs", "launch", "tests")}
        if not (folder / "README.md").is_file() and folder.parent != builders
    }
    assert without == set()


def test_the_front_page_is_short():
    """Breaks when the front page takes more than a few minutes to read."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= FRONT_PAGE_LINES
