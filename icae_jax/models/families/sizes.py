"""Sizes of well-known bases, from their config.json: enough to plan a run without weights."""

from icae_jax.errors import UserError
from icae_jax.models.llama import ModelConfig
from icae_jax.models.rope import Llama3Scaling


def _llama2(*sizes: int) -> ModelConfig:
    return ModelConfig(32000, *sizes, 128, max_position_embeddings=4096)


def _llama3(
    *sizes: int, positions: int = 131072, factor: float | None = None, tied: bool = False
) -> ModelConfig:
    return ModelConfig(
        128256,
        *sizes,
        positions,
        rope_theta=5e5,
        rope_scaling=factor and Llama3Scaling(factor, 1.0, 4.0, 8192),
        tie_word_embeddings=tied,
    )


def _mistral(**fields) -> ModelConfig:
    return ModelConfig(32000, 4096, 14336, 32, 32, 8, 128, max_position_embeddings=32768, **fields)


def _qwen(*sizes: int, **fields) -> ModelConfig:
    return ModelConfig(151936, *sizes, rms_norm_eps=1e-6, rope_theta=1e6, **fields)


def _gemma(*sizes: int, local: bool = False, window: int, **fields) -> ModelConfig:
    """local: as Gemma 3, with five layers with a window and a RoPE of their own to one without;
    else as Gemma 2, every other layer with a window.
    """
    hidden, _, layers, *_ = sizes
    every = 6 if local else 2
    windows = tuple(window if (i + 1) % every else 0 for i in range(layers))
    if local:
        fields |= {
            "qk_norm": True,
            "rope_theta": 1e6,
            "local_rope_theta": 1e4,
            "ropes": tuple("local" if width else "global" for width in windows),
        }
    else:
        fields |= {"attention_softcap": 50.0, "final_softcap": 30.0}
    return ModelConfig(
        262144 if local else 256000,
        *sizes,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        norms="both",
        norm_plus_one=True,
        activation="gelu_tanh",
        embedding_multiplier=hidden**0.5,
        windows=windows,
        **fields,
    )


# By hub id. Sizes in order: hidden, intermediate, layers, heads, KV heads, head_dim, positions.
NAMED = {
    "meta-llama/Llama-2-7b-hf": _llama2(4096, 11008, 32, 32, 32),
    "meta-llama/Llama-2-7b-chat-hf": _llama2(4096, 11008, 32, 32, 32),
    "meta-llama/Llama-2-13b-hf": _llama2(5120, 13824, 40, 40, 40),
    "meta-llama/Llama-2-70b-hf": _llama2(8192, 28672, 80, 64, 8),
    "meta-llama/Meta-Llama-3-8B": _llama3(4096, 14336, 32, 32, 8, 128, positions=8192),
    "meta-llama/Meta-Llama-3-8B-Instruct": _llama3(4096, 14336, 32, 32, 8, 128, positions=8192),
    "meta-llama/Llama-3.1-8B": _llama3(4096, 14336, 32, 32, 8, 128, factor=8.0),
    "meta-llama/Llama-3.2-1B": _llama3(2048, 8192, 16, 32, 8, 64, factor=32.0, tied=True),
    "meta-llama/Llama-3.2-3B": _llama3(3072, 8192, 28, 24, 8, 128, factor=32.0, tied=True),
    "mistralai/Mistral-7B-v0.1": _mistral(windows=(4096,) * 32),
    "mistralai/Mistral-7B-Instruct-v0.2": _mistral(rope_theta=1e6),
    "Qwen/Qwen2.5-0.5B": _qwen(
        896, 4864, 24, 14, 2, 64, 32768, qkv_bias=True, tie_word_embeddings=True
    ),
    "Qwen/Qwen3-0.6B": _qwen(
        1024, 3072, 28, 16, 8, 128, 40960, qk_norm=True, tie_word_embeddings=True
    ),
    "Qwen/Qwen3-8B": _qwen(4096, 12288, 36, 32, 8, 128, 40960, qk_norm=True),
    "google/gemma-2-2b": _gemma(2304, 9216, 26, 8, 4, 256, 8192, window=4096),
    "google/gemma-2-9b": _gemma(3584, 14336, 42, 16, 8, 256, 8192, window=4096),
    "google/gemma-3-270m": _gemma(640, 2048, 18, 4, 1, 256, 32768, window=512, local=True),
    "google/gemma-3-1b-pt": _gemma(1152, 6912, 26, 4, 1, 256, 32768, window=512, local=True),
    "allenai/OLMo-2-1124-7B": ModelConfig(
        *(100352, 4096, 11008, 32, 32, 32, 128, 4096),
        rms_norm_eps=1e-6,
        rope_theta=5e5,
        norms="after",
        qk_projection_norm=True,
    ),
    "microsoft/phi-4": ModelConfig(
        *(100352, 5120, 17920, 40, 40, 10, 128, 16384), rope_theta=2.5e5, fused=True
    ),
    "ibm-granite/granite-3.0-2b-base": ModelConfig(
        *(49155, 2048, 8192, 40, 32, 8, 64, 4096),
        tie_word_embeddings=True,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_scale=0.015625,
        logits_divisor=8.0,
    ),
    "HuggingFaceTB/SmolLM2-135M": ModelConfig(
        *(49152, 576, 1536, 30, 9, 3, 64, 8192), rope_theta=1e5, tie_word_embeddings=True
    ),
    "HuggingFaceTB/SmolLM3-3B": ModelConfig(
        *(128256, 2048, 11008, 36, 16, 4, 128, 65536),
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        tie_word_embeddings=True,
        ropes=("global", "global", "global", "none") * 9,
    ),
}

# Short names, as the configurations take them.
SHORT_NAMES = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "llama2_70b": "meta-llama/Llama-2-70b-hf",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B",
    "llama3_8b_instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "mistral_7b": "mistralai/Mistral-7B-Instruct-v0.2",
    "qwen3_8b": "Qwen/Qwen3-8B",
}


def hub_id(name: str) -> str:
    """The hub id of a base's short name; UserError with the known ones otherwise."""
    if name not in SHORT_NAMES:
        raise UserError(f"base {name!r} is not known; known: {', '.join(SHORT_NAMES)}")
    return SHORT_NAMES[name]


def find(name: str) -> ModelConfig:
    """The `ModelConfig` of a hub id; UserError, which lists the known ones, for others."""
    if name not in NAMED:
        raise UserError(f"the sizes of {name!r} are not known; known: {', '.join(NAMED)}")
    return NAMED[name]
