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
