"""Accelerators and JAX's settings: JAX is told that there are none before it looks, and nothing
else.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types

import pytest
from conftest import ROOT, TINY, random_trained

import icae_jax
from icae_jax import errors
from icae_jax.compression.config import CompressionConfig
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.models import lora
from icae_jax.objectives import targets
from icae_jax.runtime import platforms


@pytest.mark.parametrize(
    ("there", "environment", "told"),
    [
        ({"libtpu"}, {}, {"JAX_PLATFORMS": "cpu"}),
        (
            {"libtpu", "xla_cuda12", "xla_rocm7"},
            {},
            {"JAX_PLATFORMS": "cpu"},
        ),  # as on a cluster's login node
        (set(), {}, {}),
        ({"libtpu", "/dev/accel0"}, {}, {}),
        ({"libtpu", "/dev/vfio/0"}, {}, {}),
        ({"libtpu", "/dev/nvidia0"}, {}, {}),
        ({"libtpu", "/dev/nvidiactl"}, {}, {}),
        ({"libtpu", "/dev/kfd"}, {}, {}),
        ({"libtpu", "/dev/dxg"}, {}, {}),
        ({"libtpu", "some_other_plugin"}, {}, {}),
        ({"libtpu"}, {"JAX_PLATFORMS": ""}, {}),
        ({"libtpu"}, {"JAX_PLATFORMS": "tpu"}, {}),
        ({"libtpu"}, {"JAX_FORCE_TPU_INIT": "1"}, {}),
    ],
    ids=lambda value: str(sorted(value)),  # the same in every process
)
def test_what_jax_is_told(there, environment, told, monkeypatch):
    """Breaks when libtpu starts without a TPU, or a GPU, a TPU, another plugin's device or the
    user's choice is hidden.
    """
    for name in ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    matches = lambda pattern: [  # noqa: E731
        path
        for path in there
        if path.startswith("/") and platforms.glob.fnmatch.fnmatch(path, pattern)
    ]
    plugins = [
        types.SimpleNamespace(name=name) for name in there if not name.startswith(("/", "libtpu"))
    ]
    monkeypatch.setattr(platforms.glob, "glob", matches)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins)
    assert platforms.without_absent_tpus() == told


def test_a_person_sees_only_what_concerns_them(tiny_base, tmp_path):
    """Breaks when a command prints libtpu's errors on a machine without a TPU."""
    pytest.importorskip("libtpu", reason="needs libtpu, which is not installed")
    if platforms.tpu_chips():
        pytest.skip("there is a TPU here")
    base = bases.load_base(tiny_base)
    compression = CompressionConfig(k=3, rate=4, layout="sequential")
    template = targets.make_template("plain", base.tokenizer)
    config = lora.LoraConfig(4, 2.0, targets=("q_proj", "v_proj"))
    adapter = adapters.Adapter(
        compression, config, template, random_trained(TINY, 3), base.path, base.fingerprint
    )
    adapters.save_adapter(tmp_path / "adapter", adapter)
    # Otherwise another process's libtpu lock would keep this one from starting it, and quiet.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment.pop("JAX_PLATFORMS")
    command = [
        sys.executable,
        "-m",
        "icae_jax",
        "inspect",
        str(tmp_path / "adapter"),
        "--base",
        str(tiny_base),
    ]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert out.returncode == 0 and "fits" in out.stdout and out.stderr == ""


def test_programs_set_up_before_they_import_jax():
    """Breaks when a launcher's program imports JAX before setting the compile cache, which JAX
    reads then.
    """
    code = (
        "import contextlib, sys; from icae_jax.runtime import compiled\n"
        "compiled.set_up = lambda: sys.exit(print('jax' in sys.modules))\n"
        "sys.path.insert(0, 'launch/experiments')\n"
        "for name in ('evaluation', 'methods'):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        __import__(name)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert out.stdout.split() == ["False", "False"], out.stderr


def test_loading_an_adapter_in_python_is_as_quiet(tmp_path, monkeypatch):
    """Breaks when `icae_jax.load` lets transformers warn that PyTorch, which is not needed, is
    missing.
    """
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)
    with pytest.raises(errors.UserError):
        icae_jax.load(tmp_path / "absent")
    assert os.environ.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS")


def refusal(monkeypatch, environment, installed=()):
    """The message of `platforms.check` for an environment, or "". installed: plugins of JAX, and
    libtpu.
    """
    for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_FLAGS"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        platforms, "_plugins", lambda: {name for name in installed if name != "libtpu"}
    )
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name if name in installed else None
    )
    try:
        platforms.check_settings()
    except errors.UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("value", "installed", "said"),
    [
        ("", (), ""),
        ("cpu", (), ""),
        ("cuda", ("xla_cuda13",), ""),
        ("gpu", ("xla_cuda12",), ""),
        ("gpu", ("xla_rocm7",), ""),
        ("rocm", ("xla_rocm7",), ""),
        ("tpu", ("libtpu",), ""),
        ("cuda,cpu", (), ""),  # JAX passes over CUDA alone
        ("cpu,cuda", (), ""),
        ("metal", ("metal",), ""),
        ("cuda", (), "JAX's plugin for cuda is not installed; pip install 'icae_jax[gpu]'"),
        ("gpu", ("libtpu",), "JAX's plugin for gpu is not installed; pip install 'icae_jax[gpu]'"),
        (
            "cuda",
            ("xla_rocm7",),
            "JAX's plugin for cuda is not installed; pip install 'icae_jax[gpu]'",
        ),
        (
            "tpu",
            ("xla_cuda13",),
            "JAX's plugin for tpu is not installed; pip install 'icae_jax[tpu]'",
        ),
        ("tpu,cpu", (), "JAX's plugin for tpu is not installed; pip install 'icae_jax[tpu]'"),
        ("rocm", (), "JAX's plugin for rocm is not installed"),
        ("cud", (), "JAX knows no platform 'cud'; is cuda meant?"),
        ("CPU", (), "JAX knows no platform 'CPU'; is cpu meant?"),
        ("cpu, tpu", ("libtpu",), "JAX knows no platform ' tpu'; is tpu meant?"),
        ("abacus", (), "JAX knows no platform 'abacus'; it knows cpu, tpu, cuda"),
    ],
)
def test_a_platform_that_cannot_be_had_is_told(value, installed, said, monkeypatch):
    """Breaks when a missing plugin or a misspelt platform ends in JAX's traceback, or a usable one
    is refused.
    """
    told = refusal(monkeypatch, {"JAX_PLATFORMS": value}, installed)
    assert (
        told == ""
        if not said
        else told.startswith(f"$JAX_PLATFORMS is {value!r}: {said}") and "\n" not in told
    )


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("JAX_PLATFORMS", "cuda", "pip install 'icae_jax[gpu]'"),
        ("JAX_ENABLE_X64", "maybe", "$JAX_ENABLE_X64 is 'maybe', which JAX does not take"),
        ("JAX_DEBUG_NANS", "", "$JAX_DEBUG_NANS is '', which JAX does not take"),
        (
            "JAX_DEFAULT_MATMUL_PRECISION",
            "most",
            "$JAX_DEFAULT_MATMUL_PRECISION is 'most', which JAX does not take",
        ),
        (
            "XLA_FLAGS",
            "--xla_no_such_flag=1",
            "XLA ends every process for it: Unknown flag in XLA_FLAGS: --xla_no_such_flag=1",
        ),
        (
            "XLA_FLAGS",
            "no_such_file",
            'XLA ends every process for it: Could not open file "no_such_file"',
        ),
    ],
)
def test_a_setting_that_stops_jax_is_one_line(variable, value, said, tmp_path):
    """Breaks when a wrong setting of JAX's or XLA's gives a traceback or an abort, after which
    launchers start again.
    """
    environment = {
        name: text
        for name, text in os.environ.items()
        if name not in ("JAX_PLATFORMS", "XLA_FLAGS")
    }
    environment |= {"PYTHONPATH": str(ROOT), variable: value}
    command = [sys.executable, "-m", "icae_jax", "inspect", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert (
        out.returncode == 2
        and out.stderr.startswith("icae inspect: $")
        and said in out.stderr
        and out.stderr.count("\n") == 1
    )
    listing = subprocess.run(
        [*command[:3], "cache", "list"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
    )
    assert (listing.returncode, listing.stderr) == (0, ""), "what needs no device is not refused"


def test_a_machine_without_the_device_is_told_from_one_that_fails(monkeypatch):
    """Breaks when a missing TPU or GPU gives a traceback, or launchers do not retry one that is
    busy or broken.
    """
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    say = (
        "Unable to initialize backend '{}': {} (set JAX_PLATFORMS='' to automatically choose an "
        "available backend)"
    )
    absent = RuntimeError(
        say.format("tpu", "NOT_FOUND: TPU initialization failed: No jellyfish device found.")
    )
    told = platforms.absent_devices(absent)
    assert (
        told.startswith("$JAX_PLATFORMS is 'tpu', and there is no such device here (NOT_FOUND: ")
        and "set JAX" not in told
    )
    assert platforms.absent_devices(
        RuntimeError(say.format("cuda", "FAILED_PRECONDITION: No visible GPU devices."))
    )
    for passing in (
        say.format("tpu", "ABORTED: The TPU is already in use by process with pid 7"),
        say.format("cuda", "INTERNAL: x"),
        "x",
    ):
        assert platforms.absent_devices(RuntimeError(passing)) == ""
    assert platforms.absent_devices(ValueError(str(absent))) == ""
