"""Converts a trained compressor between formats, checks it by restoring text, publishes it."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

from icae_jax import files
from icae_jax.data.sources import read_texts
from icae_jax.errors import UserError, counted
from icae_jax.inference.compressor import Compressor
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import formats, peft_folder, publishing
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations
from icae_jax.models.llama import ModelConfig
from icae_jax.training import trained as trained_compressors
from icae_jax.training.trained import Trained
from icae_jax.workflows import restoring
from icae_jax.workflows.released import Unstated, read_released
from icae_jax.workflows.restoring import Restoring

NATIVE = "native"  # our adapter folder
FORMATS = (NATIVE, "peft", *formats.FORMATS)
DTYPES = ("float32", "bfloat16", "float16")
MOST_TEXTS = 8  # restored by the check


@dataclasses.dataclass(frozen=True)
class Publication:
    """Where an adapter is pushed on the hub. repository: ORG/NAME. license: for its model card."""

    repository: str
    private: bool = False
    license: str | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """How an adapter is converted.

    source: folder, workdir, checkpoint, hub id, URL, or file of tensors. to: folder to write.
    format: one of `FORMATS`. text: file of texts to restore instead of the built-in paragraph.
    dtype: of the tensors written. base_dtype: of the base during the check. base_id: the hub id
    under which the adapter names its base. force: write and push even if restoring fails.
    """

    source: str
    base: str
    to: str | None = None
    format: str = NATIVE
    text: str | None = None
    dtype: str = "float32"
    base_dtype: str | None = None
    base_id: str | None = None
    force: bool = False
    publication: Publication | None = None
    unstated: Unstated = Unstated()


@dataclasses.dataclass
class Conversion:
    """What a conversion did.

    assumed: what was assumed about a file of tensors. restoring: None if not measured.
    warning: why the check failed. refusal: why nothing was written, then the exit code is 2.
    """

    source: str
    kind: str
    rank: int
    k: int
    lora_targets: list[str]
    assumed: list[str]
    format: str
    restoring: Restoring | None = None
    warning: str = ""
    refusal: str = ""
    written: str = ""
    pushed: str = ""

    def as_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)


def convert(options: Options, say: Callable[[str], None]) -> Conversion:
    """Converts an adapter, checks it, and writes or pushes it. `say` is told each stage as a line.

    If restoring fails, nothing is pushed without `force`, nor written unless a fingerprint proves
    the base to be right and nothing was to be pushed.
    """
    _check_output(options)
    source = trained_compressors.find(options.source)
    texts = [restoring.PARAGRAPH]
    if options.text:
        rows = read_texts(options.text, "--text")
        texts = list(dict.fromkeys(row.text for row in rows))[:MOST_TEXTS]
    dtype, quantize = bases.precision(options.base_dtype)
    base = bases.load_base(
        options.base, dtype, progress=True, need_tokenizer=False, quantize=quantize
    )
    adapter, assumed, base_is_certain = _read(source, base, options)
    if options.base_id or options.publication:
        adapter = dataclasses.replace(adapter, base_path=_base_on_hub(options, adapter))
    result = Conversion(
        source=source.name if locations.is_remote(source.name) else str(source.path),
        kind=source.kind,
        rank=adapter.lora.rank,
        k=adapter.compression.k,
        lora_targets=list(adapter.lora.targets),
        assumed=assumed,
        format=options.format,
    )
    targets = ", ".join(result.lora_targets)
    say(f"{result.source}: {result.kind}, r {result.rank}, k {result.k}, LoRA on {targets}")
    if assumed:
        say("  " + ", ".join(assumed))
    _check_format(options, adapter, base.config)

    result.restoring, why = check(adapter, base, texts, source.path, dtype)
    say(f"  restores: {result.restoring or why}")
    if result.restoring is None or result.restoring.failed:
        result.warning = _warning(why, base, base_is_certain)
        if (options.publication or not base_is_certain) and not options.force:
            done, anyway = "written", "writes it"
            if options.publication:
                done, anyway = "written or pushed", "does it"
            result.refusal = f"nothing was {done}; --force {anyway} all the same"
            return result
    if source.is_file:
        origin = {
            "format": source.kind,
            "file": source.path.name,
            "restoring": dataclasses.asdict(result.restoring) if result.restoring else None,
            "forced": bool(result.warning) and not base_is_certain,
        }
        adapter = dataclasses.replace(adapter, origin=origin)
    with tempfile.TemporaryDirectory() as scratch:
        to = pathlib.Path(options.to or pathlib.Path(scratch) / "adapter")
        path = write(options.format, to, adapter, base.config, options.dtype)
        if options.publication:
            figures = _figures(result.restoring, len(texts) if options.text else 0, source)
            _write_card(to, options, adapter, base.config, figures)
        if options.to:
            result.written = str(path)
            say(f"  wrote {path} ({options.format})")
        if options.publication:
            repository, private = options.publication.repository, options.publication.private
            result.pushed = publishing.push(to, repository, private)
            say(f"  pushed {result.pushed} ({options.format})")
    return result


def _read(
    source: Trained, base: bases.Base, options: Options
) -> tuple[adapters.Adapter, list[str], bool]:
    """(adapter, what was assumed, whether a fingerprint proves the base to be the right one).

    A fingerprint that --force once wrote proves nothing.
    """
    if source.is_file:
        adapter, assumed = read_released(source, base, options.unstated, options.force)
        return adapter, assumed, bool(source.reading) and not source.reading["forced"]
    if given := options.unstated.given:
        raise UserError(f"{', '.join(given)}: {source.path} says that itself; leave the flag out")
    if source.kind == trained_compressors.CHECKPOINT:
        step, adapter = trained_compressors.read_checkpoint(source, base)
        return adapter, [f"checkpoint {step.name}"], True
    _, adapter = trained_compressors.open_adapter(source, base)
    return adapter, [], not adapter.was_forced


def check(
    adapter: adapters.Adapter, base: bases.Base, texts: list[str], path: pathlib.Path, dtype: str
) -> tuple[Restoring | None, str]:
    """(how well texts are restored, or None; why it could not be measured, or "")."""
    if base.tokenizer is None:
        return None, f"base {base.path} has no tokenizer, so no text can be restored"
    try:
        return restoring.measure(Compressor(base, adapter, path, dtype), texts), ""
    except UserError as error:
        return None, str(error)


def _warning(why, base, base_is_certain):
    hint = f"is {base.path} the base it was trained on, and are the values above right?"
    if base_is_certain:
        hint = (
            f"{base.path} is its base by fingerprint, but perhaps it was trained on other texts "
            "(--text), or not to restore"
        )
    return f"{why or 'far from restoring'}: {hint}"


def _check_output(options):
    """UserError if what is asked for can be neither written nor pushed, before loading anything."""
    if not (options.to or options.publication):
        raise UserError("give --to DIR to write the adapter, --push ORG/NAME to upload it, or both")
    if options.to:
        files.check_new_folder(options.to)
    if options.publication:
        if options.format in formats.FORMATS:
            raise UserError(
                f"--push takes --format native or peft, not {options.format}, "
                "which has no place for how the adapter is read"
            )
        publishing.check(options.publication.repository)
    if options.base_id and not locations.is_hub_id(options.base_id):
        raise UserError(f"--base_id {options.base_id!r} is no hub id; give ORG/NAME")


def _check_format(options, adapter, model_config):
    """UserError if a format cannot hold the adapter, or its implementation would misread it."""
    if options.format == "peft":
        peft_folder.check(adapter, model_config)
    if options.format not in formats.FORMATS:
        return
    formats.need_torch_for(options.format)
    misreadings = "; ".join(formats.misreadings(options.format, adapter))
    if misreadings and not options.force:
        raise UserError(
            f"--format {options.format}: its implementation would misread this: {misreadings}. "
            "--force writes it all the same"
        )


def _base_on_hub(options, adapter):
    """The base's hub id. UserError if it is unknown, or a different base than the one loaded."""
    named = options.base_id or publishing.hub_base(options.base, adapter.base_path)
    if not named:
        raise UserError(
            f"--push: {adapter.base_path} is this machine's own name of the base; "
            "say with --base_id ORG/NAME where others find it on the hub"
        )
    if named != options.base:
        fingerprint = bases.identify(named)[1]
        if fingerprint != adapter.base_fingerprint:
            raise UserError(
                f"{named} has fingerprint {fingerprint[:12]}, but the adapter's base "
                f"{adapter.base_fingerprint[:12]}; give its own --base_id"
            )
    return named


def _figures(measured, text_count, source):
    """Lines for the model card. text_count: 0 for the built-in paragraph."""
    lines = []
    if measured:
        what = counted(text_count, "texts") if text_count else "a paragraph"
        lines.append(f"Restoring {what}: {measured}.")
    if losses := trained_compressors.held_out_losses(source):
        by_kind = "; ".join(
            f"{kind.replace('_', ' ')}: "
            + ", ".join(f"{objective} {loss:.4f}" for objective, loss in of_kind.items())
            for kind, of_kind in losses.items()
        )
        lines.append(
            f"Held-out losses at the end of training (step {source.step}), "
            f"nats per token: {by_kind}."
        )
    return lines


def _write_card(folder, options, adapter, model_config, figures):
    card = publishing.card(
        adapter,
        model_config,
        options.publication.repository,
        options.format == "peft",
        figures,
        options.publication.license,
    )
    files.write_text(folder / "README.md", card)


def write(
    form: str,
    folder: pathlib.Path,
    adapter: adapters.Adapter,
    model_config: ModelConfig,
    dtype: str,
) -> pathlib.Path:
    """Writes an adapter in one of `FORMATS`; returns the path to load."""
    if form == NATIVE:
        adapters.save_adapter(folder, adapter)
        return folder
    if form == "peft":
        peft_folder.save(folder, adapter, model_config, dtype)
        return folder
    return formats.write(form, folder, adapter, model_config, dtype)
