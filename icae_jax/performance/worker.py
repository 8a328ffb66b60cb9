"""One compilation in a process of its own, since JAX fixes host devices and libtpu when it starts.

`python -m icae_jax.performance.worker` reads a pickled request on standard input and prints its
answer as one line of JSON.
"""

import importlib.metadata
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from icae_jax.errors import UserError

MARK = "answer: "


class OutOfMemory(Exception):
    """The program does not fit; the message is the compiler's."""


def ask(request: Mapping[str, Any], host_devices: int = 1) -> dict[str, Any]:
    """The answer of another process, which sees so many host devices, to a request.

    request: `{"kind": …}` of `KINDS`, with the arguments of that function. OutOfMemory if the
    compiler says so, else as `run`.
    """
    flags = (
        f"--xla_force_host_platform_device_count={host_devices} --xla_backend_optimization_level=0"
    )
    # Takes a third of the time; jaxlib 0.11 does not know the flag and would exit.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags += " --xla_cpu_use_fusion_emitters=false"
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TPU_LOG_DIR": "disabled",
    }
    answer = run("icae_jax.performance.worker", request, environment)
    if "out_of_memory" in answer:
        raise OutOfMemory(answer["out_of_memory"])
    return answer


def run(
    module: str, request: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The answer to a request of a module that calls `answer_request`, in a process of its own.

    environment: variables beside this process's. UserError if the request is at fault.
    RuntimeError, with the process's output, if it dies, which no input should cause.
    """
    with tempfile.TemporaryFile() as log:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=pickle.dumps(request),
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | (environment or {}),
            check=False,
        )
        log.seek(0)
        written = log.read().decode(errors="replace")
    lines = [line for line in done.stdout.decode().splitlines() if line.startswith(MARK)]
    if not lines:
        why = f"exit code {done.returncode}"
        if done.returncode < 0:
            why = signal.Signals(-done.returncode).name
            why += ", usually because this machine ran out of memory" if why == "SIGKILL" else ""
        raise RuntimeError(f"{module} failed ({why}): {written.strip()[-2000:]}")
    answer = json.loads(lines[-1].removeprefix(MARK))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def _tpu(spec: Any, topology: str, mesh: Any, exact: bool = False) -> dict[str, Any]:
    """Compiles a `programs.Spec` for a topology: bytes a chip, collectives, and the kind of chip.

    exact: compile with full effort, as a run does.
    """
    import jax

    from icae_jax.performance import hlo, programs
    from icae_jax.runtime import sharding

    devices = _devices(topology)
    if isinstance(devices, str):
        return {"error": devices}
    if not exact:  # takes a fifth of the time, and tells memory within a few per cent
        jax.config.update("jax_exec_time_optimization_effort", -1.0)
    device_mesh = sharding.make_mesh(mesh, devices)
    began = time.process_time()
    lowered = programs.lower(spec, device_mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            return {"error": f"compiling for {topology}: {str(error).strip().splitlines()[0]}"}
        return {"out_of_memory": str(error)}
    memory, program = compiled.memory_analysis(), hlo.Program(compiled.as_text())
    return {
        "kind": devices[0].device_kind,
        "chips": len(devices),
        "mesh": dict(device_mesh.shape),
        "notes": sharding.Placement(device_mesh, spec.model).notes(),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": max(0, memory.peak_memory_in_bytes - memory.argument_size_in_bytes),
        "peak_bytes": memory.peak_memory_in_bytes,
        "hbm_bytes": program.bytes_accessed(),
        "collectives": [list(c) for c in program.collectives()],
        "compile_cpu_seconds": time.process_time() - began,
    }


def _devices(topology: str) -> Sequence[Any] | str:
    """The devices of a topology, or what is wrong with its name."""
    from jax.experimental import topologies

    # By default libtpu asks for whole hosts, of several chips.
    single = {"chips_per_host_bounds": (1, 1, 1)} if re.fullmatch(r"\w+:1(x1)+", topology) else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **single).devices
    except (RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        return (
            f"--topology {topology}: {lines[0]}; "
            "give NAME:SHAPE such as v5e:4x4, v5p:2x2x2 or v6e:4x4"
        )


def _topology(topology: str) -> dict[str, Any]:
    """The number of chips of a topology, and their kind."""
    devices = _devices(topology)
    if isinstance(devices, str):
        return {"error": devices}
    if any(device.core_on_chip for device in devices):
        return {
            "error": f"--topology {topology}: libtpu compiles for its single cores, "
            "where a run's devices are chips; name another kind"
        }
    return {"kind": devices[0].device_kind, "chips": len(devices)}


def _host(specs: Sequence[Any], mesh: Any) -> dict[str, Any]:
    """Compiles for this process's host devices: FLOPs of one device's part of each program."""
    from icae_jax.performance import programs
    from icae_jax.runtime import sharding

    device_mesh = sharding.make_mesh(mesh)
    compiled = [programs.lower(spec, device_mesh).compile() for spec in specs]
    return {"flops": [program.cost_analysis()["flops"] for program in compiled]}


KINDS = {"tpu": _tpu, "topology": _topology, "host": _host}


def _end_with(parent: int) -> None:
    """Ends this process once its parent has gone.

    A compilation may go on for minutes, and nobody would read its answer.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def answer_request(kinds: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers the request on standard input: `{"kind": …}` of `kinds`, with its arguments."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    request = pickle.loads(sys.stdin.buffer.read())
    try:
        answer = kinds[request.pop("kind")](**request)
    except UserError as error:
        answer = {"error": str(error)}
    print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    answer_request(KINDS)
