"""What users wrote with an earlier revision is read by today's code, and gives what it gave then.

The files of `earlier/` are that revision's (3641a2d, by `earlier/make.py`), and so are the numbers
and texts in `expected.json`. `earlier/observe.py` reads them, there as here, by the command and
`icae_jax.load` alone. Numbers agree to 1e-5, of their size where that is above 1; texts and ids are
the same.
"""

import json
import math
import pathlib
import shutil

import numpy as np
import pytest
from earlier import observe

HERE = pathlib.Path(__file__).with_name("earlier")
EXPECTED = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
BOUND = 1e-5


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A copy of the files that a test may change; the process stands in it."""
    folder = shutil.copytree(
        HERE, tmp_path / "earlier", ignore=shutil.ignore_patterns("*.py[co]", "__pycache__")
    )
    monkeypatch.chdir(folder)
    return folder


def nightly_pickles(*cases):
    """Cases of files, those of pickles for the nightly run: PyTorch takes seconds to import."""
    return [
        pytest.param(*case, marks=[pytest.mark.nightly] if case[0].endswith(".pt") else [])
        for case in cases
    ]


def check(got, want, where=""):
    """AssertionError naming the first place in which plain values differ: floats by more than the
    bound, all else at all.
    """
    if isinstance(want, dict):
        assert isinstance(got, dict) and list(got) == list(want), (
            f"{where}: has {list(got)}, had {list(want)}"
        )
        for name in want:
            check(got[name], want[name], f"{where}/{name}")
    elif isinstance(want, list):
        assert isinstance(got, list) and len(got) == len(want), f"{where}: is {got}, was {want}"
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            check(g, w, f"{where}/{i}")
    elif isinstance(want, float):
        assert math.isclose(got, want, rel_tol=BOUND, abs_tol=BOUND), (
            f"{where}: is {got}, was {want}"
        )
    else:
        assert type(got) is type(want) and got == want, f"{where}: is {got!r}, was {want!r}"


def check_arrays(got, want):
    """The same names, shapes and types, and values within the bound."""
    assert {name: (x.shape, x.dtype) for name, x in got.items()} == {
        name: (x.shape, x.dtype) for name, x in want.items()
    }
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=BOUND, atol=BOUND, err_msg=name)


@pytest.mark.parametrize(
    "name",
    [
        # One of each method; the other layouts compile as much again.
        pytest.param(name, marks=[] if name in ("servable", "clean") else [pytest.mark.nightly])
        for name in observe.ADAPTERS
    ],
)
def test_adapters_of_every_layout_write_and_read_as_before(name):
    """Breaks when an adapter folder is refused, or any of its fields (layout, trigger, template,
    ks, LoRA's targets and scale) is read otherwise, or a memory, its positions, or what is
    scored behind it is another.
    """
    memory, told = observe.adapter(name)
    check(told, EXPECTED["adapters"][name])
    stored = observe.tensors(f"memories/{name}.safetensors")
    check_arrays(
        {field: np.asarray(x) for field, x in memory.contents.items()}
        | {"lengths": memory.segment_lengths},
        stored,
    )


@pytest.mark.parametrize(
    ("name", "base"), [("peft", "base"), ("servable", "base_orbax"), ("workdirs/icae", "base")]
)
def test_an_adapter_in_peft_s_form_an_orbax_base_and_a_workdir_are_read_as_before(name, base):
    """Breaks when PEFT's form of an adapter, an Orbax copy of a base or the adapter in a training's
    folder is read otherwise.
    """
    memory, told = observe.adapter(name, base)
    check(told, EXPECTED["adapters"][name])
    stored = observe.tensors(
        f"memories/{'trained' if name == 'workdirs/icae' else 'servable'}.safetensors"
    )
    np.testing.assert_allclose(memory.slots, stored["slots"], rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("name", observe.KEPT)
def test_kept_memories_are_read_as_before(name):
    """Breaks when a memory file is refused, its texts are put at other positions, or other tokens
    come out of it: of slots and of K/V, of one number of memory tokens or another, joined, and
    by a trained adapter.
    """
    check(observe.kept(name), EXPECTED["memories"][name])


def test_the_command_answers_from_a_kept_memory():
    """Breaks when `icae ask` or `restore` finds no text by its id, or answers otherwise than
    `Compressor` does.
    """
    where = (
        "--memory",
        "memories/servable.safetensors",
        "--adapter",
        "adapters/servable",
        "--base",
        "base",
        "--json",
    )
    want = EXPECTED["memories"]["servable"]
    asked = observe.icae(
        "ask", *where, "--id", "second", "--question", observe.QUESTIONS[0], "--max_new_tokens", "6"
    )[0]
    answer = {"id": "second", "question": observe.QUESTIONS[0], "answer": want["asked"][1][0][0]}
    (told,) = observe.json_lines(asked)
    read = {"k": 4, "tokens_read": 4, "mean_log_prob": told["mean_log_prob"]}  # since then
    assert told == answer | read
    restored = observe.json_lines(observe.icae("restore", *where, "--max_new_tokens", "8")[0])
    assert restored == [
        {"id": i, "text": g[0]} for i, g in zip(want["ids"], want["restored"], strict=True)
    ]


@pytest.mark.parametrize("name", ["servable", "clean"])
def test_memory_files_are_written_as_before(name):
    """Breaks when a memory file's tensors or metadata get another name, type or content, so that
    other programs, or earlier versions, do not read it; its version and the adapter's folder
    alone may differ.
    """
    compress = (
        "compress",
        "--adapter",
        f"adapters/{name}",
        "--base",
        "base",
        "--input",
        "documents.jsonl",
    )
    observe.icae(*compress, "--output", "new.safetensors")
    kept = f"memories/{name}.safetensors"
    check_arrays(observe.tensors("new.safetensors"), observe.tensors(kept))
    new, old = (
        {n: v for n, v in observe.metadata(p).items() if n not in ("icae_jax_version", "adapter")}
        for p in ("new.safetensors", kept)
    )
    assert new == old


def test_what_transformers_reads_is_written_as_before():
    """Breaks when the cache that is exported for transformers gets other tensors or another
    description.
    """
    observe.export("new")
    check_arrays(
        observe.tensors("new/cache.safetensors"), observe.tensors("hf-cache/cache.safetensors")
    )
    new, old = (
        observe.metadata("new/cache.safetensors"),
        observe.metadata("hf-cache/cache.safetensors"),
    )
    changed = {name for name, value in (new | old).items() if new.get(name) != value}
    assert changed <= {"base", "icae_jax_version"}  # the base's folder is elsewhere


@pytest.mark.parametrize("path", nightly_pickles(*((path,) for path in observe.INSPECTED)))
def test_files_are_told_apart_as_before(path):
    """Breaks when a folder or file is taken for something else, or a name in what `icae inspect
    --json` prints is another.
    """
    expected = EXPECTED["inspected"][path]
    if "v" in expected:
        expected = expected | {"k": 4}  # the shape of the tensor k stood there
    check(observe.inspected(path), expected)


@pytest.mark.parametrize(
    ("path", "adapter"),
    nightly_pickles(
        ("formats/icae-v1/icae.pt", "sequential"),
        ("formats/icae-v2/icae.safetensors", "sequential"),
        ("formats/x500/lora_params.pt", "reference"),
    ),
)
def test_the_reference_implementations_files_become_the_adapter_that_they_were(path, adapter):
    """Breaks when a file that was written for a reference implementation is read otherwise, or not
    to what the note beside it says.
    """
    if path.endswith(".pt"):
        pytest.importorskip("torch")
    form = path.split("/")[1]
    observe.icae("convert", "adapter", "--from", path, "--base", "base", "--to", "back", "--force")
    back, was = observe.inspected("back"), EXPECTED["inspected"][f"adapters/{adapter}"]
    assert back.pop("origin")["format"] == form
    check(
        back, {name: value for name, value in was.items() if name in back} | {"base": back["base"]}
    )
    check_arrays(
        *(
            observe.tensors(f"{of}/encoder/adapter_model.safetensors")
            for of in ("back", f"adapters/{adapter}")
        )
    )
    tables = [
        observe.tensors(f"{of}/memory.safetensors")["memory_token_embed.weight"]
        for of in ("back", f"adapters/{adapter}")
    ]
    rows = len(tables[1]) - (
        3 if form == "x500" else 0
    )  # that format has no place for what stands behind the memory tokens
    check_arrays({"table": tables[0][:rows]}, {"table": tables[1][:rows]})


@pytest.mark.nightly  # compiles three training steps
@pytest.mark.parametrize("name", observe.RESUMED)
def test_trainings_go_on_from_the_kept_step(name, here):
    """Breaks when a workdir is refused, or its training goes on from another step, with another
    optimizer's state, other batches, dropout or k, or its metrics are written otherwise; or when
    its data are tokenised anew, although the cache of tokens has them.
    """
    steps = observe.RESUMED[name][1]
    workdir, want = here / "workdirs" / name, EXPECTED["resumed"][name]
    before = observe.lines(workdir)
    first = before[-1]["step"]
    tokens = arrays_of_tokens()
    said = observe.resume(name)
    assert f"resumed at step {first}" in said and "tokenising" not in said
    got = observe.lines(workdir)
    assert got[: len(before)] == before and [line["step"] for line in got] == [
        line["step"] for line in want
    ]
    check(got, want)
    assert (workdir / "DONE").read_text() == f"{steps}\n"
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir())[-1] == f"step_{steps}"
    assert arrays_of_tokens() == tokens  # the very files, unchanged, and none beside them
    told = observe.inspected(f"workdirs/{name}/adapter")
    assert told["what"] == "adapter folder" and told["method"] == (
        "x500" if name == "x500" else "icae"
    )
    assert f"{workdir.relative_to(here)} is done already ({steps} steps)" in observe.resume(name)


def arrays_of_tokens():
    """`{path: (inode, time of change, bytes)}` of the arrays in the token cache."""
    found = {path: path.stat() for path in sorted(pathlib.Path("cache").rglob("*.npy"))}
    return {
        str(path): (stat.st_ino, stat.st_mtime_ns, path.read_bytes())
        for path, stat in found.items()
    }


def test_the_cache_is_listed_as_before():
    """Breaks when a kept source is no longer among what `icae cache` knows, or is an earlier
    version's, which would be removed first.
    """
    listed = observe.json_lines(observe.icae("cache", "list", "--cache_dir", "cache", "--json")[0])
    assert {(row["what"], row["name"], row["outdated"]) for row in listed} == {
        ("tokens", n, False) for n in ("text.jsonl", "qa.jsonl")
    }


@pytest.mark.parametrize("name", ["autoencode", "qa"])
def test_results_of_an_evaluation_are_shown_again(name, here):
    """Breaks when results that are there are refused as another run's, measured anew, or shown
    otherwise.
    """
    path = here / "evaluations" / name / "results.json"
    before = path.read_bytes(), path.stat().st_mtime_ns
    out, err, _ = observe.evaluate(name)
    assert (
        f"evaluations/{name} is done already" in err
        and (path.read_bytes(), path.stat().st_mtime_ns) == before
    )
    # One question was "1 questions" then.
    assert anywhere(out) == anywhere(EXPECTED[name].replace(" 1 questions ", " 1 question "))


def anywhere(text):
    """A text without the line that tells where the page lies."""
    return [line for line in text.splitlines() if not line.startswith("report ")]


@pytest.mark.nightly
def test_a_stopped_evaluation_goes_on(here):
    """Breaks when the kept progress of an evaluation is refused or measured anew, or what is
    measured beside it scores otherwise.
    """
    progress = here / "evaluations" / "stopped" / "progress.0.jsonl"
    lines = observe.json_lines(progress.read_text())
    assert len(lines) == 3  # whose they are, and two examples of six
    known, lines[1]["records"][0]["id"] = lines[1]["records"][0]["id"], "told by the file"
    progress.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, _, result = observe.evaluate("stopped")
    (told,) = (example for example in result["examples"] if example["id"] == "told by the file")
    told["id"] = known
    check({name: result[name] for name in ("scores", "examples")}, EXPECTED["stopped"])
    assert not progress.exists()


def test_the_table_of_a_sweep_is_made_again(here):
    """Breaks when a sweep's folder is refused or its points are named, counted or read otherwise,
    or results.json has other fields.
    """
    before = json.loads((here / "sweeps/k/results.json").read_text())
    out, _ = observe.sweep("--table")
    assert out == EXPECTED["sweep"]
    check(json.loads((here / "sweeps/k/results.json").read_text()), before)
