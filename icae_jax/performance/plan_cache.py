"""What plans compiled and counted before, in `cache.folder`/plans, one JSON file an answer.

An answer is kept under all that decides it: the request (program, configuration, sizes, slice,
mesh), the package's sources that make the program, the versions of the compilers, and the
environment variables that they read. That a program does not fit is an answer too.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import icae_jax
from icae_jax import cache, errors, files
from icae_jax.errors import UserError
from icae_jax.performance import worker
from icae_jax.runtime import compiled

LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax")
# The modules that make programs, or read them. What programs import besides loads arrays and files.
SOURCES = ("compression", "data", "inference", "models", "objectives", "runtime", "training")
READERS = ("performance/hlo.py", "performance/programs.py", "performance/worker.py")
# Read by JAX or libtpu; `worker.ask` sets the others itself.
VARIABLES = ("JAX_", "LIBTPU_")
_NOT_OF_PROGRAMS = ("CACHE", "PLATFORM", "COORDINATOR", "PROCESS", "LOG")

OUT_OF_MEMORY = "out_of_memory"

Request = Mapping[str, Any]


def source_digest(package: pathlib.Path | None = None) -> str:
    """The hash of the sources that decide a program, in this package or in another folder."""
    package = package or pathlib.Path(icae_jax.__file__).parent
    paths = [path for name in SOURCES for path in sorted((package / name).rglob("*.py"))]
    content = hashlib.sha256()
    for path in [*paths, *(package / name for name in READERS)]:
        text = path.read_bytes()
        content.update(f"{path.relative_to(package)} {len(text)}\n".encode() + text)
    return content.hexdigest()


@functools.cache
def _versions():
    found = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _environment():
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(VARIABLES) and not any(word in name for word in _NOT_OF_PROGRAMS)
    }


def identity(request: Request, host_devices: int = 1) -> str:
    """All that decides the answer to a request, as text."""
    return json.dumps(
        [repr(dict(request)), host_devices, source_digest(), _versions(), _environment()]
    )


def _entry(identity):
    """The name of an answer's file in the cache folder."""
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return pathlib.Path("plans") / f"{name}.json"


def _checksum(record):
    content = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path):
    """What a file of the cache holds; None if it is absent or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("checksum") == _checksum(record):
            return record
    return None


class NotKept(Exception):
    """Nobody asked this before, or not with these sources and versions."""


def kept(request: Request, host_devices: int = 1) -> dict[str, Any]:
    """The answer that `worker.ask` gave before. NotKept if there is none."""
    about = identity(request, host_devices)
    with contextlib.suppress(UserError):  # no folder can be written
        path = cache.folder(holding=_entry(about)) / _entry(about)
        record = _read(path)
        if record and record["identity"] == about:
            with contextlib.suppress(OSError):  # the cache may be read-only
                os.utime(path)
            return _answered(record["answer"])
    raise NotKept


def ask(request: Request, host_devices: int = 1) -> dict[str, Any]:
    """`worker.ask`, whose answers are kept."""
    with contextlib.suppress(NotKept):
        return kept(request, host_devices)
    about, began = identity(request, host_devices), time.perf_counter()
    try:
        answer = worker.ask(request, host_devices)
    except worker.OutOfMemory as error:
        answer = {OUT_OF_MEMORY: str(error)}
    seconds = time.perf_counter() - began
    # Sources that were edited meanwhile may have made another program than those of the identity.
    if about == identity(request, host_devices):
        _keep(about, answer, {"seconds": seconds, "like": _likeness(request, host_devices)})
    return _answered(answer)


def _answered(answer):
    if OUT_OF_MEMORY in answer:
        raise worker.OutOfMemory(answer[OUT_OF_MEMORY])
    return answer


def _keep(about, answer, more):
    record = {"identity": about, "answer": answer} | more
    try:
        files.write_json(cache.folder() / _entry(about), record | {"checksum": _checksum(record)})
    except (OSError, UserError) as error:  # it can be compiled again
        errors.say(f"what was compiled cannot be kept: {error}")


# ----------------------------------------------------------------------------------- durations

# Seconds, by `worker.KINDS`, of programs of Llama-3-8B on a core of an AMD EPYC: they took 80 to
# 220 for TPUs and 200 to 260 on the host.
MEASURED = {"topology": 5.0, "tpu": 150.0, "host": 200.0}
EXACT = 5  # times as long


def _likeness(request, host_devices):
    """What a request's duration depends on."""
    spec = request["spec"] if "spec" in request else next(iter(request.get("specs", [])), None)
    about = {"kind": request["kind"], "machine": [compiled.processor(), os.cpu_count()]}
    if spec is None:
        return about
    c, model = spec.config, spec.model
    return about | {
        "what": spec.what,
        "exact": request.get("exact", False),
        "quantize": c.quantize,
        "method": c.compression.method,
        "devices": [host_devices, request.get("topology")],
        "remat": [c.remat, c.remat_decoder],
        "width": [model.hidden_size, model.intermediate_size, model.vocab_size],
        "contexts": [spec.contexts, spec.length],
    }


_NEEDED = ("kind", "machine", "width", "exact")  # alike, or a kept duration says nothing


def forecast(missing: Sequence[tuple[Request, int]]) -> str:
    """What remains to be compiled, and about how long that takes, for the user.

    missing: (request, host devices) of what is not kept. Each takes as long as the median of the
    kept ones that are most like it; where there is none, as long as was measured elsewhere.
    """
    if not missing:
        return "everything is kept from an earlier plan; nothing is compiled"
    records = []
    with contextlib.suppress(UserError, OSError):
        records = [r for r in map(_read, sorted((cache.folder() / "plans").glob("*.json"))) if r]
    seconds, rules = 0.0, 0
    for request, host_devices in missing:
        like = _likeness(request, host_devices)
        alike: dict[int, list[float]] = {}
        for record in records:
            if all(record["like"].get(name) == like.get(name) for name in _NEEDED):
                common = sum(record["like"].get(name) == value for name, value in like.items())
                alike.setdefault(common, []).append(record["seconds"])
        if alike:
            seconds += statistics.median(alike[max(alike)])
        else:
            rules += 1
            seconds += MEASURED[request["kind"]] * (EXACT if request.get("exact") else 1)
    source = "as earlier plans took here"
    if rules:
        source = "as for Llama-3-8B on an AMD EPYC, since no plan like it was made here"
    return f"compiling {errors.counted(len(missing), 'programs')}: about {_time(seconds)}, {source}"


def _time(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
