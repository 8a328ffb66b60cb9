"""Compiled programs kept on disk, so that a command started again compiles nothing."""

import contextlib
import os
import pathlib
import platform
import sys
import zlib

from icae_jax import cache
from icae_jax.errors import UserError
from icae_jax.runtime import platforms


def keep_compiled():
    """Lets JAX keep compiled programs on disk, so that a command started again compiles nothing: in `cache.folder`/compiled, a folder
    for each kind of processor, whose instructions a program for CPUs is made of.

    JAX_COMPILATION_CACHE_DIR of the user's own is left alone, empty too, which keeps nothing; but JAX would warn of every program where it
    cannot be written.
    """
    cpus = pathlib.Path("/proc/cpuinfo")
    flags = (
        next(
            (
                line
                for line in cpus.read_text().splitlines()
                if line.startswith(("flags", "Features"))
            ),
            "",
        )
        if cpus.exists()
        else ""
    )
    kind = f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if own is None:
        folder = None
        with contextlib.suppress(UserError):  # no folder can be written: nothing is kept
            folder = cache.folder().absolute() / "compiled" / kind
        if folder and cache.can_write(folder):
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
            cache.bound_compiled(folder)
    elif own and "://" not in own and not cache.can_write(pathlib.Path(own)):
        if os.path.isdir(own) and os.access(own, os.R_OK | os.X_OK):
            os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = (
                "1e9"  # programs are read from there, and none is added
            )
        else:
            del os.environ["JAX_COMPILATION_CACHE_DIR"]
            print(
                f"$JAX_COMPILATION_CACHE_DIR {own}: cannot be written; programs are kept with the other caches",
                file=sys.stderr,
            )
            keep_compiled()


def set_up():
    """Tells libraries what they read as they are imported: every program calls it before anything imports JAX."""
    platforms.quiet_libraries()
    keep_compiled()
