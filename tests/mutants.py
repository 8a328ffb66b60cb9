"""Plants deliberate faults, one at a time, in copies of the tree, and runs the tests that should
fail of each.

    python tests/mutants.py [--only WORD] [--jobs N] [--tree FOLDER] [--check]

Not collected by pytest. Each fault of `faults*.py` is one text of one file replaced by another; a
text that is not there exactly once is an error, so that the list keeps up with the code. The same
tests are run without the fault too, and must pass: else they fail of something else. Exit code 0
where all were caught, 1 where one survived, 2 where one could not be planted or tried.
"""

import argparse
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

import faults
import faults_of_bench_ask
import faults_of_bench_serve
import faults_of_chat
import faults_of_exports
import faults_of_filling
import faults_of_input
import faults_of_methods
import faults_of_page
import faults_of_quantising
import faults_of_serve
import faults_of_store
from faults import Mutant

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("icae_jax", "tests", "configs", "launch", ".pytest.ini", "README.md", "setup.py", ".ci")
MOST_SECONDS = 600  # then it counts as caught: a test that never ends is seen
NO_TESTS = 5  # pytest's exit code
UNCHANGED = "no fault"


def copied(source, folder):
    """A copy in `folder` of what tests need of a checkout."""
    tree = pathlib.Path(tempfile.mkdtemp(dir=folder))
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(
                source / name, tree / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        elif (source / name).exists():
            shutil.copy(source / name, tree / name)
    return tree


def plant(mutant, tree):
    """Writes the fault into a copy of the tree. ValueError where the text is not there exactly
    once.
    """
    if mutant.what == UNCHANGED:
        return
    path = tree / "icae_jax" / mutant.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(mutant.text) != 1:
        raise ValueError(
            f"{mutant.file} holds {whole.count(mutant.text)} times, not once: {mutant.text}"
        )
    path.write_text(whole.replace(mutant.text, mutant.fault), encoding="utf-8")


def check(mutants, tree):
    """Prints the faults that cannot be planted. Returns the exit code."""
    wrong = 0
    for mutant in mutants:
        path = tree / "icae_jax" / mutant.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(mutant.text) != 1:
            wrong += 1
            print(f"{mutant.file} has it {text.count(mutant.text)} times: {mutant.text}")
    print(f"{len(mutants)} faults: {wrong} cannot be planted")
    return 2 if wrong else 0


def arguments(tests):
    """Pytest's arguments: files of tests/, and what else is said."""
    import shlex

    return [
        f"tests/{word}" if word.startswith("test_") and ".py" in word else word
        for word in shlex.split(tests)
    ]


def run(mutant, tree):
    """In a process of its own, which has imported what tests need but nothing of the tree: ends
    with pytest's exit code.
    """
    import pytest

    os.chdir(tree)
    out = os.open(tree / "out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ["PYTHONPATH"] = f"{tree}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    sys.path.insert(0, str(tree))
    signal.alarm(MOST_SECONDS)
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    os._exit(pytest.main([*options, *arguments(mutant.tests)]))


def outcome(status, control):
    """Caught or survived, of a control passed or failed, or an error, in a word."""
    ended = "FAILED WITHOUT A FAULT" if control else "caught"
    if os.WIFSIGNALED(status):
        return (
            ended
            if os.WTERMSIG(status) == signal.SIGALRM
            else f"killed by signal {os.WTERMSIG(status)}"
        )
    code = os.WEXITSTATUS(status)
    return {0: "passed" if control else "SURVIVED", 1: ended, NO_TESTS: "no such tests"}.get(
        code, f"pytest ended with {code}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="only faults whose description or file holds this word"
    )
    parser.add_argument("--jobs", type=int, default=2, help="how many are tried at once")
    parser.add_argument(
        "--tree", type=pathlib.Path, default=ROOT, help="another checkout, whose own tests are run"
    )
    parser.add_argument(
        "--check", action="store_true", help="only check that each fault's text is there once"
    )
    args = parser.parse_args()
    chosen = [
        m
        for module in (
            faults,
            faults_of_bench_ask,
            faults_of_bench_serve,
            faults_of_chat,
            faults_of_exports,
            faults_of_filling,
            faults_of_input,
            faults_of_methods,
            faults_of_page,
            faults_of_quantising,
            faults_of_serve,
            faults_of_store,
        )
        for m in module.MUTANTS
        if args.only in m.what or args.only in m.file
    ]
    if args.check:
        return check(chosen, args.tree)

    sys.dont_write_bytecode = (
        True  # what was compiled of a file before the fault must not be taken for it
    )
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "compiled"))
    os.environ.setdefault("ICAE_SHARED", str(args.tree.resolve().parent / "shared"))
    # Imported once: every process that is forked from here has it.
    import flax.linen  # noqa: F401
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import pytest  # noqa: F401
    import transformers  # noqa: F401

    controls = [
        Mutant(UNCHANGED, "", "", "", tests) for tests in dict.fromkeys(m.tests for m in chosen)
    ]
    found, running, waiting = {}, {}, controls + chosen
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                mutant = waiting.pop(0)
                tree = copied(args.tree, folder)
                try:
                    plant(mutant, tree)
                except (ValueError, OSError) as error:
                    found[mutant] = f"not planted: {error}"
                    print(f"{found[mutant]}: {mutant.what}", flush=True)
                    continue
                pid = os.fork()
                if not pid:
                    run(mutant, tree)
                running[pid] = mutant, tree, time.monotonic()
            if running:
                pid, status = os.wait()
                mutant, tree, began = running.pop(pid)
                control = mutant.what == UNCHANGED
                found[mutant] = word = outcome(status, control)
                about = mutant.tests if control else f"{mutant.what} ({mutant.file})"
                print(f"{word}: {about}; {time.monotonic() - began:.0f} s", flush=True)
                if word not in ("passed", "caught", "SURVIVED"):
                    print((tree / "out").read_text(errors="replace")[-1500:], flush=True)
                shutil.rmtree(tree)
    sound = {control.tests for control in controls if found[control] == "passed"}
    words = [found[m] if m.tests in sound or found[m] != "caught" else "not tried" for m in chosen]
    caught, survived = words.count("caught"), words.count("SURVIVED")
    print(
        f"{len(words)} faults: {caught} caught, {survived} survived, "
        f"{len(words) - caught - survived} not tried; "
        f"{len(sound)} of {len(controls)} selections of tests pass without a fault"
    )
    return 2 if caught + survived < len(words) else int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
