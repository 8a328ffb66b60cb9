"""Accelerators and JAX's settings, checked without importing JAX, which reads them on import."""

import difflib
import glob
import importlib.metadata
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys

from icae_jax.errors import UserError

# Devices of NVIDIA (the third under WSL), AMD, and graphics in general.
_GPUS = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/dri/*")


def tpu_chips() -> list[str]:
    """The device files of this machine's TPU chips."""
    return glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")


def without_absent_tpus() -> dict[str, str]:
    """Environment variables that keep JAX from starting libtpu on a machine without accelerators.

    Otherwise JAX starts libtpu wherever it is installed: ten lines of errors, and a lock that keeps
    other processes from compiling for TPUs. Empty if the user has set JAX_PLATFORMS or
    JAX_FORCE_TPU_INIT, or if a GPU or another plugin may be there.
    """
    if "JAX_PLATFORMS" in os.environ or "JAX_FORCE_TPU_INIT" in os.environ:
        return {}
    if importlib.util.find_spec("libtpu") is None:
        return {}
    plugins = {point.name for point in importlib.metadata.entry_points(group="jax_plugins")}
    if tpu_chips() or _other_plugins(plugins) or any(glob.glob(pattern) for pattern in _GPUS):
        return {}
    return {"JAX_PLATFORMS": "cpu"}


def cpu_only() -> bool:
    """Whether JAX, not yet imported, will use the CPU: by its settings, or for lack of devices."""
    asked = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
    if asked:
        return asked == "cpu"
    plugins = {point.name for point in importlib.metadata.entry_points(group="jax_plugins")}
    gpus = {name for name in plugins if name.startswith(("xla_cuda", "xla_rocm"))}
    gpu = gpus and any(glob.glob(pattern) for pattern in _GPUS)
    return not (tpu_chips() or plugins - gpus or gpu)


def quiet_libraries() -> None:
    """Sets what libraries read on import, so that they neither look for nor warn of the absent."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # PyTorch is not needed
    if "jax" not in sys.modules:  # otherwise it has read its settings
        os.environ.update(without_absent_tpus())


# ------------------------------------------------------------------------------------ settings

# JAX's name of a platform -> how to install it.
_KNOWN = {
    "cpu": "",
    "tpu": "pip install 'icae_jax[tpu]'",
    "cuda": "pip install 'icae_jax[gpu]'",
    "gpu": "pip install 'icae_jax[gpu]'",
    "rocm": "install AMD's jax-rocm plugins",
    "oneapi": "install Intel's plugin of JAX",
}
# XLA's client ends its process over an unknown flag.
_TRY_FLAGS = "import jaxlib.xla_client as client; client.make_cpu_client()"


def _plugins() -> set[str]:
    """The names of the installed JAX plugins, from entry points and modules."""
    names = {point.name for point in importlib.metadata.entry_points(group="jax_plugins")}
    spec = importlib.util.find_spec("jax_plugins")
    paths = spec.submodule_search_locations or [] if spec else []
    return names | {module.name for module in pkgutil.iter_modules(paths)}


def _other_plugins(plugins: set[str]) -> list[str]:
    """The plugins for something else than GPUs."""
    return [name for name in plugins if not name.startswith(("xla_cuda", "xla_rocm"))]


def _check_platforms(variable: str, value: str) -> None:
    """UserError if a list of platforms has one that JAX does not know, or none is installed."""
    plugins = _plugins()
    others = _other_plugins(plugins)
    cuda = any(name.startswith("xla_cuda") for name in plugins)
    rocm = any(name.startswith("xla_rocm") for name in plugins)
    installed = {
        "cpu": True,
        "tpu": importlib.util.find_spec("libtpu") is not None,
        "cuda": cuda,
        "rocm": rocm,
        "gpu": cuda or rocm,
    }
    usable, missing = False, []
    for name in value.split(","):
        if name not in _KNOWN and not others:
            near = difflib.get_close_matches(name.strip().lower(), _KNOWN, 1, 0.5)
            hint = f"; is {near[0]} meant?" if near else f"; it knows {', '.join(_KNOWN)}."
            raise UserError(
                f"${variable} is {value!r}: JAX knows no platform {name!r}{hint} "
                "Without the variable JAX chooses itself"
            )
        if installed.get(name, bool(others)):
            usable = True
            continue
        missing.append(name)
        if name != "cuda":  # the only one that JAX skips if it is not installed
            usable, missing = False, [name]
            break
    if not usable:
        remedy = _KNOWN[missing[0]]
        raise UserError(
            f"${variable} is {value!r}: JAX's plugin for {missing[0]} is not installed; {remedy}, "
            "or unset the variable"
        )


def _check_flags(flags: str) -> None:
    """UserError if XLA would end this process over a flag in $XLA_FLAGS; tried in another one."""
    trial = subprocess.run(
        [sys.executable, "-c", _TRY_FLAGS], capture_output=True, text=True, errors="replace"
    )
    wrong = re.search(r"parse_flags_from_env.*?\] (.*)", trial.stderr)
    if trial.returncode and wrong:
        raise UserError(
            f"$XLA_FLAGS is {flags!r}, and XLA ends every process for it: {wrong[1]}; "
            "take it out, or unset the variable"
        )


def check_settings() -> None:
    """UserError if $JAX_PLATFORMS, or $XLA_FLAGS, would keep JAX from every device."""
    for variable in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        if os.environ.get(variable):
            _check_platforms(variable, os.environ[variable])
    if os.environ.get("XLA_FLAGS"):
        _check_flags(os.environ["XLA_FLAGS"])


def check() -> None:
    """Imports JAX; UserError if an environment variable makes that fail.

    Does nothing if JAX is imported already.
    """
    if "jax" in sys.modules:
        return
    check_settings()
    try:
        import jax  # noqa: F401
    except ValueError as error:
        named = re.search(r"(?:environment '|JAX flag )(\w+)", str(error))
        variable = named[1].upper() if named else ""
        if variable not in os.environ:
            raise
        raise UserError(
            f"${variable} is {os.environ[variable]!r}, which JAX does not take ({error}); "
            "correct it, or unset it"
        ) from error


def absent_devices(error: BaseException) -> str:
    """The message if $JAX_PLATFORMS asks for a device that this machine lacks, else "".

    Other errors, such as of a device that does not respond or that another process holds, give "".

    Args:
        error: what JAX raised.
    """
    failed = re.match(r"Unable to initialize backend '(\w+)': (.*)", str(error), re.DOTALL)
    value = os.environ.get("JAX_PLATFORMS")
    if not isinstance(error, RuntimeError) or not value or not failed:
        return ""
    absent = (
        "NOT_FOUND|[Nn]o visible|NO_DEVICE|[Nn]o .{0,20}devices? (found|detected)"
        "|not in the list of known"
    )
    if not re.search(absent, failed[2]):
        return ""
    why = re.sub(r"\s*\(set JAX_PLATFORMS.*", "", failed[2]).strip().splitlines()[0]
    return (
        f"$JAX_PLATFORMS is {value!r}, and there is no such device here ({why}); "
        "run it where there is one, or unset the variable"
    )
