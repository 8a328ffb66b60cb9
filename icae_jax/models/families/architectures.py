"""The supported architectures of the model hub, one row each."""

from typing import Literal, NamedTuple

from icae_jax import errors
from icae_jax.errors import UserError


class Family(NamedTuple):
    """What an architecture always has, what config.json may switch on, and its defaults.

    The defaults are those of the architecture's configuration class in transformers, for fields
    that config.json omits.
    """

    model_type: str
    qkv_bias: bool = False  # always, as in `ModelConfig`
    qk_norm: bool = False  # always, as in `ModelConfig`
    attention_bias: bool = False  # whether this field of config.json gives q, k, v, o biases
    mlp_bias: bool = False  # whether this field of config.json gives the MLP biases
    # How `sliding_window` applies: not at all, to all layers, or to the layers that
    # use_sliding_window, max_window_layers and layer_types select.
    windows: Literal["", "all layers", "some layers"] = ""
    kv_heads: int = 0  # default; 0: as many as query heads
    head_dim: int = 0  # default; 0: hidden_size / heads
    max_positions: int = 2048  # default


FAMILIES = {
    "LlamaForCausalLM": Family("llama", attention_bias=True, mlp_bias=True),
    "MistralForCausalLM": Family("mistral", windows="all layers", kv_heads=8, max_positions=131072),
    "Qwen2ForCausalLM": Family(
        "qwen2", qkv_bias=True, windows="some layers", kv_heads=32, max_positions=32768
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        qk_norm=True,
        attention_bias=True,
        windows="some layers",
        kv_heads=32,
        head_dim=128,
        max_positions=32768,
    ),
}


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
