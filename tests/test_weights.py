"""Weights of a base model: reading, what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY

from icae_jax.interop import weights


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture
def folder(tiny_base, tmp_path):
    """A copy of the tiny base that a test may spoil."""
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.fixture
def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def test_sharded_weights(folder, tensors, tiny_params):
    """Breaks when only one of several files is read, or the index is ignored."""
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in held}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(weights.load_params(folder, TINY), tiny_params)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: named in the weight index but not there"):
        weights.load_params(folder, TINY)


def test_missing_and_misshapen_tensors_are_named(folder, tensors):
    """Breaks when uninitialised memory stands in for a missing tensor, or a wrong shape is only found by the model."""
    path = folder / "model.safetensors"
    absent = ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if k not in absent}, path)
    with pytest.raises(ValueError, match=r"2 tensors missing: lm_head.weight, model.layers.1.mlp.up_proj.weight$"):
        weights.load_params(folder, TINY)
    wrong = tensors | {"model.layers.1.self_attn.k_proj.weight": np.zeros((32, 16), np.float32)}
    safetensors.numpy.save_file(wrong, path)
    with pytest.raises(
        ValueError,
        match=r"model\.layers\.1\.self_attn\.k_proj\.weight has shape",
    ):
        weights.load_params(folder, TINY)


def test_unreadable_weights_are_named(folder):
    """Breaks when a truncated download or pickled weights end in a traceback."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        weights.load_params(folder, TINY)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights .* are not read"):
        weights.load_params(folder, TINY)
