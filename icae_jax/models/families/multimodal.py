"""The text part of a multimodal checkpoint: its config.json, and the names of its tensors."""

import re

from icae_jax import errors
from icae_jax.errors import UserError
from icae_jax.models.families.architectures import FAMILIES

# By architecture: its model_type, and that of a text part that states none.
_MULTIMODAL = {
    "Gemma3ForConditionalGeneration": ("gemma3", "gemma3_text"),
    "Mistral3ForConditionalGeneration": ("mistral3", "mistral"),
    "LlavaForConditionalGeneration": ("llava", "llama"),
}
# Where the text part leaves them out, the whole says them.
_SHARED = re.compile(
    r"dtype|torch_dtype|\w+_token_id|tie_word_embeddings|quantization_config|quantization"
    r"|quantize|quant_config|compression_config|transformers_version"
)
# As transformers 5 and as its earlier versions save them.
_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


def text_part(raw: dict, source: object = "config.json") -> dict:
    """The config.json of the text part, as of a model of its own; that of a text model as it is.

    Args:
        raw: the content of config.json.
        source: the file, for messages.

    Raises:
        UserError: there is no text part, or it is of no supported family.
    """
    names = raw.get("architectures") or []
    first = names[0] if isinstance(names, list) and names else None
    if first is None:
        kinds = {kind: name for name, (kind, _) in _MULTIMODAL.items()}
        model_type = raw.get("model_type")
        first = kinds.get(model_type) if isinstance(model_type, str) else None
    if first not in tuple(_MULTIMODAL):
        return raw
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise UserError(
            f"{source}: text_config of {first} is {errors.shown(text)}, which is not the "
            "configuration of a language model"
        )
    kind = text.get("model_type") or _MULTIMODAL[first][1]
    name = next((name for name, family in FAMILIES.items() if family.model_type == kind), None)
    if name is None:
        known = ", ".join(family.model_type for family in FAMILIES.values())
        raise UserError(
            f"{source}: the text part of {first} is of model_type {errors.shown(kind)}, which is "
            f"not supported; supported: {known}"
        )
    errors.say(f"{source}: of {first} the text part is read, as {name}; the rest is not")
    shared = {field: value for field, value in raw.items() if _SHARED.fullmatch(field)}
    stated = {field: value for field, value in text.items() if value is not None}
    nulls = {field: None for field in text if field not in shared and field not in stated}
    return shared | nulls | stated | {"architectures": [name], "model_type": kind}


def text_name(name: str) -> str:
    """The name that a tensor of a multimodal checkpoint's text part has in a text model.

    Other names as they are.
    """
    for prefix, plain in _PREFIXES:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name
