"""Entries of a store: what is put in, what its index says of one, and what is read again."""

import dataclasses
import hashlib
import json
import pathlib
import sqlite3
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from icae_jax import errors
from icae_jax.compression.decoder import Prefix
from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError
from icae_jax.inference.store import codec
from icae_jax.inference.store.info import Info
from icae_jax.interop.hub.text import check_encodable

PREFIXES = ("", "kv_")  # of the columns of an entry's parts, memory and stored prefix
_DEEPEST = 64  # levels of an entry's metadata; SQLite's JSON functions end at 1,000
# Columns of the index's table of entries, without its number and its shard's.
COLUMNS = (
    "id", "content_hash", "tokens", "k", "lengths", "memory_tokens", "ratio", "bytes",
    "offset", "nbytes", "checksum", "kv_offset", "kv_nbytes", "kv_checksum", "metadata",
)  # fmt: skip
NAMING = ("id", "content_hash", "checksum", "kv_checksum")  # columns that name a shard


def checksum(data: bytes | memoryview | np.ndarray) -> str:
    """What a store compares when it reads: BLAKE2b of 16 bytes, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class NewEntry:
    """One document to be stored.

    Attributes:
        id: any text; an entry of that id is replaced.
        content_hash: of the document and of all that decides how it is compressed.
        memory: of this one text, on the host.
        prefix: what the decoder reads of it, if the store keeps that; on the host.
        metadata: the user's, an object that JSON can hold.
    """

    id: str
    content_hash: str
    memory: Memory
    prefix: Prefix | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Known(NamedTuple):
    """What a store knows of a document: its content hash, whether K/V are kept, its metadata."""

    content_hash: str
    kv: bool
    metadata: dict[str, Any]


@runtime_checkable
class Reader(Protocol):
    """What an entry asks of its store (`reader.Store`)."""

    path: pathlib.Path
    info: Info

    def read_memory(self, entry: "Entry") -> Memory:
        """The memory of an entry."""
        ...

    def read_prefix(self, entry: "Entry") -> Prefix | None:
        """The stored prefix of an entry."""
        ...


class Span(NamedTuple):
    """Where an entry's part lies in its shard, in bytes, and its checksum."""

    offset: int
    nbytes: int
    checksum: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """One document of a store, as its index has it; what was stored is read when asked for.

    Attributes:
        id: the document's.
        content_hash: what it was compressed from, and how.
        tokens: of the context.
        k: memory tokens per segment.
        lengths: context tokens of each segment.
        memory_tokens: in all.
        ratio: context tokens per memory token.
        bytes: on disk, stored K/V of the decoder included.
        metadata: the user's.
        shard: the name of the shard that holds it.
        spans: where its parts are in the shard, by their names ("memory", "kv").
        number: its place in the order of entries.
    """

    id: str
    content_hash: str
    tokens: int
    k: int
    lengths: tuple[int, ...]
    memory_tokens: int
    ratio: float
    bytes: int
    metadata: dict[str, Any]
    shard: str
    spans: dict[str, Span]
    number: int
    store: Reader = dataclasses.field(repr=False, compare=False)

    @property
    def checksum(self) -> str:
        """Of the memory's bytes."""
        return self.spans["memory"].checksum

    @property
    def has_kv(self) -> bool:
        """Whether what the decoder reads is stored too."""
        return "kv" in self.spans

    @property
    def memory(self) -> Memory:
        """The memory of this one text, read now; UserError if its bytes are damaged."""
        return self.store.read_memory(self)

    @property
    def prefix(self) -> Prefix | None:
        """The stored prefix, head and memory, read now; None if there is none."""
        return self.store.read_prefix(self)

    def as_json(self) -> dict[str, Any]:
        """What `icae store ls --json` prints."""
        names = ("id", "content_hash", "tokens", "k", "lengths", "memory_tokens", "ratio", "bytes")
        values = {name: getattr(self, name) for name in names}
        values |= {"kv": self.has_kv, "checksum": self.checksum, "shard": self.shard}
        return {**values, "lengths": list(self.lengths), "metadata": self.metadata}


# --- Writing ---


class Encoded(NamedTuple):
    """A new entry as it is written: its parts' numbers, and its row without offsets."""

    parts: dict[str, np.ndarray]
    values: dict[str, Any]


def metadata_text(value: object, what: str) -> str:
    """The user's metadata as JSON. what: the entry, for messages.

    UserError if it is not an object of what JSON holds.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{what}: metadata is {errors.shown(value)}, which is not an object")
    _check_json(value, what)
    text = json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
    check_encodable(text, f"{what}: metadata {errors.shown(dict(value))}")
    return text


def _check_json(value: object, what: str, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise UserError(f"{what}: metadata is nested deeper than {_DEEPEST} levels; flatten it")
    if isinstance(value, Mapping):
        if keys := [key for key in value if not isinstance(key, str)]:
            raise UserError(
                f"{what}: metadata has the key {errors.shown(keys[0])}; keys must be texts"
            )
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _check_json(item, what, depth + 1)
    elif isinstance(value, float) and not np.isfinite(value):
        raise UserError(f"{what}: metadata holds {value}, which JSON cannot; leave it out")
    elif not isinstance(value, str | int | float | None):
        raise UserError(
            f"{what}: metadata holds {errors.shown(value)}, a {type(value).__name__}; give texts, "
            "numbers, true, false, null, lists and objects (bytes decoded)"
        )


def encoded(entry: NewEntry, info: Info) -> Encoded:
    """A new entry as a store keeps it.

    UserError if its id or metadata cannot be kept, if it does not fit the store, or if its memory
    is not finite, in the store's dtype.
    """
    what = f"entry {errors.shown(entry.id)}"
    check_encodable(entry.id, what)
    check_encodable(entry.content_hash, f"{what}: content_hash")
    metadata = metadata_text(entry.metadata, what)
    if not isinstance(entry.memory, info.kind) or len(entry.memory) != 1:
        raise UserError(
            f"{what}: memory is {type(entry.memory).__name__} of {len(entry.memory)} texts; give "
            f"{info.kind.__name__} of one"
        )
    lengths, k = codec.segment_lengths(entry.memory), entry.memory.tokens_per_segment
    numbers = codec.memory_numbers(entry.memory)
    count = k * len(lengths)
    _check_shape(what, "memory", numbers.shape, info.memory_shape(count))
    parts = {"memory": codec.encode(numbers, info.dtype)}
    if entry.prefix is not None:
        parts["kv"] = codec.encode(_prefix_numbers(what, entry, count, info), info.dtype)
    for name, x in parts.items():
        _check_finite(what, name, x, info.dtype, numbers if name == "memory" else None)
    sums = {name: checksum(x.view(np.uint8).reshape(-1)) for name, x in parts.items()}
    values = {
        "id": entry.id,
        "content_hash": entry.content_hash,
        "tokens": sum(lengths),
        "k": k,
        "lengths": json.dumps(lengths),
        "memory_tokens": count,
        "ratio": sum(lengths) / count,
        "bytes": sum(x.nbytes for x in parts.values()),
        "checksum": sums["memory"],
        "kv_checksum": sums.get("kv"),
        "metadata": metadata,
    }
    return Encoded(parts, values)


def _prefix_numbers(what, entry, count, info):
    if not info.kv:
        raise UserError(f"{what}: has a prefix, but the store keeps none; make one with kv")
    numbers = codec.prefix_numbers(entry.prefix)
    _check_shape(what, "prefix", numbers.shape, info.kv_shape(count))
    real = np.asarray(entry.prefix.mask)[0]
    positions = np.asarray(entry.prefix.positions)[0][real]
    head, end = len(info.head), int(np.asarray(entry.prefix.end)[0])
    # Positions are not kept, since the layout tells them: those of another head would be wrong.
    if not np.array_equal(positions, codec.prefix_positions(entry.memory, head)) or (
        end != head + int(np.asarray(entry.memory.end)[0])
    ):
        raise UserError(
            f"{what}: the prefix is not that of its memory behind a head of {head} ids; read the "
            f"memory behind the head of template {info.kv}"
        )
    return numbers


def _check_shape(what, name, have, expected):
    if have != expected:
        raise UserError(
            f"{what}: {name} has shape {have}, but the store's is {expected}; give the base and "
            "adapter that it was made with"
        )


def _check_finite(what, name, stored, dtype, numbers):
    """numbers: before they were encoded, where known: int8 codes are always finite."""
    if dtype == "int8":
        scales = np.ascontiguousarray(stored[..., -4:]).view("<f4")
        finite = np.isfinite(scales).all()
        finite = finite and (numbers is None or np.isfinite(numbers.astype(np.float32)).all())
    else:
        finite = np.isfinite(stored.astype(np.float32, copy=False)).all()
    if not finite:
        raise UserError(
            f"{what}: its {name} is not finite in {dtype}: the base or the adapter is damaged, or "
            "overflows in its dtype; load them in float32, or download them again"
        )


# --- Reading ---


def entry_of_row(row: sqlite3.Row, store: Reader) -> Entry:
    """The entry of a row of the index; UserError, naming it, if the row cannot be true.

    row: the columns, with `number` and `shard`.
    """
    what = f"store {store.path}: entry {errors.shown(row['id'])}"
    problem = _problem(row, store.info)
    if problem:
        raise UserError(
            f"{what} in shard {row['shard']}: its row of the index is damaged ({problem}); remove "
            "the entry (icae store rm) and compress its text again"
        )
    spans = {"memory": Span(row["offset"], row["nbytes"], row["checksum"])}
    if row["kv_offset"] is not None:
        spans["kv"] = Span(row["kv_offset"], row["kv_nbytes"], row["kv_checksum"])
    return Entry(
        row["id"],
        row["content_hash"],
        row["tokens"],
        row["k"],
        tuple(json.loads(row["lengths"])),
        row["memory_tokens"],
        row["tokens"] / row["memory_tokens"],
        sum(span.nbytes for span in spans.values()),
        json.loads(row["metadata"]),
        row["shard"],
        spans,
        row["number"],
        store,
    )


def _problem(row: sqlite3.Row, info: Info) -> str:
    """What of a row cannot be true; "" if nothing. The index is a file that anyone may edit."""
    for name in ("tokens", "k", "memory_tokens", "offset", "nbytes", "number"):
        if type(row[name]) is not int or row[name] < (name == "k"):
            return f"{name} is {errors.shown(row[name])}"
    for name in ("id", "content_hash", "checksum", "shard"):
        if type(row[name]) is not str:
            return f"{name} is {errors.shown(row[name])}"
    try:
        lengths, metadata = json.loads(row["lengths"]), json.loads(row["metadata"])
    except (TypeError, ValueError, RecursionError):
        return "lengths or metadata are not JSON"
    if not isinstance(metadata, dict):
        return f"metadata is {errors.shown(metadata)}"
    longest = info.compression.segment_tokens
    if not (
        isinstance(lengths, list)
        and lengths
        and all(type(n) is int and 0 < n <= longest for n in lengths)
        and sum(lengths) == row["tokens"]
    ):
        return f"lengths are {errors.shown(lengths)} for {row['tokens']} tokens"
    count = row["k"] * len(lengths)
    if row["memory_tokens"] != count:
        return f"memory_tokens is {row['memory_tokens']}, not {count}"
    if row["nbytes"] != info.nbytes(info.memory_shape(count)):
        return f"nbytes is {row['nbytes']}"
    kv = [row[f"kv_{name}"] for name in ("offset", "nbytes", "checksum")]
    if kv == [None] * 3:
        return ""
    offset, nbytes, summed = kv
    if type(offset) is not int or offset < 0 or type(summed) is not str:
        return f"kv_offset is {errors.shown(offset)}"
    if nbytes != info.nbytes(info.kv_shape(count)):
        return f"kv_nbytes is {errors.shown(nbytes)}"
    return ""
