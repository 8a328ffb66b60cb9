"""config.json of a model-hub folder <-> `ModelConfig`.

Each field is either computed, or known to change nothing (`config_fields`), or refused by name. An
unknown field's effect is unknown, and its author meant something by it, even where transformers'
class for the architecture does not read it.
"""

import os
import pathlib

import numpy as np

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.models import llama, rope
from icae_jax.models.families import config_fields, config_rope
from icae_jax.models.families.architectures import FAMILIES, Family, architecture
from icae_jax.models.families.config_values import MOST_POSITIONS, flag, number

# Sizes, required and optional, with the largest value that is accepted: beyond any real model, but
# small enough that the elements of arrays can be counted.
_SIZES = {
    "vocab_size": 2**26,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
}
_OPTIONAL_SIZES = {
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": MOST_POSITIONS,
}
_READ = {
    *_SIZES,
    *_OPTIONAL_SIZES,
    "architectures",
    "model_type",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
}
# Entries of auto_map whose code does not compute the logits.
_OTHER_CODE = {
    "AutoConfig",
    "AutoTokenizer",
    "AutoProcessor",
    "AutoImageProcessor",
    "AutoFeatureExtractor",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
}
_QUANTISED = {
    "quantization_config",
    "quantization",
    "quantize",
    "quant_config",
    "compression_config",
}
# Defaults of transformers, where config.json omits the field.
_WINDOW = 4096
_MAX_WINDOW_LAYERS = 28


def read_config(folder: str | os.PathLike) -> llama.ModelConfig:
    """The `ModelConfig` of a hub folder. UserError if `models.llama` does not compute its model."""
    path = pathlib.Path(folder) / "config.json"
    return parse_config(files.read_json(path, "the base model's configuration"), path)


def parse_config(raw: dict, source: object = "config.json") -> llama.ModelConfig:
    """The `ModelConfig` of the content of config.json.

    As in transformers, null counts as missing, and a number may be written as a string.

    Args:
        raw: the content.
        source: the file, for messages.

    Raises:
        UserError: a field is malformed, or the model is not one that is computed.
    """
    try:
        return _parse_config(raw, source)
    except UserError:
        raise
    # Only the file's content is computed with, so such an error is the file's.
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{source}: a field has a value of the wrong type ({error})") from error


def stored_dtype(raw: dict, source: object = "config.json") -> object:
    """The dtype that config.json states, or None.

    Where `dtype` and the older `torch_dtype` differ, `dtype` counts, as in transformers.
    """
    new, old = raw.get("dtype"), raw.get("torch_dtype")
    if new is not None and old is not None and new != old:
        errors.say(
            f"{source}: dtype is {errors.shown(new)} and torch_dtype {errors.shown(old)}; "
            "dtype counts, as in transformers"
        )
    return old if new is None else new


def _parse_config(raw: dict, source: object) -> llama.ModelConfig:
    name = architecture(raw, source)
    family = FAMILIES[name]
    _check_fields(raw, name, family, source)
    if raw.get("dual_chunk_attention_config"):
        errors.say(
            f"{source}: dual_chunk_attention_config is not computed, as it is not in transformers: "
            "attention sees all at once"
        )

    missing = [field for field in _SIZES if raw.get(field) is None]
    if missing:
        raise UserError(f"{source}: {', '.join(missing)} missing; is the file complete?")
    sizes = {
        field: number(raw[field], field, source, whole=True, most=most)
        for field, most in (_SIZES | _OPTIONAL_SIZES).items()
        if raw.get(field) is not None
    }
    heads = sizes["num_attention_heads"]
    positions = sizes.get("max_position_embeddings", family.max_positions)
    # For transformers, null differs from a missing field here.
    kv_heads = heads if "num_key_value_heads" in raw else family.kv_heads or heads
    eps = raw.get("rms_norm_eps")
    rope_theta, rope_scaling = config_rope.read_rope(raw, positions, source)
    attention_bias = family.attention_bias and bool(flag(raw, "attention_bias", source))
    fields = dict(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=sizes.get("num_key_value_heads", kv_heads),
        head_dim=sizes.get("head_dim", family.head_dim or sizes["hidden_size"] // heads),
        max_position_embeddings=positions,
        rms_norm_eps=1e-6 if eps is None else number(eps, "rms_norm_eps", source),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=bool(flag(raw, "tie_word_embeddings", source)),
        qkv_bias=family.qkv_bias or attention_bias,
        qk_norm=family.qk_norm,
        windows=_windows(raw, family, sizes["num_hidden_layers"], source),
        o_bias=attention_bias,
        mlp_bias=family.mlp_bias and bool(flag(raw, "mlp_bias", source)),
    )
    try:
        config = llama.ModelConfig(**fields)
    except UserError as error:  # it does not know the file
        raise UserError(f"{source}: {error}") from error
    try:
        with np.errstate(all="ignore"):
            finite = np.isfinite(rope.frequencies(config)).all()
    except ArithmeticError:
        finite = False
    if not finite:
        raise UserError(
            f"{source}: rope_theta {rope_theta:g} with {errors.shown(rope_scaling)} gives "
            "frequencies of RoPE that are not finite"
        )
    return config


def _check_fields(raw: dict, name: str, family: Family, source: object) -> None:
    """UserError on the first field that is neither read nor known to change nothing."""
    own_code = raw.get("auto_map")
    if isinstance(own_code, dict):
        if not {part for part, code in own_code.items() if code} <= _OTHER_CODE:
            raise UserError(
                f"{source}: auto_map names the repository's own code, which is not run here; "
                f"remove it if the model is {name} all the same"
            )
        own_code = None
    # Some files state what their architecture always has.
    always = dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm"), (family.qk_norm,))
    always |= dict.fromkeys(("qkv_bias", "use_qkv_bias", "add_qkv_bias"), (family.qkv_bias,))
    read = _READ | {field for field in ("attention_bias", "mlp_bias") if getattr(family, field)}
    read |= {"attention_bias"} if family.qkv_bias else set()
    neutral = config_fields.NEUTRAL | always
    for field, value in (raw | {"auto_map": own_code}).items():
        if field in read or config_fields.is_neutral(field, value, neutral):
            continue
        if field == config_fields.QUANTIZATION and _is_ours(value):
            continue
        if field in _QUANTISED:
            raise UserError(f"{source}: {field} is set; use the unquantised checkpoint")
        if field in neutral:
            only = next((same for same in neutral[field] if same not in ([], {})), None)
            raise UserError(
                f"{source}: {field} is {errors.shown(value)}, which this model does not compute; "
                f"only {only!r} is supported"
            )
        raise UserError(
            f"{source}: {errors.field(field)} is {errors.shown(value)}, an unknown field that may "
            "change what the model computes; if it does not, remove it from config.json"
        )


def _is_ours(value: object) -> bool:
    """Whether weights were quantised by this package."""
    return isinstance(value, dict) and value.get("quant_method") == config_fields.QUANTIZED_HERE


def _windows(raw: dict, family: Family, layers: int, source: object) -> tuple[int, ...]:
    """`ModelConfig.windows`, by the rules and defaults of transformers."""
    types, use = raw.get("layer_types"), flag(raw, "use_sliding_window", source)
    width = raw.get("sliding_window", _WINDOW if family.windows else None)
    first = raw.get("max_window_layers")
    by_layer = family.windows == "some layers"
    if by_layer and not use:
        width = None
    elif not family.windows and width is not None:
        if use is not False:
            raise UserError(
                f"{source}: sliding_window is {width}, which this architecture does not compute; "
                "only null is supported"
            )
        width = None
    elif width is not None and not by_layer and (use is False or first):
        field = "use_sliding_window" if use is False else "max_window_layers"
        raise UserError(
            f"{source}: {field} is {errors.shown(raw[field])}, which this architecture does not "
            f"read, and sliding_window {errors.shown(width)}; set sliding_window to null where no "
            f"layer has a window, or remove {field}"
        )
    if width is not None:
        limits = {"whole": True, "most": MOST_POSITIONS}
        width = number(width, "sliding_window", source, **limits)
        if first is None:
            first = _MAX_WINDOW_LAYERS
        else:
            first = number(first, "max_window_layers", source, zero=True, **limits)
    sliding = [width is not None and (not by_layer or i >= first) for i in range(layers)]
    if types is not None:
        if not isinstance(types, list):
            raise UserError(f"{source}: layer_types is {errors.shown(types)}, which is not a list")
        stated = [t == "sliding_attention" for t in types]
        unknown = [t for t in types if t not in ("full_attention", "sliding_attention")]
        may_differ = by_layer and (width is not None or not any(stated))
        if unknown or len(types) != layers or (stated != sliding and not may_differ):
            raise UserError(
                f"{source}: layer_types is {errors.shown(types)}, which {family.model_type} with "
                f"sliding_window {width} does not compute"
            )
        sliding = stated
    return tuple(width if s else 0 for s in sliding) if any(sliding) else ()


# ------------------------------------------------------------------------------------- writing


def hub_config(config: llama.ModelConfig, dtype: str, special_ids: dict) -> dict[str, object]:
    """The content of config.json for a model, as the plainest architecture that computes it.

    Args:
        config: the model.
        dtype: of the stored weights.
        special_ids: `{"bos_token_id": …, "eos_token_id": …}`.

    Raises:
        UserError: no architecture computes the model.
    """
    name = next((name for name, f in FAMILIES.items() if _computes(f, config)), None)
    if name is None:
        biased = ", ".join(config.biased) or "no projection"
        raise UserError(
            f"no architecture of the hub has biases of {biased}, qk_norm {config.qk_norm} and "
            f"windows {config.windows}"
        )
    family = FAMILIES[name]
    windows = {}
    if config.windows and family.windows == "all layers":
        windows = {"sliding_window": config.windows[0]}
    elif any(config.windows):
        windows = {
            "use_sliding_window": True,
            "sliding_window": max(config.windows),
            "layer_types": ["sliding_attention" if w else "full_attention" for w in config.windows],
            "max_window_layers": 0,
        }
    biases = {"mlp_bias": config.mlp_bias} if family.mlp_bias else {}
    if family.attention_bias and (family.mlp_bias or config.o_bias):
        biases = {"attention_bias": config.o_bias, **biases}
    return {
        "architectures": [name],
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
        "rope_parameters": config_rope.rope_parameters(config),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        **biases,
        **windows,
        "dtype": dtype,
        **special_ids,
    }


def _computes(family: Family, config: llama.ModelConfig) -> bool:
    """Whether an architecture can have exactly these norms, biases and windows."""
    biases = (config.qkv_bias, config.o_bias)
    widths = set(config.windows) - {0}
    match family.windows:
        case "":
            windows = not widths
        case "all layers":  # without a window, the same model is written as a Llama
            windows = bool(widths) and len(set(config.windows)) == 1
        case _:
            windows = len(widths) <= 1
    return (
        family.qk_norm == config.qk_norm
        and (
            biases == (family.qkv_bias, False) or (family.attention_bias and biases == (True, True))
        )
        and (family.mlp_bias or not config.mlp_bias)
        and windows
    )
