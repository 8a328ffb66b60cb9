"""Published peaks of accelerators, by the name that JAX gives a device."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """The published peaks of one JAX device.

    Attributes:
        kind: its `device_kind`; a device of TPU v4 and v5p is a whole chip of two cores.
        bf16_flops: dense bfloat16 matmuls, FLOP/s; a multiplication and an addition are two.
        hbm_bytes: memory; programs get a little less, since the runtime keeps some.
        hbm_bandwidth: between memory and cores, bytes/s.
        link_bandwidth: to other chips over all links together, bytes/s in one direction: half of
            the "bidirectional" figures that vendors print. Google's "Gbps" of a chip are in one
            direction: 1600 of TPU v5e are 200e9 bytes/s, over four links.
    """

    kind: str
    bf16_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float


# Device kinds, FLOP/s, GiB, bytes/s of memory, bytes/s of links. Vendors write "GB" for capacities
# in GiB (an H200 of "141 GB" reports 143,771 MiB), and NVIDIA's datasheets give FLOP/s
# "with sparsity", twice those here.
_PUBLISHED = (
    # cloud.google.com/tpu/docs/v4; links: arXiv 2304.01433, six of 50 GB/s
    (("TPU v4",), 275e12, 32, 1200e9, 300e9),
    # cloud.google.com/tpu/docs/v5e (links: 1600 Gbps, 400 GBps bidirectional)
    (("TPU v5 lite", "TPU v5e"), 197e12, 16, 819e9, 200e9),
    # cloud.google.com/tpu/docs/v5p (links: 4800 Gbps, 1200 GBps bidirectional)
    (("TPU v5", "TPU v5p"), 459e12, 95, 2765e9, 600e9),
    # cloud.google.com/tpu/docs/v6e (links: 3200 Gbps, 800 GBps bidirectional)
    (("TPU v6 lite", "TPU v6e"), 918e12, 32, 1600e9, 400e9),
    # NVIDIA A100 datasheet. Cards: PCIe 4.0 x16, since an NVLink bridge joins two at most
    (("NVIDIA A100-SXM4-40GB",), 312e12, 40, 1555e9, 300e9),
    (("NVIDIA A100-SXM4-80GB",), 312e12, 80, 2039e9, 300e9),
    (("NVIDIA A100-PCIE-40GB",), 312e12, 40, 1555e9, 32e9),
    (("NVIDIA A100 80GB PCIe",), 312e12, 80, 1935e9, 32e9),
    # NVIDIA H100 datasheet: 1,979 and 1,513 TFLOPS with sparsity. Cards: PCIe 5.0 x16
    (("NVIDIA H100 80GB HBM3",), 989e12, 80, 3350e9, 450e9),
    (("NVIDIA H100 PCIe",), 756e12, 80, 2000e9, 64e9),
    # NVIDIA H200 datasheet (SXM): 141 GB
    (("NVIDIA H200",), 989e12, 141, 4800e9, 450e9),
    # NVIDIA DGX B200 datasheet: 1,440 GB and 64 TB/s of eight; 4.5 PFLOPS each with sparsity;
    # NVLink 1.8 TB/s
    (("NVIDIA B200",), 2250e12, 180, 8000e9, 900e9),
)
CHIPS = {
    kind: Chip(kind, flops, gib * 2**30, bandwidth, links)
    for kinds, flops, gib, bandwidth, links in _PUBLISHED
    for kind in kinds
}


def find(device_kind: str) -> Chip | None:
    """The peaks of a device kind; None for one that is not in the table, such as a CPU."""
    return CHIPS.get(device_kind)
