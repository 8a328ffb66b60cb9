"""config.json of a model-hub folder: which models this family computes, in both directions."""

import dataclasses
import pathlib

from icae_jax.interop import files
from icae_jax.models import llama

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
