"""config.json of a model-hub folder: which models this family computes, in both directions.

A field that changes the result is either computed or refused by name. What an architecture does not read (a window in a Llama's
config.json) would have no effect in transformers either, but is refused too: its author meant something by it.
"""

import dataclasses
import math
import pathlib
import typing

from icae_jax.errors import UserError
from icae_jax.interop import files
from icae_jax.models import llama, rope


class Family(typing.NamedTuple):
    """An architecture of the hub: what it always has, and what its config.json leaves out. head_dim 0: hidden_size / heads."""

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    kv_heads: int = 0
    head_dim: int = 0
    max_positions: int = 2048


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral", kv_heads=8, max_positions=131072),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, kv_heads=32, max_positions=32768),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, kv_heads=32, head_dim=128, max_positions=32768),
}

# Fields that change the result, with the values that change nothing. Any other value is refused by name.
REQUIRED_VALUES = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, 1.0, None),
    "attention_chunk_size": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (1, 1.0, None),
    "residual_multiplier": (1, 1.0, None),
    "logits_scaling": (1, 1.0, None),
    "logit_scale": (1, 1.0, None),
    "clip_qkv": (None,),
    "no_rope_layers": (None, []),
    "use_qk_norm": (False, None),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
ROPE_FIELDS = {
    "default": ("original_max_position_embeddings",),  # written by some, and without effect
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim",
    ),
}  # fmt: skip


def read_config(folder):
    """The `ModelConfig` of a hub folder. UserError where the folder's model is not one that `models.llama` computes."""
    path = pathlib.Path(folder) / "config.json"
    return parse_config(files.read_json(path, "the base model's configuration"), path)


# Those that every architecture needs, and those that it may leave out.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")


def parse_config(raw, source="config.json"):
    """The `ModelConfig` of config.json's content, in both spellings of RoPE (`rope_theta` at the top, or `rope_parameters`)."""
    try:
        return _parse_config(raw, source)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # it computes with nothing but this file
        raise UserError(f"{source}: a field has a value of another kind than it should ({error})") from error


def _parse_config(raw, source):
    architecture = (raw.get("architectures") or ["no architecture"])[0]
    if architecture not in FAMILIES:
        raise UserError(f"{source}: architecture {architecture} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[architecture]
    for field, allowed in REQUIRED_VALUES.items():
        if field == "attention_bias" and family.qkv_bias:
            continue  # some say so what this architecture always has
        if field in raw and raw[field] not in allowed:
            raise UserError(f"{source}: {field} is {raw[field]!r}, which this model does not compute; only {allowed[0]!r} is supported")
    if "AutoModelForCausalLM" in (raw.get("auto_map") or {}):
        raise UserError(f"{source}: auto_map names code of the repository's own, not run here; remove it if that is {architecture} too")
    if "quantization_config" in raw:
        raise UserError(f"{source}: quantization_config is set; use the unquantised checkpoint")
    sizes = (*_SIZES, *(name for name in _OPTIONAL_SIZES if raw.get(name) is not None))
    files.check_fields(raw, dict.fromkeys(sizes, int), source)
    for name in sizes:
        if raw[name] < (name in _SIZES):
            raise UserError(f"{source}: {name} is {raw[name]}; it must be positive")

    heads = raw["num_attention_heads"]
    positions = raw.get("max_position_embeddings", family.max_positions)
    rope_theta, rope_scaling = _rope(raw, positions, source)
    return llama.ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads", family.kv_heads) or heads,
        head_dim=raw.get("head_dim", family.head_dim) or raw["hidden_size"] // heads,
        max_position_embeddings=positions,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        windows=_windows(raw, family, source),
    )


def _windows(raw, family, source):
    """`ModelConfig.windows`, by the rules of the architecture's configuration in transformers, with its defaults."""
    layers, types = raw["num_hidden_layers"], raw.get("layer_types")
    width = raw.get("sliding_window", None if family.model_type == "llama" else 4096)
    if family.model_type == "llama" and width is not None:
        raise UserError(f"{source}: sliding_window is {width}, which this architecture does not compute; only null is supported")
    if family.model_type.startswith("qwen") and not raw.get("use_sliding_window", False):
        width = None
    sliding = [width is not None and (family.model_type == "mistral" or i >= raw.get("max_window_layers", 28)) for i in range(layers)]
    if types is not None:
        meant = [t == "sliding_attention" for t in types]
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        of_its_own = family.model_type.startswith("qwen") and (width is not None or not any(meant))
        if unknown or len(types) != layers or (meant != sliding and not of_its_own):
            raise UserError(f"{source}: layer_types is {types}, which {family.model_type} with sliding_window {width} does not compute")
        sliding = meant
    return tuple(width if s else 0 for s in sliding) if any(sliding) else ()


def _rope(raw, positions, source):
    """(theta, scaling or None) of either spelling."""
    spellings = [dict(raw[field]) for field in ("rope_parameters", "rope_scaling") if raw.get(field)]
    if len(spellings) == 2 and spellings[0] != spellings[1]:  # transformers would take the second, and lose the theta of the first
        raise UserError(f"{source}: rope_parameters and rope_scaling are both set, to different values; keep the one that is meant")
    fields = spellings[0] if spellings else {}
    theta = float(fields.pop("rope_theta", None) or raw.get("rope_theta", 10000.0))
    kind = fields.pop("rope_type", fields.pop("type", "default"))
    fields.pop("type", None)
    if kind not in ROPE_FIELDS:
        raise UserError(f"{source}: RoPE type {kind!r} is not supported; supported: {', '.join(ROPE_FIELDS)}")
    if fields.pop("partial_rotary_factor", 1) not in (1, None):
        raise UserError(f"{source}: partial_rotary_factor of RoPE is not 1, which this model does not compute")
    unknown = [field for field in fields if field not in ROPE_FIELDS[kind] and fields[field] is not None]
    if unknown:
        raise UserError(f"{source}: RoPE of type {kind} has {', '.join(unknown)}, which this model does not compute")
    fields["original_max_position_embeddings"] = raw.get(
        "original_max_position_embeddings", fields.get("original_max_position_embeddings") or positions
    )
    if kind == "yarn" and fields.get("factor") is None:
        fields["factor"] = positions / fields["original_max_position_embeddings"]
    needed = {"linear": ("factor",), "llama3": ROPE_FIELDS["llama3"]}.get(kind, ())
    absent = [field for field in needed if fields.get(field) is None]
    if absent:
        raise UserError(f"{source}: RoPE of type {kind} lacks {', '.join(absent)}")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, rope.LinearScaling(float(fields["factor"]))
    original = int(fields["original_max_position_embeddings"])
    if kind == "llama3":
        low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
        return theta, rope.Llama3Scaling(float(fields["factor"]), low, high, original)
    factor = float(fields["factor"])
    magnitude = fields.get("attention_factor")
    if magnitude is None:  # arXiv 2309.00071, eq. 22; mscale and mscale_all_dim are DeepSeek's refinement
        both = fields.get("mscale") and fields.get("mscale_all_dim")
        scales = (fields["mscale"], fields["mscale_all_dim"]) if both else (1.0, 0.0)
        above, below = (1.0 + (0.1 * m * math.log(factor) if factor > 1 else 0.0) for m in scales)
        magnitude = above / below
    fast, slow = float(fields.get("beta_fast") or 32), float(fields.get("beta_slow") or 1)
    return theta, rope.YarnScaling(factor, original, float(magnitude), fast, slow, bool(fields.get("truncate", True)))


def hub_config(config, dtype, special_ids):
    """config.json's content for a `ModelConfig`, as the plainest architecture that computes it.

    special_ids: `{"bos_token_id": …, "eos_token_id": …}`. UserError where no architecture does.
    """
    widths = set(config.windows) - {0}
    everywhere = len(set(config.windows)) <= 1
    fitting = [
        name
        for name, f in FAMILIES.items()
        if (f.qkv_bias, f.qk_norm) == (config.qkv_bias, config.qk_norm)
        and (not widths or (f.model_type == "mistral" and everywhere) or (f.model_type.startswith("qwen") and len(widths) == 1))
        and not (f.model_type == "mistral" and not widths)
    ]
    if not fitting:
        raise UserError(f"no architecture of the hub has qkv_bias {config.qkv_bias}, qk_norm {config.qk_norm}, windows {config.windows}")
    family = FAMILIES[fitting[0]]
    parameters = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        kind = {rope.LinearScaling: "linear", rope.Llama3Scaling: "llama3", rope.YarnScaling: "yarn"}
        parameters |= {"rope_type": kind[type(config.rope_scaling)], **dataclasses.asdict(config.rope_scaling)}
    windows = {}
    if family.model_type == "mistral":
        windows = {"sliding_window": widths.pop()}
    elif widths:
        types = ["sliding_attention" if w else "full_attention" for w in config.windows]
        windows = {"use_sliding_window": True, "sliding_window": widths.pop(), "layer_types": types, "max_window_layers": 0}
    biases = {"attention_bias": False, "mlp_bias": False} if family.model_type == "llama" else {}
    return {
        "architectures": [fitting[0]],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": parameters,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        **biases,
        **windows,
        "dtype": dtype,
        **special_ids,
    }
