"""The supported architectures of the model hub, one row each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from icae_jax import errors
from icae_jax.errors import UserError
from icae_jax.models import llama

NOTHING: Mapping[str, Any] = MappingProxyType({})

# Numbers of config.json that some families read, and the fields of `ModelConfig` that they give.
NUMBERS = {
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "attention_multiplier": "attention_scale",
    "query_pre_attn_scalar": "attention_scale",  # scores are divided by its root
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "final_softcap",
    "logits_scaling": "logits_divisor",
}


class Family(NamedTuple):
    """What an architecture always has, what config.json may switch on, and its defaults."""

    model_type: str
    # What it always computes: fields of `ModelConfig`, where they are not the default.
    always: Mapping[str, Any] = NOTHING
    # Of config.json, where it omits a field: those of the configuration class in transformers.
    defaults: Mapping[str, Any] = NOTHING
    attention_bias: bool = False  # whether this field of config.json gives q, k, v, o biases
    mlp_bias: bool = False  # whether this field of config.json gives the MLP biases
    # How `sliding_window` applies: not at all, to all layers, to the layers that
    # use_sliding_window, max_window_layers and layer_types select, or to those that layer_types
    # does, where it says nothing to all but every n-th.
    windows: Literal["", "all layers", "some layers", "all but every n-th"] = ""
    windows_every: int = 0  # that n; 0: config.json's sliding_window_pattern, or 6
    numbers: tuple[str, ...] = ()  # which of `NUMBERS` it reads
    scaled_embeddings: bool = False  # embeddings are multiplied by the root of hidden_size
    # Whether given input embeddings are multiplied too, as looked-up ones are.
    multiplies_inputs: bool = False
    local_rope: bool = False  # layers with windows have a RoPE of their own
    no_rope_layers: bool = False  # whether this field of config.json switches RoPE off
    ropes: tuple[str, ...] = ()  # types of RoPE that it has; () for all
    partial_rotary: bool = False  # whether RoPE may rotate a part of each head
    # The model's code in its makers' repositories, which transformers has taken over.
    hub_code: str = ""


_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
_GEMMA = {"norms": "both", "norm_plus_one": True, "activation": "gelu_tanh"}
_GEMMA_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

# The plainest first: a model is written as the first that computes it.
FAMILIES = {
    "LlamaForCausalLM": Family("llama", attention_bias=True, mlp_bias=True),
    "MistralForCausalLM": Family(
        "mistral",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        windows="all layers",
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        always={"qkv_bias": True},
        defaults=_QWEN_DEFAULTS,
        windows="some layers",
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        always={"qk_norm": True},
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
        attention_bias=True,
        windows="some layers",
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        always={"norms": "after", "qk_projection_norm": True},
        defaults={"rms_norm_eps": 1e-5},
        attention_bias=True,
    ),
    "GraniteForCausalLM": Family(
        "granite",
        defaults={"attention_multiplier": 1.0},
        attention_bias=True,
        mlp_bias=True,
        numbers=(
            "embedding_multiplier",
            "residual_multiplier",
            "attention_multiplier",
            "logits_scaling",
        ),
        multiplies_inputs=True,
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        attention_bias=True,
        mlp_bias=True,
        no_rope_layers=True,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        always=_GEMMA,
        defaults=_GEMMA_DEFAULTS
        | {
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        attention_bias=True,
        windows="all but every n-th",
        windows_every=2,
        numbers=("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        scaled_embeddings=True,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        always=_GEMMA | {"qk_norm": True},
        defaults=_GEMMA_DEFAULTS
        | {
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        attention_bias=True,
        windows="all but every n-th",
        numbers=("query_pre_attn_scalar", "final_logit_softcapping"),
        scaled_embeddings=True,
        local_rope=True,
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        always={"fused": True},
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        windows="all layers",
        ropes=("default",),
        partial_rotary=True,
        hub_code="modeling_phi3.Phi3ForCausalLM",
    ),
}


def computed_by(config: llama.ModelConfig) -> str | None:
    """The plainest architecture that computes exactly this model, None if none does."""
    return next((name for name, family in FAMILIES.items() if _computes(family, config)), None)


def input_multiplier(config: llama.ModelConfig) -> float:
    """What transformers multiplies given input embeddings by, for it does so in some families.

    Divide vectors that our first block reads as they are by it.
    """
    family = FAMILIES.get(computed_by(config) or "")
    return config.embedding_multiplier if family and family.multiplies_inputs else 1.0


# Fields of `ModelConfig` that architectures have or have not; the others are sizes.
_SWITCHES = (
    *("qk_norm", "qk_projection_norm", "norms", "norm_plus_one", "activation", "fused"),
    *dict.fromkeys(NUMBERS.values()),
)


def _computes(family: Family, config: llama.ModelConfig) -> bool:
    """Whether an architecture can have exactly these switches, numbers, biases, RoPEs, windows."""
    numbers = {NUMBERS[name] for name in family.numbers}
    for field in _SWITCHES:
        plain = family.always.get(field, llama.ModelConfig.__dataclass_fields__[field].default)
        if field == "embedding_multiplier" and family.scaled_embeddings:
            plain = config.hidden_size**0.5
        if field not in numbers and getattr(config, field) != plain:
            return False
    biases = (config.qkv_bias, config.o_bias)
    always = family.always.get("qkv_bias", False)
    if biases != (always, False) and not (family.attention_bias and biases == (True, True)):
        return False
    if config.mlp_bias and not family.mlp_bias:
        return False
    if config.rotary_dim not in (None, config.head_dim) and not family.partial_rotary:
        return False
    if family.ropes and config.rope_scaling is not None:
        return False
    kinds = config.ropes or ("global",) * config.num_layers
    if family.local_rope:
        windows = config.windows or (0,) * config.num_layers
        if kinds != tuple("local" if width else "global" for width in windows):
            return False
    elif not set(kinds) <= {"global", "none" if family.no_rope_layers else "global"}:
        return False
    widths = set(config.windows) - {0}
    match family.windows:
        case "":
            return not widths
        case "all layers":  # without a window, the same model is written as a Llama
            return len(set(config.windows)) <= 1 and bool(widths or family.always)
        case _:
            return len(widths) <= 1


def architecture(raw: dict, source: object = "config.json") -> str:
    """The architecture that config.json names first, else the one of its model_type.

    Args:
        raw: the content of config.json.
        source: the file, for messages.

    Raises:
        UserError: the architecture is missing or not supported.
    """
    names, model_type = raw.get("architectures") or [], raw.get("model_type")
    supported = f"supported: {', '.join(FAMILIES)}"
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{source}: architectures is {errors.shown(names)}, which is not a list of names"
        )
    if not names:
        names = [name for name, family in FAMILIES.items() if family.model_type == model_type]
    if not names:
        if "phase" in raw and "base" in raw:
            raise UserError(
                f"{source}: the configuration of a training run, whose folder is not a base; "
                f"its base is {errors.shown(raw['base'])}"
            )
        known = f"model_type is {errors.shown(model_type)}" if model_type else "nor a model_type"
        raise UserError(
            f"{source}: no architectures ({known}), which say what the model is; {supported}"
        )
    if names[0] not in FAMILIES:
        raise UserError(f"{source}: architecture {names[0]} is not supported; {supported}")
    if model_type not in (None, FAMILIES[names[0]].model_type):
        raise UserError(
            f"{source}: model_type is {errors.shown(model_type)}, which transformers goes by, but "
            f"the architecture is {names[0]}; write the one that is meant into both"
        )
    return names[0]
