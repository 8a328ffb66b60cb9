"""Model FLOPs utilisation (MFU): the share of the chips' peak that the model's own FLOPs take."""

from jaxtyping import PyTree

from icae_jax.performance import chips, flops
from icae_jax.training.compressor_task import CompressorTask


def mfu(least_flops: float, seconds: float, chip: chips.Chip | None, devices: int) -> float | None:
    """MFU (arXiv 2204.02311, appendix B) of work done in `seconds` on all `devices` together.

    None for a chip whose peak is unknown.
    """
    return None if chip is None else least_flops / (seconds * devices * chip.bf16_flops)


class Meter:
    """Measures the MFU of a compressor's training."""

    def __init__(self, task: CompressorTask):
        mesh = task.placement.mesh
        self._task, self._devices = task, mesh.size
        self._chip = chips.find(mesh.devices.flat[0].device_kind)

    def least_flops(self, batch: PyTree) -> int:
        """The fewest FLOPs that a step on a (global) batch of these shapes takes."""
        t = self._task
        return flops.least(
            *(t.model.config, t.config.lora, t.compression, batch),
            heads=t.heads,
            before=t.before,
            teacher_lora=t.teacher_lora,
        ).total

    def utilisation(self, least_flops: float, seconds: float) -> float | None:
        """The MFU of so many FLOPs in so much time; None for a chip whose peak is unknown."""
        return mfu(least_flops, seconds, self._chip, self._devices)
