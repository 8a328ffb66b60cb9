"""Every command in every README is one that its program takes, and every link leads somewhere."""

import argparse
import itertools
import pathlib
import re
import runpy
import shlex
import sys

import pydantic
import pytest
from conftest import ROOT

from icae_jax.cli import flags
from icae_jax.cli import main as cli
from icae_jax.errors import UserError
from icae_jax.server import schema
from icae_jax.training import config_file
from icae_jax.training.config import BaseConfig, TrainConfig

PAGES = [ROOT / "README.md"] + [
    page
    for folder in ("configs", "icae_jax", "launch", "tests")
    for page in sorted((ROOT / folder).rglob("README.md"))
]
FRONT_PAGE_LINES = 220
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Other people's programs, whose arguments are not checked.
OTHERS = {"pip", "cp", "python3", ".", "pytest", "ruff"}
OTHERS |= {"sudo", "openssl", "journalctl", "kubectl"}
CURL = ("-X", "-H", "-d")
# What curl asks of `icae serve` in the READMEs.
SERVED = {
    ("POST", "v1/chat/completions"): schema.ChatRequest,
    ("POST", "v1/completions"): schema.CompletionRequest,
    ("POST", "v1/memories"): schema.MemoryRequest,
    ("POST", "v1/memories/ID/restore"): schema.RestoreRequest,
    ("GET", "v1/models"): None,
    ("GET", "v1/memories"): None,
    ("GET", "metrics"): None,
}
WITH_CONFIG = ("train", "sweep", "plan", "bench")
# Words that stand for a file of the reader's.
PLACEHOLDERS = ("FILE", "NAME", "my_configs/")


class Understood(Exception):
    """Raised in place of running a program whose arguments are valid."""


class Wrong(Exception):
    """A command that its program would refuse."""


# --------------------------------------------------------------------------------- reading a page


def prose(text: str) -> str:
    """A page without its code blocks."""
    return FENCED.sub("", text)


def commands(text: str) -> list[str]:
    """The commands in a page's bash blocks, with their variables filled in."""
    blocks = [block for language, block in FENCED.findall(text) if language == "bash"]
    lines, variables = [], {}
    for line in re.sub(r"\\\n\s*", " ", "".join(blocks)).splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        if words and re.match(r"\w+=", words[0]):
            name, _, value = words[0].partition("=")
            variables[name] = value
        elif words:
            lines += shlex.join(words).split(" '&&' ")
    return lines


def mentions(text: str) -> list[str]:
    """The commands between backticks in a page's prose, which may leave arguments out."""
    spans = re.findall(r"`((?:icae|python|bash|launch/\S+) [^`]+)`", prose(text))
    return [re.sub(r"[\[\]]", "", span.replace("\n", " ")) for span in spans]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: pathlib.Path, text: str) -> list[str]:
    """The links of a page to files or headings that are not in this repository."""
    broken = []
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(text)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if re.match(r"\w+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            broken.append(link)
    return broken


# ------------------------------------------------------------------------------ trying a command


@pytest.fixture
def attempt(monkeypatch):
    """`attempt(command, complete)`: raises `Wrong` where a README shows what no program takes.

    Every argument parser stops after parsing. Unless `complete`, it asks for no argument.
    """
    parse = argparse.ArgumentParser.parse_known_args
    complete = True

    def parse_and_stop(self, args=None, namespace=None):
        if not complete:
            for argument in [*self._actions, *self._mutually_exclusive_groups]:
                argument.required = False
        try:
            _, unknown = parse(self, args, namespace)
        except SystemExit as end:  # --help was printed
            raise Understood from end
        if unknown:
            raise Wrong(f"{self.prog} has no {' '.join(unknown)}")
        raise Understood

    def refuse(self, message):
        if not complete and message.endswith("expected one argument"):
            raise Understood
        raise Wrong(f"{self.prog}: {message}")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)

    def attempt(command, is_complete=True):
        nonlocal complete
        complete = is_complete
        try_command([word for word in shlex.split(command) if word != "…"], monkeypatch)

    return attempt


def try_command(words, monkeypatch):
    """Parses a command as its program would."""
    program, *arguments = words
    if program == "icae":
        try_icae(arguments)
    elif program == "bash" or program.startswith("launch/"):
        script, *arguments = arguments if program == "bash" else words
        try_launcher(ROOT / script, arguments)
    elif program == "python":
        script, *arguments = arguments
        # A script that an export wrote is a copy of one of the package.
        folder = ROOT if script.startswith(("launch/", "tests/")) else ROOT / "icae_jax"
        if folder != ROOT:
            script = f"interop/export/scripts/{pathlib.Path(script).name}"
        try_script(folder / script, arguments, monkeypatch)
    elif program == "curl":
        try_curl(arguments)
    elif program not in OTHERS:
        raise Wrong(f"what is {program}?")


def try_curl(argv):
    """Holds a request to `icae serve` against its fields and its routes."""
    options = {flag: value for flag, value in itertools.pairwise(argv) if flag in CURL}
    (url,) = [word for word in argv if word.startswith("localhost:8000/")]
    method = options.get("-X", "POST" if "-d" in options else "GET")
    path = re.sub("/memories/[^/]+", "/memories/ID", url.partition("/")[2].partition("?")[0])
    if (method, path) not in SERVED:
        raise Wrong(f"icae serve has no {method} {path}")
    if "-d" not in options:
        return
    if "application/json" not in options.get("-H", ""):
        raise Wrong("a body is read only with Content-Type: application/json")
    try:
        SERVED[method, path].model_validate_json(options["-d"])
    except pydantic.ValidationError as error:
        raise Wrong(str(error)) from error


def try_icae(argv):
    """Parses the arguments of the `icae` command, and loads the configuration that they name."""
    argv = flags.normalised(argv)
    if not argv or argv[0] in ("VERB", "help"):
        return
    if argv[0] not in cli.VERBS:
        raise Wrong(f"no verb {argv[0]}")
    if argv[0] in WITH_CONFIG:
        try_configuration(argv)
        argv = [word for word in argv if not word.startswith("--config.")]
    run, _ = cli.VERBS[argv[0]]
    try:
        code = run(argv[1:])
    except Understood:
        return
    raise Wrong(f"exit code {code}, not parsed")


def try_configuration(argv):
    """Loads what `--config` names, with the fields given."""
    names = [name for flag, name in itertools.pairwise(argv) if flag == "--config"]
    fields = [word for word in argv if word.startswith("--config.") and "field" not in word]
    if not names or names[0].startswith(PLACEHOLDERS):
        return
    kind = BaseConfig if argv[:2] == ["train", "base"] else TrainConfig
    absent = {"base": "BASE", "data.train": "DATA", "init_from": "RUN"}
    try:
        config_file.load(
            kind, names[0], config_file.overrides(fields), absent if kind is TrainConfig else {}
        )
    except UserError as error:
        raise Wrong(str(error)) from error


def try_script(path, argv, monkeypatch):
    """Parses the arguments of a Python script, if it parses any."""
    if not path.is_file():
        raise Wrong(f"no file {path.relative_to(ROOT)}")
    if "argparse" not in path.read_text(encoding="utf-8"):
        return
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    monkeypatch.syspath_prepend(path.parent)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Understood:
        return
    raise Wrong(f"{path.name} was run, not parsed")


def try_launcher(path, argv):
    """Looks for the flags in a shell script, and parses the `icae` command that it is given."""
    if not path.is_file():
        raise Wrong(f"no file {path.relative_to(ROOT)}")
    split = argv.index("--") if "--" in argv else len(argv)
    own, command = argv[:split], argv[split + 1 :]
    if path.suffix == ".sbatch":  # takes a verb and its flags
        split = next((i for i, word in enumerate(own) if not word.startswith("--")), len(own))
        own, command = own[:split], ["icae", *own[split:]]
    known = re.findall(r"--\w+", path.read_text(encoding="utf-8"))
    for word in own:
        if word.startswith("--") and word.partition("=")[0] not in known:
            raise Wrong(f"{path.name} has no {word}")
    if command[:1] == ["icae"]:
        try_icae(command[1:])


# ------------------------------------------------------------------------------------------ tests


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    """Breaks when a file or a heading that a README points to is moved or renamed."""
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_understood(page, attempt):
    """Breaks when a README shows a verb, flag, configuration, field or script that is not there."""
    text, wrong = page.read_text(encoding="utf-8"), {}
    both = [(line, True) for line in commands(text)] + [(line, False) for line in mentions(text)]
    for line, complete in both:
        try:
            attempt(line, complete)
        except Wrong as error:
            wrong[line] = str(error)
    assert wrong == {}


@pytest.mark.parametrize(
    "line",
    [
        "icae compres --adapter A",
        "icae compress --adapter A --inputs x --output y",
        "icae compress --adapter A --input x",
        "icae compress --adapter A --input x --output y --config.steps=3",
        "icae train --config icae:pretrain --workdir W --resume",
        "icae train --config icae:pretrain --workdir W --config.compression.kk=3",
        "icae train --config icae:pretrain --workdir W --config.compression.k=many",
        "icae train --config icae:nothing_7b --workdir W",
        "icae train --config absent.py --workdir W",
        "icae train base --config tiny_base --workdir W --config.compression.k=3",
        "icae convert adapter --frm A --to B --base C",
        "icae convert",
        "icae evaluate --suite qa2 --adapter A --data D",
        "icae export prompt_embed --memory M --to D",
        "python launch/experiments/absent.py",
        "python launch/experiments/methods.py --wrkdir W",
        "python exported/vllm/request.py tell",
        "launch/tpu_pod.sh --nam x -- icae train",
        "launch/tpu_pod.sh --name x -- icae trane",
        "launch/tpu_pods.sh --name x -- icae train",
        "bash launch/slurm.sbatch --dry_run train --config icae:nothing_7b --workdir W",
        "bash launch/slurm.sbatch --dry_run trane --config icae --workdir W",
        "icea train",
    ],
)
def test_a_wrong_command_is_seen(line, attempt):
    """Breaks when the test of the commands could not fail."""
    with pytest.raises(Wrong):
        attempt(line)


def test_a_mention_may_leave_arguments_out_but_not_misspell_them(attempt):
    """Breaks when prose must repeat all of a command, or may name flags that are not there."""
    attempt("icae compress --k 4", False)
    attempt("icae plan --help")
    with pytest.raises(Wrong, match="--kk"):
        attempt("icae compress --kk 4", False)


def test_commands_are_found():
    """Breaks when comments, variables, lines that go on, or joined commands are misread."""
    text = (
        "# not a command\n```bash\na && b -c   # remark\n\n"
        'both="x y"\nicae ask $both \\\n    --d "e f"\n```\n'
        "Text with `icae cache list` and `icae x [--y]`.\n```\nicae output\n```\n"
    )
    assert commands(text) == ["a", "b -c", "icae ask x y --d 'e f'"]
    assert mentions(text) == ["icae cache list", "icae x --y"]
    lines = [line for page in PAGES for line in commands(page.read_text(encoding="utf-8"))]
    assert sum(line.startswith("icae ") for line in lines) > 40


def test_a_broken_link_is_seen(tmp_path):
    """Breaks when the test of the links could not fail."""
    (tmp_path / "b.md").write_text("# A heading: `x`\n```\n# none\n```\n")
    text = "[1](b.md#a-heading-x) [2](b.md#none) [3](c.md) [4](#here) [5](https://x.y)\n## Here\n"
    (tmp_path / "a.md").write_text(text)
    assert broken_links(tmp_path / "a.md", text + "[6](#there)") == ["b.md#none", "c.md", "#there"]


def test_every_folder_has_a_page():
    """Breaks when a folder of the package has no README; each builder's is that of all builders."""
    folders = {path.parent for path in (ROOT / "icae_jax").rglob("__init__.py")}
    builders = ROOT / "icae_jax" / "data" / "builders"
    assert [
        name_of(f) for f in folders if f.parent != builders and f / "README.md" not in PAGES
    ] == []


def test_the_front_page_is_short():
    """Breaks when the front page takes more than a few minutes to read."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= FRONT_PAGE_LINES
