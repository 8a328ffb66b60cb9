"""How much memory this process takes at its peak."""

import contextlib
import ctypes
import gc
import pathlib
import resource
import sys

import jax

_STATUS, _RESET = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


class Peak:
    """The peak of the resident memory (CPUs) or of the fullest device's; bytes.

    On Linux the former starts anew when this is made, and with `start_again`; elsewhere a peak is
    that of the whole process.

    Attributes:
      before: what was taken when it was made.
    """

    def __init__(self):
        self._on_cpu = jax.default_backend() == "cpu"
        self.start_again()
        self.before = self._of("bytes_in_use", "VmRSS")

    def start_again(self) -> None:
        """Gives back what is free, and forgets the peak so far."""
        gc.collect()
        if self._on_cpu and sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):  # another C library; a container
                ctypes.CDLL(None).malloc_trim(0)
                _RESET.write_text("5")

    def read(self) -> int:
        """The peak."""
        return self._of("peak_bytes_in_use", "VmHWM")

    def _of(self, of_device, of_process):
        if not self._on_cpu:
            return max((d.memory_stats() or {}).get(of_device, 0) for d in jax.local_devices())
        if _STATUS.exists():
            lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
            return int(lines[of_process].split()[0]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
