"""A trained compressor, wherever it is: adapter folder, workdir, checkpoint, hub id, URL, file.

The one way to open any of them: `find` recognises it by its content, before the base is loaded,
which takes minutes; `open_adapter` loads it onto the base.
"""

import dataclasses
import os
import pathlib
from typing import Any

import jax

from icae_jax import files
from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import formats, tensor_files
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations
from icae_jax.interop.hub.identity import check_identity, compare_quantisation
from icae_jax.objectives import targets
from icae_jax.training import checkpoint_files, config_file, metrics
from icae_jax.training.config import TrainConfig, compression_on
from icae_jax.training.workdir import read_run, steps_done

CHECKPOINT = "orbax"  # kind of a training run's checkpoint


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained compressor that was found, not yet loaded.

    kind: "native", "peft", "orbax" (a checkpoint), or one of `interop.adapters.formats`.
    path: the adapter folder, the folder of one checkpoint, or the file of tensors.
    name: how the user names it; from the hub, with the commit.
    tensors: of a file, by name.
    reading: what `reading.json` beside a file says, if it is there.
    given: for a checkpoint, the path it was found by, which may be its workdir.
    base: for an adapter folder, the base it names.
    """

    kind: str
    path: pathlib.Path
    name: str = ""
    tensors: dict[str, Any] | None = None
    reading: dict[str, Any] | None = None
    given: pathlib.Path | None = None
    base: str = ""

    @property
    def is_file(self) -> bool:
        """Whether it is a file of tensors, which does not say by itself how it is read."""
        return self.kind in formats.FORMATS

    @property
    def step(self) -> int:
        """The step of a checkpoint, or after which a run wrote its adapter; 0 if unknown."""
        if self.kind == CHECKPOINT:
            return int(self.path.name.removeprefix("step_"))
        in_workdir = self.path.name == adapters.IN_WORKDIR
        return steps_done(self.path.parent) if in_workdir else 0

    @property
    def workdir(self) -> pathlib.Path:
        """The folder in which a run keeps its configuration and metrics."""
        return self.path.parent.parent if self.kind == CHECKPOINT else self.path.parent


def find(path: str | os.PathLike, progress: bool = True) -> Trained:
    """Finds the trained compressor at a path, a hub id or a URL; may download it.

    A workdir means its `adapter/`, or while its training goes on the best of its whole checkpoints,
    the latest where none was evaluated.

    progress: whether to show bars of a download on stderr.

    UserError if there is none, or it is an adapter folder that cannot be read.
    """
    folder, name = adapters.locate(path, progress)
    name = name if locations.is_remote(name) else str(path)
    if folder.is_file():
        return _in_file(folder, name)
    if (folder / adapters.INFO).exists() or locations.is_remote(name):
        _, lora_fields = adapters.read_adapter_info(folder, name)
        kind = "peft" if lora_fields.source.parent == folder else "native"
        return Trained(kind, folder, name, base=lora_fields.base)
    if not folder.is_dir():
        raise UserError(f"{path}: neither a file nor a folder")
    step = checkpoint_files.step_folder(folder)
    if step is not None:
        return Trained(CHECKPOINT, step, name, given=folder)
    return _only_file(folder, path, name)


def _in_file(path, name):
    tensors, _ = tensor_files.open_tensors(path)
    kind = formats.recognise(tensors)
    if kind is None:
        first = ", ".join(sorted(tensors)[:3])
        raise UserError(
            f"{name}: not a trained compressor; its {len(tensors)} tensors are {first}, …; "
            f"see icae inspect {name}"
        )
    return Trained(kind, path, name, tensors, formats.read_reading(path))


def _only_file(folder, path, name):
    """The one file of a folder that holds a trained compressor."""
    compressors = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and tensor_files.file_kind(file)
        and formats.recognise(tensor_files.open_tensors(file)[0])
    ]
    if len(compressors) == 1:
        return find(compressors[0])
    if not compressors and (folder / "adapter_config.json").exists():
        adapters.read_adapter_info(folder, name)  # raises, naming what is missing
    what = "holds no trained compressor"
    if (folder / "checkpoints").is_dir():
        what = "is a training's workdir without a whole checkpoint yet; it holds no compressor"
    if compressors:
        names = ", ".join(file.name for file in compressors)
        what = f"holds several trained compressors: {names}; name one"
    bases = sorted(file.name for file in folder.glob("*.gguf"))
    hint = f"; it holds {bases[0]}, a base: give that file" if bases else ""
    raise UserError(
        f"{path} {what} (adapter folder, training workdir, safetensors or .pt file){hint}"
    )


def find_whole(path: str | os.PathLike, progress: bool = True) -> Trained:
    """As `find`, but UserError for a bare file of tensors, which must be converted first."""
    trained = find(path, progress)
    if trained.is_file:
        raise UserError(
            f"{path} is a file of tensors ({trained.kind}); "
            "make an adapter folder of it first: icae convert adapter"
        )
    return trained


def base_of(trained: Trained) -> str:
    """The base that an adapter folder or a run names.

    UserError if it names none, or a folder that is not on this machine.
    """
    if trained.kind != CHECKPOINT:
        return adapters.check_base(trained.base, trained.name)
    raw, path = _recorded(trained)
    files.check_fields(raw, {"base": str}, path)
    return adapters.check_base(raw["base"], trained.name)


def stated_compression(trained: Trained) -> dict[str, Any]:
    """The fields of the compression as `find_whole`'s adapter or run states them.

    Those of earlier versions lack some, which then have their defaults.
    """
    if trained.kind != CHECKPOINT:
        return adapters.read_adapter_info(trained.path, trained.name)[0]["compression"]
    raw, _ = _recorded(trained)
    start = "compression."
    return {name.removeprefix(start): raw[name] for name in raw if name.startswith(start)}


def stated_identity(trained: Trained) -> dict[str, str]:
    """What `find_whole`'s adapter or run says of its base beside the fingerprint (`Base.identity`).

    Earlier versions do not say it all.
    """
    if trained.kind != CHECKPOINT:
        return adapters.read_adapter_info(trained.path, trained.name)[0].get("base_identity", {})
    raw, _ = _recorded(trained)
    names = {name: raw.get(f"identity.{name}") for name in ("weights", "tokenizer")}
    return {name: value for name, value in names.items() if value}


def _recorded(trained):
    """(the configuration of a checkpoint's run, its file)."""
    path = trained.workdir / "config.json"
    return read_run(path), path


def open_adapter(trained: Trained, base: bases.Base) -> tuple[str, adapters.Adapter]:
    """(what names it to whoever reads its memories later, adapter) of what `find_whole` found.

    The name is an absolute path, for a checkpoint its own, or a hub id with the commit, or a URL.
    UserError if it was trained on another base.
    """
    if trained.kind == CHECKPOINT:
        step, adapter = read_checkpoint(trained, base)
        return os.path.abspath(step), adapter
    remote = locations.is_remote(trained.name)
    name = trained.name if remote else os.path.abspath(trained.path)
    return name, adapters.load_adapter(trained.path, base)


def read_checkpoint(trained: Trained, base: bases.Base) -> tuple[pathlib.Path, adapters.Adapter]:
    """(folder of the step, adapter) of a run's checkpoint, read by the run's own configuration.

    The step may differ from `trained.path`: a running training deletes old checkpoints.
    """
    path = trained.workdir / "config.json"
    run = read_run(path)
    nested = config_file.nested(run, path)
    identity = nested.pop("identity", {})
    trained_on = identity.get("base") if isinstance(identity, dict) else None
    if trained_on is None:
        raise UserError(f"{path}: not the configuration of a compressor's training")
    if trained_on != base.fingerprint:
        raise UserError(
            f"{trained.path} was trained on base {trained_on[:12]}, but {base.path} has "
            f"{base.fingerprint[:12]}; give the right base"
        )
    stated = {name: identity.get(name) for name in base.identity}
    check_identity(str(trained.path), stated, base.identity)
    quantize = identity.get("quantize", "")
    compare_quantisation(str(trained.path), quantize, base.quantize)
    if base.tokenizer is None:
        raise UserError(
            f"base {base.path} has no tokenizer, which the run's template needs; "
            "add the tokenizer's files to it"
        )
    config = config_file.from_dict(TrainConfig, nested, f"{path}: config")
    compression, _ = compression_on(config, base.tokenizer, run)
    recorded = identity.get("template")
    if recorded:
        template = targets.Template.from_json(recorded, path)
    else:
        template = targets.make_template(config.objectives.template, base.tokenizer)
    newest = checkpoint_files.read_selected(trained.given)
    if newest is None:
        raise UserError(
            f"{trained.given}: the checkpoint has been deleted meanwhile; "
            "name another, or the workdir for its best"
        )
    step, arrays = newest
    arrays = jax.tree.map(jax.numpy.asarray, arrays)
    adapter = adapters.Adapter(
        compression,
        config.lora,
        template,
        arrays,
        base.path,
        base.fingerprint,
        base_identity=base.identity,
        base_quantize=quantize,
    )
    return step, adapter


def held_out_losses(trained: Trained) -> dict[str, dict[str, float]]:
    """The last held-out losses, nats per token: `{kind of memory: {objective: loss}}`.

    Read from the run's metrics.jsonl at the step of the checkpoint or adapter; {} if unknown.
    """
    path = trained.workdir / "metrics.jsonl"
    if not trained.step or not path.exists():
        return {}
    evaluations = [
        line["eval"]
        for line in metrics.read_lines(path)
        if line.get("step") == trained.step and "eval" in line
    ]
    return evaluations[-1] if evaluations else {}
