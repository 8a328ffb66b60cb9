"""Published peaks of accelerators: what is found, and that the figures fit each other."""

import jax
import pytest

from icae_jax.performance import chips


@pytest.mark.parametrize(
    ("kind", "flops", "gib", "bandwidth", "links"),
    [
        ("TPU v4", 275e12, 32, 1200e9, 6 * 50e9),
        ("TPU v5 lite", 197e12, 16, 819e9, 1600e9 / 8),
        ("TPU v5", 459e12, 95, 2765e9, 4800e9 / 8),
        ("TPU v6 lite", 918e12, 32, 1600e9, 3200e9 / 8),
        ("NVIDIA A100-SXM4-80GB", 624e12 / 2, 80, 2039e9, 600e9 / 2),
        ("NVIDIA H100 80GB HBM3", 1979e12 / 2, 80, 3350e9, 900e9 / 2),
        ("NVIDIA H100 PCIe", 1513e12 / 2, 80, 2000e9, 128e9 / 2),
        ("NVIDIA H200", 1979e12 / 2, 141, 4800e9, 900e9 / 2),
        ("NVIDIA B200", 4500e12 / 2, 180, 8000e9, 1800e9 / 2),
    ],
)
def test_what_vendors_publish(kind, flops, gib, bandwidth, links):
    """Breaks when a figure with sparsity, of both directions, in bits or in another unit gets into
    the table.
    """
    chip = chips.find(kind)
    assert chip.kind == kind
    assert chip.bf16_flops == pytest.approx(flops, rel=1e-3)
    assert (chip.hbm_bytes, chip.hbm_bandwidth, chip.link_bandwidth) == (
        gib * 2**30,
        bandwidth,
        links,
    )


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda chip: chip.kind)
def test_units(chip):
    """Breaks when an entry lacks its thousands, or holds two figures in each other's place."""
    assert 1e14 < chip.bf16_flops < 1e16 and 1e10 < chip.hbm_bytes < 1e12
    assert 100 < chip.bf16_flops / chip.hbm_bandwidth < 600  # FLOPs a byte
    assert chip.hbm_bandwidth > 2 * chip.link_bandwidth > 0


def test_both_names_of_a_chip_and_none_of_another():
    """Breaks when a spelling of jax's is missing, or a device that is not in the table passes for
    one that is.
    """
    for one, other in (
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
    ):
        assert vars(chips.find(one)) | {"kind": other} == vars(chips.find(other))
    for kind in ("cpu", "", "TPU v5 litepod", "NVIDIA H100", jax.devices("cpu")[0].device_kind):
        assert chips.find(kind) is None
