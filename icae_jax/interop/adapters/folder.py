"""The adapter folder: LoRA in PEFT's format, the memory table, and `icae.json`.

icae.json                          method, layout, template, fingerprint of the base
memory.safetensors                 memory_token_embed.weight, by default [k + 3, D], and what else
                                   the method trains, by its names
encoder/adapter_config.json        the encoder's LoRA, as PEFT writes it
encoder/adapter_model.safetensors
decoder/…                          the decoder's LoRA, likewise, in adapters that have one
"""

import dataclasses
import hashlib
import os
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float

import icae_jax
from icae_jax import errors, files
from icae_jax.compression.config import OPTIONS, CompressionConfig
from icae_jax.compression.trained import DECODER_LORA, SPECIAL_ROWS
from icae_jax.errors import UserError
from icae_jax.interop.adapters import lora_tensors, peft_config
from icae_jax.interop.adapters.peft_config import LoraFields
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.identity import check_identity, compare_quantisation
from icae_jax.models.llama import ModelConfig
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives.targets import Template

T = TypeVar("T")

FORMAT_VERSION = 1
MEMORY_TENSORS, MEMORY_TABLE = "memory.safetensors", "memory_token_embed.weight"
INFO = "icae.json"
IN_WORKDIR = "adapter"  # the folder that training writes into its workdir
ENCODER, DECODER = "encoder", "decoder"
LORA_CONFIG, LORA_TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Fields of icae.json's `compression` that earlier versions did not write.
_LATER_FIELDS = (
    *("k_choices", "trigger", DECODER_LORA),
    *("encoder_mask", "encoder_layers", "anchor_vectors"),
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A trained compressor, apart from its base.

    Attributes:
        compression: how it compresses.
        lora: sizes of its LoRA.
        template: how it is asked questions.
        trained: the tree of `compression.trained.init`.
        base_path: the base that it was trained on: folder, hub id or URL.
        base_fingerprint: that base's `Base.fingerprint`.
        origin: of a converted adapter, where it comes from and how well it restored a text.
        base_identity: that base's `Base.identity`, as far as the file says it.
        base_quantize: that base's `Base.quantize`.
    """

    compression: CompressionConfig
    lora: LoraConfig
    template: Template
    trained: dict
    base_path: str
    base_fingerprint: str
    origin: dict | None = None
    base_identity: dict[str, str] = dataclasses.field(default_factory=dict)
    base_quantize: str = ""

    @property
    def fingerprint(self) -> str:
        """sha256 over the trained tensors, in float32."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.trained):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf, np.float32).tobytes())
        return digest.hexdigest()

    @property
    def has_decoder_lora(self) -> bool:
        """Whether the decoder reads with a LoRA of its own."""
        return DECODER_LORA in self.trained


def was_forced(adapter: Adapter) -> bool:
    """Whether the adapter was converted without evidence that its base is the one of training."""
    return bool(adapter.origin and adapter.origin.get("forced"))


def refuse_decoder_lora(adapter: Adapter, what: str) -> None:
    """Raises UserError if the adapter has a decoder LoRA, which `what` cannot carry."""
    if adapter.has_decoder_lora:
        raise UserError(
            f"the adapter was trained with compression.{DECODER_LORA}, and {what} cannot carry a "
            "decoder LoRA; use an adapter without one, or keep this one in an adapter folder"
        )


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


def icae_json(adapter: Adapter) -> dict:
    """The content of icae.json."""
    compression = dataclasses.asdict(adapter.compression)
    # Unknown to earlier versions, which read the rest, so left out where they mean nothing new.
    spec = adapter.compression.spec
    earlier = {DECODER_LORA: False, "encoder_layers": 0, "encoder_mask": "causal"}
    earlier |= {name: values[0] for name, values in OPTIONS.items()}
    for name, value in earlier.items():
        if compression[name] == value and (name != "encoder_mask" or spec.encoder_mask == value):
            del compression[name]
    return {
        "format_version": FORMAT_VERSION,
        "icae_jax_version": icae_jax.__version__,
        "base_fingerprint": adapter.base_fingerprint,
        **({"base_identity": adapter.base_identity} if adapter.base_identity else {}),
        **({"base_quantize": adapter.base_quantize} if adapter.base_quantize else {}),
        "compression": compression,
        "template": dataclasses.asdict(adapter.template),
        **({"origin": adapter.origin} if adapter.origin else {}),
    }


def save_adapter(folder: str | os.PathLike, adapter: Adapter) -> None:
    """Writes the adapter folder; an existing one is replaced only when the new one is complete."""
    loras = {ENCODER: adapter.trained["lora"]}
    if adapter.has_decoder_lora:
        loras[DECODER] = adapter.trained[DECODER_LORA]
    with files.replacing_folder(folder) as tmp:
        for name, lora in loras.items():
            (tmp / name).mkdir()
            tensors = lora_tensors.lora_to_hub(lora)
            safetensors.numpy.save_file(tensors, tmp / name / LORA_TENSORS, {"format": "pt"})
            files.write_json(tmp / name / LORA_CONFIG, peft_json(adapter, name))
        safetensors.numpy.save_file(memory_tensors(adapter), tmp / MEMORY_TENSORS, {"format": "pt"})
        files.write_json(tmp / INFO, icae_json(adapter))


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
    if (folder / "checkpoints").is_dir():
        raise UserError(
            f"{name!r} is the workdir of a training that has not ended, so it holds no "
            f"{IN_WORKDIR}/ yet; let it end, or make an adapter of its latest checkpoint with "
            f"icae convert adapter --from {name}"
        )
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
    path = folder / INFO
    info = files.read_json(path, "how the adapter is read")
    version = info.get("format_version")
    if version != FORMAT_VERSION or not files.is_kind(version, int):
        raise UserError(
            f"{path}: format_version is {version!r:.40}, this version reads {FORMAT_VERSION}"
        )
    kinds = {"base_fingerprint": str, "compression": dict, "template": dict}
    files.check_fields(info, kinds, path)
    files.check_fields(info["template"], {"name": str}, f"{path}: template")
    if "base_identity" in info:
        files.check_fields(info, {"base_identity": dict}, path)
        identity = info["base_identity"]
        files.check_fields(identity, dict.fromkeys(identity, str), path)
    if "base_quantize" in info:
        files.check_fields(info, {"base_quantize": str}, path)
    if info.get("origin") is not None:
        files.check_fields(info, {"origin": dict}, path)
    return info, peft_config.read(lora_folder(folder) / LORA_CONFIG)


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


def _from_json(
    kind: Callable[..., T], raw: dict[str, Any], source: str, later_fields: tuple[str, ...] = ()
) -> T:
    """Builds a dataclass from JSON, lists as tuples; UserError on unknown, missing or wrong fields.

    later_fields: fields that older files lack; their defaults are what those files meant.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    wrong = sorted((set(raw) ^ names) - (set(later_fields) - set(raw)))
    if wrong:
        raise UserError(
            f"{source}: fields {', '.join(map(errors.field, wrong))} unknown or missing; was it "
            "written by another version of icae_jax?"
        )
    types = {
        field.name: list if typing.get_origin(field.type) is tuple else field.type
        for field in dataclasses.fields(kind)
        if field.name in raw
    }
    files.check_fields(raw, types, source)
    for name, type_ in types.items():
        if type_ is list and not all(files.is_kind(value, int) for value in raw[name]):
            raise UserError(f"{source}: {name} is {raw[name]!r}, which are not whole numbers")
        if type_ in (int, float) and not abs(raw[name]) < 2**31:  # NaN too
            raise UserError(
                f"{source}: {name} is {raw[name]!r:.40}, which is not a number of sensible size"
            )
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


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
    compression = _from_json(
        CompressionConfig, info["compression"], f"{source}: compression", _LATER_FIELDS
    )
    template = _from_json(Template, info["template"], f"{source}: template")
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
