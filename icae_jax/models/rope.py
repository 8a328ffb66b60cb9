"""Rotary positions (RoPE, arXiv 2104.09864) and the ways in which bases stretch them over longer contexts.

`config` is a `models.llama.ModelConfig` throughout; letters as there.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float

    def stretch(self, freqs, rope_theta):
        return freqs / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Frequency-dependent stretching of RoPE (Llama 3.1, section 3.4.1 of arXiv 2407.21783), as config.json names it."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def stretch(self, freqs, rope_theta):
        # Wavelengths longer than the original context are stretched by `factor`, short ones kept, between them a ramp.
        wavelength = 2 * math.pi / freqs
        ramp = self.original_max_position_embeddings / wavelength - self.low_freq_factor
        ramp = np.clip(ramp / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return (1 - ramp) * freqs / self.factor + ramp * freqs


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071, section 3.2 to 3.4): slow frequencies are stretched by `factor`, fast ones kept, and cos and sin are
    multiplied by `attention_factor`. beta_fast, beta_slow: rotations over the original context between which the ramp lies.

    truncate: the ramp's ends are rounded outwards to whole frequencies.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def stretch(self, freqs, rope_theta):
        half = len(freqs)

        def index_of(rotations):
            """The (fractional) index of the frequency that turns so many times over the original context."""
            return (
                half
                * math.log(self.original_max_position_embeddings / (rotations * 2 * math.pi))
                / math.log(rope_theta)
            )

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        stretched = np.clip((np.arange(half) - low) / (high - low or 0.001), 0.0, 1.0)
        return stretched * freqs / self.factor + (1 - stretched) * freqs


Scaling = LinearScaling | Llama3Scaling | YarnScaling


def frequencies(config):
    """Angular frequencies in radians per position, `[H / 2]`, float64 numpy."""
    half = config.head_dim // 2
    freqs = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    return (
        freqs
        if config.rope_scaling is None
        else config.rope_scaling.stretch(freqs, config.rope_theta)
    )


def tables(config, positions):
    """cos and sin of every position's angles, each `[..., H / 2]` float32, for integer positions `[...]`."""
    angles = jnp.einsum(
        "...,h->...h", positions.astype(jnp.float32), jnp.asarray(frequencies(config), jnp.float32)
    )
    magnitude = getattr(config.rope_scaling, "attention_factor", 1.0)
    return magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)


def rotate(x, cos_sin):
    """Rotates heads `x [..., T, heads, H]` by `cos_sin`, each `[..., T, H / 2]` (halves paired as the hub's Llama does)."""
    cos, sin = (t[..., None, :] for t in cos_sin)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def rotate_keys(config, k_LBPKH, positions_BP):
    """Rotates the stacked, unrotated keys that `Llama` returns, for use as a prefix at the given positions."""
    cos, sin = tables(config, positions_BP)
    return rotate(k_LBPKH, (cos[None], sin[None]))
