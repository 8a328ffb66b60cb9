"""What the files of this folder give, read by the code of the day: numbers and texts as plain
values, for `expected.json`.

Everything works on a copy of the folder, in which the process stands. Nothing of the package is
used but the command and `icae_jax.load`.
"""

import contextlib
import io
import json
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

import icae_jax
from icae_jax.cli import main as cli  # a module; in the revision that wrote the files, a function

LAYOUTS = {
    "icae": ("servable", "sequential", "uniform", "padded"),
    "x500": ("clean", "sequential_x500", "uniform_x500", "reference"),
}
ADAPTERS = (*LAYOUTS["icae"], *LAYOUTS["x500"])
QUESTIONS = ("where did the cat sat ?", "who ate bread ?")
ANSWER = "the big tree"
INSPECTED = (
    *(f"adapters/{name}" for name in (*ADAPTERS, "peft")),
    "base",
    "formats/icae-v1/icae.pt",
    "formats/icae-v2/icae.safetensors",
    "formats/x500/lora_params.pt",
    "memories/clean.safetensors",
    "memories/joined.safetensors",
    "memories/servable.safetensors",
    "workdirs/icae",
    "workdirs/interrupted",
    "workdirs/x500/adapter",
)
EVALUATIONS = {
    "autoencode": (
        "--suite",
        "autoencode",
        "--adapter",
        "adapters/servable",
        "--data",
        "documents.jsonl",
    ),
    "qa": (
        "--suite",
        "qa",
        "--adapter",
        "workdirs/x500",
        "--data",
        "qa.jsonl",
        "--limit",
        "3",
        "--max_new_tokens",
        "4",
    ),
    "stopped": (
        "--suite",
        "continue",
        "--adapter",
        "adapters/servable",
        "--data",
        "text.jsonl",
        "--batch_size",
        "2",
        "--arms",
        "memory",
    ),
}
# Memory files, whose they are, and what is read out of them.
KEPT = {
    "servable": ("servable", "restored", "asked"),
    "joined": ("servable", "restored"),
    "clean": ("clean", "restored", "asked"),
    "clean_k1": ("clean", "asked"),
    "trained": ("workdirs/icae",),
}
# Configuration, steps and flags of trainings that go on; the first begins from what the second has
# now, and is held against other texts.
UNHELD = "--config.eval_examples=0"
RESUMED = {"interrupted": ("finetune", 6), "icae": ("icae", 6, UNHELD), "x500": ("x500", 6, UNHELD)}
CLOCKS = (
    "seconds",
    "tokens_per_second",
    "mfu",
)  # of a line of metrics, what no two runs have alike


def icae(*argv, code=0):
    """(standard output, standard error) of the command; AssertionError where its exit code is
    another.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = getattr(cli, "main", cli)([str(part) for part in argv])
    assert got == code, f"icae {' '.join(map(str, argv))}: exit code {got}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def documents():
    return [row["text"] for row in json_lines(pathlib.Path("documents.jsonl").read_text())]


def tensors(path):
    return safetensors.numpy.load_file(path)


def metadata(path):
    with safetensors.safe_open(path, framework="numpy") as f:
        return f.metadata()


def load(name, base="base"):
    return icae_jax.load(f"adapters/{name}" if "/" not in name else name, base)


def placed(memory):
    """Where a memory is read, and what it takes."""
    known = {
        "tokens": memory.tokens,
        "bytes": memory.bytes,
        "ratio": memory.ratio,
        "lengths": memory.segment_lengths,
    }
    return {
        name: np.asarray(value).tolist()
        for name, value in (known | {"positions": memory.positions, "end": memory.end}).items()
    }


def scored(compressor, memory):
    """Log-probabilities behind each memory: of the text itself, and of an answer."""
    rows = {"restoring": compressor.score_restoring(memory, documents())}
    if compressor.adapter.template.name in (
        "plain",
        "v1",
    ):  # of both methods; the other templates' ids are told
        rows["answer"] = compressor.score(
            memory, [ANSWER] * len(memory), [QUESTIONS[0]] * len(memory)
        )
    return {name: [[s.log_prob, s.tokens] for s in row] for name, row in rows.items()}


FIELDS = 4  # of a generation, then: text, ids, stopped, ties


def restored(compressor, memory):
    """The texts and ids that are read back out of each memory."""
    return [list(g)[:FIELDS] for g in compressor.restore(memory, max_new_tokens=8, details=True)]


def asked(compressor, memory):
    """The texts and ids that each memory answers."""
    answers = compressor.ask(
        memory, [list(QUESTIONS)] * len(memory), max_new_tokens=6, details=True
    )
    return [[list(g)[:FIELDS] for g in row] for row in answers]


def adapter(name, base="base"):
    """The memory of the documents, written now by an adapter, and what is read out of it."""
    compressor = load(name, base)
    memory = compressor.compress(documents())
    told = {
        "fingerprint": compressor.adapter.fingerprint,
        "template": compressor.adapter.template.as_json(),
        **placed(memory),
    }
    return memory, told | scored(compressor, memory)


def kept(name):
    """What a kept memory file gives with its adapter."""
    compressor = load(KEPT[name][0])
    memory, ids = compressor.load_memory(f"memories/{name}.safetensors")
    told = {"ids": ids, **placed(memory)}
    for do in (restored, asked):
        if do.__name__ in KEPT[name][1:]:
            told[do.__name__] = do(compressor, memory)
    return told


def inspected(path):
    return json.loads(icae("inspect", path, "--json")[0])


def lines(workdir):
    """The lines of a run's metrics, without clocks."""
    every = json_lines((pathlib.Path(workdir) / "metrics.jsonl").read_text())
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in every]


def resume(name):
    """What is said on stderr of a training that goes on."""
    arg, steps, *flags = RESUMED[name]
    return train(arg, name, f"--config.steps={steps}", *flags)


def train(arg, name, *flags):
    """What is said on stderr of a training."""
    return icae("train", "--config", f"config.py:{arg}", "--workdir", f"workdirs/{name}", *flags)[1]


def export(to):
    memory = (
        "--memory",
        "memories/clean.safetensors",
        "--adapter",
        "adapters/clean",
        "--base",
        "base",
    )
    return icae("export", "hf-cache", *memory, "--to", to)


def sweep(*flags):
    return icae(
        "sweep",
        "--config",
        "config.py:icae",
        "--sweep",
        "k",
        "--workdir",
        "sweeps/k",
        "--config.steps=2",
        *flags,
    )


def evaluate(name):
    """(standard output, standard error, results.json) of an evaluation."""
    out, err = icae(
        "evaluate", *EVALUATIONS[name], "--base", "base", "--out", f"evaluations/{name}"
    )
    return out, err, json.loads((pathlib.Path("evaluations") / name / "results.json").read_text())
