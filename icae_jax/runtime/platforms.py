"""Which accelerators this machine has and what is set for JAX, looked up without JAX, which reads its settings when it is imported."""

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
    if (
        "JAX_PLATFORMS" in os.environ
        or "JAX_FORCE_TPU_INIT" in os.environ
        or importlib.util.find_spec("libtpu") is None
    ):
        return {}
    plugins = {point.name for point in importlib.metadata.entry_points(group="jax_plugins")}
    others = [name for name in plugins if not name.startswith(("xla_cuda", "xla_rocm"))]
    return (
        {}
        if tpu_chips() or others or any(glob.glob(pattern) for pattern in _GPUS)
        else {"JAX_PLATFORMS": "cpu"}
    )


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
    """Tells libraries, which read it as they are imported, what they need not look for or say here."""
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # it misses PyTorch, which is not needed
    if "jax" not in sys.modules:  # else it has read its settings
        os.environ.update(without_absent_tpus())


# ------------------------------------------------------------------------------------------------------------ settings

# What JAX calls a platform: what to install for it.
_KNOWN = {
    "cpu": "", "tpu": "pip install 'icae_jax[tpu]'", "cuda": "pip install 'icae_jax[gpu]'", "gpu": "pip install 'icae_jax[gpu]'",
    "rocm": "install AMD's jax-rocm plugins", "oneapi": "install Intel's plugin of JAX",
}  # fmt: skip
# What XLA's client does first of all; it ends a process that has a flag which it does not know.
_TRY_FLAGS = "import jaxlib.xla_client as client; client.make_cpu_client()"


def _plugins() -> set[str]:
    """The names of JAX's plugins that are installed: their entry points' and modules'."""
    names = {point.name for point in importlib.metadata.entry_points(group="jax_plugins")}
    spec = importlib.util.find_spec("jax_plugins")
    return names | {
        module.name
        for module in pkgutil.iter_modules(spec.submodule_search_locations or [] if spec else [])
    }


def _check_platforms(variable: str, value: str) -> None:
    """UserError where a list of platforms names one that JAX does not know, or none that is installed."""
    plugins, usable, missing = _plugins(), [], {}
    for name in value.split(","):
        cuda, rocm = (
            any(plugin.startswith(f"xla_{kind}") for plugin in plugins) for kind in ("cuda", "rocm")
        )
        there = {
            "cpu": True,
            "tpu": importlib.util.find_spec("libtpu") is not None,
            "cuda": cuda,
            "rocm": rocm,
            "gpu": cuda or rocm,
        }
        others = [plugin for plugin in plugins if not plugin.startswith(("xla_cuda", "xla_rocm"))]
        if name not in _KNOWN and not others:
            near = difflib.get_close_matches(name.strip().lower(), _KNOWN, 1, 0.5)
            meant = f"; is {near[0]} meant?" if near else f"; it knows {', '.join(_KNOWN)}."
            raise UserError(
                f"${variable} is {value!r}: JAX knows no platform {name!r}{meant} Without the variable JAX chooses itself"
            )
        if there.get(name, bool(others)):
            usable.append(name)
        elif name == "cuda":  # which alone JAX passes over in a list
            missing[name] = _KNOWN[name]
        else:
            usable, missing = [], {name: _KNOWN[name]}
            break
    if not usable:
        ((name, remedy),) = list(missing.items())[:1]
        raise UserError(
            f"${variable} is {value!r}: JAX's plugin for {name} is not installed; {remedy}, or unset the variable"
        )


def _check_flags(flags: str) -> None:
    """UserError where XLA would end the process for a flag in $XLA_FLAGS: tried in another process."""
    tried = subprocess.run(
        [sys.executable, "-c", _TRY_FLAGS], capture_output=True, text=True, errors="replace"
    )
    wrong = re.search(r"parse_flags_from_env.*?\] (.*)", tried.stderr)
    if tried.returncode and wrong:
        raise UserError(
            f"$XLA_FLAGS is {flags!r}, and XLA ends every process for it: {wrong[1]}; take it out, or unset the variable"
        )


def check_settings() -> None:
    """UserError where $JAX_PLATFORMS, or $XLA_FLAGS, would keep JAX from every device."""
    for variable in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        if os.environ.get(variable):
            _check_platforms(variable, os.environ[variable])
    if os.environ.get("XLA_FLAGS"):
        _check_flags(os.environ["XLA_FLAGS"])


def check() -> None:
    """UserError where a variable of the environment would end in JAX's own error. To be called before JAX is imported; later it does
    nothing.
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
            f"${variable} is {os.environ[variable]!r}, which JAX does not take ({error}); correct it, or unset it"
        ) from error


def absent_devices(error: BaseException) -> str:
    """What to say where JAX was told to use a platform of which this machine has no device; "" of any other error, such as of a device that
    is there and does not answer, or that another process has.
    """
    told = re.match(r"Unable to initialize backend '(\w+)': (.*)", str(error), re.DOTALL)
    if not isinstance(error, RuntimeError) or not os.environ.get("JAX_PLATFORMS"):
        return ""
    value = os.environ["JAX_PLATFORMS"]
    if told and re.search(
        r"NOT_FOUND|[Nn]o visible|NO_DEVICE|[Nn]o .{0,20}devices? (found|detected)|not in the list of known",
        told[2],
    ):
        why = re.sub(r"\s*\(set JAX_PLATFORMS.*", "", told[2]).strip().splitlines()[0]
        return f"$JAX_PLATFORMS is {value!r}, and there is no such device here ({why}); run it where there is one, or unset the variable"
    return ""
