"""That annotations are checked while the tests run."""

import jax.numpy as jnp
import pytest
from beartype.roar import BeartypeCallHintParamViolation
from conftest import TINY
from jaxtyping import TypeCheckError

from icae_jax import errors
from icae_jax.inference.memory_file import Origin
from icae_jax.models import rope


def test_types_of_functions_without_arrays():
    """Breaks when the hook is not in force, also for the fields of a dataclass."""
    with pytest.raises(BeartypeCallHintParamViolation, match="name=3"):
        errors.field(3)
    with pytest.raises(BeartypeCallHintParamViolation, match="compression=1"):
        Origin(1, "base", "adapter", "folder")


def test_shapes_of_arrays():
    """Breaks when sizes with one name may differ between arguments, or dtypes are not checked."""
    keys = jnp.zeros((2, 1, 3, 2, 8))
    rotated = rope.rotate_keys(TINY, keys, jnp.zeros((1, 3), int))
    assert rotated.shape == keys.shape
    for positions in (jnp.zeros((1, 4), int), jnp.zeros((1, 3))):
        with pytest.raises(TypeCheckError, match="positions_BP"):
            rope.rotate_keys(TINY, keys, positions)
