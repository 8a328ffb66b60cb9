"""Dataclasses that are JAX pytrees."""

from typing import Any, TypeVar, dataclass_transform

from flax import struct

T = TypeVar("T", bound=type)


def static(**options: Any) -> Any:
    """A field of a `pytree` that belongs to the program, not to its data; it must be hashable.

    options: those of `dataclasses.field`, such as a default.
    """
    return struct.field(pytree_node=False, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def pytree(cls: T) -> T:
    """`flax.struct.dataclass` whose field types are documentation only.

    A pytree is also built with leaves that are no arrays (shardings, shapes, cotangents), so a
    runtime type checker must not look at its fields.
    """
    cls = struct.dataclass(cls)
    cls.__no_type_check__ = True
    return cls
