"""The cache of compiled programs on disk, so that a command started again compiles nothing."""

import contextlib
import os
import pathlib
import platform
import sys
import zlib

from icae_jax import cache
from icae_jax.errors import UserError
from icae_jax.runtime import platforms


def processor() -> str:
    """Names the kind of processor, whose instructions a program compiled for CPUs consists of."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"


def keep_compiled() -> None:
    """Has JAX keep compiled programs in `cache.folder`/compiled, a folder per processor kind.

    The user's own JAX_COMPILATION_CACHE_DIR is left alone, also an empty one, which keeps nothing.
    One that cannot be written is read only, or given up: JAX would warn of every program.
    """
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if own is None:
        folder = None
        with contextlib.suppress(UserError):  # no folder can be written: nothing is kept
            folder = cache.folder().absolute() / "compiled" / processor()
        if folder and cache.can_write(folder):
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
            cache.bound_compiled(folder)
    elif own and "://" not in own and not cache.can_write(pathlib.Path(own)):
        if os.path.isdir(own) and os.access(own, os.R_OK | os.X_OK):
            # Programs are read from there, and none is added.
            os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
        else:
            del os.environ["JAX_COMPILATION_CACHE_DIR"]
            print(
                f"$JAX_COMPILATION_CACHE_DIR {own}: cannot be written; "
                "programs are kept with the other caches",
                file=sys.stderr,
            )
            keep_compiled()


def set_up() -> None:
    """Sets what JAX and other libraries read when they are imported; call it before."""
    platforms.quiet_libraries()
    keep_compiled()
