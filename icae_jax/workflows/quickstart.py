"""The quickstart: trains methods on a small shipped base, and shows what memories are worth."""

import dataclasses
import functools
import json
import pathlib
import runpy
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree
from tqdm import tqdm

from icae_jax import files, lock
from icae_jax.data import synthetic
from icae_jax.errors import UserError
from icae_jax.evaluation import report
from icae_jax.inference.compressor import Compressor
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.performance.utilisation import Meter
from icae_jax.runtime import sharding
from icae_jax.training import config_file
from icae_jax.training.base_task import BASE, BaseTask
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import BaseConfig, TrainConfig
from icae_jax.training.train import NORMAL, QUIET, VERBOSE, train
from icae_jax.workflows import quickstart_results as results
from icae_jax.workflows.quickstart_results import PHASES, Rows, TrainedMethod

SHIPPED_BASE = pathlib.Path(__file__).parents[1] / "data" / "tiny_base"
QUICK, FULL = "4x", ""  # arguments of the configuration `quickstart`: one ratio, or both
TRAIN_SEED, HELD_OUT_SEED = 1, 2
TRAIN_PASSAGES, QUICK_PASSAGES = 12_000, 4_000
SHOWN_EVERY = 50  # training steps between two restored sentences

TIMES = {
    QUICK: "the first answer within 2 minutes, all of it within 5 "
    "(--full: memories of 2 tokens as well, 10 minutes)",
    FULL: "the first answer within 4 minutes, all of it within 10",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the quickstart does.

    workdir: by default ./quickstart, with full ./quickstart_full. full: one model per method for
    both ratios, trained longer. from_scratch: train the base too. steps: of each phase, instead of
    the recipe's. held_out: passages to measure on. verbose: let training say everything.
    """

    workdir: str | None = None
    full: bool = False
    from_scratch: bool = False
    steps: int | None = None
    held_out: int = 100
    verbose: bool = False

    def __post_init__(self):
        # At least two passages: each is also measured with the other's memory.
        for name, least in (("steps", 1), ("held_out", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}; it must be at least {least}")
        if not (SHIPPED_BASE / "config.json").exists() and not self.from_scratch:
            raise UserError(
                f"{SHIPPED_BASE}: the shipped base is not there; "
                "reinstall, or run with --from_scratch"
            )

    @property
    def folder(self) -> pathlib.Path:
        """The workdir."""
        return pathlib.Path(self.workdir or ("quickstart_full" if self.full else "quickstart"))

    @property
    def recipe(self) -> str:
        """`QUICK` or `FULL`."""
        return FULL if self.full else QUICK

    @property
    def verbosity(self) -> int:
        """As `training.train` has it."""
        return VERBOSE if self.verbose else QUIET


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the quickstart came to.

    result: the content of results.json. shown: (title, memory tokens, passage, restored) of some
    passages. facts: what was measured, in a sentence. passage, commands: what to try next.
    """

    result: results.Result
    shown: list[tuple[str, int, str, str]]
    facts: str
    page: pathlib.Path
    adapter: pathlib.Path
    passage: str
    commands: list[str]

    def as_json(self) -> dict[str, Any]:
        """The result with the places of the page and the adapter."""
        places = {"report": str(self.page.resolve()), "adapter": str(self.adapter)}
        return self.result | places | {"next": self.commands}

    def text(self) -> str:
        """The outcome for people: facts, the table, a restored passage of each memory."""
        lines = ["", self.facts, "", report.text_table(*results.summary_table(self.result)), ""]
        first = {(name, k): pair for name, k, *pair in reversed(self.shown)}
        for (name, k), (original, restored) in first.items():
            label = f"{name}, {k} tokens"
            width = max(16, len(label) + 2)
            lines += [f"{'original':{width}}{original}", f"{label:{width}}{restored}", ""]
        lines += [f"report    {self.page.resolve()}", f"adapter   {self.adapter}", ""]
        lines += [f"next, about: {self.passage}", ""]
        return "\n".join([*lines, *(f"  {command}" for command in self.commands)])


# ------------------------------------------------------------------------------------------ recipes


@functools.cache
def trained_methods() -> tuple[str, ...]:
    """The methods of configs/quickstart.py, the sooner trained first."""
    path, _ = config_file.find("quickstart")
    return tuple(runpy.run_path(str(path))["METHODS"])


def phase_config(phase: str, method: str, recipe: str, fields: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a phase of a method, with these fields set."""
    arg = "-".join(filter(None, (phase, method, recipe)))
    return config_file.load(TrainConfig, f"quickstart:{arg}", fields)


def announcement(options: Options) -> str:
    """What will be trained, and how long it takes."""
    unset = {"base": "-", "data.train": "-"}
    config = phase_config("pretrain", trained_methods()[0], options.recipe, unset)
    tokens = " and ".join(map(str, sorted(config.compression.choices, reverse=True)))
    titles = " and ".join(map(results.title, trained_methods()))
    return (
        f"Trains {titles} on a small shipped base: passages of 46 tokens are written into memories "
        f"of {tokens} tokens, restored, and asked about.\n"
        f"On 2 CPU cores without other load: {TIMES[options.recipe]}.\n"
        f"At the end: a table beside the controls, and {options.folder}/report.html. "
        "Stopped in the middle, the same command continues.\n"
    )


def write_data(folder: pathlib.Path, train_passages: int, held_out_passages: int) -> None:
    """Writes train.jsonl and held_out.jsonl with a line per question, as `data.sources` reads it.

    Files that are there stay: a run that is continued keeps its data.
    """
    for name, seed, count in (
        ("train", TRAIN_SEED, train_passages),
        ("held_out", HELD_OUT_SEED, held_out_passages),
    ):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            lines = [
                json.dumps({"context": row["context"], **question}) + "\n"
                for row in synthetic.passages(seed, count)
                for question in row["questions"]
            ]
            files.write_text(path, "".join(lines))


def load_base(source: str | pathlib.Path) -> bases.Base:
    """A base as all trainings of the quickstart have it, read once."""
    placement = sharding.Placement(sharding.make_mesh(), bases.sizes(source))
    return bases.load_base(source, jnp.float32, placement.parameter)


# ----------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class Training:
    """How methods are trained.

    data: the folder of `write_data`. recipe: `QUICK` or `FULL`. steps: `{phase: steps}` instead of
    the recipe's. rows: held-out passages, of which a restored sentence is shown now and then.
    """

    base: bases.Base
    data: pathlib.Path
    recipe: str = FULL
    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rows: Rows = ()
    verbosity: int = NORMAL

    def train(
        self, method: str, workdir: pathlib.Path, compression: Mapping[str, Any] | None = None
    ) -> tuple[int, TrainedMethod | None]:
        """Trains both phases of a method in `workdir`; returns (exit code, the method if done).

        compression: fields of the compression configuration to set.
        """
        untrained = compressor_of = None
        for phase, learned in PHASES.items():
            config = self._config(phase, method, workdir, compression or {})
            task = CompressorTask(config, self.base)
            if phase == "pretrain":  # whose k_choices are those of the second phase
                compressor_of = functools.partial(self._compressor, config, task, workdir)
                untrained = compressor_of(task.init())
            watch = None
            if len(self.rows):
                watch = show_restored(
                    compressor_of, self.rows, lambda text: tqdm.write(text, file=sys.stderr)
                )
            code = train(
                config,
                task,
                workdir / phase,
                verbosity=self.verbosity,
                title=f"{results.title(method)}, {learned}",
                watch=watch,
                meter=Meter(task),
            )
            if code:
                return code, None
        folder = workdir / phase / adapters.IN_WORKDIR
        adapter = adapters.load_adapter(folder, self.base)
        compressor = Compressor(self.base, adapter, folder, mesh=task.placement.mesh)
        return 0, TrainedMethod(method, workdir, compressor, untrained)

    def _config(self, phase, method, workdir, compression):
        fields = {
            "base": self.base.path,
            "data.train": str(self.data / "train.jsonl"),
            "data.eval": str(self.data / "held_out.jsonl"),
            "data.cache_dir": str(self.data / "cache"),
            **{f"compression.{name}": value for name, value in compression.items()},
        }
        if phase in self.steps:
            fields["steps"] = self.steps[phase]
        if phase == "finetune":
            fields["init_from"] = str(workdir / "pretrain")
        return phase_config(phase, method, self.recipe, fields)

    def _compressor(self, config, task, workdir, trained):
        base = self.base
        adapter = adapters.Adapter(
            config.compression, config.lora, task.template, trained, base.path, base.fingerprint
        )
        return Compressor(base, adapter, workdir, mesh=task.placement.mesh)


def show_restored(
    compressor_of: Callable[[PyTree], Compressor], rows: Rows, say: Callable[[str], Any]
) -> Callable[[int, PyTree], None]:
    """A `watch` of `train` that says a restored sentence every `SHOWN_EVERY` steps.

    The sentence is of a held-out passage, beside its original. compressor_of: makes a compressor of
    trained parameters.
    """
    batch = results.BATCH
    contexts = [row["context"] for row in rows[:batch]]

    def watch(step, trained):
        if step % SHOWN_EVERY:
            return
        compressor = compressor_of(trained)
        restored = compressor.restore(compressor.compress(contexts, batch), batch_size=batch)
        whole = sum(a == b.strip() for a, b in zip(contexts, restored, strict=True))
        say(
            f"step {step:3}   {_second_sentence(contexts[0])} → {_second_sentence(restored[0])}   "
            f"({whole} of {len(contexts)} passages came back whole)"
        )

    return watch


def _second_sentence(text):
    """The second sentence of a text, which states its first fact; or its only one."""
    sentences = text.split(". ")
    return sentences[min(1, len(sentences) - 1)].strip()


# -------------------------------------------------------------------------------------- the whole


def run(options: Options, say: Callable[[str], None], began: float) -> tuple[int, Outcome | None]:
    """Runs the quickstart in its workdir; run again, it continues or shows the result again.

    `say` is told the first answer of a memory. began: when the command was started, by
    `time.perf_counter`. Returns (exit code, the outcome if all was trained).
    """
    with lock.only_writer(options.folder, "--workdir"):
        return _run(options, say, began)


def _run(options, say, began):
    workdir = options.folder

    # ------------------------------------------------------------------------------------ the base
    base = SHIPPED_BASE
    if options.from_scratch:
        config = config_file.load(BaseConfig, "tiny_base")
        folder = workdir / "base_training"
        code = train(
            config, BaseTask(config), folder, verbosity=options.verbosity, title="the base"
        )
        if code:
            return code, None
        base = folder / BASE

    # ------------------------------------------------------- data, then both phases of each method
    data = workdir / "data"
    passages = TRAIN_PASSAGES if options.full else min(TRAIN_PASSAGES, QUICK_PASSAGES)
    write_data(data, passages, options.held_out)
    rows = synthetic.passages(HELD_OUT_SEED, options.held_out)
    steps = dict.fromkeys(PHASES, options.steps) if options.steps else {}
    training = Training(load_base(base), data, options.recipe, steps, rows, options.verbosity)
    trained = []
    for method in trained_methods():
        code, trained_method = training.train(method, workdir / method)
        if code:
            return code, None
        if not trained:
            minutes = (time.perf_counter() - began) / 60
            lines = results.first_answer(trained_method.compressor, rows)
            heading = f"The first answer from a memory, after {minutes:.1f} minutes:"
            say("\n".join(["", heading, *lines, ""]))
        trained.append(trained_method)

    # ---------------------------------------------------------------------------------- the result
    result, restored = results.compare(trained, rows)
    files.write_json(workdir / "results.json", result)
    outcome = Outcome(
        result=result,
        shown=results.examples(result, restored, rows),
        facts=results.facts(result, (time.perf_counter() - began) / 60),
        page=workdir / "report.html",
        adapter=pathlib.Path(trained[-1].compressor.path),
        passage=rows[0]["context"],
        commands=_next_commands(workdir, trained[-1].compressor.path, rows[0]),
    )
    next_steps = outcome.passage, outcome.commands
    results.write_page(outcome.page, trained, result, outcome.shown, outcome.facts, next_steps)
    return 0, outcome


def _next_commands(workdir, adapter, row):
    """Commands that compress a passage, ask about it and restore it."""
    example, memory = workdir / "data" / "example.jsonl", workdir / "memory.safetensors"
    files.write_text(example, json.dumps({"id": "example", "text": row["context"]}) + "\n")
    return [
        f"icae compress --adapter {adapter} --input {example} --output {memory}",
        f'icae ask --memory {memory} --question "{row["questions"][1]["question"]}"',
        f"icae restore --memory {memory}",
    ]
