"""The adapter folder: LoRA in PEFT's format, the memory table, and `icae.json`.

icae.json                          method, layout, template, fingerprint of the base
memory.safetensors                 memory_token_embed.weight, by default [k + 3, D], and what else
                                   the method trains, by its names
encoder/adapter_config.json        the encoder's LoRA, as PEFT writes it
encoder/adapter_model.safetensors
decoder/…                          the decoder's LoRA, likewise, in adapters that have one
"""

import os
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.typing import DTypeLike
from jaxtyping import Float

from icae_jax import errors, files
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.trained import DECODER_LORA, SPECIAL_ROWS
from icae_jax.errors import UserError
from icae_jax.interop.adapters import info as infos
from icae_jax.interop.adapters import lora_tensors, peft_config
from icae_jax.interop.adapters.adapter import Adapter
from icae_jax.interop.adapters.info import INFO
from icae_jax.interop.adapters.peft_config import LoraFields
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.identity import check_identity, compare_quantisation
from icae_jax.models.llama import ModelConfig
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives.targets import Template

MEMORY_TENSORS, MEMORY_TABLE = "memory.safetensors", "memory_token_embed.weight"
IN_WORKDIR = "adapter"  # the folder that training writes into its workdir
ENCODER, DECODER = "encoder", "decoder"
LORA_CONFIG, LORA_TENSORS = "adapter_config.json", "adapter_model.safetensors"


# --- Writing ---


def peft_json(adapter: Adapter, lora: str = ENCODER) -> dict:
    """The content of adapter_config.json. PEFT silently assumes r = alpha = 8 without them.

    lora: whose, `ENCODER` or `DECODER`.
    """
    base, revision = adapter.base_path, ""
    if pathlib.Path(base).exists():  # a folder or a GGUF file
        base = str(pathlib.Path(base).resolve())
    elif locations.is_hub_id(base):  # PEFT keeps a hub id's revision in a field of its own
        base, _, revision = base.partition("@")
    layers = adapter.compression.encoder_layers if lora == ENCODER else 0
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **({"revision": revision} if revision else {}),
        "r": adapter.lora.rank,
        "lora_alpha": adapter.lora.scale * adapter.lora.rank,
        "lora_dropout": adapter.lora.dropout,
        "target_modules": list(adapter.lora.targets),
        **({"layers_to_transform": list(range(layers))} if layers else {}),
        "bias": "none",
        "inference_mode": True,
    }


def memory_tensors(adapter: Adapter) -> dict[str, Float[np.ndarray, "rows D"]]:
    """What is trained beside LoRA, by name, as memory.safetensors holds it."""
    return {
        MEMORY_TABLE if name == "memory_table" else name: np.asarray(x, np.float32)
        for name, x in adapter.trained.items()
        if name not in ("lora", DECODER_LORA)
    }


def save_lora(
    folder: pathlib.Path, adapter: Adapter, name: str = ENCODER, dtype: DTypeLike = np.float32
) -> None:
    """Writes one of an adapter's LoRAs as PEFT reads it; the folder is made if it is absent.

    name: `ENCODER` or `DECODER`. dtype: of the tensors.
    """
    lora = adapter.trained["lora" if name == ENCODER else DECODER_LORA]
    tensors = {n: x.astype(dtype) for n, x in lora_tensors.lora_to_hub(lora).items()}
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / LORA_TENSORS, {"format": "pt"})
    files.write_json(folder / LORA_CONFIG, peft_json(adapter, name))


def save_adapter(folder: str | os.PathLike, adapter: Adapter) -> None:
    """Writes the adapter folder; an existing one is replaced only when the new one is complete."""
    with files.replacing_folder(folder) as tmp:
        save_lora(tmp / ENCODER, adapter)
        if adapter.has_decoder_lora:
            save_lora(tmp / DECODER, adapter, DECODER)
        safetensors.numpy.save_file(memory_tensors(adapter), tmp / MEMORY_TENSORS, {"format": "pt"})
        files.write_json(tmp / INFO, infos.icae_json(adapter))


# --- Finding ---


def locate(adapter: str | os.PathLike, progress: bool = True) -> locations.LocalAdapter:
    """The adapter folder that a folder, training workdir, hub id or URL means; may download it."""
    folder, name = locations.local_adapter(adapter, progress)
    is_workdir = (folder / IN_WORKDIR / INFO).exists()
    if is_workdir and (folder / INFO).exists():
        raise UserError(
            f"adapter {name!r} holds {INFO} twice, in itself and in {IN_WORKDIR}/; name that "
            "folder, or move it away"
        )
    if not is_workdir:
        return locations.LocalAdapter(folder, name)
    return locations.LocalAdapter(folder / IN_WORKDIR, os.path.join(name, IN_WORKDIR))


def lora_folder(folder: str | os.PathLike) -> pathlib.Path:
    """Where an adapter folder keeps the encoder's LoRA: in encoder/, or at the top as PEFT does."""
    folder = pathlib.Path(folder)
    candidates = [f for f in (folder, folder / ENCODER) if (f / LORA_CONFIG).exists()]
    if len(candidates) > 1:
        raise UserError(
            f"{folder} holds adapter_config.json twice, in itself and in encoder/; remove the one "
            "that is not the adapter's"
        )
    return candidates[0] if candidates else folder / ENCODER


def _check_is_adapter(folder: pathlib.Path, name: str) -> None:
    """Raises UserError if a folder is not an adapter of this package. name: for the message."""
    if not folder.is_dir() and not locations.is_remote(name):
        raise UserError(
            f"adapter {name!r} is not a folder; give the folder that training wrote (it holds "
            f"{INFO}), a hub id, or gs://…"
        )
    if (folder / INFO).exists():
        return
    what = "it is no adapter of this package"
    if (folder / LORA_CONFIG).exists():
        what = "it is an ordinary PEFT adapter, without memory tokens"
    remedy = ""
    if locations.is_remote(name):
        remedy = (
            " (of another implementation's file, download that and give it to icae convert adapter)"
        )
    raise UserError(
        f"adapter {name!r} has no {INFO}, so {what}; give one that training or icae convert "
        f"adapter wrote{remedy}"
    )


# --- Reading ---


def read_adapter_info(folder: str | os.PathLike, name: str = "") -> tuple[dict, LoraFields]:
    """The checked contents of icae.json and adapter_config.json. name: for error messages."""
    folder = pathlib.Path(folder)
    _check_is_adapter(folder, name or str(folder))
    return infos.read(folder / INFO), peft_config.read(lora_folder(folder) / LORA_CONFIG)


def check_base(base: str, adapter: str) -> str:
    """The base that an adapter names; UserError if it names none, or what is not there."""
    if not base:
        raise UserError(
            f"adapter {adapter} names no base (base_model_name_or_path); give the base model with "
            "--base"
        )
    if pathlib.Path(base).is_absolute() and not pathlib.Path(base).exists():
        kind = "GGUF file that is here" if locations.is_gguf(base) else "folder"
        raise UserError(
            f"adapter {adapter} names its base as {base}, which is not a {kind}; give the base "
            "model with --base"
        )
    return base


def check_template(template: Template, base: bases.Base, source: object) -> None:
    """Raises UserError if an id of a template has no embedding. source: names the template's file.

    Negative ids are rows of the trained table; the stop id must be the tokenizer's own.
    """
    for part in ("head", "before", "after", "stop"):
        ids = [template.stop] if part == "stop" else getattr(template, part)
        tokenizers.check_ids(
            [ids],
            base.config.vocab_size,
            lambda _, part=part: f"{source}: template {part}",
            base.tokenizer,
            0 if part == "stop" else SPECIAL_ROWS,
        )


def _tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file; UserError if it is absent. A pickle beside it is named."""
    pickle = path.with_suffix(".bin")
    if not path.exists() and pickle.exists():
        raise UserError(
            f"{path}: no such file, and {pickle.name} beside it is a pickle, which is never read "
            "here; save it with peft's save_pretrained, which writes safetensors"
        )
    if not path.exists():
        raise UserError(
            f"{path}: no such file; an adapter folder holds encoder/, memory.safetensors and {INFO}"
        )
    tensors = files.read_safetensors(path, safetensors.numpy.load_file)
    if pickle.exists():
        errors.say(f"{path} is read, as by peft; {pickle.name} beside it is not")
    return tensors


def _check_all_read(path: pathlib.Path, tensors: Mapping, is_read: Callable[[str], bool]) -> None:
    """Raises UserError naming tensors that would be ignored: the memory would be another one."""
    unread = [name for name in tensors if not is_read(name)]
    if unread:
        shown = ", ".join(unread[:4]) + (f", … ({len(unread)} in all)" if len(unread) > 4 else "")
        raise UserError(
            f"{path}: {shown} would not be read, so the memory would differ from the one that was "
            "trained; give plain LoRA"
        )


def _load_lora(stated: LoraFields, model: ModelConfig) -> tuple[dict, LoraConfig]:
    """The LoRA tree beside an adapter_config.json, for a model of these sizes, and its sizes."""
    path = stated.source.with_name(LORA_TENSORS)
    tensors = _tensors(path)
    _check_all_read(path, tensors, lora_tensors.is_peft_name)
    problems: list[str] = []
    lora = lora_tensors.lora_from_hub(tensors, model, problems, stated)
    if problems:
        raise UserError(
            lora_tensors.misfits(f"{path}: the adapter's tensors do not fit this base", problems)
        )
    projections, rank = lora_tensors.targets_and_rank(lora)
    listed = stated.targets if isinstance(stated.targets, tuple) else ()  # in the order of training
    in_order = (*(name for name in listed if name in projections), *projections)
    targets = tuple(dict.fromkeys(in_order))
    return lora, LoraConfig(rank, stated.scale, stated.dropout, targets)


def _load_decoder_lora(
    folder: pathlib.Path, compression: CompressionConfig, encoder: LoraConfig, base: bases.Base
) -> dict:
    """`{"decoder_lora": tree}` of an adapter that has one, else {}."""
    path = folder / DECODER / LORA_CONFIG
    if not compression.decoder_lora:
        if path.exists():
            raise UserError(
                f"{path} is there, but {folder / INFO} says nothing of a decoder LoRA "
                f"(compression.{DECODER_LORA}); remove the folder if it is not the adapter's"
            )
        return {}
    lora, config = _load_lora(peft_config.read(path), base.config)
    if config.scale != encoder.scale:
        raise UserError(
            f"{path}: lora_alpha / r is {config.scale}, the encoder's {encoder.scale}; they must "
            "be the same"
        )
    return {DECODER_LORA: lora}


def load_adapter(folder: str | os.PathLike, base: bases.Base) -> Adapter:
    """Loads an adapter folder for a loaded base.

    Raises UserError if the base is not the one of training, if tensors do not fit or would not be
    read, or if they and adapter_config.json disagree.
    """
    folder = pathlib.Path(folder)
    info, stated = read_adapter_info(folder)
    source = f"{folder}/{INFO}"
    if info["base_fingerprint"] != base.fingerprint:
        raise UserError(
            f"adapter {folder} was trained on a base with fingerprint "
            f"{info['base_fingerprint'][:12]} ({stated.base or 'not named'}), but {base.path} has "
            f"{base.fingerprint[:12]}; give the right base"
        )
    check_identity(f"adapter {folder}", info.get("base_identity", {}), base.identity)
    quantize = info.get("base_quantize", "")
    compare_quantisation(f"adapter {folder}", quantize, base.quantize)
    compression = infos.from_json(
        CompressionConfig, info["compression"], f"{source}: compression", infos.LATER_FIELDS
    )
    template = infos.from_json(Template, info["template"], f"{source}: template")
    check_template(template, base, source)
    try:
        encoder = compression.encoder_config(base.config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    lora, lora_config = _load_lora(stated, encoder)
    trained = {"lora": lora} | _load_memory_tensors(folder / MEMORY_TENSORS, compression, base)
    trained |= _load_decoder_lora(folder, compression, lora_config, base)
    return Adapter(
        compression,
        lora_config,
        template,
        trained,
        stated.base or base.path,
        info["base_fingerprint"],
        info.get("origin"),
        info.get("base_identity", {}),
        quantize,
    )


def _load_memory_tensors(
    path: pathlib.Path, compression: CompressionConfig, base: bases.Base
) -> dict[str, Float[jax.Array, "rows D"]]:
    """The memory table and the method's own tensors."""
    tensors, problems, trained = _tensors(path), [], {}
    shapes = {"memory_table": (compression.vectors + SPECIAL_ROWS, base.config.hidden_size)}
    if compression.spec.tensors:
        own = jax.eval_shape(lambda: compression.spec.tensors(base.config, compression))
        shapes |= {name: x.shape for name, x in own.items()}
    names = {name: MEMORY_TABLE if name == "memory_table" else name for name in shapes}
    for name, want in shapes.items():
        tensor = tensors.get(names[name])
        have = None if tensor is None else tensor.shape
        if have != want:
            raise UserError(f"{path}: {names[name]} is {have}, expected {want}")
        trained[name] = jnp.asarray(lora_tensors.read_floats(tensor, names[name], problems))
    _check_all_read(path, tensors, set(names.values()).__contains__)
    if problems:
        raise UserError(f"{path}: {problems[0]}")
    return trained
