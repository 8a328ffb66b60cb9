"""Logical axes: names of array dimensions, which a mesh's rules map to its axes.

The rules are made and activated by `runtime.sharding.Placement`. On a single device there are none,
and `constrain` does nothing.
"""

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec
from jaxtyping import Shaped

# (input, output) of each kernel.
PROJECTION_AXES = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}
STORED_ONLY = ("embed", "rank")  # split where parameters are stored, whole where they are used
KV_AXES = ("layers", "batch", None, "kv_heads", None)  # of stacked keys or values [L, B, T, K, H]
UNCONSTRAINED = (("unconstrained", None),)  # rules that switch `constrain` off under a mesh


def logical_axes(path: tuple[str, ...]) -> tuple[str | None, ...]:
    """The logical axes of the parameter at a path, () if it is never split.

    A path is, for example, ("layers", "self_attn", "q_proj", "kernel"). LoRA's a and b have the
    path of the kernel that they adapt.
    """
    name, module = path[-1] if path else "", path[-2] if len(path) > 1 else ""
    if module in PROJECTION_AXES:
        d_in, d_out = PROJECTION_AXES[module]
        return {
            "kernel": ("layers", d_in, d_out),
            "bias": ("layers", d_out),
            "a": ("layers", d_in, "rank"),
            "b": ("layers", "rank", d_out),
        }[name]
    return {
        "embed": ("vocab", "embed"),
        "lm_head": ("embed", "vocab"),
        "projection": ("embed", None),  # of slots, `[D, D]`
    }.get(name, ())


def active() -> bool:
    """Whether arrays are split over a mesh here, under the rules of a `Placement`.

    RuntimeError under a mesh of several devices without rules: every constraint would silently do
    nothing.
    """
    rules = nn.get_logical_axis_rules()
    if rules:
        return tuple(rules) != UNCONSTRAINED
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        raise RuntimeError(
            f"a mesh {dict(mesh.shape)} is active without logical axis rules, so nothing would be "
            "split; use `Placement.active()` in place of `jax.set_mesh`"
        )
    return False


def parts(axes: str | tuple[str, ...] | None) -> int:
    """How many parts the given axes of the active mesh split a dimension into."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def split(name: str, n: int) -> tuple[Any, int]:
    """(mesh axes, number of parts) that split a dimension of this logical name and length.

    (None, 1) if nothing splits it.
    """
    if not active():
        return None, 1
    mesh_axes = nn.logical_to_mesh_axes((name,))[0] or ()
    count = parts(mesh_axes)
    return (None, 1) if count == 1 or n % count else (mesh_axes, count)


def constrain(x: Shaped[Any, "..."], *names: str | None) -> Shaped[Any, "..."]:
    """Splits `x` by one logical axis per dimension (None: not split). Returns x itself off a mesh.

    A dimension that its mesh axes do not divide stays whole, such as the single row of a head that
    is shared by all memories.
    """
    if not active():
        return x
    spec = [
        None if n % parts(axes) else axes
        for axes, n in zip(nn.logical_to_mesh_axes(names), x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def gathered(w: Any, axes: tuple[str | None, ...]) -> Any:
    """A parameter as a matmul uses it: whole along the axes that are split in storage only.

    w: an array, or a pytree in its place (`models.quantize`), each leaf of which is constrained.
    """
    names = [None if axis in STORED_ONLY else axis for axis in axes]
    return jax.tree.map(lambda leaf: constrain(leaf, *names), w)
