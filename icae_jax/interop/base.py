"""Base models in model-hub format: config.json, one or many safetensors files, tokenizer files."""

import dataclasses
import hashlib
import json
import os
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from icae_jax.interop import files
from icae_jax.models import llama, lora

# Fields of config.json that change the result, with the only values this family computes. Anything else is refused by name.
REQUIRED_VALUES = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, 1.0),
}
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


def read_config(folder):
    """The `ModelConfig` of a hub folder. ValueError where the folder's model is not one that `models.llama` computes."""
    path = pathlib.Path(folder) / "config.json"
    return parse_config(files.read_json(path, "the base model's configuration"), path)


def parse_config(raw, source="config.json"):
    """The `ModelConfig` of config.json's content, in both spellings of RoPE (`rope_theta` at the top, or `rope_parameters`)."""
    architecture = (raw.get("architectures") or ["no architecture"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{source}: architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}")
    for field, allowed in REQUIRED_VALUES.items():
        if field in raw and raw[field] not in allowed:
            raise ValueError(f"{source}: {field} is {raw[field]!r}, which this model does not compute; only {allowed[0]!r} is supported")
    if architecture == "MistralForCausalLM" and "sliding_window" not in raw:
        raise ValueError(f"{source}: sliding_window is absent, which means 4096; only null is supported (Mistral-7B v0.2 and later)")
    if "quantization_config" in raw:
        raise ValueError(f"{source}: quantization_config is set; use the unquantised checkpoint")
    missing = [f for f in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads") if f not in raw]
    if missing:
        raise ValueError(f"{source}: {', '.join(missing)} missing; is this a complete config.json?")

    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope_theta = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "llama3":
        scaling = llama.Llama3RopeScaling(
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    elif rope_type == "default":
        scaling = None
    else:
        raise ValueError(f"{source}: RoPE type {rope_type!r} is not supported; supported: default, llama3")
    heads = raw["num_attention_heads"]
    return llama.ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=rope_theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )


def hub_config(config, dtype, special_ids):
    """config.json's content for a `ModelConfig` (Llama architecture). special_ids: `{"bos_token_id": …, "eos_token_id": …}`."""
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype,
        **special_ids,
    }


# -------------------------------------------------------------------------------------------------------------- weights


def tensor_names(config):
    """Every tensor of the hub's checkpoint with its place in our tree: `name -> (path, layer or None, transposed)`."""
    names = {"model.embed_tokens.weight": (("embed",), None, False), "model.norm.weight": (("norm", "scale"), None, False)}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = (("lm_head",), None, True)
    for i in range(config.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names[f"model.layers.{i}.{norm}.weight"] = (("layers", norm, "scale"), i, False)
        for p in lora.PROJECTIONS:
            names[f"model.layers.{i}.{lora.module_of(p)}.{p}.weight"] = (("layers", lora.module_of(p), p, "kernel"), i, True)
    return names


def weight_files(folder):
    """The folder's safetensors files; the index names them where there are many."""
    folder = pathlib.Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted({folder / name for name in files.read_json(index, "the weight index")["weight_map"].values()})
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise ValueError(f"{folder}: no model.safetensors and no model.safetensors.index.json; pickled weights (.bin, .pt) are not read")


def load_params(folder, config, dtype=jnp.float32):
    """Parameters of a hub folder in our tree, layers stacked `[L, …]`, kernels `[in, out]`, in `dtype`.

    Read tensor by tensor into the stacked arrays. ValueError lists the tensors that are missing, or names one of the wrong shape.
    """
    names, shapes = tensor_names(config), llama.param_shapes(config)
    tree, left = {}, set(names)
    for path in weight_files(folder):
        if not path.exists():
            raise ValueError(f"{path}: named in the weight index but not there; download the folder again")
        try:
            with safetensors.safe_open(path, framework="numpy") as f:
                for name in sorted(left.intersection(f.keys())):
                    where, layer, transposed = names[name]
                    stored = f.get_tensor(name)
                    value = stored.T if transposed else stored
                    want = shapes
                    for key in where:
                        want = want[key]
                    shape = want.shape if layer is None else want.shape[1:]
                    if value.shape != shape:
                        implied = shape[::-1] if transposed else shape
                        raise ValueError(f"{path}: {name} has shape {stored.shape}, config.json implies {implied}")
                    node = tree
                    for key in where[:-1]:
                        node = node.setdefault(key, {})
                    if layer is None:
                        node[where[-1]] = value.astype(dtype)
                    else:
                        node.setdefault(where[-1], np.empty(want.shape, dtype))[layer] = value.astype(dtype)
                    left.remove(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if left:
        some = ", ".join(sorted(left)[:5])
        raise ValueError(f"{folder}: {len(left)} tensors missing: {some}{', …' if len(left) > 5 else ''}")
    return _to_device(tree)


def _to_device(tree):
    return {k: _to_device(v) if isinstance(v, dict) else jnp.asarray(v) for k, v in tree.items()}


def _leaf(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def save_base(folder, config, params, tokenizer, dtype="bfloat16"):
    """Writes a hub folder (config.json, generation_config.json, model.safetensors, tokenizer) that transformers loads too."""
    folder = pathlib.Path(folder)
    np_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {}
    for name, (path, layer, transposed) in tensor_names(config).items():
        value = np.asarray(_leaf(params, path))
        value = value if layer is None else value[layer]
        tensors[name] = np.ascontiguousarray((value.T if transposed else value).astype(np_dtype))
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with files.replacing_folder(folder) as tmp:
        files.write_json(tmp / "config.json", hub_config(config, dtype, special))
        files.write_json(tmp / "generation_config.json", special)
        safetensors.numpy.save_file(tensors, tmp / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(tmp)


def load_tokenizer(folder):
    """The folder's tokenizer, through transformers."""
    import transformers

    if not os.path.isdir(folder):
        raise ValueError(f"base {str(folder)!r} is not a folder; give a model-hub folder with config.json, weights and tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no tokenizer could be loaded ({str(error).splitlines()[0]})") from error


def bos_id(tokenizer):
    """The id that the tokenizer itself sets in front of a text, or None."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None


def stop_ids(folder, tokenizer):
    """Ids that end a generation: generation_config.json's eos ids, and the tokenizer's."""
    path = pathlib.Path(folder) / "generation_config.json"
    eos = files.read_json(path, "the generation configuration").get("eos_token_id") if path.exists() else None
    ids = eos if isinstance(eos, list) else [eos]
    return tuple(sorted({int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}))


# ---------------------------------------------------------------------------------------------------------- fingerprint


def fingerprint(config, params):
    """Identity of a base: sha256 over the fields that change results, the final norm and 64 embedding rows in bfloat16.

    64 rows spread over the vocabulary tell one base from another (a fine-tuned one too) without reading gigabytes, and
    rounding makes float32, bfloat16 and converted copies of one base agree.
    """
    digest = hashlib.sha256()
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k != "max_position_embeddings"}
    digest.update(json.dumps(fields, sort_keys=True).encode())
    rows = np.linspace(0, config.vocab_size - 1, 64).astype(int)
    for value in (params["norm"]["scale"], params["embed"][rows]):
        digest.update(np.asarray(value, np.float32).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen base model as everything else uses it: sizes, parameters, tokenizer, stop ids, identity and where it came from."""

    config: llama.ModelConfig
    params: dict
    tokenizer: object
    stop_ids: tuple[int, ...]
    fingerprint: str
    path: str


def load_base(folder, dtype=jnp.float32):
    """Loads a hub folder completely: `Base`."""
    tokenizer = load_tokenizer(folder)
    config = read_config(folder)
    params = load_params(folder, config, dtype)
    return Base(config, params, tokenizer, stop_ids(folder, tokenizer), fingerprint(config, params), str(folder))
