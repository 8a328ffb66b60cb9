"""One compilation in a process of its own: the number of host devices, and libtpu, are fixed once a process has touched JAX.

`python -m icae_jax.performance.worker` reads a pickled request on standard input, and prints its answer as one line of JSON.
"""

import importlib.metadata
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time

from icae_jax.errors import UserError

MARK = "answer: "


class OutOfMemory(Exception):
    """The program does not fit; the message is the compiler's."""


def ask(request, host_devices=1):
    """The answer to a request, `{"kind": "tpu" or "host", …}` as `_tpu` and `_host` take them, from another process.

    OutOfMemory where the compiler says so, UserError where the request is at fault; RuntimeError, with what it wrote, where the process
    dies, which is nobody's input.
    """
    flags = (
        f"--xla_force_host_platform_device_count={host_devices} --xla_backend_optimization_level=0"
    )
    if importlib.metadata.version("jaxlib").startswith(
        "0.10."
    ):  # a third of the time; with 0.11 the flag would end the process
        flags += " --xla_cpu_use_fusion_emitters=false"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled",
    }  # fmt: skip
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "icae_jax.performance.worker"]
        done = subprocess.run(
            command,
            input=pickle.dumps(request),
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            check=False,
        )
        log.seek(0)
        written = log.read().decode(errors="replace")
    lines = [line for line in done.stdout.decode().splitlines() if line.startswith(MARK)]
    if not lines:
        why = f"exit code {done.returncode}"
        if done.returncode < 0:
            why = signal.Signals(-done.returncode).name
            why += ", as a rule for want of this machine's memory" if why == "SIGKILL" else ""
        raise RuntimeError(f"compiling failed ({why}): {written.strip()[-2000:]}")
    answer = json.loads(lines[-1].removeprefix(MARK))
    if "out_of_memory" in answer:
        raise OutOfMemory(answer["out_of_memory"])
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def _tpu(spec, topology, mesh, exact=False):
    """Compiles for the chips of a topology: bytes a chip, collectives, and the kind of chip.

    exact: with all the compiler's effort, as a run does, instead of as little as tells the same.
    """
    import jax

    from icae_jax.performance import hlo, programs
    from icae_jax.runtime import sharding

    found = _devices(topology)
    if isinstance(found, str):
        return {"error": found}
    if not exact:
        jax.config.update(
            "jax_exec_time_optimization_effort", -1.0
        )  # a fifth of the time; memory within a few per cent
    placed = sharding.make_mesh(mesh, found)
    began = time.process_time()
    lowered = programs.lower(spec, placed)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            return {"error": f"compiling for {topology}: {str(error).strip().splitlines()[0]}"}
        return {"out_of_memory": str(error)}
    memory, program = compiled.memory_analysis(), hlo.Program(compiled.as_text())
    return {
        "kind": found[0].device_kind,
        "chips": len(found),
        "mesh": dict(placed.shape),
        "notes": sharding.Placement(placed, spec.model).notes(),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": max(0, memory.peak_memory_in_bytes - memory.argument_size_in_bytes),
        "peak_bytes": memory.peak_memory_in_bytes,
        "hbm_bytes": program.bytes_accessed(),
        "collectives": [list(c) for c in program.collectives()],
        "compile_cpu_seconds": time.process_time() - began,
    }


def _devices(topology):
    """The devices of a topology, or what is wrong with its name."""
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        return f"--topology {topology}: {lines[0]}; give NAME:SHAPE such as v5e:4x4, v5p:2x2x2 or v6e:4x4"


def _topology(topology):
    """The number of chips of a topology, and their kind."""
    found = _devices(topology)
    if isinstance(found, str):
        return {"error": found}
    if any(device.core_on_chip for device in found):
        return {
            "error": f"--topology {topology}: libtpu compiles for its single cores, where a run's devices are chips; name another kind"
        }
    return {"kind": found[0].device_kind, "chips": len(found)}


def _host(specs, mesh):
    """Compiles for this process's host devices: FLOPs of one device's part of each program."""
    from icae_jax.performance import programs
    from icae_jax.runtime import sharding

    placed = sharding.make_mesh(mesh)
    return {
        "flops": [programs.lower(spec, placed).compile().cost_analysis()["flops"] for spec in specs]
    }


KINDS = {"tpu": _tpu, "topology": _topology, "host": _host}


def _end_with(parent):
    """Ends this process once its parent has gone: a compilation may go on for minutes, and nobody would read its answer."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main():
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    request = pickle.loads(sys.stdin.buffer.read())
    print(MARK + json.dumps(KINDS[request.pop("kind")](**request)), flush=True)


if __name__ == "__main__":
    main()
