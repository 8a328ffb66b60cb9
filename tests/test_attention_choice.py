"""Which attention a run uses: the requested or the fastest one, never one that device, dtype or
mesh rule out.
"""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY
from jax.sharding import Mesh

from icae_jax.models import attention as kernels
from icae_jax.runtime import attention_choice, sharding


def on(platform, tensor=1, devices=1):
    """A stand-in for a mesh of such devices."""
    shape = {"data": devices // tensor, "fsdp": 1, "tensor": tensor}
    device = mock.Mock(spec=jax.Device, platform=platform, device_kind=f"a {platform}")
    return mock.Mock(spec=Mesh, local_devices=[device], shape=shape, size=devices)


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch):
    monkeypatch.setattr(attention_choice, "_TIMINGS", {})


def choose(asked, mesh, dtype=jnp.bfloat16, model=TINY, mask="causal"):
    return attention_choice.choose(asked, model, mesh, rows=8, length=20, dtype=dtype, mask=mask)


def test_a_cpu_has_one_and_measures_nothing(monkeypatch):
    monkeypatch.setattr(kernels, "fastest", None)
    assert (
        choose("auto", sharding.make_mesh()) == choose("xla", sharding.make_mesh()) == ("xla", [])
    )


def test_auto_takes_the_fastest_of_one_device_s_share(monkeypatch):
    """Breaks when other sizes than one device's are timed, or the choice is not reported."""
    asked = {}

    def fastest(**sizes):
        asked.update(sizes)
        return kernels.Choice(
            "cudnn",
            {"xla": 2e-3, "cudnn": 5e-4},
            {"splash": "splash needs a tpu; the device is a gpu"},
        )

    monkeypatch.setattr(kernels, "fastest", fastest)
    name, (line,) = choose("auto", on("gpu", tensor=2, devices=8))
    assert (
        name == "cudnn"
        and line == "attention: cudnn; a layer, forward and backward: xla 2.00 ms, cudnn 0.50 ms"
    )
    assert (asked["rows"], asked["heads"], asked["kv_heads"], asked["length"]) == (2, 2, 1, 20)
    assert asked["dtype"] == jnp.bfloat16 and not asked["windows"] and asked["mask"] == "causal"
    choose("auto", on("gpu"), mask="all")
    assert asked["mask"] == "all"


def test_the_same_sizes_are_timed_once(monkeypatch):
    """Breaks when every compressor of a process times attention anew, or timings of other sizes are
    used.
    """
    asked = []

    def fastest(**sizes):
        asked.append(sizes)
        return kernels.Choice("cudnn", {"xla": 2e-3, "cudnn": 5e-4}, {})

    monkeypatch.setattr(kernels, "fastest", fastest)
    first = choose("auto", on("gpu"))
    assert (
        choose("auto", on("gpu")) == choose("auto", on("gpu"), "bfloat16") == first
        and len(asked) == 1
    )
    for other in (
        {"mesh": on("gpu", devices=2)},
        {"dtype": jnp.float16},
        {"model": dataclasses.replace(TINY, windows=(5, 0))},
        {"mask": "slots"},
    ):
        assert choose("auto", **{"mesh": on("gpu"), **other}) == first
    assert len(asked) == 5


def test_auto_tells_what_the_device_refused(monkeypatch):
    """Breaks when a kernel that fails to compile looks merely slower."""
    monkeypatch.setattr(
        kernels,
        "fastest",
        lambda **_: kernels.Choice("xla", {"xla": 1e-3}, {"cudnn": "cuDNN is not detected"}),
    )
    name, (line,) = choose("auto", on("gpu"))
    assert name == "xla" and line.endswith("xla 1.00 ms, cudnn: cuDNN is not detected")


@pytest.mark.parametrize(
    ("asked", "mesh", "dtype", "message"),
    [
        (
            "cudnn",
            on("cpu"),
            jnp.bfloat16,
            "attention is 'cudnn', but cudnn needs a gpu; the device is a cpu; choose xla, or auto",
        ),
        ("cudnn", on("gpu"), jnp.float32, "the dtype is float32"),
        (
            "splash",
            on("tpu", tensor=4, devices=4),
            jnp.bfloat16,
            "4 query heads are split over 4 devices, 2 key/value heads cannot be",
        ),
    ],
    ids=["cpu", "dtype", "heads"],
)
def test_what_cannot_be_had_is_refused_with_the_reason(asked, mesh, dtype, message):
    with pytest.raises(ValueError, match=message):
        choose(asked, mesh, dtype)


def test_splash_is_refused_for_a_mask_that_it_does_not_know():
    """Breaks when memory tokens that see each other are computed as causal ones."""
    with pytest.raises(ValueError, match="causal masks and full ones; the encoder's mask is slots"):
        choose("splash", on("tpu"), mask="slots")
    assert choose("splash", on("tpu"), mask="all")[0] == "splash"


def test_auto_on_a_mesh_that_no_kernel_can_be_split_over(monkeypatch):
    monkeypatch.setattr(kernels, "fastest", None)
    assert choose("auto", on("tpu", tensor=4, devices=4)) == ("xla", [])
