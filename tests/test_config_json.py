"""config.json: what is read, what is refused, and the way back."""

import dataclasses
import json

import pytest
from conftest import TINY

from icae_jax.errors import UserError
from icae_jax.interop import config_json
from icae_jax.models import rope

RAW = config_json.hub_config(TINY, "float32", {"bos_token_id": 1, "eos_token_id": 2})
LLAMA3 = rope.Llama3Scaling(8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, rope_scaling=LLAMA3, rope_theta=5e5, tie_word_embeddings=True, rms_norm_eps=1e-6, head_dim=16),
        dataclasses.replace(TINY, rope_scaling=rope.LinearScaling(2.0)),
        dataclasses.replace(TINY, rope_scaling=rope.YarnScaling(4.0, 64, 1.3, 20.0, 2.0, False)),
        dataclasses.replace(TINY, windows=(16, 16)),
        dataclasses.replace(TINY, qkv_bias=True),
        dataclasses.replace(TINY, qkv_bias=True, windows=(0, 16)),
        dataclasses.replace(TINY, qk_norm=True, windows=(8, 0)),
    ],
)
def test_config_round_trip(config):
    """Breaks when a field is lost or renamed on the way through config.json."""
    assert config_json.parse_config(json.loads(json.dumps(config_json.hub_config(config, "bfloat16", {})))) == config


def test_defaults_of_absent_fields():
    """Breaks when an older config.json, which leaves out what equals the default, is read with other defaults."""
    raw = {
        k: RAW[k] for k in ("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
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
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .* llama with sliding_window None"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.X"}}, "auto_map names code of the repository's own"),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "attention_bias is True"),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention", "chunked_attention"]}, "layer_types is .*chunked"),
        ({"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 2}, "layer_types is .* sliding_window 4096"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "RoPE of type linear lacks factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}}, "RoPE of type linear has low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor of RoPE"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "RoPE of type default has full_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters and rope_scaling are both set, to different values"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {}}, "quantization_config is set"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "RoPE type 'longrope' is not supported"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be positive"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be positive"),
        ({"head_dim": -2}, "head_dim is -2; it must be positive"),
        ({"hidden_size": "64"}, "hidden_size is '64', which is not a whole number"),
        ({"rms_norm_eps": "small"}, "config.json: a field has a value of another kind .*'small'"),
        ({"max_position_embeddings": None}, "config.json: a field has a value of another kind"),
        ({"architectures": {}}, "no architecture"),
        ({"architectures": {"a": 1}}, "config.json: a field has a value of another kind"),
        ({"rope_parameters": ["x"]}, "config.json: a field has a value of another kind"),
        ({"layer_types": 2}, "config.json: a field has a value of another kind"),
    ],
)
def test_other_models_are_refused_by_field(change, message):
    """Breaks when a model that is computed differently loads silently and yields garbage."""
    assert config_json.parse_config(RAW) == TINY
    with pytest.raises(UserError, match=message):
        config_json.parse_config(RAW | change)


def test_incomplete_config_names_what_is_missing(tmp_path):
    """Breaks when a missing field ends in a KeyError, or a missing file in a traceback."""
    with pytest.raises(ValueError, match=r"vocab_size, hidden_size, .* missing"):
        config_json.parse_config({"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        config_json.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: not an object; it should hold the base model's configuration"):
        config_json.read_config(tmp_path)


def test_windows_by_the_rules_of_each_architecture():
    """Breaks when an absent window means none where the architecture's default is 4096, or a switched-off one is computed."""

    def windows(name, **fields):
        return config_json.parse_config(RAW | {"architectures": [name], "num_hidden_layers": 3} | fields).windows

    assert windows("MistralForCausalLM") == (4096,) * 3 and windows("MistralForCausalLM", sliding_window=None) == ()
    assert windows("Qwen2ForCausalLM", sliding_window=64) == () == windows("Qwen3ForCausalLM", use_sliding_window=True)
    assert windows("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=64, max_window_layers=1) == (0, 64, 64)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert windows("Qwen3ForCausalLM", use_sliding_window=True, sliding_window=64, layer_types=types) == (64, 0, 0)


def test_no_architecture_is_made_up():
    """Breaks when a model is written as one that computes something else."""
    for changes in ({"qkv_bias": True, "qk_norm": True}, {"windows": (0, 16)}, {"qk_norm": True, "windows": (4, 8)}):
        with pytest.raises(ValueError, match="no architecture of the hub has"):
            config_json.hub_config(dataclasses.replace(TINY, **changes), "float32", {})
