"""Host memory of loading a base onto a mesh: safetensors, an Orbax copy, quantised or not.

    python launch/benchmarks/streamed_load.py --workdir runs/streamed_load
    python launch/benchmarks/streamed_load.py --workdir runs/streamed_load --accelerators

The base is a random checkpoint of a few GiB, split over 8 host devices, or with --accelerators over
those of this machine. Each load runs in a process of its own, which samples its anonymous memory
(RssAnon, without mapped files). At no time may that exceed the parameters loaded so far (host
devices keep them in the same memory) by more than one device's part of one stacked parameter, for a
quantised load also one layer's largest matrix in float32, and some slack. The exit code is 1 if it
does, or if a loaded value differs from the file (of a quantised load: from its codes' nearest
values). Linux only.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import zlib

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that a checkout that is not installed works too

from icae_jax.runtime import compiled  # noqa: E402

DEVICES, LAYERS = 8, 16
# Random values are repeated with this period; prime, so that no two rows or layers are equal.
PERIOD = 65521
FILE_BYTES = 512 << 20
SCHEMES = ("int8", "nf4")
# Each in its own process; "copy" makes an Orbax copy.
STAGES = tuple(
    f"{stage}{scheme}"
    for scheme in ("", *(f" {s}" for s in SCHEMES))
    for stage in ("safetensors", "copy", "orbax")
)


def model_config(gib):
    """A Llama of 16 layers whose bfloat16 weights take about `gib` GiB."""
    from icae_jax.models import llama

    hidden = max(256, round((gib * 2**30 / 448) ** 0.5 / 256) * 256)
    return llama.ModelConfig(
        8 * hidden, hidden, 7 * hidden // 2, LAYERS, hidden // 64, hidden // 256, 64, 4096
    )


def tensors(config, tree):
    """The hub's tensors: (name, shape, leaf of the parameter tree, layer, whether transposed).

    layer: None for a leaf that is not stacked over layers.
    """
    from icae_jax.models.families import tensor_names

    for name, ((path, layer, transposed, _),) in tensor_names.tensor_names(config).items():
        leaf = tree
        for key in path:
            leaf = leaf[key]
        shape = leaf.shape if layer is None else leaf.shape[1:]
        yield name, shape[::-1] if transposed else shape, leaf, layer, transposed


def values(name, shape):
    """The bfloat16 values of a tensor, which its name determines."""
    import ml_dtypes

    period = (
        np.random.default_rng(zlib.crc32(name.encode())).standard_normal(PERIOD, np.float32) / 50
    )
    return np.resize(period.astype(ml_dtypes.bfloat16), shape)


def write_checkpoint(folder, config):
    """Writes config.json, safetensors files and their index, one file in memory at a time."""
    import safetensors.numpy

    from icae_jax import files
    from icae_jax.models import llama
    from icae_jax.models.families import config_json

    contents, size = [[]], 0
    for name, shape, *_ in tensors(config, llama.param_shapes(config)):
        if size > FILE_BYTES:
            contents.append([])
            size = 0
        contents[-1].append((name, shape))
        size += 2 * int(np.prod(shape))
    folder.mkdir(parents=True)
    weight_map = {}
    for i, held in enumerate(contents, 1):
        file = f"model-{i:05}-of-{len(contents):05}.safetensors"
        safetensors.numpy.save_file(
            {name: values(name, shape) for name, shape in held}, folder / file, {"format": "pt"}
        )
        weight_map |= {name: file for name, _ in held}
    files.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    files.write_json(folder / "config.json", config_json.hub_config(config, "bfloat16", {}))


def held():
    """Bytes of all arrays in the host's memory; arrays that share a buffer count once."""
    import jax

    shards = [
        s for x in jax.live_arrays() for s in x.addressable_shards if s.device.platform == "cpu"
    ]
    return sum({s.data.unsafe_buffer_pointer(): s.data.nbytes for s in shards}.values())


class Memory:
    """Samples this process's RssAnon until it is stopped.

    Attributes:
      before: at the start.
      peak: the most.
      above: the most by which it grew beyond `held()`.
    """

    def __init__(self, held):
        self.held, self.above = held, 0
        self.before = self.peak = self.now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    @staticmethod
    def now():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))

    def _watch(self):
        while not self._stop.wait(0.003):
            now = self.now()
            self.peak = max(self.peak, now)
            with contextlib.suppress(RuntimeError):  # an array went while it was counted
                self.above = max(self.above, now - self.before - self.held())

    def stop(self):
        self._stop.set()
        self._thread.join()


def load(folder, scheme):
    """Loads a folder over all devices; returns the figures, the parameters, the model config.

    scheme: of `models.schemes`, "" for bfloat16.
    """
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from icae_jax.interop.hub import weights
    from icae_jax.models.families.config_json import read_config

    mesh = Mesh(np.asarray(jax.devices()), ("all",))

    def sharding(path, shape):
        """Splits the last axis that divides; norms are replicated."""
        axes = [i for i, n in enumerate(shape.shape) if n % mesh.size == 0]
        spec = [None] * len(shape.shape)
        if path[-1] != "scale" and axes:
            spec[axes[-1]] = "all"
        return NamedSharding(mesh, PartitionSpec(*spec))

    config = read_config(folder)
    # So that the runtime's own memory is there before the first sample.
    jax.block_until_ready(jax.device_put(np.zeros(8), sharding(("scale",), np.zeros(8))))
    memory, began = Memory(held), time.perf_counter()
    try:
        params = jax.block_until_ready(
            weights.load_params(folder, config, "bfloat16", sharding, quantize=scheme)
        )
    finally:
        memory.stop()
    shards = [s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards]
    seconds = time.perf_counter() - began
    matrix = 4 * config.hidden_size * config.intermediate_size if scheme else 0
    sizes = {
        "held": sum(shards),
        "shard": max(shards),
        "matrix": matrix,
        "before": memory.before,
        "peak": memory.peak,
        "above": memory.above,
    }
    return sizes | {"seconds": seconds}, params, config


def wrong_tensors(config, params):
    """Names of tensors that differ from what was written.

    Looks at the first and the last layer, and at what is outside the layers.
    """
    import jax

    from icae_jax.models import quantize, schemes

    wrong = []
    for name, shape, leaf, layer, transposed in tensors(config, params):
        if layer not in (None, 0, config.num_layers - 1):
            continue
        want = values(name, shape).T if transposed else values(name, shape)
        if quantize.is_quantized(leaf):
            kind = "int8" if isinstance(leaf, quantize.Int8Matrix) else "nf4"
            matrix = jax.tree.map(lambda x, layer=layer: np.asarray(x[layer]), leaf)
            nearest = schemes.quantize_matrix(want, kind)
            same = jax.tree.map(np.array_equal, matrix, nearest)
            wrong += [] if all(jax.tree.leaves(same)) else [name]
            continue
        for shard in leaf.addressable_shards:
            part, index = (
                (shard.data, shard.index) if layer is None else (shard.data[layer], shard.index[1:])
            )
            if not np.array_equal(np.asarray(part), want[index]):
                wrong.append(name)
                break
    return wrong


def run_stage(stage, workdir):
    """One stage, in a process of its own; its last line on stdout is JSON."""
    stage, _, scheme = stage.partition(" ")
    folder, copy = workdir / "hub", workdir / f"orbax{scheme}"
    if stage == "copy":
        from icae_jax import files
        from icae_jax.interop.hub import orbax_copy, stored_scheme

        _, params, _ = load(folder, scheme)
        copy.mkdir()
        raw = files.read_json(folder / "config.json", "a configuration")
        if scheme:
            raw |= stored_scheme.StoredScheme(scheme, "", "").as_json()
        files.write_json(copy / "config.json", raw)
        orbax_copy.save_orbax(copy, params)
        print("{}")
        return
    figures, params, config = load(folder if stage == "safetensors" else copy, scheme)
    print(json.dumps(figures | {"wrong": wrong_tensors(config, params)}))


def in_process(stage, args):
    command = [sys.executable, __file__, "--workdir", str(args.workdir), "--stage", stage]
    environment = dict(os.environ)
    if not args.accelerators:
        environment |= {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
            "JAX_PLATFORMS": "cpu",
        }
    out = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return json.loads(out.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--workdir",
        required=True,
        type=pathlib.Path,
        help="new folder for the checkpoint and its Orbax copy",
    )
    parser.add_argument(
        "--gib", type=float, default=4.0, help="about how large the checkpoint is (default: 4)"
    )
    parser.add_argument(
        "--slack_mib",
        type=float,
        default=1024.0,
        help="memory allowed beside the parameters and one part (default: 1024)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the checkpoint and its copy there"
    )
    parser.add_argument(
        "--accelerators",
        action="store_true",
        help=f"load onto this machine's accelerators, not {DEVICES} host devices",
    )
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    compiled.set_up()  # before anything imports JAX
    if args.stage:
        run_stage(args.stage, args.workdir)
        return 0
    if not args.gib > 0:
        parser.error(f"--gib is {args.gib}; it must be positive")
    if args.workdir.exists() and any(args.workdir.iterdir()):
        parser.error(f"--workdir {args.workdir} is not empty; give a new folder")
    from icae_jax.evaluation import report

    try:
        config = model_config(args.gib)
        print(
            f"writing a random checkpoint: hidden_size {config.hidden_size}, "
            f"{config.num_layers} layers",
            file=sys.stderr,
        )
        write_checkpoint(args.workdir / "hub", config)
        results = {stage: in_process(stage, args) for stage in STAGES}
    finally:
        if not args.keep:
            for folder in ("hub", "orbax", *(f"orbax{scheme}" for scheme in SCHEMES)):
                shutil.rmtree(args.workdir / folder, ignore_errors=True)
    rows, good = [], True
    for stage in (stage for stage in STAGES if not stage.startswith("copy")):
        r = results[stage]
        bound = r["shard"] + r["matrix"] + args.slack_mib * 2**20
        verdict = (
            "wrong: " + r["wrong"][0] if r["wrong"] else "ok" if r["above"] <= bound else "NOT OK"
        )
        good &= verdict == "ok"
        sizes = (r["held"], r["shard"], r["before"], r["peak"], r["above"], bound)
        rows.append(
            (
                stage.replace(" ", "/"),
                *(f"{size / 2**20:,.0f}" for size in sizes),
                f"{r['seconds']:.1f}",
                verdict,
            )
        )
    header = (
        "MiB",
        "parameters",
        "largest part",
        "RssAnon before",
        "peak",
        "peak above",
        "bound",
        "seconds",
        "",
    )
    print(report.text_table(header, rows))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
