"""Rotary positions (RoPE, arXiv 2104.09864), and how bases stretch them over longer contexts.

`config` is a `models.llama.ModelConfig` throughout; letters as there. Layers may differ in their
RoPE: `config.ropes` names that of each.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Frequencies = Float[np.ndarray, " half_R"]
# What a layer may have: the model's RoPE; one of other frequencies, unstretched (the layers with
# windows of Gemma 3); or none, where tokens have no positions (SmolLM3).
GLOBAL, LOCAL, NONE = KINDS = ("global", "local", "none")


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


def kinds(config: Any) -> tuple[str, ...]:
    """The distinct kinds of RoPE (`KINDS`) that the layers have, by their first layer."""
    return tuple(dict.fromkeys(config.ropes)) or (GLOBAL,)


def layer_kinds(config: Any) -> Int[np.ndarray, " L"]:
    """For each layer, the index of its kind in `kinds`."""
    index = {kind: i for i, kind in enumerate(kinds(config))}
    return np.asarray([index[kind] for kind in config.ropes or (GLOBAL,) * config.num_layers])


def frequencies(config: Any, kind: str = GLOBAL) -> Frequencies:
    """Angular frequencies in radians per position, float64, of the R rotated numbers of a head."""
    half = (config.rotary_dim or config.head_dim) // 2
    if kind == NONE:
        return np.zeros(half)
    theta = config.local_rope_theta if kind == LOCAL else config.rope_theta
    freqs = theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling if kind == GLOBAL else None
    return freqs if scaling is None else scaling.stretch(freqs, theta)


def tables(
    config: Any, positions: Int[Any, "..."], kind: str = GLOBAL
) -> tuple[Float[Array, "... half_R"], Float[Array, "... half_R"]]:
    """Cosines and sines of every position's angles, float32."""
    angles = jnp.einsum(
        "...,h->...h",
        positions.astype(jnp.float32),
        jnp.asarray(frequencies(config, kind), jnp.float32),
    )
    scaling = config.rope_scaling if kind == GLOBAL else None
    magnitude = getattr(scaling, "attention_factor", 1.0)
    return magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)


def rotate(
    x: Float[Any, "*time heads H"], cos_sin: tuple[Any, Any]
) -> Float[Array, "*time heads H"]:
    """Rotates heads `[..., T, heads, H]` by cos and sin `[..., T, R / 2]`.

    Halves of the first R numbers of a head are paired, as in the hub's Llama, where R is H. The
    others stay (Phi-3's partial_rotary_factor).
    """
    cos, sin = (t[..., None, :] for t in cos_sin)
    half = cos.shape[-1]
    ends = [end for end in (half, 2 * half) if end < x.shape[-1]]
    x1, x2, *others = jnp.split(x.astype(jnp.float32), ends, axis=-1)
    rotated = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
    return jnp.concatenate([*rotated, *others], axis=-1).astype(x.dtype)


def rotate_keys(
    config: Any, k_LBPKH: Float[Any, "L B P K H"], positions_BP: Int[Any, "_ P"]
) -> Float[Array, "L B P K H"]:
    """Rotates the stacked, unrotated keys that `Llama` returns, for use as a prefix.

    Each layer's keys are rotated by its own RoPE.
    """
    each = [tables(config, positions_BP, kind) for kind in kinds(config)]
    if len(each) == 1:
        cos, sin = (table[None] for table in each[0])
    else:
        cos, sin = (jnp.stack(tables)[layer_kinds(config)] for tables in zip(*each, strict=True))
    return rotate(k_LBPKH, (cos, sin))
