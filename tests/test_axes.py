"""Constraints on logical axes: what is split, and that a mesh without rules is an error."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from conftest import TINY, eight_devices

from icae_jax.models import axes, llama
from icae_jax.runtime import sharding


def test_constrain_does_nothing_on_a_single_device():
    x = jnp.ones((4, 6))
    assert axes.constrain(x, "batch", None) is x


def test_a_mesh_without_rules_is_refused():
    """Breaks when a program is traced under a mesh that silently drops its constraints."""
    with eight_devices():
        mesh = sharding.make_mesh(devices=jax.devices()[:4])
        with (
            jax.set_mesh(mesh),
            pytest.raises(RuntimeError, match=r"without logical axis rules.*Placement.active"),
        ):
            axes.constrain(jnp.ones((4, 6)), "batch", None)
        with jax.set_mesh(mesh), nn.logical_axis_rules(axes.UNCONSTRAINED):
            x = jnp.ones((4, 6))
            assert axes.constrain(x, "batch", None) is x


def test_constrain_splits_what_its_axes_divide():
    """Breaks when a constraint is lost, or a dimension is split that the mesh does not divide."""
    with eight_devices():
        placement = sharding.Placement(sharding.make_mesh(devices=jax.devices()[:4]), TINY)
        with placement.active():
            split, whole = jax.jit(lambda *xs: tuple(axes.constrain(x, "batch", None) for x in xs))(
                jnp.ones((8, 6)), jnp.ones((3, 6))
            )
    assert split.sharding.spec[0] == ("data", "fsdp") and len(split.addressable_shards) == 4
    assert whole.sharding.is_fully_replicated


@pytest.mark.parametrize("path", ["layers self_attn q_proj kernel", "embed", "norm scale"])
def test_every_parameter_has_as_many_axes_as_dimensions(path):
    """Breaks when a parameter's axes are those of another."""
    keys = tuple(path.split())
    shape = llama.param_shapes(TINY)
    for key in keys:
        shape = shape[key]
    assert len(axes.logical_axes(keys)) in (0, len(shape.shape))
