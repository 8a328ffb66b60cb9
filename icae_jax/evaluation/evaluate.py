"""`icae evaluate`: the papers' tables, measured on an adapter: scores with intervals, every example, and a page to look at."""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys

import jax

from icae_jax import errors, files
from icae_jax.data import rows, sources
from icae_jax.errors import UserError
from icae_jax.evaluation import examples as drawn
from icae_jax.evaluation import page, plain, run
from icae_jax.evaluation.suites import SUITES
from icae_jax.evaluation.suites.common import Options
from icae_jax.inference.compressor import Compressor
from icae_jax.inference.loading import load_base
from icae_jax.objectives.targets import TEMPLATES
from icae_jax.runtime import distributed, sharding
from icae_jax.training import trained
from icae_jax.training.workdir import steps_done

RESULTS, PAGE = "results.json", "report.html"


def _numbers(text):
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers such as 1,2,4"
        ) from error


def _words(text):
    return tuple(part.strip() for part in text.split(",") if part.strip())


def flags(parser):
    """The flags of the verb; those in the group have the names of `evaluation.suites.common.Options`."""
    add = parser.add_argument
    add("--suite", required=True, choices=list(SUITES), help="what to measure")
    add(
        "--adapter",
        required=True,
        action="append",
        metavar="[NAME=]DIR",
        help="adapter folder, workdir, checkpoint, hub id, or gs://…; ablate: several",
    )
    add(
        "--base",
        help="base model (folder, hub id or gs://…); by default the one that the adapter names",
    )
    add(
        "--base_dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of base, activations and memory",
    )
    add(
        "--mesh",
        help="this host's devices, to split base and batches over, such as fsdp=4,tensor=2; by default batches over all",
    )
    add(
        "--data",
        required=True,
        help="[NAME=]SOURCE, several joined by commas: JSON, tables, text, a folder or glob of them, or tfds:NAME:SPLIT",
    )
    add("--tfds_dir", help="folder of prepared TFDS sets")
    add(
        "--no_answer",
        default="",
        metavar="TEXT",
        help="the reference answer of questions that have none; by default they are left out",
    )
    add(
        "--strict",
        action="store_true",
        help="refuse empty texts and questions without an answer, which are left out otherwise",
    )
    add(
        "--limit",
        type=int,
        default=0,
        help="texts of each set, drawn by the seed; 0 (the default) for all",
    )
    add("--seed", type=int, default=0, help="of the draw of texts and of the intervals")
    add(
        "--out",
        type=pathlib.Path,
        help="folder of results.json and report.html; the same command continues what is there",
    )
    add = parser.add_argument_group("settings; each suite takes what concerns it").add_argument
    default = Options()
    add(
        "--batch_size",
        type=int,
        default=default.batch_size,
        help="contexts at once; changes no score (default: %(default)s)",
    )
    add(
        "--k",
        type=_numbers,
        default=default.k,
        help="memory tokens a segment, such as 2,11; by default all that the adapter knows",
    )
    lengths = "tokens of a context, such as 128,256,512; by default what one segment holds"
    add("--context_lengths", type=_numbers, default=default.context_lengths, help=lengths)
    add(
        "--continuation_tokens",
        type=int,
        default=default.continuation_tokens,
        help="at most (default: %(default)s)",
    )
    add(
        "--max_new_tokens",
        type=int,
        default=default.max_new_tokens,
        help="of an answer (default: %(default)s)",
    )
    add(
        "--spans",
        type=_numbers,
        default=default.spans,
        help="numbers of segments to join (default: 1,2,4)",
    )
    add(
        "--plain_template",
        default="",
        choices=("", *TEMPLATES),
        help="in which the base alone is asked; by default the adapter's",
    )
    add(
        "--arms", type=_words, default=(), help="some of the arms, joined by commas; by default all"
    )


def named_adapters(given):
    """`{name: path}` of --adapter flags; without a name, "adapter" where there is but one, else the path itself."""
    named = {}
    for item in given:
        name, mark, path = item.partition("=")
        if not mark or pathlib.Path(item).exists():
            name, path = (item if len(given) > 1 else "adapter"), item
        if name in named:
            raise UserError(f"--adapter {name} is given twice; give each another NAME=")
        named[name] = path
    return named


def load(named, base, dtype, mesh):
    """`{name: Compressor}` on one base, over the devices of a mesh. UserError where adapters disagree on the base."""
    found = {}
    for name, path in named.items():  # all of them, since loading a base takes minutes
        try:
            found[name] = trained.find_whole(path)
        except UserError as error:
            raise UserError(f"--adapter {error}") from error
    loaded = load_base(base or trained.base_of(next(iter(found.values()))), dtype, mesh)
    return {
        name: Compressor(loaded, trained.open_adapter(of, loaded), of.name, dtype, mesh)
        for name, of in found.items()
    }


def _about(compressor):
    c = compressor.config
    known = {
        "path": str(compressor.path),
        "fingerprint": compressor.adapter.fingerprint,
        "method": c.method,
        "k": list(c.choices),
    }
    return known | {
        "segment_tokens": c.segment_tokens,
        "layout": c.layout,
        "template": compressor.adapter.template.name,
    }


def _facts(result):
    """Lines that say what was measured on what."""
    lines = []
    for name, about in result["adapters"].items():
        k = ", ".join(map(str, about["k"]))
        sizes = f"{k} memory tokens for up to {about['segment_tokens']} of text"
        path = about["path"] if name == about["path"] else f"{name} {about['path']}"
        lines.append(f"{path}: {about['method']}, {sizes}, layout {about['layout']}")
    wanted = result["config"]["k"] or next(iter(result["adapters"].values()))["k"]
    lines += [f"memory: with {max(wanted)} memory tokens a segment"] if len(wanted) > 1 else []
    lines.append(
        f"base {result['base']['path']} ({result['base']['fingerprint'][:12]}), {result['config']['base_dtype']}"
    )
    sets = ", ".join(f"{name} ({count} texts)" for name, count in result["data"]["texts"].items())
    lines.append(f"data {sets}; seed {result['seed']}")
    lines += [f"left out: {count} {reason}" for reason, count in result["left_out"].items()]
    ties = ", ".join(
        f"{arm} {of['steps']} in {of['texts']} texts"
        for arm, of in result["ties"].items()
        if of["steps"]
    )
    lines += [f"steps where the two best tokens tied: {ties}"] if ties else []
    return lines


def _show(result, folder):
    print("\n".join(_facts(result)) + f"\n\n{page.text(result)}\n")
    print(f"results   {folder / RESULTS}\nreport    {(folder / PAGE).resolve()}")


def _trained_steps(path):
    source = trained.find(path)
    if source.kind == "orbax":
        return int(source.path.name.removeprefix("step_"))
    return steps_done(path)


def _events(folder, result, compressors):
    """TensorBoard's scalars: each score at the step that its adapter was trained to, 0 where its folder does not tell."""
    from tensorboardX import SummaryWriter

    steps = {
        name: _trained_steps(pathlib.Path(compressor.path))
        for name, compressor in compressors.items()
    }
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for metric, arms in result["scores"].items():
            for arm, found in arms.items():
                step = steps.get(arm, next(iter(steps.values())))
                writer.add_scalar(
                    f"{result['suite']}/{metric}/{arm}".replace(" ", "_"), found["mean"], step
                )


def main(parser, argv):
    """Runs one suite. Returns the exit code 0; UserError on bad input, before anything is computed."""
    flags(parser)
    args = parser.parse_args(argv)
    options = Options(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)}
    )
    named = named_adapters(args.adapter)
    if len(named) > 1 and args.suite != "ablate":
        raise UserError(
            f"--adapter is given {len(named)} times; suite {args.suite} takes one (ablate compares several)"
        )
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; give a whole number from 0 on")
    rows.check_no_answer(args.no_answer, "--no_answer")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; give a folder")
    distributed.start(args.coordinator, args.processes, args.process)
    sources.check_present(
        ",".join(drawn.named_sources(args.data).values()), args.tfds_dir
    )  # are they there? Before the base is loaded
    sieve = rows.Sieve("--strict" if args.strict else "", args.no_answer)
    sets = drawn.read(args.data, args.tfds_dir, args.limit, args.seed, sieve)
    if sieve.left_out and jax.process_index() == 0:
        print(f"--data {args.data}: left out {sieve}", file=sys.stderr)

    # ------------------------------------------------------------------------------------- what is measured, on what
    mesh = sharding.local_mesh(sharding.parse(args.mesh)) if args.mesh else sharding.local_mesh()
    compressors = load(named, args.base, args.base_dtype, mesh)
    compressor = next(iter(compressors.values()))
    suite = SUITES[args.suite](compressors if args.suite == "ablate" else compressor, options)
    examples, left_out = drawn.make(sets, args.limit, suite)
    left_out = sieve.counts | left_out
    config = {k: v for k, v in dataclasses.asdict(options).items() if k != "batch_size"} | {
        "base_dtype": args.base_dtype
    }
    config = json.loads(json.dumps(config))
    identity = {
        "suite": args.suite, "config": config, "seed": args.seed, "base": compressor.base.fingerprint,
        "adapters": {name: c.adapter.fingerprint for name, c in compressors.items()}, "icae_jax": run.versions()["icae_jax"],
        "examples": run.content(examples), **compressor.base.identity,
    }  # fmt: skip
    identity["stop_ids"] = list(compressor.base.stop_ids)
    if options.plain_template:  # a chat template may write today's date
        identity["plain_template"] = plain.template_of(compressor, options.plain_template).as_json()
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    distributed.check_agreement(
        identity
    )  # hosts with other data, or a workdir whose best changed meanwhile, would mix their scores
    folder = args.out or pathlib.Path("evaluation") / f"{args.suite}-{digest[:8]}"
    if distributed.agreed((folder / RESULTS).exists()):
        return _show_again(folder, identity)
    with errors.naming(f"--out {folder}", "give a folder that can be written"):
        folder.mkdir(parents=True, exist_ok=True)
    with distributed.only_writer(folder, "--out"):
        if distributed.agreed((folder / RESULTS).exists()):  # by another, for which this one waited
            return _show_again(folder, identity)

        # ------------------------------------------------------------------------------------- measure, then sum up
        progress = run.Progress(folder, identity)
        records = run.measure(suite, examples, options.batch_size, progress)
        if jax.process_index():
            return 0
        texts = {name: len({e.cluster for e in examples if e.set == name}) for name in sets}
        result = {
            "suite": args.suite,
            **run.summarise(suite, records, args.seed),
            "config": config | {"batch_size": options.batch_size, "limit": args.limit},
            "adapters": {name: _about(c) for name, c in compressors.items()},
            "base": {"path": compressor.base.path, "fingerprint": compressor.base.fingerprint},
            "data": {"sources": drawn.named_sources(args.data), "texts": texts},
            "left_out": left_out,
            "seed": args.seed,
            "versions": run.versions(),
            "devices": f"{jax.process_count()} x {jax.local_device_count()} {jax.local_devices()[0].device_kind}",
            "identity": identity,
        }
        page.write(folder / PAGE, result, suite.group_label, _facts(result))
        _events(folder, result, compressors)
        files.write_json(folder / RESULTS, result)
        progress.remove()
        _show(result, folder)
        return 0


def _show_again(folder, identity):
    """Shows results that are there. Returns the exit code 0; UserError where they are another run's."""
    if jax.process_index() == 0:
        result = files.read_json(folder / RESULTS, "the results of an evaluation")
        run.check_identity(folder / RESULTS, result.get("identity", {}), identity)
        print(f"{folder} is done already\n", file=sys.stderr)
        _show(result, folder)
    return 0
