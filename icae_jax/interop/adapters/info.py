"""icae.json: how the tensors of an adapter are read."""

import dataclasses
import pathlib
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import icae_jax
from icae_jax import errors, files
from icae_jax.compression.config import EARLIER
from icae_jax.errors import UserError
from icae_jax.interop.adapters.adapter import Adapter

T = TypeVar("T")

FORMAT_VERSION = 1
INFO = "icae.json"
# Fields that earlier versions did not write.
LATER_FIELDS = ("k_choices", "trigger", *EARLIER)


def icae_json(adapter: Adapter) -> dict:
    """The content of icae.json."""
    compression = dataclasses.asdict(adapter.compression)
    # Unknown to earlier versions, which read the rest, so left out where they mean nothing new.
    masked = adapter.compression.spec.encoder_mask != EARLIER["encoder_mask"]
    for name, value in EARLIER.items():
        if compression[name] == value and not (masked and name == "encoder_mask"):
            del compression[name]
    return {
        "format_version": FORMAT_VERSION,
        "icae_jax_version": icae_jax.__version__,
        "base_fingerprint": adapter.base_fingerprint,
        **({"base_identity": adapter.base_identity} if adapter.base_identity else {}),
        **({"base_quantize": adapter.base_quantize} if adapter.base_quantize else {}),
        "compression": compression,
        "template": dataclasses.asdict(adapter.template),
        **({"origin": adapter.origin} if adapter.origin else {}),
    }


def read(path: pathlib.Path) -> dict:
    """The checked content of icae.json. UserError names the field that is missing or wrong."""
    raw = files.read_json(path, "how the adapter is read")
    version = raw.get("format_version")
    if version != FORMAT_VERSION or not files.is_kind(version, int):
        raise UserError(
            f"{path}: format_version is {version!r:.40}, this version reads {FORMAT_VERSION}"
        )
    kinds = {"base_fingerprint": str, "compression": dict, "template": dict}
    files.check_fields(raw, kinds, path)
    files.check_fields(raw["template"], {"name": str}, f"{path}: template")
    if "base_identity" in raw:
        files.check_fields(raw, {"base_identity": dict}, path)
        identity = raw["base_identity"]
        files.check_fields(identity, dict.fromkeys(identity, str), path)
    if "base_quantize" in raw:
        files.check_fields(raw, {"base_quantize": str}, path)
    if raw.get("origin") is not None:
        files.check_fields(raw, {"origin": dict}, path)
    return raw


def from_json(
    kind: Callable[..., T], raw: dict[str, Any], source: str, later_fields: tuple[str, ...] = ()
) -> T:
    """Builds a dataclass from JSON, lists as tuples; UserError on unknown, missing or wrong fields.

    later_fields: fields that older files lack; their defaults are what those files meant.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    wrong = sorted((set(raw) ^ names) - (set(later_fields) - set(raw)))
    if wrong:
        raise UserError(
            f"{source}: fields {', '.join(map(errors.field, wrong))} unknown or missing; was it "
            "written by another version of icae_jax?"
        )
    types = {
        field.name: list if typing.get_origin(field.type) is tuple else field.type
        for field in dataclasses.fields(kind)
        if field.name in raw
    }
    files.check_fields(raw, types, source)
    for name, type_ in types.items():
        if type_ is list and not all(files.is_kind(value, int) for value in raw[name]):
            raise UserError(f"{source}: {name} is {raw[name]!r}, which are not whole numbers")
        if type_ in (int, float) and not abs(raw[name]) < 2**31:  # NaN too
            raise UserError(
                f"{source}: {name} is {raw[name]!r:.40}, which is not a number of sensible size"
            )
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
