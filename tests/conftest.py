import os
import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = pathlib.Path(os.environ.get("ICAE_SHARED", ROOT.parent / "shared"))
GOLDEN = pathlib.Path(os.environ.get("ICAE_GOLDEN", SHARED / "golden"))


def shared(path):
    """A file of the reference data beside the checkout; the test skips where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs {SHARED / path}, which is not here")
    return SHARED / path
