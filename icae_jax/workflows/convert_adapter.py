"""`icae convert adapter`: any trained compressor in, recognised by its content, checked by restoring a text, and out in any format."""

import dataclasses
import pathlib
import sys
import tempfile

import jax
import numpy as np

from icae_jax import files
from icae_jax.data.sources import read_texts
from icae_jax.errors import UserError
from icae_jax.evaluation import scores
from icae_jax.inference.compressor import Compressor
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import formats, peft_folder, publishing
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations
from icae_jax.objectives import targets
from icae_jax.training import checkpoint, config_file, metrics
from icae_jax.training.compressor_task import compression_on
from icae_jax.training.config import TrainConfig
from icae_jax.training.workdir import read_run, steps_done

FORMATS = ("native", "peft", "icae-v1", "icae-v2", "x500")
DTYPES = ("float32", "bfloat16", "float16")
TOLD = (
    "method",
    "alpha",
    "rate",
    "context_length",
    "phase",
    "template",
    "layout",
)  # flags for what tensors cannot tell
MILD = 8  # up to this ratio a text comes back nearly whole (arXiv 2307.06945, table 1; arXiv 2408.03094, table 7)

# The text of the check, and its control. Plain prose: random text is not restored even on the right base.
PARAGRAPH, ANOTHER = (
    "The ferry left the island shortly after seven, when the fog had lifted from the harbour and the last crates of apples were on board. "
    "Marta stood at the rail and counted the lighthouses along the coast, as her father had taught her when she was a child. "
    "There had been nine of them then; now there were six, and only two were still lit by a keeper. She wondered who would remember "
    "their names in twenty years, and she took out her notebook and wrote them down, one on each line, with the year it was built in.",
    "A good loaf needs four things: flour, water, salt and time. The baker on our street starts his dough in the afternoon and lets it "
    "rest overnight in a cool cellar, so that the crust turns dark and the inside stays moist for days. In the morning he heats the oven "
    "with beech wood until the stones are white, sweeps out the ashes, and bakes forty loaves at once. By nine o'clock most of them are "
    "sold, and whoever comes later has to be content with rolls, or with yesterday's bread, which he gives away for half the price.",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """What --from turned out to be. kind: "native", "peft", "orbax", or a format of `interop.adapters.formats`.

    path: the adapter folder, the checkpoint of one step, or the file of tensors. told: what `reading.json` beside the file says. given: of
    a checkpoint the path by which it was found, which may be its workdir's. base: of an adapter folder the one that it names. name: how
    the user calls it, of the hub with the commit.
    """

    kind: str
    path: pathlib.Path
    tensors: dict | None = None
    told: dict | None = None
    given: pathlib.Path | None = None
    base: str = ""
    name: str = ""


def recognise(path):
    """The `Source` at a path, a hub id or a URL: by what is in it, not by what it is called. UserError where it is no trained compressor,
    or an adapter folder that cannot be read.
    """
    folder, name = adapters.locate(path)
    name = name if locations.is_remote(name) else str(path)
    if folder.is_file():
        tensors, _ = formats.open_tensors(folder)
        form = formats.recognise(tensors)
        if form is None:
            names = ", ".join(sorted(tensors)[:3])
            raise UserError(
                f"{path}: no trained compressor, its {len(tensors)} tensors are {names}, …; see icae inspect {path}"
            )
        return Source(form, folder, tensors, formats.read_reading(folder), name=name)
    if (folder / adapters.INFO).exists() or locations.is_remote(name):
        _, stated = adapters.read_adapter_info(folder, name)
        return Source(
            "peft" if stated.source.parent == folder else "native",
            folder,
            base=stated.base,
            name=name,
        )
    if not folder.is_dir():
        raise UserError(f"{path}: neither a file nor a folder")
    step = checkpoint.step_folder(folder)
    if step is not None:
        return Source("orbax", step, given=folder, name=name)
    found = [
        file for file in sorted(folder.iterdir()) if file.is_file() and formats.file_kind(file)
    ]
    found = [file for file in found if formats.recognise(formats.open_tensors(file)[0])]
    if len(found) == 1:
        return recognise(found[0])
    if not found and (folder / "adapter_config.json").exists():
        adapters.read_adapter_info(folder, name)  # which says what is missing
    what = (
        f"holds several trained compressors: {', '.join(f.name for f in found)}; name one"
        if found
        else "holds no trained compressor"
    )
    raise UserError(f"{path} {what} (adapter folder, training workdir, safetensors or .pt file)")


# ------------------------------------------------------------------------------------------------------------------- in


def _from_tensors(source, base, args):
    """(`Adapter`, lines that say what was assumed) of a file of a reference implementation."""
    possible = formats.methods_of(source.kind, source.tensors, args.phase)
    told = source.told or {}
    method = args.method or told.get("method") or (possible[0] if len(possible) == 1 else None)
    if method is None:
        raise UserError(
            f"{source.path}: after tuning on questions, 500xCompressor and the ICAE of its repository save the same tensors; "
            "say which this is with --method x500 or --method icae"
        )
    if method not in possible:
        raise UserError(
            f"--method is {method}, but {source.path} is of format {source.kind}, method {' or '.join(possible)}"
        )
    trained = formats.read_trained(source.kind, source.tensors, base, source.path)
    k = trained["memory_table"].shape[0] - formats.SPECIAL_ROWS
    phase = args.phase or "finetune"
    assumed = formats.defaults(source.kind, method, phase, k)
    given = {
        name: getattr(args, name) for name in ("alpha", "context_length", "layout", "template")
    }
    if args.rate is not None:
        length = round(k * args.rate)
        if given["context_length"] not in (None, length):
            raise UserError(
                f"--rate {args.rate} with k {k} is --context_length {length}, not {args.context_length}; give one of them"
            )
        given["context_length"] = length
    lines, chosen = (
        [
            f"method {method}{'' if args.method else ' (by its tensors)' if len(possible) == 1 else ' (told)'}"
        ],
        {},
    )
    lines.append(f"phase {phase}{'' if args.phase else ' (default)'}")
    for name, value in given.items():
        where = (
            ""
            if value is not None
            else " (told)"
            if name in told
            else f" (default of {source.kind})"
        )
        chosen[name] = value if value is not None else told.get(name, assumed[name])
        lines.append(
            f"{name} {chosen[name]:g}{where}"
            if name == "alpha"
            else f"{name} {chosen[name]}{where}"
        )
    name = chosen.pop("template")
    if base.tokenizer is None and name not in ("v1", "none"):
        if not args.force or args.template:
            raise UserError(
                f"base {base.path} has no tokenizer, of whose tokens template {name} is made; add the tokenizer's files to it, "
                "or give --template v1 or none"
            )
        lines.append(f"template none in place of {name}: the base has no tokenizer to make it of")
        name = "none"
    if told and told["base_fingerprint"] != base.fingerprint:
        was = f"{told['base']} ({told['base_fingerprint'][:12]})"
        raise UserError(
            f"{source.path} was trained on {was}, not on {base.path} ({base.fingerprint[:12]}); give the right base"
        )
    if told:
        bases.check_identity(str(source.path), told.get("base_identity") or {}, base.identity)
    if (
        told.get("template_ids") and name == told["template"]
    ):  # as it was, where a chat template would write today's date
        template = targets.Template.from_json(
            told["template_ids"], source.path.with_name(formats.READING)
        )
    else:
        template = targets.make_template(name, base.tokenizer, next(iter(base.stop_ids), 2))
    adapters.check_template(template, base, source.path)
    adapter = formats.make_adapter(trained, base, template, method=method, **chosen)
    return adapter, lines


def _from_orbax(source, base):
    """(step folder, `Adapter`) of a checkpoint of a training workdir, by the configuration kept there."""
    step = source.path
    path = step.parent.parent / "config.json"
    nested = config_file.nested(read_run(path), path)
    identity = nested.pop("identity", {})
    trained_on = identity.get("base") if isinstance(identity, dict) else None
    if trained_on is None:
        raise UserError(f"{path}: not the configuration of a compressor's training")
    if trained_on != base.fingerprint:
        raise UserError(
            f"{step} was trained on base {trained_on[:12]}, but {base.path} has {base.fingerprint[:12]}; give the right base"
        )
    bases.check_identity(
        str(step), {name: identity.get(name) for name in base.identity}, base.identity
    )
    if base.tokenizer is None:
        raise UserError(
            f"base {base.path} has no tokenizer, of whose tokens the run's template is made; add the tokenizer's files to it"
        )
    config = config_file.from_dict(TrainConfig, nested, f"{path}: config")
    compression, _ = compression_on(config, base.tokenizer)
    kept = identity.get("template")
    template = (
        targets.Template.from_json(kept, path)
        if kept
        else targets.make_template(config.objectives.template, base.tokenizer)
    )
    newly = checkpoint.read_newly(source.given)
    if newly is None:
        raise UserError(
            f"{source.given}: the checkpoint has been deleted meanwhile; name another, or the workdir for its best"
        )
    step, trained = newly
    trained = jax.tree.map(jax.numpy.asarray, trained)
    return step, adapters.Adapter(
        compression,
        config.lora,
        template,
        trained,
        base.path,
        base.fingerprint,
        base_identity=base.identity,
    )


def recognise_whole(path):
    """The `Source` at a path that says itself how it is read: an adapter folder, a training workdir, one of its checkpoints."""
    source = recognise(path)
    if source.kind in formats.NAMES:
        raise UserError(
            f"{path} is a file of tensors ({source.kind}); make an adapter folder of it first: icae convert adapter"
        )
    return source


def base_of(source):
    """The base that a whole `Source` names. UserError where it names none, or a folder that is not here."""
    if source.kind != "orbax":
        return adapters.check_base(source.base, source.name)
    about = source.path.parent.parent / "config.json"
    raw = files.read_json(about, "the run's configuration")
    files.check_fields(raw, {"base": str}, about)
    return adapters.check_base(raw["base"], source.name)


def open_trained(source, base):
    """The `Adapter` of a whole `Source`."""
    return (
        _from_orbax(source, base)[1]
        if source.kind == "orbax"
        else adapters.load_adapter(source.path, base)
    )


def read(source, base, args):
    """(`Adapter`, lines of what was assumed, whether a fingerprint says that the base is right: not one that --force put there)."""
    if source.kind in formats.NAMES:
        adapter, lines = _from_tensors(source, base, args)
        return adapter, lines, bool(source.told) and not source.told["forced"]
    given = [f"--{name}" for name in TOLD if getattr(args, name) is not None]
    if given:
        raise UserError(f"{', '.join(given)}: {source.path} says that itself; leave the flag out")
    if source.kind == "orbax":
        step, adapter = _from_orbax(source, base)
        return adapter, [f"checkpoint {step.name}"], True
    adapter = adapters.load_adapter(source.path, base)
    return adapter, [], not adapters.was_forced(adapter)


# ---------------------------------------------------------------------------------------------------------------- check


@dataclasses.dataclass(frozen=True)
class Restoring:
    """How well texts come back. ae_loss, control: nats per token behind their own memory, and behind another text's. bleu in percent."""

    ae_loss: float
    control: float
    bleu: float
    ratio: float

    @property
    def far(self):
        """Whether this is far from restoring, as a wrong base (or a wrong alpha, layout, …) makes it.

        Another text's memory tells nothing of a text, so what its own tells is the difference. At mild ratios the text must come back.
        """
        return not (self.ae_loss <= self.control / 2 and (self.ratio > MILD or self.bleu >= 70))

    def __str__(self):
        own = f"AE loss {self.ae_loss:.3f} nats per token (behind another text's memory {self.control:.3f})"
        return f"{own}, BLEU-4 {self.bleu:.1f}, at {self.ratio:.1f}x"


def restoring(compressor, texts):
    """`Restoring` of texts; each is also scored behind the memory of another of them (a single one behind that of `ANOTHER`)."""
    memory = compressor.compress(texts)
    others = (
        compressor.compress([ANOTHER])
        if len(texts) == 1
        else memory[np.roll(np.arange(len(texts)), 1)]
    )

    def loss(read):
        made = compressor.score_restoring(read, texts)
        return -sum(s.log_prob for s in made) / sum(s.tokens for s in made)

    return Restoring(
        loss(memory),
        loss(others),
        scores.bleu(compressor.restore(memory), texts),
        float(np.mean(memory.ratio)),
    )


def held_out(source):
    """A line of the held-out losses of the run that a `Source` is the result of, as its metrics.jsonl tells them; "" where it does not."""
    if source.kind == "orbax":
        workdir, step = source.path.parent.parent, int(source.path.name.removeprefix("step_"))
    else:
        workdir = source.path.parent
        step = steps_done(workdir) if source.path.name == adapters.IN_WORKDIR else 0
    file = workdir / "metrics.jsonl"
    losses = (
        [line["eval"] for line in metrics.read(file) if line.get("step") == step and "eval" in line]
        if step and file.exists()
        else []
    )
    if not losses:
        return ""
    told = "; ".join(
        f"{kind.replace('_', ' ')}: {', '.join(f'{o} {v:.4f}' for o, v in of.items())}"
        for kind, of in losses[-1].items()
    )
    return f"Held-out losses at the end of training (step {step}), nats per token: {told}."


def check(adapter, base, texts, where, dtype):
    """(`Restoring` or None, why it could not be measured)."""
    if base.tokenizer is None:
        return None, f"base {base.path} has no tokenizer, so no text can be restored"
    try:
        return restoring(Compressor(base, adapter, where, dtype), texts), ""
    except UserError as error:
        return None, str(error)


# ----------------------------------------------------------------------------------------------------------------- verb


def main(parser, argv):
    """Converts an adapter, and pushes it. Returns an exit code: 0 done; 2 bad input, or far from restoring without --force. Then nothing is
    pushed, nor written unless a fingerprint says that the base is right and nothing was to be pushed.
    """
    add = parser.add_argument
    help_text = "adapter folder, workdir, checkpoint, hub id, gs://…, safetensors or .pt file"
    add("--from", dest="source", required=True, metavar="PATH", help=help_text)
    add("--base", required=True, help="the base model: folder, hub id, or gs://…")
    add("--to", metavar="DIR", help="folder to write; with --push it may be left out")
    add(
        "--format",
        default="native",
        choices=FORMATS,
        help="format to write (default: native, our adapter folder)",
    )
    add(
        "--text",
        metavar="FILE",
        help="texts to restore for the check (the first 8), in place of the built-in paragraph",
    )
    add(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="of the tensors written, in formats other than native",
    )
    add(
        "--base_dtype",
        default="float32",
        choices=DTYPES[:2],
        help="of the base while it restores; bfloat16 takes half the memory",
    )
    add(
        "--base_id",
        metavar="ORG/NAME",
        help="the base's hub id, which the adapter is to name instead of a folder",
    )
    add("--force", action="store_true", help="write, and push, even where restoring fails")
    add = parser.add_argument_group("the model hub").add_argument
    add(
        "--push",
        metavar="ORG/NAME",
        help="upload the adapter, native or peft, with a model card; a repository that is not there is made",
    )
    add("--private", action="store_true", help="make it a private one")
    add("--license", metavar="NAME", help="the adapter's licence, for the card: apache-2.0, …")
    add = parser.add_argument_group(
        "what tensors cannot tell; each format has a default, which is printed"
    ).add_argument
    add("--method", choices=("icae", "x500"))
    add("--alpha", type=float, help="LoRA's alpha; its scale is alpha / r")
    add("--rate", type=float, help="text tokens per memory token; --context_length is k times this")
    add("--context_length", type=int, help="most text tokens of a segment")
    add("--phase", choices=("pretrain", "finetune"))
    add("--template", choices=targets.TEMPLATES)
    add("--layout", help="position layout, where it was trained with another than its format's")
    args = parser.parse_args(argv)
    for name in ("alpha", "rate", "context_length"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be positive")
    _check_output(args)
    source = recognise(args.source)
    texts = (
        list(dict.fromkeys(row.text for row in read_texts(args.text, "--text")))[:8]
        if args.text
        else [PARAGRAPH]
    )
    base = bases.load_base(args.base, args.base_dtype, progress=True, need_tokenizer=False)
    adapter, lines, settled = read(source, base, args)
    if args.base_id or args.push:
        adapter = dataclasses.replace(adapter, base_path=_base_on_hub(args, adapter))
    shown = source.name if locations.is_remote(source.name) else source.path
    print(
        f"{shown}: {source.kind}, r {adapter.lora.rank}, k {adapter.compression.k}, LoRA on {', '.join(adapter.lora.targets)}"
    )
    if lines:
        print("  " + ", ".join(lines))
    if args.format in formats.NAMES:
        formats.need_torch_for(args.format)
        wrong = "; ".join(formats.misreadings(args.format, adapter))
        if wrong and not args.force:
            raise UserError(
                f"--format {args.format}: its implementation would misread this: {wrong}. --force writes it all the same"
            )

    measured, why = check(adapter, base, texts, source.path, args.base_dtype)
    print(f"  restores: {measured or why}")
    failed = measured is None or measured.far
    if failed:
        unsure = f"is {base.path} the base it was trained on, and are the values above right?"
        sure = f"{base.path} is its base by fingerprint, but perhaps it was trained on other texts (--text), or not to restore"
        print(
            f"icae convert adapter: {why or 'far from restoring'}: {sure if settled else unsure}",
            file=sys.stderr,
        )
        if (args.push or not settled) and not args.force:
            done, anyway = (
                ("written or pushed", "does it") if args.push else ("written", "writes it")
            )
            print(
                f"icae convert adapter: nothing was {done}; --force {anyway} all the same",
                file=sys.stderr,
            )
            return 2
    if source.kind in formats.NAMES:
        figures = dataclasses.asdict(measured) if measured else None
        origin = {
            "format": source.kind,
            "file": source.path.name,
            "restoring": figures,
            "forced": failed and not settled,
        }
        adapter = dataclasses.replace(adapter, origin=origin)
    with tempfile.TemporaryDirectory() as scratch:
        to = args.to or pathlib.Path(scratch) / "adapter"
        written = write(args.format, to, adapter, base.config, args.dtype)
        if args.push:
            restored = (
                f"Restoring {f'{len(texts)} texts' if args.text else 'a paragraph'}: {measured}."
                if measured
                else ""
            )
            figures = [line for line in (restored, held_out(source)) if line]
            text = publishing.card(
                adapter, base.config, args.push, args.format == "peft", figures, args.license
            )
            files.write_text(pathlib.Path(to) / "README.md", text)
        if args.to:
            print(f"  wrote {written} ({args.format})")
        if args.push:
            print(f"  pushed {publishing.push(to, args.push, args.private)} ({args.format})")
    return 0


def _check_output(args):
    """UserError where what is asked for can neither be written nor pushed, before anything is loaded."""
    if not (args.to or args.push):
        raise UserError("give --to DIR to write the adapter, --push ORG/NAME to upload it, or both")
    if args.to:
        files.check_new_folder(args.to)
    if args.push:
        if args.format in formats.NAMES:
            raise UserError(
                f"--push takes --format native or peft, not {args.format}, which has no place for how the adapter is read"
            )
        publishing.check(args.push)
    given = [
        f"--{name}" for name in ("private", "license") if getattr(args, name) and not args.push
    ]
    if given:
        raise UserError(f"{', '.join(given)} counts only with --push")
    if args.base_id and not locations.is_hub_id(args.base_id):
        raise UserError(f"--base_id {args.base_id!r} is no hub id; give ORG/NAME")


def _base_on_hub(args, adapter):
    """The base's hub id, checked to be the same base where it was not the one loaded."""
    named = args.base_id or publishing.hub_base(args.base, adapter.base_path)
    if not named:
        own = f"{adapter.base_path} is this machine's own name of the base"
        raise UserError(
            f"--push: {own}; say with --base_id ORG/NAME where others find it on the hub"
        )
    if named != args.base and (theirs := bases.identify(named)[1]) != adapter.base_fingerprint:
        raise UserError(
            f"{named} has fingerprint {theirs[:12]}, but the adapter's base {adapter.base_fingerprint[:12]}; give its own --base_id"
        )
    return named


def write(form, folder, adapter, model_config, dtype):
    """Writes an adapter in one of `FORMATS`; returns the path of what to load."""
    if form == "native":
        adapters.save_adapter(folder, adapter)
        return folder
    if form == "peft":
        peft_folder.save(folder, adapter, model_config, dtype)
        return folder
    return formats.write(form, folder, adapter, model_config, dtype)
