"""Loading quantised bases: streamed, split, from Orbax copies and int8 blocks; their identity."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY, close, eight_devices, free_port, random_params, same

from icae_jax.cli import main as cli
from icae_jax.errors import UserError
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import identity, quantizing, stored, weights
from icae_jax.models import llama, quantize, schemes
from icae_jax.runtime import sharding
from icae_jax.workflows import convert_base

WIDE = dataclasses.replace(TINY, hidden_size=64, intermediate_size=128, head_dim=16)


@pytest.fixture(scope="module")
def params():
    return random_params(WIDE)


@pytest.fixture(scope="module")
def folder(params, tiny_tokenizer, tmp_path_factory):
    """A base's folder, in bfloat16."""
    path = tmp_path_factory.mktemp("base") / "hub"
    bases.save_base(path, WIDE, params, tiny_tokenizer)
    return path


@pytest.fixture(scope="module")
def whole(folder):
    """That base in full precision."""
    return bases.load_base(folder)


@pytest.fixture(scope="module")
def copies(folder, tmp_path_factory):
    """Its Orbax copies, by scheme."""
    made = {}
    for scheme in ("int8", "nf4+ends"):
        made[scheme] = tmp_path_factory.mktemp("copies") / scheme
        convert_base.convert(folder, made[scheme], dtype=scheme)
    return made


@pytest.mark.parametrize("scheme", schemes.SCHEMES)
def test_streamed_as_quantised_in_memory(folder, whole, scheme, monkeypatch):
    """Breaks when a chunk is cut wrongly, or the identity is not that of the source's weights."""
    monkeypatch.setattr(quantizing, "CHUNK_BYTES", 5000)  # several chunks, the last one smaller
    base = bases.load_base(folder, quantize=scheme)
    want = schemes.quantize_params(whole.params, scheme)
    same(base.params, want)
    assert base.quantize == scheme and whole.quantize == ""
    assert (base.fingerprint, base.identity) == (whole.fingerprint, whole.identity)
    assert jax.tree.structure(base.params) == jax.tree.structure(want)


@pytest.mark.parametrize(
    ("scheme", "shape"), [("nf4+ends", (1, 4, 2)), ("int8", (1, 1, 8)), ("int8+ends", (2, 2, 1))]
)
def test_a_load_onto_a_mesh(folder, whole, scheme, shape):
    """Breaks when codes or scales depend on how devices split them, or a checksum counts twice."""
    with eight_devices():
        devices = jax.devices()[: np.prod(shape)]
        mesh = sharding.make_mesh(sharding.MeshConfig(*shape), devices)
        placement = sharding.Placement(mesh, WIDE)
        base = bases.load_base(folder, sharding=placement.parameter, quantize=scheme)
        leaf = base.params["layers"]["self_attn"]["q_proj"]["kernel"].codes
        split = leaf.sharding.shard_shape(leaf.shape)
        tensor = 1 if shape[2] == 8 else shape[2]  # eight do not divide four heads
        assert split == (2, leaf.shape[1] // shape[1], leaf.shape[2] // tensor)
        assert (base.fingerprint, base.identity) == (whole.fingerprint, whole.identity)
        same(jax.device_get(base.params), schemes.quantize_params(whole.params, scheme))


# Loads a base as one of two processes with two devices each, and runs it.
PROCESS = """
import json, pathlib, sys
import jax
import numpy as np
from icae_jax.interop.hub import base as bases
from icae_jax.models import llama
from icae_jax.runtime import distributed, sharding

folder, coordinator, process, out, *schemes = sys.argv[1:]
distributed.start(coordinator, 2, int(process))
placement = sharding.Placement(
    sharding.make_mesh(sharding.MeshConfig(1, 2, 2)), bases.sizes(folder)
)
ids, results = np.arange(6)[None], {}
for scheme in schemes:
    base = bases.load_base(folder, sharding=placement.parameter, quantize=scheme)

    def hidden(params):
        position = np.arange(6)[None]
        mask = llama.causal_mask(6)
        return llama.Llama(base.config).apply({"params": params}, ids, position, mask)[0]

    with placement.active():
        x = sharding.on_host(jax.jit(hidden)(base.params))
    leaves = [leaf.tolist() for leaf in jax.tree.leaves(sharding.on_host(base.params))]
    results[scheme] = base.fingerprint, base.identity["weights"], leaves, x.tolist()
pathlib.Path(out).write_text(json.dumps(results))
"""


@pytest.mark.nightly
def test_a_load_by_two_processes(folder, whole, tmp_path):
    """Breaks when a process quantises its shards by its own scales, sums a part of the checksums
    twice or not at all, or waits for another.
    """
    coordinator, both = f"127.0.0.1:{free_port()}", ("int8+ends", "nf4+ends")
    xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    env = os.environ | {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    outs = [tmp_path / str(process) for process in range(2)]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(folder), coordinator, str(i), str(out), *both],
            env=env,
        )
        for i, out in enumerate(outs)
    ]
    try:
        assert [child.wait(240) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
            child.wait()
    ids = np.arange(6)[None]
    for scheme in both:
        params = schemes.quantize_params(whole.params, scheme)
        want, _ = llama.Llama(WIDE).apply({"params": params}, ids, ids, llama.causal_mask(6))
        for out in outs:
            own, weights_of_source, leaves, x = json.loads(out.read_text())[scheme]
            assert (own, weights_of_source) == (whole.fingerprint, whole.identity["weights"])
            same(leaves, [leaf.tolist() for leaf in jax.tree.leaves(params)])
            close(x, want)


def test_a_number_that_is_not_finite_is_named(folder, tmp_path, params, tiny_tokenizer):
    """Breaks when NaN becomes a code."""
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"].at[1, 3, 5].set(np.nan)
    mlp = params["layers"]["mlp"] | {"up_proj": {"kernel": kernel}}
    broken = params | {"layers": params["layers"] | {"mlp": mlp}}
    bases.save_base(tmp_path / "b", WIDE, broken, tiny_tokenizer)
    with pytest.raises(UserError, match=r"up_proj\.kernel holds numbers that are not finite"):
        bases.load_base(tmp_path / "b", quantize="int8")


class _Blocks:
    """A tensor of a file that stores int8 in blocks of 32."""

    def __init__(self, shape, seed):
        rng = np.random.default_rng(seed)
        self.codes = rng.integers(-127, 128, shape).astype(np.int8)
        self.scales = (rng.random((shape[0], shape[1] // 32)) / 99).astype(np.float16)

    def get_shape(self):
        return list(self.codes.shape)

    def get_dtype(self):
        return "F32"

    def __getitem__(self, index):
        scales = self.scales.astype(np.float32).repeat(32, 1)
        return (self.codes * scales)[index]

    def read_q8_0(self, rows):
        return self.codes[rows], self.scales[rows]


def test_int8_blocks_are_taken_as_they_are(folder, monkeypatch, tmp_path, tiny_tokenizer):
    """Breaks when stored int8 blocks are rounded again, transposed, or known as other weights; or
    taken for nf4's."""
    real = stored.open_tensors

    def open_tensors(folder, config, shapes, enter):
        held = real(folder, config, shapes, enter)
        quantised = [n for n in held if "mlp" in n or n in (stored.TABLE, stored.HEAD)]
        return held | {n: ("file", _Blocks(shapes[n], i)) for i, n in enumerate(quantised)}

    monkeypatch.setattr(weights.stored, "open_tensors", open_tensors)
    whole, base = bases.load_base(folder), bases.load_base(folder, quantize="int8+ends")
    assert (base.fingerprint, base.identity) == (whole.fingerprint, whole.identity)
    for path in (("embed",), ("lm_head",), ("layers", "mlp", "down_proj", "kernel")):
        w, want = base.params, whole.params
        for key in path:
            w, want = w[key], want[key]
        same(w.dequantize(jnp.float32), want)
        assert 32 in np.asarray(w.shape) // np.asarray(w.scales.shape)
    assert base.params["layers"]["self_attn"]["q_proj"]["kernel"].scales.shape[1] == 1
    other = bases.load_base(folder, quantize="nf4+ends")
    same(other.params, schemes.quantize_params(whole.params, "nf4+ends"))
    assert (other.fingerprint, other.identity) == (whole.fingerprint, whole.identity)
    convert_base.convert(folder, tmp_path / "copy", dtype="int8+ends")
    monkeypatch.undo()
    same(bases.load_base(tmp_path / "copy").params, base.params)


# ------------------------------------------------------------------------------------ Orbax copies


def test_a_copy_is_what_was_quantised(folder, whole, copies, capsys):
    """Breaks when a copy loses its scheme, an array, or the identity of its source."""
    for scheme, copy in copies.items():
        base = bases.load_base(copy)
        same(base.params, bases.load_base(folder, quantize=scheme).params)
        assert base.quantize == scheme
        assert (base.fingerprint, base.identity) == (whole.fingerprint, whole.identity)
        assert bases.identify(copy) == (WIDE, whole.fingerprint)
        capsys.readouterr()
        plain = bases.load_base(copy, quantize=None)
        assert f"stored in {scheme}; dequantised to float32" in capsys.readouterr().err
        want = jax.tree.map(
            lambda w: w.dequantize(jnp.float32) if quantize.is_quantized(w) else w,
            base.params,
            is_leaf=quantize.is_quantized,
        )
        same(plain.params, want)
        assert plain.quantize == scheme  # its numbers are rounded all the same


def test_a_copy_onto_a_mesh(copies):
    """Breaks when a shard of stored codes is another's."""
    for copy in copies.values():
        want = bases.load_base(copy).params
        with eight_devices():
            placement = sharding.Placement(
                sharding.make_mesh(sharding.MeshConfig(1, 4, 2), jax.devices()), WIDE
            )
            base = bases.load_base(copy, sharding=placement.parameter)
            same(jax.device_get(base.params), want)


def test_an_unquantised_copy_is_quantised(folder, whole, tmp_path):
    """Breaks when an Orbax copy is read otherwise than safetensors."""
    convert_base.convert(folder, tmp_path / "copy", "orbax")
    base = bases.load_base(tmp_path / "copy", quantize="nf4+ends")
    same(base.params, schemes.quantize_params(whole.params, "nf4+ends"))
    assert (base.fingerprint, base.identity) == (whole.fingerprint, whole.identity)


def test_converting_back(copies, tmp_path, whole, capsys):
    """Breaks when a dequantised folder still says that it is quantised."""
    assert (
        cli.main(
            [
                "convert",
                "base",
                "--from",
                str(copies["int8"]),
                "--to",
                str(tmp_path / "hub"),
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    back = bases.load_base(tmp_path / "hub")
    same(back.params, bases.load_base(copies["int8"], quantize=None).params)
    assert "quantization_config" not in json.loads((tmp_path / "hub" / "config.json").read_text())
    assert back.identity["weights"] != whole.identity["weights"]
    convert_base.convert(copies["int8"], tmp_path / "again")  # in its own scheme
    same(bases.load_base(tmp_path / "again").params, bases.load_base(copies["int8"]).params)


def test_inspect_tells_the_scheme(copies, whole, capsys):
    """Breaks when inspect calls a quantised folder's weights something else."""
    assert cli.main(["inspect", str(copies["nf4+ends"]), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["dtype"] == "nf4+ends" and about["fingerprint"] == whole.fingerprint


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--from BASE --to NEW --dtype nf4 --format hub", "--format hub has no place for nf4"),
        ("--from COPY --to NEW --format hub", "--format hub has no place for int8"),
        ("--from COPY --to NEW --dtype nf4", "stored in int8, of which nf4 cannot be made"),
        ("--from TINY --to NEW --dtype nf4", "do not divide the width 48 of layers."),
        ("--from TINY --to NEW --dtype int4", "invalid choice: 'int4'"),
    ],
)
def test_bad_conversions(folder, copies, tiny_base, tmp_path, argv, message, capsys):
    """Breaks when something is written that does not load, or the message names no remedy."""
    places = {"BASE": folder, "COPY": copies["int8"], "TINY": tiny_base, "NEW": tmp_path / "new"}
    words = [str(places.get(word, word)) for word in argv.split()]
    try:
        code = cli.main(["convert", "base", *words])
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_bad_folders(folder, copies, tmp_path):
    """Breaks when a damaged record of the scheme ends in a traceback, or other weights load."""
    copy = shutil.copytree(copies["int8"], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())

    def refused(message, **changes):
        field = config["quantization_config"] | changes
        (copy / "config.json").write_text(json.dumps(config | {"quantization_config": field}))
        with pytest.raises(UserError, match=message):
            bases.load_base(copy)

    refused("has the scheme 'int3'; this version reads int8", scheme="int3")
    refused("fingerprint is 7, which is not", fingerprint=7)
    refused("quantization_config is set; use the unquantised checkpoint", quant_method="awq")
    refused(r"7 tensors missing: layers\.mlp\.down_proj\.kernel\.block_scales", scheme="nf4")
    (copy / "config.json").write_text(json.dumps(config))
    shutil.rmtree(copy / "params")
    shutil.copy(folder / "model.safetensors", copy)
    with pytest.raises(UserError, match="weights are in int8, and only Orbax copies are"):
        bases.load_base(copy)
    with pytest.raises(UserError, match=r"width 32 of layers\.mlp\.down_proj\S*; use int8"):
        config = dataclasses.replace(WIDE, intermediate_size=32)
        weights.load_params(folder, config, quantize="nf4")


# ---------------------------------------------------------------------------------------- identity


def test_precision():
    """Breaks when a value of --base_dtype gives another base or other activations."""
    assert bases.precision(None) == ("float32", "")
    assert bases.precision("bfloat16") == ("bfloat16", None)
    assert bases.precision(jnp.float32) == ("float32", None)
    assert bases.precision("nf4+ends") == ("float32", "nf4+ends")


def test_fingerprints_stay(params):
    """Breaks when a field of the model that is not used enters fingerprints of older files."""
    text = identity.fingerprint(TINY, random_params(TINY))
    changed = dataclasses.replace(TINY, qk_norm=True)
    assert identity.fingerprint(changed, random_params(TINY)) != text
    assert (
        identity.fingerprint(
            dataclasses.replace(TINY, max_position_embeddings=9), random_params(TINY)
        )
        == text
    )
    assert llama.ModelConfig.__dataclass_fields__["rope_theta"].default == 10000.0
