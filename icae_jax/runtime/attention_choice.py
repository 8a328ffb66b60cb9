"""Which attention a run computes: the one that its configuration names, or by measurement on its own device."""

import jax.numpy as jnp

from icae_jax.errors import UserError
from icae_jax.models import attention
from icae_jax.runtime import distributed

AUTO = "auto"
CHOICES = (AUTO, *attention.IMPLEMENTATIONS)
_MEASURED: dict[
    tuple, attention.Choice
] = {}  # by kind of device and sizes: seconds of compiling and timing, the same for every adapter


def choose(asked, model, mesh, *, rows, length, dtype):
    """(the implementation, lines on how it was found).

    asked: one of `CHOICES`; "auto" times a layer's forward and backward pass of all that can be had, on one device of this process, and
    takes the fastest; several processes take the first one's. A process times the same sizes on one kind of device only once.
    model: `ModelConfig`. rows, length: of the batches on the whole mesh.
    UserError where what is asked for cannot be had here.
    """
    device, tensor = mesh.local_devices[0], mesh.shape["tensor"]
    heads, kv_heads = model.num_heads, model.num_kv_heads
    sizes = {"dtype": dtype, "head_dim": model.head_dim, "windows": any(model.windows)}
    why_not = {
        name: attention.supported(
            name, device.platform, heads=heads, kv_heads=kv_heads, tensor=tensor, **sizes
        )
        for name in attention.IMPLEMENTATIONS
    }
    if asked != AUTO:
        if why_not[asked]:
            raise UserError(
                f"attention is {asked!r}, but {why_not[asked]}; choose xla, or auto for the fastest that can be had"
            )
        return asked, []
    if all(why for name, why in why_not.items() if name != "xla"):
        return "xla", []
    sizes["dtype"] = jnp.dtype(dtype)
    sizes |= {"rows": max(1, rows * tensor // mesh.size), "length": length}
    sizes |= {
        name: n // tensor if n % tensor == 0 else n
        for name, n in (("heads", heads), ("kv_heads", kv_heads))
    }
    key = (device.device_kind, *sorted(sizes.items()))
    if key not in _MEASURED:
        _MEASURED[key] = attention.fastest(device=device, **sizes)
    found = _MEASURED[key]
    name = attention.IMPLEMENTATIONS[
        distributed.agreed(attention.IMPLEMENTATIONS.index(found.implementation))
    ]
    seconds = [f"{of} {1e3 * taken:.2f} ms" for of, taken in found.seconds.items()]
    refused = [
        f"{of}: {found.refused[of]}"
        for of, why in why_not.items()
        if of in found.refused and not why
    ]
    return name, [
        f"attention: {name}; a layer, forward and backward: {', '.join(seconds + refused)}"
    ]
