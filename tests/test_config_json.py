"""config.json: what is read, what is refused, and the way back."""

import dataclasses
import json
import re

import pytest
from conftest import TINY

from icae_jax import errors
from icae_jax.errors import UserError
from icae_jax.models import rope
from icae_jax.models.families import config_json

RAW = config_json.hub_config(TINY, "float32", {"bos_token_id": 1, "eos_token_id": 2})
LLAMA3 = rope.Llama3Scaling(8.0, 1.0, 4.0, 64)
MISTRAL, QWEN2, QWEN3 = (
    {"architectures": [name], "model_type": config_json.FAMILIES[name].model_type}
    for name in ("MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
)
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(
            TINY,
            rope_scaling=LLAMA3,
            rope_theta=5e5,
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            head_dim=16,
        ),
        dataclasses.replace(TINY, rope_scaling=rope.LinearScaling(2.0)),
        dataclasses.replace(TINY, rope_scaling=rope.YarnScaling(4.0, 64, 1.3, 20.0, 2.0, False)),
        dataclasses.replace(TINY, windows=(16, 16)),
        dataclasses.replace(TINY, qkv_bias=True),
        dataclasses.replace(TINY, qkv_bias=True, windows=(0, 16)),
        dataclasses.replace(TINY, qk_norm=True, windows=(8, 0)),
        dataclasses.replace(TINY, qkv_bias=True, o_bias=True),
        dataclasses.replace(TINY, mlp_bias=True),
        dataclasses.replace(TINY, qk_norm=True, qkv_bias=True, o_bias=True, windows=(8, 0)),
    ],
)
def test_config_round_trip(config):
    """Breaks when a field is lost or renamed on the way through config.json."""
    assert (
        config_json.parse_config(
            json.loads(json.dumps(config_json.hub_config(config, "bfloat16", {})))
        )
        == config
    )


def test_defaults_of_absent_fields():
    """Breaks when an older config.json, which omits fields at their defaults, is read with other
    defaults.
    """
    raw = {
        k: RAW[k]
        for k in (
            "architectures",
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
    }
    config = config_json.parse_config(raw)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.rms_norm_eps) == (
        4,
        8,
        10000.0,
        1e-6,
    )
    assert not config.tie_word_embeddings and config.rope_scaling is None
    old = config_json.parse_config(
        raw | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | dataclasses.asdict(LLAMA3)}
    )
    assert old.rope_theta == 5e5 and old.rope_scaling == LLAMA3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            "architecture GemmaForCausalLM is not supported; supported: Llama",
        ),
        ({"architectures": None, "model_type": None}, "no architectures"),
        ({"architectures": None, "model_type": "gemma"}, "no architectures .model_type is 'gemma'"),
        (
            {"architectures": None, "model_type": None, "phase": "pretrain", "base": "org/b"},
            "of a training run.* its base is 'org/b'",
        ),
        ({"architectures": {"a": 1}}, "architectures is {'a': 1}, which is not a list of names"),
        (
            {"architectures": "LlamaForCausalLM"},
            "architectures is 'LlamaForCausalLM', which is not a list of names",
        ),
        (
            {"model_type": "mistral"},
            "model_type is 'mistral', which transformers goes by, "
            "but the architecture is LlamaForCausalLM",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (QWEN3 | {"mlp_bias": True}, "mlp_bias is True"),
        (MISTRAL | {"attention_bias": True}, "attention_bias is True"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        (
            MISTRAL | {"sliding_window": 4096, "use_sliding_window": False},
            "use_sliding_window is False, .* and sliding_window 4096",
        ),
        (MISTRAL | {"sliding_window": 0}, "sliding_window is 0"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is .* llama with sliding_window None",
        ),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        ({"is_causal": False}, "is_causal is False"),
        ({"use_qk_norm": True}, "use_qk_norm is True"),
        (
            {"of_the_future": False},
            "of_the_future is False, an unknown field .* remove it from config.json",
        ),
        (
            {"of_the_future": {"a": [1] * 99}},
            r"of_the_future is {'a': \[1, [1, ]{40,80}…, an unknown field",
        ),
        (
            {"transformers_weights": "x.safetensors"},
            "transformers_weights is 'x.safetensors', an unknown field",
        ),
        ({"lora_r": 8}, "lora_r is 8, an unknown field"),
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling.X"}},
            "auto_map names the repository's own code",
        ),
        (
            {"auto_map": {"AutoTokenizer": "x.X", "AutoModel": "modeling.X"}},
            "auto_map names the repository's own code",
        ),
        ({"auto_map": "x"}, "auto_map is 'x'"),
        (
            QWEN2 | {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types is .*chunked",
        ),
        (
            MISTRAL | {"layer_types": ["full_attention"] * 2},
            "layer_types is .* sliding_window 4096",
        ),
        ({"layer_types": 2}, "layer_types is 2, which is not a list"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear"}},
            "RoPE of type linear lacks factor",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}},
            "RoPE of type linear has low_freq_factor",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor of RoPE is 0.5",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "RoPE of type default has full_attention",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_parameters and rope_scaling are both set, to different values",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
            "RoPE type 'dynamic' is not supported",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', which is not an object"),
        ({"rope_parameters": ["x"]}, r"rope_parameters is \['x'\], which is not an object"),
        ({"rope_parameters": {"type": ["linear"]}}, r"RoPE type \['linear'\] is not supported"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": NAN}},
            "factor of RoPE is nan, which is not a finite number above 0",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "low_freq_factor of RoPE is 4, which is not below high_freq_factor",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "rope_theta": 1}},
            "rope_theta 1 with YarnScaling.* not finite",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": True}, "partial_rotary_factor is True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantization is set"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "RoPE type 'dynamic' is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "RoPE type 'longrope' is not supported",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, which is not a whole number above 0"),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers is 1000000000, which is not a whole number above 0 to 10000",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, which is not"),
        (
            {"num_key_value_heads": 3},
            "^config.json: num_heads 4 is not a multiple of num_kv_heads 3",
        ),
        ({"head_dim": -2}, "head_dim is -2, which is not"),
        ({"vocab_size": 10**400}, "vocab_size is 10{60,80}…, which is not"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', which is not a whole number"),
        ({"hidden_size": True}, "hidden_size is True, which is not"),
        ({"hidden_size": 32.5}, "hidden_size is 32.5, which is not"),
        ({"hidden_size": [32]}, r"hidden_size is \[32\], which is not"),
        ({"hidden_size": None}, "hidden_size missing"),
        (
            {"rms_norm_eps": "small"},
            "rms_norm_eps is 'small', which is not a finite number above 0",
        ),
        ({"rms_norm_eps": "nan"}, "rms_norm_eps is 'nan', which is not"),
        ({"rms_norm_eps": INFINITY}, "rms_norm_eps is inf, which is not"),
        ({"rope_parameters": None, "rope_theta": -1.0}, "rope_theta is -1.0, which is not"),
        (
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings is 'false', which is neither true nor false",
        ),
        ({"attention_bias": 1}, "attention_bias is 1, which is neither"),
    ],
)
def test_other_models_are_refused_by_field(change, message):
    """Breaks when a model that is computed differently loads silently and yields garbage."""
    assert config_json.parse_config(RAW) == TINY
    with pytest.raises(UserError, match=message):
        config_json.parse_config(RAW | change)


@pytest.mark.parametrize(
    "change",
    [
        {"of_the_future": None},
        {"quantization_config": None},
        {"quantization_config": {}},
        {"auto_map": None},
        {
            "auto_map": {
                "AutoTokenizer": ["tokenization.X", None],
                "AutoConfig": "configuration.X",
                "AutoModelForCausalLM": None,
            }
        },
        {"architectures": None},
        {"model_type": None},
        {"hidden_act": "swish"},
        {"hidden_act": None},
        {"pretraining_tp": 2},  # splits a matmul into several that add up to it
        {"is_causal": True},
        {
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_window_layers": 28,
        },  # a Qwen2 as a Llama
        QWEN2 | {"sliding_window": -1, "max_window_layers": -1, "use_sliding_window": False},
        {
            "is_llama_config": True,
            "rope_interleaved": False,
            "activation": "swiglu",
            "transformers.js_config": {"dtype": "q4"},
        },
        {"tie_word_embeddings": None},
        {
            "num_key_value_heads": 2.0,
            "hidden_size": 32.0,
            "max_position_embeddings": 256.0,
            "vocab_size": "64",
        },
        {"rms_norm_eps": "1e-05"},
        {"rope_parameters": None, "rope_theta": "10000.0"},
        {
            "rope_parameters": None,
            "rope_theta": None,
            "rope_scaling": {"rope_theta": 1e4, "rope_type": "default"},
        },
        {"rope_scaling": {"type": "default", "rope_type": None, "factor": None}},
        {"rope_scaling": {}, "original_max_position_embeddings": None},
        {
            "unsloth_fixed": True,
            "unsloth_version": "2025.3.1",
            "max_sequence_length": 16384,
            "transformers_version": "4.31.0",
        },
        {
            "temperature": 0.6,
            "top_p": 0.9,
            "do_sample": True,
            "max_length": 4096,
            "forced_eos_token_id": 2,
            "pad_token_id": 0,
        },
        {
            "attention_dropout": 0.1,
            "resid_pdrop": 0.1,
            "initializer_range": 0.02,
            "use_cache": False,
            "torch_dtype": "float16",
        },
        {
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "pruned_heads": {},
            "chunk_size_feed_forward": 0,
            "is_decoder": True,
        },
        {
            "_name_or_path": "org/x",
            "_attn_implementation_autoset": True,
            "attn_implementation": "flash_attention_2",
            "torchscript": False,
        },
        {"dual_chunk_attention_config": {"chunk_size": 262144}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_nothing_is_read(change):
    """Breaks when a base is refused for a placeholder (null, empty), its author's notes, or a
    number's spelling.
    """
    expected = dataclasses.replace(TINY, qkv_bias=change.get("model_type") == "qwen2")
    assert config_json.parse_config(RAW | change) == expected


def test_every_field_that_transformers_writes_is_known():
    """Breaks when a supported family's configuration, with all defaults written out, is refused for
    a field.
    """
    transformers = pytest.importorskip("transformers")
    for name, family in config_json.FAMILIES.items():
        raw = transformers.CONFIG_MAPPING[family.model_type]().to_dict() | {"architectures": [name]}
        raw |= transformers.GenerationConfig().to_dict()
        config_json.parse_config(json.loads(json.dumps(raw)))


@pytest.mark.parametrize(
    ("change", "said", "expected"),
    [
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4},
            "rope_theta is 10000, and 500000 beside",
            {"rope_theta": 5e5},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
            "RoPE has rope_type linear and type 'dynamic'; rope_type counts",
            {"rope_scaling": rope.LinearScaling(2.0)},
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "attn_factor": 0.5,
                    "factor": 1.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "attn_factor of RoPE .0.5. is not read",
            {"rope_scaling": rope.YarnScaling(1.0, 64, 1.0)},
        ),
        (
            {"dual_chunk_attention_config": {"chunk_size": 9}},
            "dual_chunk_attention_config is not computed",
            {},
        ),
    ],
    ids=["theta", "type", "attn_factor", "chunks"],
)
def test_of_two_spellings_the_one_that_counts_is_said(change, said, expected, capsys):
    """Breaks when a contradiction is not resolved as in transformers, or is resolved silently."""
    errors.say.cache_clear()
    for _ in range(2):
        assert config_json.parse_config(RAW | change) == dataclasses.replace(TINY, **expected)
    told = capsys.readouterr().err
    assert re.search(said, told) and told.count("\n") == 1


def test_both_spellings_of_rope_may_agree():
    """Breaks when a file that states the same twice is refused."""
    both = {
        "rope_scaling": {"type": "linear", "factor": 2},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    }
    assert config_json.parse_config(RAW | both) == dataclasses.replace(
        TINY, rope_scaling=rope.LinearScaling(2.0)
    )


def test_the_dtype_of_two_spellings(capsys):
    """Breaks when the old name of a dtype wins over the new one, or a placeholder counts as a
    dtype.
    """
    errors.say.cache_clear()
    assert (
        config_json.stored_dtype({"dtype": None, "torch_dtype": "float16"}) == "float16"
        and config_json.stored_dtype({}) is None
    )
    assert not capsys.readouterr().err
    assert config_json.stored_dtype({"dtype": "bfloat16", "torch_dtype": "float16"}) == "bfloat16"
    assert "dtype is 'bfloat16' and torch_dtype 'float16'; dtype counts" in capsys.readouterr().err


def test_incomplete_config_names_what_is_missing(tmp_path):
    """Breaks when a missing field ends in a KeyError, or a missing file in a traceback."""
    with pytest.raises(ValueError, match=r"vocab_size, hidden_size, .* missing"):
        config_json.parse_config({"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        config_json.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(
        UserError,
        match=r"config\.json: not an object; it should hold the base model's configuration",
    ):
        config_json.read_config(tmp_path)


def test_windows_by_the_rules_of_each_architecture():
    """Breaks when a missing window means none where the default is 4096, or a disabled one is
    computed.
    """

    def windows(name, **fields):
        family = {"architectures": [name], "model_type": config_json.FAMILIES[name].model_type}
        return config_json.parse_config(RAW | family | {"num_hidden_layers": 3} | fields).windows

    assert (
        windows("MistralForCausalLM") == (4096,) * 3
        and windows("MistralForCausalLM", sliding_window=None) == ()
    )
    assert (
        windows("Qwen2ForCausalLM", sliding_window=64, max_window_layers=0)
        == ()
        == windows("Qwen3ForCausalLM", use_sliding_window=True)
    )
    assert windows(
        "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=64, max_window_layers=1
    ) == (0, 64, 64)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert windows(
        "Qwen3ForCausalLM", use_sliding_window=True, sliding_window=64, layer_types=types
    ) == (64, 0, 0)


def test_no_architecture_is_made_up():
    """Breaks when a model is written as one that computes something else."""
    for changes in (
        {"qkv_bias": True, "qk_norm": True},
        {"windows": (0, 16)},
        {"qk_norm": True, "windows": (4, 8)},
        {"o_bias": True},
        {"qkv_bias": True, "mlp_bias": True},
        {"qk_norm": True, "mlp_bias": True},
        {"mlp_bias": True, "windows": (4, 4)},
    ):
        with pytest.raises(ValueError, match="no architecture of the hub has"):
            config_json.hub_config(dataclasses.replace(TINY, **changes), "float32", {})
