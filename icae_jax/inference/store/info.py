"""What a store says of itself: the compressor that fills it, and how memories are kept."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import icae_jax
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError
from icae_jax.inference import origin as origins
from icae_jax.inference.origin import Origin

if TYPE_CHECKING:
    from icae_jax.inference.compressor import Compressor
else:
    Compressor = object  # imports much that a store does not need

FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16", "int8")
_REMEDY = "the index is damaged: take it from a backup, or fill a new store"


@dataclasses.dataclass(frozen=True)
class Info:
    """What is the same for all entries of a store.

    Attributes:
        origin: the compressor that fills it.
        sizes: of a memory's axes, without those of texts and tokens (`Memory.sizes`).
        kv_sizes: (L, K, H) of the base: of stored prefixes.
        dtype: of the numbers on disk, one of `DTYPES`.
        kv: the name of the template whose head stands in stored prefixes; "" where none are kept.
        head: the ids of that head.
        base: the base's folder, hub id or URL, "" if not known; not compared.
        shards: a URL or a folder where shards are, "" for the store's own folder; not compared.
        created_by: the version of the package; not compared.
    """

    origin: Origin
    sizes: tuple[int, ...]
    kv_sizes: tuple[int, ...]
    dtype: str = "float32"
    kv: str = ""
    head: tuple[int, ...] = ()
    base: str = ""
    shards: str = ""
    created_by: str = icae_jax.__version__

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}; choose from {', '.join(DTYPES)}")

    @classmethod
    def of(
        cls,
        compressor: Compressor,
        dtype: str = "float32",
        kv: str = "",
        base: str | os.PathLike | None = None,
    ) -> "Info":
        """What a store says that a compressor fills.

        kv: the adapter's template, whose head is to stand in stored prefixes; "" to store none.
        base: where the base is, by default as it was given when it was loaded. UserError if the
        adapter has another template.
        """
        template, model = compressor.adapter.template, compressor.base.config
        if kv and kv != template.name:
            raise UserError(
                f"kv is {kv!r}, but the adapter's template is {template.name!r}; give that one"
            )
        return cls(
            compressor.origin,
            tuple(compressor.config.spec.memory.sizes(model)),
            (model.num_layers, model.num_kv_heads, model.head_dim),
            dtype,
            kv,
            tuple(template.head) if kv else (),
            str(compressor.base.path if base is None else base),
        )

    @property
    def compression(self) -> CompressionConfig:
        """The adapter's compression."""
        return self.origin.compression

    @property
    def method(self) -> str:
        """The name of its method."""
        return self.compression.method

    @property
    def layout(self) -> str:
        """The name of its position layout."""
        return self.compression.layout

    @property
    def kind(self) -> type[Memory]:
        """The kind of memory."""
        return self.compression.spec.memory

    @property
    def adapter(self) -> str:
        """The adapter's folder, hub id or URL."""
        return self.metadata["adapter"]

    @property
    def metadata(self) -> dict[str, str]:
        """What a memory file would say of the compressor (`origin.metadata`)."""
        return origins.metadata(self.origin)

    # --- In the index ---

    def rows(self) -> dict[str, str]:
        """The rows of the index's table `info`."""
        return {
            "format_version": str(FORMAT_VERSION),
            **self.metadata,
            "compression": json.dumps(dataclasses.asdict(self.compression)),
            "kind": self.kind.__name__,
            "sizes": json.dumps(self.sizes),
            "kv_sizes": json.dumps(self.kv_sizes),
            "dtype": self.dtype,
            "kv": self.kv,
            "head": json.dumps(self.head),
            "base": self.base,
            "shards": self.shards,
            "created_by": self.created_by,
        }

    @classmethod
    def from_rows(cls, rows: Mapping[str, str], source: object) -> "Info":
        """What `rows` gave. UserError, naming `source`, if they are of a newer version or damaged.

        source: the store.
        """
        check_version(rows, source)
        try:
            compression = _compression(json.loads(rows["compression"]))
            origin = Origin(
                compression,
                rows["base_fingerprint"],
                rows["adapter_fingerprint"],
                rows["adapter"],
                origins.read_identity(f"store {source}", rows),
                float(rows["lora_scale"]) if "lora_scale" in rows else None,
                rows.get("base_quantize", ""),
            )
            sizes, kv_sizes, head = (_numbers(rows[name]) for name in ("sizes", "kv_sizes", "head"))
            names = ("dtype", "kv")
            texts = [str(rows[name]) for name in names]
            others = [str(rows[name]) for name in ("base", "shards", "created_by")]
            return cls(origin, sizes, kv_sizes, *texts, head, *others)
        except KeyError as error:
            raise UserError(f"store {source}: its index has no {error}; {_REMEDY}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"store {source}: {error}; {_REMEDY}") from error

    # --- Comparing ---

    def differences(self, source: object, other: "Info") -> Iterator[str]:
        """What another filler would store otherwise than this store holds: sentences.

        source: this store, for messages.
        """
        what = f"store {source}"
        yield from origins.differences(what, self.metadata, other.origin)
        if self.dtype != other.dtype:
            yield f"{what} holds {self.dtype}, not {other.dtype}; give --dtype {self.dtype}"
        if (self.kv, self.head) != (other.kv, other.head):
            yield (
                f"{what} holds {_kv_text(self.kv, self.head)}, not "
                f"{_kv_text(other.kv, other.head)}; fill it as it was made, or fill a new store"
            )
        if (self.sizes, self.kv_sizes) != (other.sizes, other.kv_sizes):
            yield (
                f"{what} is of a base of sizes {self.sizes}, {self.kv_sizes}, not {other.sizes}, "
                f"{other.kv_sizes}; give the base that it was made with"
            )

    def check(self, source: object, other: "Info") -> None:
        """UserError that names all that differs, see `differences`."""
        if different := list(self.differences(source, other)):
            raise UserError("\n".join(different))

    def check_compressor(self, source: object, compressor: Compressor) -> None:
        """UserError if a compressor cannot read a store: naming both sides of all that differs."""
        kv = compressor.adapter.template.name if self.kv else ""
        self.check(source, type(self).of(compressor, self.dtype, kv))

    # --- Sizes ---

    def memory_shape(self, tokens: int) -> tuple[int, ...]:
        """The shape of a memory's numbers of so many tokens.

        `[M, D]` of slots, `[2, L, M, K, H]` of K/V: fields of the kind in front if it has several.
        """
        axis, fields = self.kind.TEXT_AXIS, len(self.kind.CONTENTS)
        shape = (*self.sizes[:axis], tokens, *self.sizes[axis:])
        return (fields, *shape) if fields > 1 else shape

    def kv_shape(self, tokens: int) -> tuple[int, ...]:
        """The shape of a stored prefix behind the head, `[2, L, h + M, K, H]`."""
        layers, heads, size = self.kv_sizes
        return (2, layers, len(self.head) + tokens, heads, size)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes on disk of numbers of a shape; in int8, of a scale for each last axis too."""
        if self.dtype == "int8":
            return math.prod(shape[:-1]) * (shape[-1] + 4)
        return math.prod(shape) * (4 if self.dtype == "float32" else 2)


def check_version(rows: Mapping[str, str], source: object) -> None:
    """UserError unless the rows of a store's info are of a version that is read."""
    version = str(rows.get("format_version"))
    if version != str(FORMAT_VERSION):
        newer = version.isdecimal() and int(version) > FORMAT_VERSION
        made = f" (made by icae_jax {rows['created_by']})" if "created_by" in rows else ""
        remedy = "install a newer icae_jax" if newer else _REMEDY
        raise UserError(
            f"store {source} has format_version {version}{made}; icae_jax {icae_jax.__version__} "
            f"reads {FORMAT_VERSION}; {remedy}"
        )


def _compression(fields: dict[str, Any]) -> CompressionConfig:
    fields["k_choices"] = tuple(fields["k_choices"])
    return CompressionConfig(**fields)


def _numbers(text: str) -> tuple[int, ...]:
    numbers = json.loads(text)
    if not isinstance(numbers, list) or any(type(n) is not int for n in numbers):
        raise ValueError(f"{text[:40]!r} is not a list of whole numbers")
    return tuple(numbers)


def _kv_text(kv: str, head: tuple[int, ...]) -> str:
    return f"K/V behind the head {list(head)} of template {kv}" if kv else "no K/V of the decoder"
