"""Model FLOPs utilisation."""

import pytest

from icae_jax.performance import chips, utilisation
from icae_jax.training import metrics


def test_mfu():
    """Breaks when a device is not counted, or a chip of unknown peak gets a number."""
    chip = chips.Chip("toy", bf16_flops=100.0, hbm_bytes=1, hbm_bandwidth=1.0, link_bandwidth=1.0)
    assert utilisation.mfu(600, 2.0, chip, 4) == pytest.approx(0.75)
    assert utilisation.mfu(600, 2.0, None, 4) is None
    assert "mfu" in metrics.WALL_CLOCK
