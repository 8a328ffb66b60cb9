"""The metadata of a GGUF file -> the content of a config.json.

Families are known in `models.families` alone: here the metadata are only spelt as transformers'
configuration classes spell them. Every key of the architecture is read, known to change nothing, or
refused by name.
"""

import math
from typing import Any

import numpy as np

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub import gguf_tensors
from icae_jax.interop.hub.gguf_file import GGUF

# By general.architecture.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
_REQUIRED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_READ = {
    *_REQUIRED,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
# Harmless at any value, or at these.
_HARMLESS = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
_NEUTRAL = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
}
# Gemma's layers see a window but for each n-th; llama.cpp knows n by the architecture too.
_WINDOW_PATTERN = {"gemma2": 2, "gemma3": 6}
_LOCAL_THETA = 10000.0  # of Gemma 3's layers with a window
# The models of 27B parameters scale queries by another width than a head's, which no key tells.
_WIDE_QUERIES = {("gemma2", 46), ("gemma3", 62)}
_QUANTISED = "float32"  # what dequantised numbers need
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FACTORS_BOUND = 1e-5  # relative
MOST_LAYERS = 10_000


class _Values:
    """The values of one architecture's keys."""

    def __init__(self, file: GGUF, architecture: str):
        self.file, self.architecture = file, architecture

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value. Of a list with one for each layer the one that all share; UserError if none."""
        name = f"{self.architecture}.{key}"
        value = self.file.metadata.get(name)
        if not isinstance(value, np.ndarray):
            return self.file.get(name, kind, default)
        if not value.size or (value != value[0]).any():
            raise UserError(
                f"{self.file.path}: {name} differs from layer to layer "
                f"({errors.shown(value.tolist())}), which is not computed here"
            )
        return kind(value[0])


def architecture(file: GGUF) -> str:
    """The architecture's name in GGUF. UserError if it is absent or not supported."""
    path, name, kind = (
        file.path,
        file.get("general.architecture", str),
        file.get("general.type", str),
    )
    if kind not in (None, "model"):
        raise UserError(f"{path}: it holds a {kind} (general.type) and not a model")
    supported = f"supported: {', '.join(ARCHITECTURES)}"
    if name not in ARCHITECTURES:
        what = "no general.architecture" if name is None else f"architecture {errors.shown(name)}"
        remedy = f"which is not supported in GGUF files; {supported}"
        raise UserError(f"{path}: {what}, {remedy if name else supported}")
    return name


def config_json(file: GGUF) -> dict[str, Any]:
    """The content of config.json for a file's model.

    Its dtype is the one of the embedding table, or float32 where that is quantised: a dequantised
    number is a product that fewer bits do not hold.

    Raises:
        UserError: a key is missing, malformed or not computed.
    """
    name, path = architecture(file), file.path
    values = _Values(file, name)
    _check_keys(file, name)
    raw: dict[str, Any] = {"architectures": [ARCHITECTURES[name][0]]}
    raw |= {"model_type": ARCHITECTURES[name][1]}
    for key, field in _REQUIRED.items():
        raw[field] = values.get(key, float if field == "rms_norm_eps" else int)
        if raw[field] is None:
            raise UserError(f"{path}: {name}.{key} is missing; is the file complete?")
    heads = raw["num_attention_heads"]
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise UserError(f"{path}: the embedding table, token_embd.weight, is missing")
    raw["vocab_size"] = table.shape[0]
    raw["num_key_value_heads"] = values.get("attention.head_count_kv", int, heads)
    head_dim = values.get("attention.key_length", int, raw["hidden_size"] // max(1, heads))
    raw["head_dim"] = head_dim
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, int, head_dim) != head_dim:
            raise UserError(
                f"{path}: {name}.{key} is {values.get(key, int)}, which is not the width of a "
                f"head, {head_dim}; that is not computed here"
            )
    # The shortest decimal: the file has 1e-5 as the float32 that is nearest to it.
    raw["rms_norm_eps"] = float(str(np.float32(raw["rms_norm_eps"])))
    raw["tie_word_embeddings"] = "output.weight" not in file.tensors
    raw["rope_theta"] = values.get("rope.freq_base", float, 10000.0)
    raw["hidden_act"] = "silu"
    window = values.get("attention.sliding_window", int, 0)
    if name in _WINDOW_PATTERN:
        raw |= _gemma(values, raw, window)
    elif name == "llama":
        raw |= {
            field: f"blk.0.{tensor}.bias" in file.tensors
            for field, tensor in (("attention_bias", "attn_output"), ("mlp_bias", "ffn_up"))
        }
        if window:
            raw |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
            raw["sliding_window"] = window
            for field in ("attention_bias", "mlp_bias"):
                raw.pop(field)
    elif window:
        raise UserError(
            f"{path}: {name}.attention.sliding_window is {window}, but not which layers have it"
        )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if values.get(key, float):
            raw[key] = values.get(key, float)
    scaling = _rope_scaling(values, raw)
    raw |= {"rope_scaling": scaling} if scaling else {}
    return raw | {"dtype": _DTYPES.get(table.kind, _QUANTISED)}


def _check_keys(file, name):
    """UserError on the first key of the architecture that may change what the model computes."""
    for key, value in file.metadata.items():
        own = key.removeprefix(f"{name}.")
        if own == key or own in _READ | _HARMLESS:
            continue
        if isinstance(value, np.ndarray) or value not in _NEUTRAL.get(own, ()):
            raise UserError(
                f"{file.path}: {errors.field(key)} is {errors.shown(value)}, which may change what "
                "the model computes and is not computed here"
            )


def _gemma(values, raw, window):
    """The fields that only Gemma's configurations have."""
    name, layers = values.architecture, raw["num_hidden_layers"]
    wide = (name, layers) in _WIDE_QUERIES
    width = raw["hidden_size"] // raw["num_attention_heads"] if wide else raw["head_dim"]
    fields = {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width,
        # The published models' caps, which files of early converters do not state.
        "attn_logit_softcapping": 50.0 if name == "gemma2" else None,
        "final_logit_softcapping": 30.0 if name == "gemma2" else None,
    }
    if not window:
        raise UserError(
            f"{values.file.path}: {name}.attention.sliding_window is missing; is the file complete?"
        )
    fields["sliding_window"] = window
    fields["layer_types"] = [
        "sliding_attention" if slides else "full_attention" for slides in _slides(values, layers)
    ]
    if name == "gemma3":
        fields["rope_local_base_freq"] = values.get("rope.freq_base_swa", float, _LOCAL_THETA)
    return fields


def _slides(values, layers):
    """Of each layer whether it sees a window only."""
    name, path = values.architecture, values.file.path
    key = f"{name}.attention.sliding_window_pattern"
    stated = values.file.metadata.get(key, _WINDOW_PATTERN[name])
    if isinstance(stated, np.ndarray) and stated.dtype == bool and len(stated) == layers:
        return stated.tolist()
    if not files.is_kind(stated, int) or stated < 1 or layers > MOST_LAYERS:
        raise UserError(f"{path}: {key} is {errors.shown(stated)}, of {layers} layers")
    return [(i + 1) % stated != 0 for i in range(layers)]


# ---------------------------------------------------------------------------------------- RoPE


def _rope_scaling(values, raw):
    """The content of `rope_scaling`, or None."""
    path, name = values.file.path, values.architecture
    factors = values.file.tensors.get(gguf_tensors.FACTORS)
    older = values.get("rope.scale_linear", float)
    factor = values.get("rope.scaling.factor", float, 1.0 if older is None else older)
    # As in llama.cpp, a factor alone is linear.
    kind = values.get("rope.scaling.type", str, "none" if factor == 1 else "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UserError(
            f"{path}: {name}.rope.scaling.type is {errors.shown(kind)}, which is not computed "
            "here; none, linear and yarn are"
        )
    if factors is not None:
        if kind != "none" and factor != 1:
            raise UserError(f"{path}: RoPE is scaled by {kind} and by {gguf_tensors.FACTORS} too")
        return _llama3(factors, raw, path)
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    scaling = {"rope_type": "yarn", "factor": factor}
    for key, field, type_ in (
        ("original_context_length", "original_max_position_embeddings", int),
        ("yarn_beta_fast", "beta_fast", float),
        ("yarn_beta_slow", "beta_slow", float),
    ):
        value = values.get(f"rope.scaling.{key}", type_)
        scaling |= {} if value is None else {field: value}
    attention = values.get("rope.scaling.attn_factor", float)
    if attention is not None and attention != 1:  # llama.cpp multiplies yarn's own factor by it
        scaling["attention_factor"] = attention * (1.0 + 0.1 * math.log(max(factor, 1.0)))
    return scaling


def _llama3(tensor, raw, path):
    """The fields of Llama 3.1's RoPE, by which each frequency is divided by a factor of its own.

    Only the factors are stored: 1 for short wavelengths, `factor` for long ones, and between them
    1 / ((1 - s) / factor + s), where s is linear in 1 / wavelength; its two ends are found from
    those between. The fields are taken only if they give the stored factors back.
    """
    refusal = UserError(
        f"{path}: {gguf_tensors.FACTORS} holds factors of RoPE that are not those of Llama 3.1's "
        "scaling, and no others are computed here"
    )
    half = raw["head_dim"] // 2
    if tensor.shape != (half,) or half < 2:
        raise refusal
    stored = gguf_tensors.read_whole(tensor).astype(np.float64)
    factor = float(stored.max())
    if not (np.isfinite(stored).all() and stored.min() >= 1 and factor > 1):
        raise refusal
    with np.errstate(all="ignore"):
        inverse = raw["rope_theta"] ** (-np.arange(half) / half) / (2 * math.pi)
        share = (1 / stored - 1 / factor) / (1 - 1 / factor)
        between = (share > 1e-4) & (share < 1 - 1e-4)
        if between.sum() < 2:
            raise refusal
        slope, offset = np.polyfit(inverse[between], share[between], 1)
        low, high = -offset / slope, (1 - offset) / slope  # where s is 0 and 1
        if not (0 < low < high and np.isfinite(high)):
            raise refusal
        # Only low and high over the original length matter, so low is 1, as Llama's is.
        original = max(1, round(1 / low))
        scaling = {
            "rope_type": "llama3",
            "factor": round(factor, 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": round(float(high * original), 3),
            "original_max_position_embeddings": original,
        }
        ends = 1 / original, scaling["high_freq_factor"] / original
        share = np.clip((inverse - ends[0]) / (ends[1] - ends[0]), 0, 1)
        again = 1 / ((1 - share) / scaling["factor"] + share)
    if not (np.abs(again - stored) <= _FACTORS_BOUND * stored).all():
        raise refusal
    return scaling
