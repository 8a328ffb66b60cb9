"""Describes a file or folder: what it is, its sizes, its method, and which bases fit it."""

import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from icae_jax import files
from icae_jax.compression.config import EARLIER
from icae_jax.errors import UserError, counted
from icae_jax.inference import memory_file
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import formats, lora_tensors, tensor_files
from icae_jax.interop.export import hf_cache
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import (
    gguf_file,
    gguf_folder,
    gguf_tokenizer,
    locations,
    stored_scheme,
)
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.models import lora as loras
from icae_jax.models.families import config_json, multimodal, tensor_names
from icae_jax.models.llama import ModelConfig
from icae_jax.training import trained as trained_compressors
from icae_jax.training.workdir import read_run

Description = dict[str, Any]  # plain values under readable names

# Published bases by (layers, hidden size, width of q, width of k and v), from their config.json.
KNOWN = {
    "Llama-2-7B": (32, 4096, 4096, 4096),
    "Llama-2-13B": (40, 5120, 5120, 5120),
    "Llama-2-70B, Llama-3-70B, Llama-3.1-70B, Llama-3.3-70B": (80, 8192, 8192, 1024),
    "Llama-3-8B, Llama-3.1-8B": (32, 4096, 4096, 1024),
    "Llama-3.2-1B": (16, 2048, 2048, 512),
    "Llama-3.2-3B": (28, 3072, 3072, 1024),
    "Mistral-7B (v0.1 to v0.3)": (32, 4096, 4096, 1024),
    "Mistral-Nemo-12B": (40, 5120, 4096, 1024),
    "TinyLlama-1.1B": (22, 2048, 2048, 256),
    "SmolLM2-135M, SmolLM-135M": (30, 576, 576, 192),
    "SmolLM2-360M, SmolLM-360M": (32, 960, 960, 320),
    "SmolLM2-1.7B, SmolLM-1.7B": (24, 2048, 2048, 2048),
    "Qwen2.5-0.5B, Qwen2-0.5B": (24, 896, 896, 128),
    "Qwen2.5-1.5B, Qwen2-1.5B": (28, 1536, 1536, 256),
    "Qwen2.5-3B": (36, 2048, 2048, 256),
    "Qwen2.5-7B, Qwen2-7B": (28, 3584, 3584, 512),
    "Qwen3-0.6B": (28, 1024, 2048, 1024),
    "Qwen3-1.7B": (28, 2048, 2048, 1024),
    "Qwen3-4B": (36, 2560, 4096, 1024),
    "Qwen3-8B": (36, 4096, 4096, 1024),
}


# How the encoder reads, beside the layout.
ENCODER_FIELDS = ("encoder_mask", "encoder_layers", "anchor_vectors")
SIZE_FIELDS = ("num_hidden_layers", "hidden_size", "q_width", "kv_width")


# ------------------------------------------------------------------------------------------- sizes


def _lora_sizes(tensors: Mapping[str, Any]) -> Description:
    """Layers, rank and targets of LoRA tensors, and the sizes that they imply of a base."""
    layers, ranks, widths = set(), set(), {}
    for name, tensor in tensors.items():
        match = lora_tensors.parse_lora_name(name)
        if match and len(tensor.shape) == 2:
            layer, _, projection, letter = match
            rank_axis = 0 if letter == "A" else 1
            layers.add(layer)
            ranks.add(tensor.shape[rank_axis])
            widths[projection, letter] = tensor.shape[1 - rank_axis]
    targets = [p for p in loras.PROJECTIONS if (p, "A") in widths]
    implied = {"num_hidden_layers": len(layers)}
    reads_hidden = [p for p in targets if p not in ("o_proj", "down_proj")]
    if reads_hidden:
        implied["hidden_size"] = widths[reads_hidden[0], "A"]
    outputs = {
        "q_width": ("q_proj",),
        "kv_width": ("k_proj", "v_proj"),
        "intermediate_size": ("gate_proj", "up_proj"),
    }
    for field, projections in outputs.items():
        known = [widths[p, "B"] for p in projections if (p, "B") in widths]
        implied |= {field: known[0]} if known else {}
    return {"rank": sorted(ranks), "lora_targets": targets, "base_must_have": implied}


def _base_sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "q_width": config.num_heads * config.head_dim,
        "kv_width": config.num_kv_heads * config.head_dim,
        "intermediate_size": config.intermediate_size,
    }


def _published(implied: Mapping[str, int]) -> list[str]:
    """The published bases that have these sizes."""
    return [
        name
        for name, sizes in KNOWN.items()
        if all(
            implied.get(field, size) == size for field, size in zip(SIZE_FIELDS, sizes, strict=True)
        )
    ]


def _parameter_count(tensors: Mapping[str, Any]) -> int:
    return sum(math.prod(getattr(t, "shape", t)) for t in tensors.values())


# ------------------------------------------------------------------------------------------- kinds


def _trained_file(path, tensors) -> Description:
    form = formats.recognise(tensors)
    trained = {n: t for n, t in tensors.items() if lora_tensors.is_lora(n) or formats.is_table(n)}
    table_name = next(n for n in trained if formats.is_table(n) and not n.endswith("ae_embedding"))
    about = {
        "what": f"trained compressor, format {form}",
        "method": " or ".join(formats.methods_of(form, tensors)),
        "k": formats.memory_tokens(form, trained[table_name]),
        **_lora_sizes(tensors),
        "trained_parameters": _parameter_count(trained),
        "dtypes": sorted({t.dtype.lower() for t in trained.values()}),
    }
    rest = {n: t for n, t in tensors.items() if n not in trained}
    if rest:
        zeros = sum(t.shape == () for t in rest.values())
        about["besides"] = (
            f"{counted(zeros, 'scalar placeholders')} of the base"
            if zeros == len(rest)
            else f"{counted(len(rest), 'tensors')} of the base"
        )
    reading = formats.read_reading(path)
    return about | ({"reading": reading} if reading else {})


def _adapter(folder) -> Description:
    stated, lora_fields = adapters.read_adapter_info(folder)
    lora_folder = lora_fields.source.parent
    tensors, _ = tensor_files.open_tensors(lora_folder / "adapter_model.safetensors")
    table, _ = tensor_files.open_tensors(pathlib.Path(folder) / "memory.safetensors")
    compression = stated["compression"]
    is_peft = lora_folder == pathlib.Path(folder)
    about = {"what": "adapter folder in PEFT's form" if is_peft else "adapter folder"}
    for name in ("method", "k", "rate", "layout", "k_choices", *ENCODER_FIELDS):
        if compression.get(name):
            about[name] = compression[name]
    own = {n: list(t.shape) for n, t in table.items() if n != adapters.MEMORY_TABLE}
    about |= {"trained_tensors": own} if own else {}
    decoder = {}
    if compression.get("decoder_lora"):
        decoder, _ = tensor_files.open_tensors(
            pathlib.Path(folder) / adapters.DECODER / "adapter_model.safetensors"
        )
        about["decoder_lora"] = f"{_parameter_count(decoder)} parameters"
    sizes = _lora_sizes(tensors)
    if compression.get("encoder_layers"):  # of the base's first layers alone
        del sizes["base_must_have"]["num_hidden_layers"]
    about |= {
        "template": stated["template"]["name"],
        **sizes,
        "lora_scale": lora_fields.scale,
        "trained_parameters": _parameter_count(tensors | table) + _parameter_count(decoder),
        "base": lora_fields.base,
        "base_fingerprint": stated["base_fingerprint"],
        **({"base_quantize": stated["base_quantize"]} if stated.get("base_quantize") else {}),
    }
    return about | ({"origin": stated["origin"]} if stated.get("origin") else {})


def describe_base(base: str | os.PathLike) -> Description:
    """What a base is: a folder, a GGUF file, a hub id or a URL, see `locations.local_folder`."""
    folder = locations.local_folder(base, with_weights=locations.is_gguf(str(base)))
    about = _base(folder)
    if gguf := gguf_folder.source(folder):
        about |= _gguf(gguf, folder)
    return about


def _gguf(path, folder) -> Description:
    """What a GGUF file says beside the sizes; reads the rows that identify it."""
    file = gguf_file.read(path)
    blocks = collections.Counter(tensor.kind for tensor in file.tensors.values())
    about = {
        "name": file.get("general.name", str, ""),
        "blocks": dict(sorted(blocks.items())),
        "bytes": sum(part.stat().st_size for part in gguf_file.parts(path)),
    }
    if gguf_tokenizer.has_tokenizer(file):
        model, pre = (file.get(f"{gguf_tokenizer.KEY}.{k}", str, "") for k in ("model", "pre"))
        about["tokenizer"] = f"{model}, {pre}" if model == "gpt2" else model
        about["tokenizer_fingerprint"] = tokenizers.fingerprint(tokenizers.load_tokenizer(folder))
        about["chat_template"] = bool(file.get("tokenizer.chat_template", str))
        about["stop_ids"] = gguf_tokenizer.end_ids(file)
    return about | {"fingerprint": bases.identify(path)[1]}


def _base(folder) -> Description:
    path = folder / "config.json"
    raw = files.read_json(path, "the base model's configuration")
    raw = multimodal.text_part(raw, path)
    config = config_json.parse_config(raw, path)
    shapes, held = tensor_names.hub_shapes(config), stored_scheme.read(folder)
    about = {
        "what": f"base model, {config_json.architecture(raw, path)}",
        **_base_sizes(config),
        "vocab_size": config.vocab_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
    }
    if config.rope_scaling:
        about["rope_scaling"] = {
            "type": type(config.rope_scaling).__name__,
            **dataclasses.asdict(config.rope_scaling),
        }
    if config.windows:
        about["windows"] = config.windows
    if config.ropes:
        about["rope_of_layers"] = config.ropes
    if config.biased:
        about["biases"] = config.biased
    about |= {
        "dtype": held.scheme if held else config_json.stored_dtype(raw, path),
        "tensors": len(shapes),
        "parameters": _parameter_count(shapes),
    }
    if held:
        about |= {"fingerprint": held.fingerprint}
    published = _published(_base_sizes(config))
    return about | ({"sizes_of": published} if published else {})


def _memory(path) -> Description:
    metadata = memory_file.read_metadata(path)
    tensors, _ = tensor_files.open_tensors(path)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    shapes.pop("k", None)  # that of v; k is the number of memory tokens
    return {
        "what": "memory file",
        "method": metadata["method"],
        "layout": metadata["layout"],
        **{name: metadata[name] for name in ENCODER_FIELDS if name in metadata},
        "k": int(metadata["k"]),
        "texts": len(memory_file.read_ids(path, metadata)),
        **shapes,
        "bytes": path.stat().st_size,
        "adapter": metadata["adapter"],
        "adapter_fingerprint": metadata["adapter_fingerprint"],
        "base_fingerprint": metadata["base_fingerprint"],
    }


def _checkpoint(trained) -> Description:
    recorded = read_run(trained.workdir / "config.json")
    named = {
        "method": "compression.method",
        "k": "compression.k",
        "rate": "compression.rate",
        "layout": "compression.layout",
        "phase": "phase",
        "rank": "lora.rank",
        "base": "base",
        "base_fingerprint": "identity.base",
    }
    for name in ("decoder_lora", *ENCODER_FIELDS):
        value = recorded.get(f"compression.{name}")  # None in runs of earlier versions
        if value and (name == "encoder_mask" or value != EARLIER[name]):
            named[name] = f"compression.{name}"
    return {
        "what": f"checkpoint of a training run, {trained.path.name}",
        **{name: recorded.get(field) for name, field in named.items()},
    }


def _has_decoder_lora(metadata) -> bool:
    return json.loads(metadata.get("decoder_lora", "false"))


def _tensors(path) -> Description:
    tensors, metadata = tensor_files.open_tensors(path)
    if hf_cache.is_cache(metadata):
        return {
            "what": "memories exported for transformers' generate, read by use_cache.py beside it",
            **{name: json.loads(metadata[name]) for name in ("method", "layout", "objective")},
            "base_fingerprint": json.loads(metadata["base_fingerprint"]),
            **({"decoder_lora": "decoder_lora/"} if _has_decoder_lora(metadata) else {}),
        }
    if {"format_version", "method", "ids"} <= set(metadata):
        return _memory(path)
    if formats.recognise(tensors):
        return _trained_file(path, tensors)
    is_base = any(name.endswith("embed_tokens.weight") for name in tensors)
    return {
        "what": "weights of a base model; give the folder that holds them"
        if is_base
        else "tensors of no known kind",
        "tensors": len(tensors),
        "first": sorted(tensors)[:3],
    }


def describe(path: str | os.PathLike) -> Description:
    """What a path (or an adapter's hub id or URL) holds, as plain values under readable names.

    UserError if it is nothing that this package knows.
    """
    if locations.is_gguf(str(path)):
        return describe_base(path)
    local = pathlib.Path(path)
    config_path = local / "config.json"
    config = files.read_json(config_path, "a configuration") if config_path.exists() else {}
    if "architectures" in config or "model_type" in config:
        return _base(local)
    if local.is_file() and tensor_files.file_kind(local):
        about = _tensors(local)
    else:
        trained = trained_compressors.find(path)
        if trained.kind == trained_compressors.CHECKPOINT:
            return _checkpoint(trained)
        if trained.tensors:
            about = _trained_file(trained.path, trained.tensors)
        else:
            about = _adapter(trained.path)
    implied = about.get("base_must_have")
    if implied and not about.get("base_fingerprint"):
        about["sizes_of"] = _published(implied) or ["no base known here"]
    return about


# -------------------------------------------------------------------------------------------- bases


def _fits(about: Description, base: str) -> tuple[bool, str]:
    """Whether a base (folder, hub id or URL) fits what `describe` found, and why."""
    wanted = about.get("base_fingerprint")
    if wanted:
        fingerprint = bases.identify(base)[1]
        same = wanted == fingerprint
        return same, f"fingerprint {fingerprint[:12]}{'' if same else f', not {wanted[:12]}'}"
    sizes = _base_sizes(bases.sizes(base))
    wrong = [
        f"{field} {sizes[field]}, not {size}"
        for field, size in about["base_must_have"].items()
        if sizes[field] != size
    ]
    return not wrong, (
        ", ".join(wrong) or "by its sizes; icae convert adapter restores a text to make sure"
    )


def try_bases(
    path: str | os.PathLike, about: Description, base_names: Iterable[str]
) -> dict[str, tuple[bool, str]]:
    """`{base: (whether it fits, why)}` for what `describe` found at a path.

    UserError if what is there needs no base.
    """
    base_names = list(base_names)
    if base_names and not (about.get("base_must_have") or about.get("base_fingerprint")):
        raise UserError(f"--base: {path} is {about['what']}, which needs no base")
    return {base: _fits(about, base) for base in base_names}
