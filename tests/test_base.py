"""Base models in hub format: reading and writing weights, what is refused, identity."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, close, random_params

from icae_jax.interop import base as bases
from icae_jax.models import llama

RAW = bases.hub_config(TINY, "float32", {"bos_token_id": 1, "eos_token_id": 2})
LLAMA3 = llama.Llama3RopeScaling(8.0, 1.0, 4.0, 64)


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture
def folder(tiny_base, tmp_path):
    """A copy of the tiny base that a test may spoil."""
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.fixture
def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


# --------------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, rope_scaling=LLAMA3, rope_theta=5e5, tie_word_embeddings=True, rms_norm_eps=1e-6, head_dim=16),
    ],
)
def test_config_round_trip(config):
    """Breaks when a field is lost or renamed on the way through config.json."""
    assert bases.parse_config(json.loads(json.dumps(bases.hub_config(config, "bfloat16", {})))) == config


def test_defaults_of_absent_fields():
    """Breaks when an older config.json, which leaves out what equals the default, is read with other defaults."""
    raw = {
        k: RAW[k]
        for k in ("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    config = bases.parse_config(raw)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.rms_norm_eps) == (4, 8, 10000.0, 1e-6)
    assert not config.tie_word_embeddings and config.rope_scaling is None
    old = bases.parse_config(raw | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | dataclasses.asdict(LLAMA3)})
    assert old.rope_theta == 5e5 and old.rope_scaling == LLAMA3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architecture GemmaForCausalLM is not supported; supported: Llama"),
        ({"architectures": None}, "no architecture"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {}}, "quantization_config is set"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "RoPE type 'longrope' is not supported"),
        ({"num_hidden_layers": 0}, "num_layers of the model is 0"),
    ],
)
def test_other_models_are_refused_by_field(change, message):
    """Breaks when a model that is computed differently loads silently and yields garbage."""
    assert bases.parse_config(RAW) == TINY
    with pytest.raises(ValueError, match=message):
        bases.parse_config(RAW | change)


def test_incomplete_config_names_what_is_missing(tmp_path):
    """Breaks when a missing field ends in a KeyError, or a missing file in a traceback."""
    with pytest.raises(ValueError, match=r"vocab_size, hidden_size, .* missing"):
        bases.parse_config({"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        bases.read_config(tmp_path)


# -------------------------------------------------------------------------------------------------------------- weights


def test_bfloat16_round_trip_through_transformers(tmp_path, tiny_params, tiny_tokenizer):
    """Breaks when a saved base loads differently here or in transformers: names, transposition, rounding, config, tokenizer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    bases.save_base(tmp_path / "saved", TINY, tiny_params, tiny_tokenizer)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), tiny_params)
    same(bases.load_params(tmp_path / "saved", TINY, jnp.bfloat16), rounded)
    base = bases.load_base(tmp_path / "saved")
    same(base.params, jax.tree.map(lambda x: x.astype(np.float32), rounded))
    assert base.config == TINY and base.tokenizer("the cat")["input_ids"] == [1, 8, 9] and bases.bos_id(base.tokenizer) == 1

    ids = np.random.default_rng(0).integers(0, 64, (1, 12))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(ids)).logits.numpy()

    @jax.jit
    def logits(params, ids):
        hidden, _ = llama.Llama(TINY).apply({"params": params}, ids, jnp.arange(12)[None], llama.causal_mask(12))
        return hidden @ llama.head_kernel(params)

    close(logits(base.params, jnp.asarray(ids)), want, 1e-4)


def test_sharded_weights(folder, tensors, tiny_params):
    """Breaks when only one of several files is read, or the index is ignored."""
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in held}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(bases.load_params(folder, TINY), tiny_params)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: named in the weight index but not there"):
        bases.load_params(folder, TINY)


def test_missing_and_misshapen_tensors_are_named(folder, tensors):
    """Breaks when uninitialised memory stands in for a missing tensor, or a wrong shape is only found by the model."""
    path = folder / "model.safetensors"
    absent = ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if k not in absent}, path)
    with pytest.raises(ValueError, match=r"2 tensors missing: lm_head.weight, model.layers.1.mlp.up_proj.weight$"):
        bases.load_params(folder, TINY)
    wrong = tensors | {"model.layers.1.self_attn.k_proj.weight": np.zeros((32, 16), np.float32)}
    safetensors.numpy.save_file(wrong, path)
    with pytest.raises(
        ValueError,
        match=r"model\.layers\.1\.self_attn\.k_proj\.weight has shape",
    ):
        bases.load_params(folder, TINY)


def test_unreadable_weights_are_named(folder):
    """Breaks when a truncated download or pickled weights end in a traceback."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        bases.load_params(folder, TINY)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights .* are not read"):
        bases.load_params(folder, TINY)


# ------------------------------------------------------------------------------------------------- tokenizer and identity


def test_stop_ids(folder, tiny_tokenizer):
    """Breaks when generation_config's list of eos ids, or the tokenizer's own, is left out."""
    assert bases.stop_ids(folder, tiny_tokenizer) == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert bases.stop_ids(folder, tiny_tokenizer) == (2, 5, 7)
    (folder / "generation_config.json").write_text("{}")
    assert bases.stop_ids(folder, tiny_tokenizer) == (2,)


def test_folder_without_tokenizer_is_named(folder, tmp_path):
    """Breaks when a wrong path is taken for a name on the hub and downloaded."""
    with pytest.raises(ValueError, match="is not a folder; give a model-hub folder"):
        bases.load_tokenizer(tmp_path / "absent")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        bases.load_tokenizer(folder)


def test_fingerprint(tiny_params):
    """Breaks when one base has two fingerprints (by dtype), or two bases have one."""
    own = bases.fingerprint(TINY, tiny_params)
    assert bases.fingerprint(TINY, jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), tiny_params)) == own
    assert bases.fingerprint(dataclasses.replace(TINY, max_position_embeddings=999), tiny_params) == own
    others = [
        bases.fingerprint(TINY, random_params(TINY, seed=1)),
        bases.fingerprint(TINY, tiny_params | {"norm": {"scale": tiny_params["norm"]["scale"] * 1.1}}),
        bases.fingerprint(TINY, tiny_params | {"embed": tiny_params["embed"].at[40].multiply(1.1)}),
        bases.fingerprint(dataclasses.replace(TINY, rope_theta=5e5), tiny_params),
        bases.fingerprint(dataclasses.replace(TINY, rms_norm_eps=1e-6), tiny_params),
        bases.fingerprint(dataclasses.replace(TINY, rope_scaling=LLAMA3), tiny_params),
    ]
    assert len({own, *others}) == 7
