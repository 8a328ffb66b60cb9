"""Sizes of well-known bases: against the published parameter counts, and through config.json."""

import math

import jax
import pytest

from icae_jax.models import llama, rope
from icae_jax.models.families import config_json, sizes

COUNTS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "microsoft/phi-4": 14_659_507_200,
    "ibm-granite/granite-3.0-2b-base": 2_533_531_648,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
}

# What no parameter count shows, from the models' config.json and papers: heads, positions, RoPE,
# the norm's epsilon, windows.
CONSTANTS = {
    "meta-llama/Llama-2-7b-hf": (32, 4096, 1e4, None, 1e-5, ()),
    "meta-llama/Llama-2-70b-hf": (64, 4096, 1e4, None, 1e-5, ()),
    "meta-llama/Meta-Llama-3-8B": (32, 8192, 5e5, None, 1e-5, ()),
    "meta-llama/Llama-3.1-8B": (32, 131072, 5e5, rope.Llama3Scaling(8.0, 1.0, 4.0, 8192), 1e-5, ()),
    "meta-llama/Llama-3.2-1B": (
        32,
        131072,
        5e5,
        rope.Llama3Scaling(32.0, 1.0, 4.0, 8192),
        1e-5,
        (),
    ),
    "mistralai/Mistral-7B-v0.1": (32, 32768, 1e4, None, 1e-5, (4096,) * 32),
    "mistralai/Mistral-7B-Instruct-v0.2": (32, 32768, 1e6, None, 1e-5, ()),
    "Qwen/Qwen2.5-0.5B": (14, 32768, 1e6, None, 1e-6, ()),
    "Qwen/Qwen3-8B": (32, 40960, 1e6, None, 1e-6, ()),
    "google/gemma-2-2b": (8, 8192, 1e4, None, 1e-6, (4096, 0) * 13),
    "google/gemma-3-270m": (4, 32768, 1e6, None, 1e-6, ((512,) * 5 + (0,)) * 3),
    "google/gemma-3-1b-pt": (4, 32768, 1e6, None, 1e-6, ((512,) * 5 + (0,)) * 4 + (512, 512)),
    "HuggingFaceTB/SmolLM3-3B": (16, 65536, 5e6, None, 1e-6, ()),
}


@pytest.mark.parametrize("name", sizes.NAMED)
def test_parameter_counts(name):
    """Breaks when a width, a count of layers or heads, a bias, a norm or the tied head is not the
    published model's.
    """
    assert (
        sum(math.prod(x.shape) for x in jax.tree.leaves(llama.param_shapes(sizes.find(name))))
        == COUNTS[name]
    )


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_that_no_count_shows(name):
    c = sizes.find(name)
    assert (
        c.num_heads,
        c.max_position_embeddings,
        c.rope_theta,
        c.rope_scaling,
        c.rms_norm_eps,
        c.windows,
    ) == CONSTANTS[name]


@pytest.mark.parametrize("name", sizes.NAMED)
def test_through_config_json(name):
    """Breaks when a base has what no architecture of the hub computes, or a field is lost in
    config.json.
    """
    raw = config_json.hub_config(sizes.find(name), "bfloat16", {})
    assert config_json.parse_config(raw) == sizes.find(name)
    families = {
        "Qwen/Qwen3": "qwen3",
        "Qwen/Qwen2.5": "qwen2",
        "mistralai/Mistral-7B-v0.1": "mistral",
        "google/gemma-2": "gemma2",
        "google/gemma-3": "gemma3_text",
        "allenai/OLMo-2": "olmo2",
        "microsoft/phi-4": "phi3",
        "ibm-granite/granite-3": "granite",
        "HuggingFaceTB/SmolLM3": "smollm3",
    }
    assert raw["model_type"] == next(
        (kind for start, kind in families.items() if name.startswith(start)), "llama"
    )


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"sizes of 'llama3_8b' are not known; known: .*Llama-2-7b-hf.*Qwen3-8B"
    ):
        sizes.find("llama3_8b")
