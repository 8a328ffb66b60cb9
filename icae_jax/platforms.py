"""Which accelerators this machine has, looked up without JAX, which reads its settings when it is imported."""

import glob
import importlib.metadata
import importlib.util
import os
import sys

# NVIDIA's, also in WSL; AMD's; graphics in general.
_GPUS = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/dri/*")


def tpu_chips() -> list[str]:
    """The device files of this machine's TPU chips."""
    return glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")


def without_absent_tpus() -> dict[str, str]:
    """Environment variables that have JAX, not yet imported, use the CPU alone where libtpu is installed and no accelerator is there.

    JAX would start libtpu wherever it finds it: ten lines of errors, and a lock that keeps other processes from compiling for TPUs. A
    JAX_PLATFORMS or JAX_FORCE_TPU_INIT of the user's own is left alone, and so is JAX where a GPU or a plugin for something else may be.
    """
    if "JAX_PLATFORMS" in os.environ or "JAX_FORCE_TPU_INIT" in os.environ or importlib.util.find_spec("libtpu") is None:
        return {}
    plugins = {point.name for point in importlib.metadata.entry_points(group="jax_plugins")}
    others = [name for name in plugins if not name.startswith(("xla_cuda", "xla_rocm"))]
    return {} if tpu_chips() or others or any(glob.glob(pattern) for pattern in _GPUS) else {"JAX_PLATFORMS": "cpu"}


def quiet_libraries() -> None:
    """Tells libraries, which read it as they are imported, what they need not look for or say here."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses PyTorch, which is not needed
    if "jax" not in sys.modules:  # else it has read its settings
        os.environ.update(without_absent_tpus())
