"""Decides which attention implementation a run uses: the one it names, or the fastest here."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from icae_jax.errors import UserError
from icae_jax.models import attention, llama
from icae_jax.runtime import distributed

AUTO = "auto"
CHOICES = (AUTO, *attention.IMPLEMENTATIONS)
# Timings of this process, by device kind and sizes: they take seconds, and hold for every adapter.
_TIMINGS: dict[tuple, attention.Choice] = {}


def choose(
    asked: str,
    model: llama.ModelConfig,
    mesh: Mesh,
    *,
    rows: int,
    length: int,
    dtype: DTypeLike,
    mask: str = "causal",
) -> tuple[str, list[str]]:
    """(the implementation, notes on how it was chosen).

    "auto" times one layer's forward and backward pass with every available implementation on one
    device of this process, once for each kind of device and sizes, and takes the fastest. Several
    processes all use the choice of process 0.

    Args:
        asked: one of `CHOICES`.
        model: the base.
        mesh: the devices of the run.
        rows: rows of a batch on the whole mesh.
        length: tokens in a row.
        dtype: of the activations.
        mask: of the encoder, which is most of the work, see `models.attention.supported`.

    Raises:
        UserError: the implementation that is asked for is not available here.
    """
    device, tensor = mesh.local_devices[0], mesh.shape["tensor"]
    unavailable = {
        name: attention.supported(
            name,
            device.platform,
            dtype=dtype,
            head_dim=model.head_dim,
            windows=any(model.windows),
            softcap=bool(model.attention_softcap),
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            tensor=tensor,
            mask=mask,
        )
        for name in attention.IMPLEMENTATIONS
    }
    if asked != AUTO:
        if unavailable[asked]:
            raise UserError(
                f"attention is {asked!r}, but {unavailable[asked]}; choose xla, "
                "or auto for the fastest that is available"
            )
        return asked, []
    if all(reason for name, reason in unavailable.items() if name != "xla"):
        return "xla", []
    timing = _time(
        device,
        dtype=jnp.dtype(dtype),
        head_dim=model.head_dim,
        windows=any(model.windows),
        softcap=bool(model.attention_softcap),
        mask=mask,
        rows=max(1, rows * tensor // mesh.size),
        length=length,
        heads=_share(model.num_heads, tensor),
        kv_heads=_share(model.num_kv_heads, tensor),
    )
    names = list(attention.IMPLEMENTATIONS)
    name = names[distributed.agreed(names.index(timing.implementation))]
    seconds = [f"{name} {1e3 * s:.2f} ms" for name, s in timing.seconds.items()]
    refused = [
        f"{name}: {timing.refused[name]}"
        for name, reason in unavailable.items()
        if name in timing.refused and not reason
    ]
    results = ", ".join(seconds + refused)
    return name, [f"attention: {name}; a layer, forward and backward: {results}"]


def _share(heads: int, devices: int) -> int:
    """The heads on each device; all of them if they do not divide evenly."""
    return heads // devices if heads % devices == 0 else heads


def _time(device: jax.Device, **sizes) -> attention.Choice:
    """`attention.fastest`, timed once for each kind of device and sizes."""
    key = (device.device_kind, *sorted(sizes.items()))
    if key not in _TIMINGS:
        _TIMINGS[key] = attention.fastest(device=device, **sizes)
    return _TIMINGS[key]
