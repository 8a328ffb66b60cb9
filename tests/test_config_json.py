"""config.json: what is read, what is refused, and the way back."""

import dataclasses
import json

import pytest
from conftest import TINY

from icae_jax.interop import config_json
from icae_jax.models import llama

RAW = config_json.hub_config(TINY, "float32", {"bos_token_id": 1, "eos_token_id": 2})
LLAMA3 = llama.Llama3RopeScaling(8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, rope_scaling=LLAMA3, rope_theta=5e5, tie_word_embeddings=True, rms_norm_eps=1e-6, head_dim=16),
    ],
)
def test_config_round_trip(config):
    """Breaks when a field is lost or renamed on the way through config.json."""
    assert config_json.parse_config(json.loads(json.dumps(config_json.hub_config(config, "bfloat16", {})))) == config


def test_defaults_of_absent_fields():
    """Breaks when an older config.json, which leaves out what equals the default, is read with other defaults."""
    raw = {
        k: RAW[k]
        for k in ("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    config = config_json.parse_config(raw)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.rms_norm_eps) == (4, 8, 10000.0, 1e-6)
    assert not config.tie_word_embeddings and config.rope_scaling is None
    old = config_json.parse_config(raw | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | dataclasses.asdict(LLAMA3)})
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
    assert config_json.parse_config(RAW) == TINY
    with pytest.raises(ValueError, match=message):
        config_json.parse_config(RAW | change)


def test_incomplete_config_names_what_is_missing(tmp_path):
    """Breaks when a missing field ends in a KeyError, or a missing file in a traceback."""
    with pytest.raises(ValueError, match=r"vocab_size, hidden_size, .* missing"):
        config_json.parse_config({"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        config_json.read_config(tmp_path)
