"""Rotary positions in config.json: `rope_theta` with `rope_scaling`, or `rope_parameters`.

Where layers with windows have a RoPE of their own (Gemma 3), `rope_parameters` has one of each kind
of layer, or `rope_local_base_freq` stands beside `rope_theta`.
"""

import dataclasses
import math
from typing import Any

from icae_jax import errors
from icae_jax.errors import UserError
from icae_jax.models import llama, rope
from icae_jax.models.families import config_fields
from icae_jax.models.families.architectures import Family
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
# Of transformers, where config.json omits the field, unless a family has its own.
DEFAULTS = {"rope_theta": 10000.0, "rope_local_base_freq": 10000.0}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_TYPES = {rope.LinearScaling: "linear", rope.Llama3Scaling: "llama3", rope.YarnScaling: "yarn"}


def read_rope(
    raw: dict, family: Family, head_dim: int, positions: int, source: object
) -> dict[str, Any]:
    """The fields of `ModelConfig` on RoPE, but for which layer has which.

    Args:
        raw: the content of config.json.
        family: of its architecture.
        head_dim: its head_dim.
        positions: its max_position_embeddings.
        source: the file, for messages.

    Raises:
        UserError: a field is missing, malformed, contradictory or not computed.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if raw.get(name) and not isinstance(raw[name], dict):
            raise UserError(
                f"{source}: {name} is {errors.shown(raw[name])}, which is not an object"
            )
    result = {}
    if family.local_rope:
        raw, result["local_rope_theta"] = _split_local(raw, family, source)
    if family.partial_rotary:
        raw, factor = _split_partial(raw, source)
        rotated = int(head_dim * factor)
        result["rotary_dim"] = None if rotated == head_dim else rotated
    default = family.defaults.get("rope_theta", DEFAULTS["rope_theta"])
    theta, scaling = _read_either(raw, default, positions, source)
    if family.ropes and scaling is not None:
        raise UserError(
            f"{source}: RoPE type {_TYPES[type(scaling)]} of {family.model_type} is not "
            f"supported; supported: {', '.join(family.ropes)}"
        )
    return result | {"rope_theta": theta, "rope_scaling": scaling}


def _split_local(raw, family, source):
    """(config.json with the RoPE of the layers without windows, theta of the others)."""
    nested = raw.get("rope_parameters") or {}
    if not set(nested) <= {_FULL, _SLIDING} or not all(
        isinstance(fields, dict | None) for fields in nested.values()
    ):
        raise UserError(
            f"{source}: rope_parameters of {family.model_type} is {errors.shown(nested)}; it must "
            f"have the RoPE of {_FULL} and that of {_SLIDING}"
        )
    local = nested.get(_SLIDING) or {}
    for field, value in local.items():
        if field not in ("rope_theta", "rope_type", "type") and not (
            value is None or config_fields.is_neutral_rope(field, value)
        ):
            raise UserError(
                f"{source}: RoPE of {_SLIDING} has {field} {errors.shown(value)}, which this "
                "model does not compute"
            )
    kind = local.get("rope_type", local.get("type", "default"))
    if kind != "default":
        raise UserError(
            f"{source}: RoPE type {errors.shown(kind)} of {_SLIDING} is not supported; only "
            "default is"
        )
    values = local.get("rope_theta"), raw.get("rope_local_base_freq")
    theta = next((value for value in values if value is not None), None)
    if theta is None:
        theta = family.defaults.get("rope_local_base_freq", DEFAULTS["rope_local_base_freq"])
    theta = number(theta, f"rope_theta of {_SLIDING}", source)
    return raw | {"rope_parameters": nested.get(_FULL)}, theta


def _split_partial(raw, source):
    """(config.json without partial_rotary_factor, its value)."""
    factor, rest = raw.get("partial_rotary_factor"), dict(raw)
    for name in ("rope_parameters", "rope_scaling"):
        if rest.get(name):
            fields = dict(rest[name])
            inner = fields.pop("partial_rotary_factor", None)
            factor, rest[name] = factor if inner is None else inner, fields
    return rest, 1.0 if factor is None else number(factor, "partial_rotary_factor", source, most=1)


def _read_either(raw, default_theta, positions, source):
    """(theta, scaling) from either spelling, or from both where they mean the same."""
    spellings = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)}
    meanings = {
        _read_spelling(fields, raw, default_theta, positions, source)
        for fields in list(spellings.values()) or [{}]
    }
    if len(meanings) == 2:  # transformers would take rope_scaling, and lose the other's theta
        raise UserError(
            f"{source}: rope_parameters and rope_scaling are both set, to different values; "
            "keep the one that is meant"
        )
    return meanings.pop()


def rope_fields(config: llama.ModelConfig, family: Family) -> dict[str, object]:
    """The fields of config.json on RoPE for a model of a family."""
    fields: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        fields["rope_type"] = _TYPES[type(config.rope_scaling)]
        fields |= dataclasses.asdict(config.rope_scaling)
    if config.rotary_dim is not None:
        fields["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    result = {"rope_parameters": fields, "rope_theta": config.rope_theta}
    if family.local_rope:
        theta = config.local_rope_theta or DEFAULTS["rope_local_base_freq"]
        local = {"rope_theta": theta, "rope_type": "default"}
        result["rope_parameters"] = {_FULL: fields, _SLIDING: local}
        result["rope_local_base_freq"] = theta
    if family.no_rope_layers:
        kinds = config.ropes or (rope.GLOBAL,) * config.num_layers
        result["no_rope_layers"] = [int(kind != rope.NONE) for kind in kinds]
    return result


def _read_spelling(fields, raw, default_theta, positions, source):
    """(theta, scaling) from the fields of one spelling."""
    # As in transformers, null is false, while a missing field is true.
    truncate = flag(fields, "truncate", source) if "truncate" in fields else True
    fields = {field: value for field, value in fields.items() if value is not None}
    theta = _theta(fields, raw, default_theta, source)
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


def _theta(fields, raw, default, source):
    """rope_theta from beside the RoPE type, else from the top level, else the default."""
    inner, outer = (
        number(place["rope_theta"], "rope_theta", source)
        if place.get("rope_theta") is not None
        else None
        for place in (fields, raw)
    )
    theta = next(value for value in (inner, outer, default) if value is not None)
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
