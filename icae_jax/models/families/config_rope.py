"""Rotary positions in config.json: `rope_theta` with `rope_scaling`, or `rope_parameters`."""

import dataclasses
import math

from icae_jax import errors
from icae_jax.errors import UserError
from icae_jax.models import llama, rope
from icae_jax.models.families import config_fields
from icae_jax.models.families.config_values import MOST_POSITIONS, flag, number

# The fields that each RoPE type reads.
FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "mscale",
        "mscale_all_dim",
    ),
}
_REQUIRED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
_TYPES = {rope.LinearScaling: "linear", rope.Llama3Scaling: "llama3", rope.YarnScaling: "yarn"}


def read_rope(raw: dict, positions: int, source: object) -> tuple[float, rope.Scaling | None]:
    """(theta, scaling) from either spelling, or from both where they mean the same.

    Args:
        raw: the content of config.json.
        positions: its max_position_embeddings.
        source: the file, for messages.

    Raises:
        UserError: a field is missing, malformed, contradictory or not computed.
    """
    spellings = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)}
    for name, fields in spellings.items():
        if not isinstance(fields, dict):
            raise UserError(f"{source}: {name} is {errors.shown(fields)}, which is not an object")
    meanings = {
        _read_spelling(fields, raw, positions, source)
        for fields in list(spellings.values()) or [{}]
    }
    if len(meanings) == 2:  # transformers would take rope_scaling, and lose the other's theta
        raise UserError(
            f"{source}: rope_parameters and rope_scaling are both set, to different values; "
            "keep the one that is meant"
        )
    return meanings.pop()


def rope_parameters(config: llama.ModelConfig) -> dict[str, object]:
    """The content of `rope_parameters` for a model."""
    if config.rope_scaling is None:
        return {"rope_theta": config.rope_theta, "rope_type": "default"}
    return {
        "rope_theta": config.rope_theta,
        "rope_type": _TYPES[type(config.rope_scaling)],
        **dataclasses.asdict(config.rope_scaling),
    }


def _read_spelling(fields, raw, positions, source):
    """(theta, scaling) from the fields of one spelling."""
    # As in transformers, null is false, while a missing field is true.
    truncate = flag(fields, "truncate", source) if "truncate" in fields else True
    fields = {field: value for field, value in fields.items() if value is not None}
    theta = _theta(fields, raw, source)
    kind = _kind(fields, source)
    _check_fields(fields, kind, source)
    if raw.get("original_max_position_embeddings") is not None:
        fields["original_max_position_embeddings"] = raw["original_max_position_embeddings"]

    def read(field, default=None, **limits):
        if field not in fields:
            return default
        return number(fields[field], f"{field} of RoPE", source, **limits)

    original = read("original_max_position_embeddings", positions, whole=True, most=MOST_POSITIONS)
    missing = [field for field in _REQUIRED.get(kind, ()) if field not in fields]
    if missing:
        raise UserError(f"{source}: RoPE of type {kind} lacks {', '.join(missing)}")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, rope.LinearScaling(read("factor"))
    if kind == "llama3":
        low, high = read("low_freq_factor"), read("high_freq_factor")
        if low >= high:
            raise UserError(
                f"{source}: low_freq_factor of RoPE is {low:g}, "
                f"which is not below high_freq_factor, {high:g}"
            )
        return theta, rope.Llama3Scaling(read("factor"), low, high, original)
    factor, magnitude = read("factor", positions / original), read("attention_factor")
    if magnitude is None:
        # arXiv 2309.00071, eq. 22; mscale and mscale_all_dim are DeepSeek's refinement.
        mscale, all_dim = read("mscale", 0, zero=True), read("mscale_all_dim", 0, zero=True)
        scales = (mscale, all_dim) if mscale and all_dim else (1.0, 0.0)
        above, below = (1.0 + (0.1 * m * math.log(factor) if factor > 1 else 0.0) for m in scales)
        magnitude = above / below
    fast, slow = read("beta_fast", 0, zero=True) or 32.0, read("beta_slow", 0, zero=True) or 1.0
    return theta, rope.YarnScaling(factor, original, magnitude, fast, slow, bool(truncate))


def _theta(fields, raw, source):
    """rope_theta from beside the RoPE type, else from the top level, else the default."""
    inner, outer = (
        number(place["rope_theta"], "rope_theta", source)
        if place.get("rope_theta") is not None
        else None
        for place in (fields, raw)
    )
    theta = next((value for value in (inner, outer) if value is not None), 10000.0)
    if outer not in (None, theta):
        errors.say(
            f"{source}: rope_theta is {outer:g}, and {theta:g} beside the type of RoPE; "
            "the latter counts, as in transformers"
        )
    return theta


def _kind(fields, source):
    """The RoPE type."""
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in tuple(FIELDS):  # a tuple, since the value may be unhashable
        raise UserError(
            f"{source}: RoPE type {errors.shown(kind)} is not supported; "
            f"supported: {', '.join(FIELDS)}"
        )
    if fields.get("type", kind) != kind:
        errors.say(
            f"{source}: RoPE has rope_type {kind} and type {errors.shown(fields['type'])}; "
            "rope_type counts, as in transformers"
        )
    return kind


def _check_fields(fields, kind, source):
    """UserError on a field that this RoPE type does not read and that may change something."""
    for field, value in fields.items():
        if field in ("rope_theta", "rope_type", "type", *FIELDS[kind]):
            continue
        if field == "attn_factor" and kind == "yarn" and value != 1:
            errors.say(
                f"{source}: attn_factor of RoPE ({errors.shown(value)}) is not read, "
                "as it is not by transformers; attention_factor is"
            )
        elif not config_fields.is_neutral_rope(field, value):
            if field in config_fields.ROPE_NEUTRAL:
                raise UserError(
                    f"{source}: {field} of RoPE is {errors.shown(value)}, "
                    "which this model does not compute; only 1 is supported"
                )
            raise UserError(
                f"{source}: RoPE of type {kind} has {field}, which this model does not compute; "
                "where it changes nothing, remove it"
            )
