"""Rotary positions (RoPE, arXiv 2104.09864), and how bases stretch them over longer contexts.

`config` is a `models.llama.ModelConfig` throughout; letters as there.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Frequencies = Float[np.ndarray, " half_H"]


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float

    def stretch(self, freqs: Frequencies, rope_theta: float) -> Frequencies:
        """The stretched frequencies."""
        return freqs / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Frequency-dependent stretching (Llama 3.1; section 3.4.1 of arXiv 2407.21783).

    Field names are those of config.json.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def stretch(self, freqs: Frequencies, rope_theta: float) -> Frequencies:
        """The stretched frequencies.

        Wavelengths longer than the original context are stretched by `factor`, short ones kept,
        with a ramp between them.
        """
        wavelength = 2 * math.pi / freqs
        ramp = self.original_max_position_embeddings / wavelength - self.low_freq_factor
        ramp = np.clip(ramp / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return (1 - ramp) * freqs / self.factor + ramp * freqs


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071, sections 3.2 to 3.4): only slow frequencies are stretched.

    factor: of the stretching. attention_factor: multiplies cos and sin. beta_fast, beta_slow:
    rotations over the original context between which the ramp lies. truncate: whether the ramp's
    ends are rounded outwards to whole frequencies.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def stretch(self, freqs: Frequencies, rope_theta: float) -> Frequencies:
        """The stretched frequencies."""
        half = len(freqs)

        def index_of(rotations):
            """The fractional index of the frequency with that many turns over the context."""
            turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return half * math.log(turns) / math.log(rope_theta)

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        stretched = np.clip((np.arange(half) - low) / (high - low or 0.001), 0.0, 1.0)
        return stretched * freqs / self.factor + (1 - stretched) * freqs


Scaling = LinearScaling | Llama3Scaling | YarnScaling


def frequencies(config: Any) -> Frequencies:
    """Angular frequencies in radians per position, float64."""
    half = config.head_dim // 2
    freqs = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    return freqs if scaling is None else scaling.stretch(freqs, config.rope_theta)


def tables(
    config: Any, positions: Int[Any, "..."]
) -> tuple[Float[Array, "... half_H"], Float[Array, "... half_H"]]:
    """Cosines and sines of every position's angles, float32."""
    angles = jnp.einsum(
        "...,h->...h", positions.astype(jnp.float32), jnp.asarray(frequencies(config), jnp.float32)
    )
    magnitude = getattr(config.rope_scaling, "attention_factor", 1.0)
    return magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)


def rotate(
    x: Float[Any, "*time heads H"], cos_sin: tuple[Any, Any]
) -> Float[Array, "*time heads H"]:
    """Rotates heads `[..., T, heads, H]` by cos and sin `[..., T, H / 2]`.

    Halves of a head are paired, as in the hub's Llama.
    """
    cos, sin = (t[..., None, :] for t in cos_sin)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def rotate_keys(
    config: Any, k_LBPKH: Float[Any, "L B P K H"], positions_BP: Int[Any, "_ P"]
) -> Float[Array, "L B P K H"]:
    """Rotates the stacked, unrotated keys that `Llama` returns, for use as a prefix."""
    cos, sin = tables(config, positions_BP)
    return rotate(k_LBPKH, (cos[None], sin[None]))
