"""`icae inspect`: what a file or folder is, its sizes, its method, and which bases it fits."""

import dataclasses
import json
import math
import pathlib

from icae_jax import files
from icae_jax.compression.encoder import SPECIAL_ROWS
from icae_jax.errors import UserError
from icae_jax.inference import memory_file
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import formats
from icae_jax.interop.hub import base as bases
from icae_jax.models import lora as loras
from icae_jax.models.families import config_json, tensor_names
from icae_jax.training.config import read_run
from icae_jax.workflows import convert_adapter

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


def _lora_sizes(tensors):
    """What the LoRA tensors tell: layers, rank, targets, and the widths that they imply of a base."""
    layers, ranks, widths = set(), set(), {}
    for name, tensor in tensors.items():
        match = adapters.parse_lora_name(name)
        if match and len(tensor.shape) == 2:
            layer, _, projection, letter = match
            layers.add(layer)
            ranks.add(tensor.shape[0 if letter == "A" else 1])
            widths[projection, letter] = tensor.shape[1 if letter == "A" else 0]
    targets = [p for p in loras.PROJECTIONS if (p, "A") in widths]
    implied = {"num_hidden_layers": len(layers)}
    reads_hidden = [p for p in targets if p not in ("o_proj", "down_proj")]
    if reads_hidden:
        implied["hidden_size"] = widths[reads_hidden[0], "A"]
    wide = {
        "q_width": ("q_proj",),
        "kv_width": ("k_proj", "v_proj"),
        "intermediate_size": ("gate_proj", "up_proj"),
    }
    for field, projections in wide.items():
        known = [widths[p, "B"] for p in projections if (p, "B") in widths]
        implied |= {field: known[0]} if known else {}
    return {"rank": sorted(ranks), "lora_targets": targets, "base_must_have": implied}


def _sizes_of(config):
    kv = config.num_kv_heads * config.head_dim
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "q_width": config.num_heads * config.head_dim,
        "kv_width": kv,
        "intermediate_size": config.intermediate_size,
    }


def _known(implied):
    fields = ("num_hidden_layers", "hidden_size", "q_width", "kv_width")
    return [
        name
        for name, sizes in KNOWN.items()
        if all(implied.get(f, s) == s for f, s in zip(fields, sizes, strict=True))
    ]


def _count(tensors):
    return sum(math.prod(getattr(t, "shape", t)) for t in tensors.values())


def _trained_file(path, tensors):
    form = formats.recognise(tensors)
    trained = {n: t for n, t in tensors.items() if adapters.is_lora(n) or formats.is_table(n)}
    about = {
        "what": f"trained compressor, format {form}",
        "method": " or ".join(formats.methods_of(form, tensors)),
    }
    table = next(
        t for n, t in trained.items() if formats.is_table(n) and not n.endswith("ae_embedding")
    )
    about["k"] = max(0, formats.rows(table) - (0 if form == "x500" else SPECIAL_ROWS))
    about |= _lora_sizes(tensors)
    about |= {
        "trained_parameters": _count(trained),
        "dtypes": sorted({t.dtype.lower() for t in trained.values()}),
    }
    rest = {n: t for n, t in tensors.items() if n not in trained}
    if rest:
        zeros = sum(t.shape == () for t in rest.values())
        about["besides"] = (
            f"{zeros} scalar placeholders of the base"
            if zeros == len(rest)
            else f"{len(rest)} tensors of the base"
        )
    told = formats.read_reading(path)
    return about | ({"reading": told} if told else {})


def _adapter(folder):
    info, stated = adapters.read_adapter_info(folder)
    inner = stated.source.parent
    tensors, _ = formats.open_tensors(inner / "adapter_model.safetensors")
    table, _ = formats.open_tensors(pathlib.Path(folder) / "memory.safetensors")
    compression = info["compression"]
    return {
        "what": "adapter folder"
        if inner != pathlib.Path(folder)
        else "adapter folder in PEFT's form",
        **{
            name: compression.get(name)
            for name in ("method", "k", "rate", "layout", "k_choices")
            if compression.get(name)
        },
        "template": info["template"]["name"],
        **_lora_sizes(tensors),
        "lora_scale": stated.scale,
        "trained_parameters": _count(tensors | table),
        "base": stated.base,
        "base_fingerprint": info["base_fingerprint"],
        **({"origin": info["origin"]} if info.get("origin") else {}),
    }


def _base(folder):
    path = folder / "config.json"
    raw = files.read_json(path, "the base model's configuration")
    config = config_json.parse_config(raw, path)
    shapes = tensor_names.hub_shapes(config)
    about = {
        "what": f"base model, {config_json.architecture(raw, path)}",
        **_sizes_of(config),
        "vocab_size": config.vocab_size,
    }
    about |= {
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }
    about["max_position_embeddings"] = config.max_position_embeddings
    if config.rope_scaling:
        about["rope_scaling"] = {
            "type": type(config.rope_scaling).__name__,
            **dataclasses.asdict(config.rope_scaling),
        }
    if config.windows:
        about["windows"] = config.windows
    if config.biased:
        about["biases"] = config.biased
    about |= {
        "dtype": config_json.stored_dtype(raw, path),
        "tensors": len(shapes),
        "parameters": _count(shapes),
    }
    known = _known(_sizes_of(config))
    return about | ({"sizes_of": known} if known else {})


def _memory(path):
    metadata = memory_file.read_metadata(path)
    tensors, _ = formats.open_tensors(path)
    ids = memory_file.read_ids(path, metadata)
    about = {
        "what": "memory file",
        "method": metadata["method"],
        "layout": metadata["layout"],
        "k": int(metadata["k"]),
        "texts": len(ids),
    }
    about |= {name: list(t.shape) for name, t in tensors.items()} | {
        "bytes": pathlib.Path(path).stat().st_size
    }
    return about | {
        name: metadata[name] for name in ("adapter", "adapter_fingerprint", "base_fingerprint")
    }


def describe(path):
    """What a path holds, as plain values under readable names. UserError where it is nothing that this package knows."""
    given, path = path, pathlib.Path(path)
    stated = (
        files.read_json(path / "config.json", "a configuration")
        if path.is_dir() and (path / "config.json").exists()
        else {}
    )
    if "architectures" in stated or "model_type" in stated:
        return _base(path)
    if path.is_file() and formats.file_kind(path):
        tensors, metadata = formats.open_tensors(path)
        if {"format_version", "method", "ids"} <= set(metadata):
            return _memory(path)
        if formats.recognise(tensors):
            return _trained_file(path, tensors)
        names = sorted(tensors)
        known = any(n.endswith("embed_tokens.weight") for n in names)
        what = (
            "weights of a base model; give the folder that holds them"
            if known
            else "tensors of no known kind"
        )
        return {"what": what, "tensors": len(names), "first": names[:3]}
    source = convert_adapter.recognise(given)
    if source.kind == "orbax":
        flat = read_run(source.path.parent.parent / "config.json")
        named = {
            "method": "compression.method",
            "k": "compression.k",
            "rate": "compression.rate",
            "layout": "compression.layout",
        }
        named |= {
            "phase": "phase",
            "rank": "lora.rank",
            "base": "base",
            "base_fingerprint": "identity.base",
        }
        return {
            "what": f"checkpoint of a training run, {source.path.name}",
            **{name: flat.get(field) for name, field in named.items()},
        }
    return _trained_file(source.path, source.tensors) if source.tensors else _adapter(source.path)


def fits(about, base):
    """Whether a base (folder, hub id or URL) fits what `describe` told: (yes or no, why)."""
    wanted = about.get("base_fingerprint")
    if wanted:
        identity = bases.identify(base)[1]
        same = wanted == identity
        return same, f"fingerprint {identity[:12]}{'' if same else f', not {wanted[:12]}'}"
    have = _sizes_of(bases.sizes(base))
    wrong = [
        f"{field} {have[field]}, not {value}"
        for field, value in about["base_must_have"].items()
        if have[field] != value
    ]
    return not wrong, ", ".join(
        wrong
    ) or "by its sizes; icae convert adapter restores a text to make sure"


def main(parser, argv):
    """Prints what a path is; with --base, whether each fits. Returns 0; 2 where a base given does not fit."""
    parser.add_argument("path", help="file or folder, or an adapter's hub id or gs://…")
    parser.add_argument(
        "--base",
        action="append",
        default=[],
        help="a base to try: folder, hub id, or gs://…; may be given many times",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    about = describe(args.path)
    implied = about.get("base_must_have")
    if implied and not about.get("base_fingerprint"):
        about["sizes_of"] = _known(implied) or ["no base known here"]
    if args.base and not (implied or about.get("base_fingerprint")):
        raise UserError(f"--base: {args.path} is {about['what']}, which needs no base")
    verdicts = {base: fits(about, base) for base in args.base}
    if args.json:
        print(
            json.dumps(
                about | ({"fits": {b: ok for b, (ok, _) in verdicts.items()}} if verdicts else {}),
                ensure_ascii=False,
            )
        )
    else:
        for name, value in about.items():
            shown = (
                ", ".join(f"{k} {v}" for k, v in value.items())
                if isinstance(value, dict)
                else value
            )
            print(
                f"{name.replace('_', ' '):20}{', '.join(map(str, shown)) if isinstance(shown, list | tuple) else shown}"
            )
        for base, (ok, why) in verdicts.items():
            print(f"{'fits' if ok else 'does not fit':20}{base} ({why})")
    return 0 if all(ok for ok, _ in verdicts.values()) else 2
