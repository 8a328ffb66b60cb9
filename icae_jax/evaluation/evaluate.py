"""Measures compressors by one of the papers' suites: scores with intervals, and an HTML report."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from icae_jax import errors, files
from icae_jax.data import rows, sources
from icae_jax.errors import UserError
from icae_jax.evaluation import examples as suite_examples
from icae_jax.evaluation import page, plain, run, stored
from icae_jax.evaluation.suites import SUITES
from icae_jax.evaluation.suites.common import Options
from icae_jax.inference.compressor import Compressor
from icae_jax.inference.loading import load_base, load_onto, store_base
from icae_jax.inference.store import open_store
from icae_jax.runtime import distributed, sharding
from icae_jax.training import trained
from icae_jax.training.trained import Trained

RESULTS, PAGE = "results.json", "report.html"


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure; the fields are `icae evaluate`'s flags.

    adapters: paths by name; only suite ablate takes several. {} for the one that the store names.
    store: of memories that suites qa and autoencode read in place of compressing; None to compress.
    base: None for the one that the first adapter names.
    base_dtype: see `loading.load`.
    mesh: such as "fsdp=4,tensor=2", of this host's devices; None splits batches over all of them.
    data: `[NAME=]SOURCE`, several joined by commas.
    no_answer: the reference answer of questions without one; "" leaves them out.
    strict: whether rows that cannot be used are an error.
    limit: texts of each set; 0 for all.
    seed: draws the texts and the bootstrap replicates.
    out: the folder of results; None for `evaluation/SUITE-HASH`.
    """

    suite: str
    adapters: dict[str, str]
    data: str
    store: str | None = None
    base: str | None = None
    base_dtype: str | None = None
    mesh: str | None = None
    tfds_dir: str | None = None
    no_answer: str = ""
    strict: bool = False
    limit: int = 0
    seed: int = 0
    out: pathlib.Path | None = None
    options: Options = Options()

    def __post_init__(self):
        if len(self.adapters) > 1 and self.suite != "ablate":
            raise UserError(
                f"--adapter is given {len(self.adapters)} times; suite {self.suite} takes one "
                "(ablate compares several)"
            )
        if not self.adapters and not self.store:
            raise UserError("--adapter is not given; name a compressor, or a --store")
        if self.store:
            self._check_store()
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; give a whole number from 0 on")
        if self.options.ladder and self.suite != "qa":
            raise UserError(
                f"--ladder is {self.options.ladder}, but suite {self.suite} asks nothing; leave it "
                "out, or take suite qa"
            )
        rows.check_no_answer(self.no_answer, "--no_answer")
        if self.out and self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; give a folder")

    def _check_store(self):
        if self.suite not in stored.SUITES:
            raise UserError(
                f"--store holds memories of whole texts, which suite {self.suite} does not read; "
                f"take suite {' or '.join(stored.SUITES)}, or leave --store out"
            )
        if self.options.ladder:
            raise UserError(
                f"--ladder is {self.options.ladder}, but a store's memories have their k; leave it "
                "out, or leave --store out"
            )
        if self.suite == "autoencode" and self.options.context_lengths:
            raise UserError(
                f"--context_lengths is {self.options.context_lengths}, but a store holds memories "
                "of whole texts; leave it out"
            )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The folder of a finished evaluation, and what its results.json holds."""

    folder: pathlib.Path
    result: dict[str, Any]


def named_adapters(items: Sequence[str]) -> dict[str, str]:
    """Paths by name from `[NAME=]PATH` items.

    Without a name it is "adapter" if there is but one, else the path itself.
    """
    named = {}
    for item in items:
        name, mark, path = item.partition("=")
        if not mark or pathlib.Path(item).exists():
            name, path = (item if len(items) > 1 else "adapter"), item
        if name in named:
            raise UserError(f"--adapter {name} is given twice; give each another NAME=")
        named[name] = path
    return named


def find(named: dict[str, str]) -> dict[str, Trained]:
    """Finds all adapters, before the base is loaded, which takes minutes."""
    try:
        return {name: trained.find_whole(path) for name, path in named.items()}
    except UserError as error:
        raise UserError(f"--adapter {error}") from error


def load(
    adapters: dict[str, Trained],
    base: str | None,
    dtype: str | None,
    mesh: jax.sharding.Mesh | None,
) -> dict[str, Compressor]:
    """Loads adapters onto one base, by default the first one's. UserError if theirs differ."""
    loaded = load_base(base or trained.base_of(next(iter(adapters.values()))), dtype, mesh)
    return {name: load_onto(loaded, one, dtype, mesh) for name, one in adapters.items()}


def evaluate(request: Request, say: Callable[[str], Any] = lambda text: None) -> Evaluation:
    """Runs one suite, or continues it, or returns the results that are there.

    Several processes all call this with the same request; process 0 writes. `say` takes lines
    worth showing. UserError on bad input, before anything is computed.
    """
    r, options = request, request.options
    sources.check_present(",".join(suite_examples.named_sources(r.data).values()), r.tfds_dir)
    sieve = rows.Sieve("--strict" if r.strict else "", r.no_answer)
    sets = suite_examples.read_texts(r.data, r.tfds_dir, r.limit, r.seed, sieve)
    if sieve.left_out:
        say(f"--data {r.data}: left out {sieve}")

    # -------------------------------------------------------------------- what is measured, on what
    mesh = sharding.local_mesh(sharding.parse(r.mesh)) if r.mesh else sharding.local_mesh()
    opened = open_store(r.store) if r.store else None
    named = r.adapters or {"adapter": opened.info.adapter}
    base = r.base or (None if opened is None else store_base(opened.info))
    adapters = find(named)
    compressors = load(adapters, base, r.base_dtype, mesh)
    compressor = next(iter(compressors.values()))
    memories = None
    if opened is not None:
        opened.check(compressor)
        texts = [text for of_set in sets.values() for text in of_set]
        memories = stored.StoredMemories(opened, compressor, texts)
        options = dataclasses.replace(options, k=options.k or memories.ks)
    suite = SUITES[r.suite](compressors if r.suite == "ablate" else compressor, options)
    suite.stored = memories
    examples, left_out = suite_examples.make_examples(sets, r.limit, suite)
    identity = _identity(r, compressors, examples)
    if memories is not None:
        identity["store"] = memories.identity()
    # Hosts with other data, or a workdir whose best changed meanwhile, would mix their scores.
    distributed.check_agreement(identity)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = r.out or pathlib.Path("evaluation") / f"{r.suite}-{digest[:8]}"
    if distributed.agreed((folder / RESULTS).exists()):
        return _finished(folder, identity, say)
    with errors.naming(f"--out {folder}", "give a folder that can be written"):
        folder.mkdir(parents=True, exist_ok=True)
    with distributed.only_writer(folder, "--out"):
        if distributed.agreed((folder / RESULTS).exists()):  # this one waited for another
            return _finished(folder, identity, say)

        # ----------------------------------------------------------------------- measure, summarise
        progress = run.Progress(folder, identity)
        records = run.measure(suite, examples, options.batch_size, progress)
        texts = {name: len({e.cluster for e in examples if e.set == name}) for name in sets}
        device = jax.local_devices()[0].device_kind
        config = dataclasses.asdict(options) | identity["config"] | {"limit": r.limit}
        result = {
            "suite": r.suite,
            **run.summarise(suite, records, r.seed),
            "config": config,
            "adapters": {name: _facts(c) for name, c in compressors.items()},
            "base": {"path": compressor.base.path, "fingerprint": compressor.base.fingerprint},
            **({"store": {"path": r.store} | opened.stats()} if opened is not None else {}),
            "data": {"sources": suite_examples.named_sources(r.data), "texts": texts},
            "left_out": sieve.counts | left_out,
            "seed": r.seed,
            "versions": run.versions(),
            "devices": f"{jax.process_count()} x {jax.local_device_count()} {device}",
            "identity": identity,
        }
        if jax.process_index() == 0:
            page.write(folder / PAGE, result, suite.group_label, page.facts(result))
            _write_scalars(folder, result, {name: one.step for name, one in adapters.items()})
            files.write_json(folder / RESULTS, result)
            progress.remove()
    return Evaluation(folder, result)


def _identity(request, compressors, examples):
    """What two runs must have alike for one to continue the other."""
    compressor = next(iter(compressors.values()))
    base, options = compressor.base, dataclasses.asdict(request.options)
    # Without a ladder all is as it was before there were any, so that earlier results are found.
    left_out = ("batch_size",) if options["ladder"] else ("batch_size", "ladder", "threshold")
    config = {name: value for name, value in options.items() if name not in left_out}
    config["base_dtype"] = base.quantize or request.base_dtype or "float32"
    identity = {
        "suite": request.suite,
        "config": json.loads(json.dumps(config)),
        "seed": request.seed,
        "base": base.fingerprint,
        "adapters": {name: c.adapter.fingerprint for name, c in compressors.items()},
        "icae_jax": run.SAME_SCORES_SINCE,
        "examples": run.content(examples),
        **base.identity,
        "stop_ids": list(base.stop_ids),
    }
    if name := request.options.plain_template:  # a chat template may write today's date
        identity["plain_template"] = plain.template_of(compressor, name).as_json()
    return identity


def _facts(compressor: Compressor) -> dict[str, Any]:
    """What results.json says of a compressor."""
    config, adapter = compressor.config, compressor.adapter
    return {
        "path": str(compressor.path),
        "fingerprint": adapter.fingerprint,
        "method": config.method,
        "k": list(config.choices),
        "segment_tokens": config.segment_tokens,
        "layout": config.layout,
        "template": adapter.template.name,
    }


def _write_scalars(folder: pathlib.Path, result: dict, steps: dict[str, int]) -> None:
    """Writes scores for TensorBoard, at the step that the arm's adapter was trained to.

    Arms that are no adapter's stand at the first one's.
    """
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for metric, arms in result["scores"].items():
            for arm, estimate in arms.items():
                step = steps.get(arm, next(iter(steps.values())))
                tag = f"{result['suite']}/{metric}/{arm}".replace(" ", "_")
                writer.add_scalar(tag, estimate["mean"], step)


def _finished(folder, identity, say) -> Evaluation:
    """The results that are there. UserError where they are another run's."""
    result = files.read_json(folder / RESULTS, "the results of an evaluation")
    run.check_identity(folder / RESULTS, result.get("identity", {}), identity)
    say(f"{folder} is done already\n")
    return Evaluation(folder, result)
