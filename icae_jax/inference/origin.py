"""What memory files and stores say of the compressor that wrote them, and its comparison.

Both carry it as texts: `metadata` writes them, `check` compares them with a compressor at hand.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping

from icae_jax.compression.config import EARLIER, CompressionConfig
from icae_jax.errors import UserError
from icae_jax.interop.hub import locations
from icae_jax.interop.hub.identity import check_identity, compare_quantisation

REMEDY = "compress the texts again"


@dataclasses.dataclass(frozen=True)
class Origin:
    """The compressor that writes or reads memories.

    Attributes:
        compression: of the adapter.
        base_fingerprint: `Base.fingerprint`.
        adapter_fingerprint: `Adapter.fingerprint`.
        adapter_path: folder, hub id or URL; only written.
        base_identity: `Base.identity`.
        base_quantize: `Base.quantize`.
        lora_scale: of the adapter; None if not known, then not compared.
    """

    compression: CompressionConfig
    base_fingerprint: str
    adapter_fingerprint: str
    adapter_path: str | os.PathLike = ""
    base_identity: dict[str, str] = dataclasses.field(default_factory=dict)
    lora_scale: float | None = None
    base_quantize: str = ""


def _how_written(origin: Origin) -> dict[str, str]:
    """What of the compression is not seen in the trained tensors, but in the memory."""
    names = ("encoder_mask", "encoder_layers")
    return {name: str(getattr(origin.compression, name)) for name in names}


def metadata(origin: Origin) -> dict[str, str]:
    """What is written of an origin: names and texts, without k.

    The adapter's folder is absolute, so that it is found from anywhere.
    """
    adapter = str(origin.adapter_path)
    if not locations.is_remote(adapter):
        adapter = str(pathlib.Path(adapter).resolve())
    written = {
        "method": origin.compression.method,
        "layout": origin.compression.layout,
        "base_fingerprint": origin.base_fingerprint,
        "adapter_fingerprint": origin.adapter_fingerprint,
        "segment_tokens": str(origin.compression.segment_tokens),
        **{n: value for n, value in _how_written(origin).items() if value != str(EARLIER[n])},
        "adapter": adapter,
    }
    if origin.base_identity:
        written["base_identity"] = json.dumps(origin.base_identity)
    if origin.base_quantize:
        written["base_quantize"] = origin.base_quantize
    if origin.lora_scale is not None:
        written["lora_scale"] = repr(origin.lora_scale)
    return written


def read_identity(what: str, stated: Mapping[str, str]) -> dict[str, str]:
    """`base_identity` of metadata; empty if an earlier version wrote them.

    what: the file, for messages. UserError if it is not an object of texts.
    """
    name = "base_identity"
    try:
        value = json.loads(stated.get(name, "{}"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise UserError(
            f"{what}: {name} in its metadata is {stated[name][:50]!r}, which is not an "
            f"object of texts; {REMEDY}"
        )
    return value


def differences(what: str, stated: Mapping[str, str], origin: Origin) -> Iterator[str]:
    """What differs between the compressor that wrote a file and another: sentences, both named.

    Another quantisation of the base is only noted on stderr.

    Args:
        what: the file, for messages.
        stated: what `metadata` wrote.
        origin: the other compressor.
    """
    compression = origin.compression
    for kind, have in (("base", origin.base_fingerprint), ("adapter", origin.adapter_fingerprint)):
        written_with = stated[f"{kind}_fingerprint"]
        if written_with != have:
            yield (
                f"{what} was written with {kind} {written_with[:12]}, but {have[:12]} is "
                f"loaded; give that {kind}"
            )
    for field, have in (("method", compression.method), ("layout", compression.layout)):
        if stated[field] != have:
            yield (
                f"{what} has {field} {stated[field]}, the adapter {have}; give the "
                "adapter that it names"
            )
    identity = read_identity(what, stated)
    try:
        check_identity(what, identity, origin.base_identity)
    except UserError as error:
        yield str(error)
    compare_quantisation(what, stated.get("base_quantize", ""), origin.base_quantize)
    expected = {"segment_tokens": str(compression.segment_tokens)}
    if origin.lora_scale is not None:
        expected["lora_scale"] = repr(origin.lora_scale)
    expected |= _how_written(origin)
    for field, have in expected.items():
        # Earlier versions did not write them all; what says how the encoder reads is left out where
        # it is as they knew it.
        written_with = stated.get(field, str(EARLIER.get(field, have)))
        if written_with != have:
            yield (
                f"{what} has {field} {written_with}, the adapter {have}; give the adapter as "
                f"it was, or {REMEDY}"
            )


def check(what: str, stated: Mapping[str, str], origin: Origin) -> None:
    """UserError, naming both sides, if another compressor wrote a file; else as `differences`."""
    for difference in differences(what, stated, origin):
        raise UserError(difference)
