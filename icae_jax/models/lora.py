"""LoRA (Hu et al., arXiv 2106.09685) as a linen variable collection.

A tree made by `init_lora` is passed as `apply({"params": base, "lora": tree}, ...)`. Without it the
same module computes the base alone, so that one frozen copy serves as encoder and as decoder.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from icae_jax.errors import UserError

# The seven projections of a block, by the module that holds them.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION + MLP


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections get an adapter `scale * (x @ A) @ B`, and of which size.

    scale: alpha / r in PEFT's terms. dropout: on the adapter's input, in training.
    """

    rank: int = 128
    scale: float = 2.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        if self.rank <= 0:
            raise UserError(f"lora.rank is {self.rank}; it must be a positive number such as 128")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; it must lie in [0, 1)")
        unknown = [t for t in self.targets if t not in PROJECTIONS]
        if unknown or not self.targets:
            raise UserError(
                f"lora.targets holds {unknown or 'nothing'}; choose from {', '.join(PROJECTIONS)}"
            )


def projection_shape(model_config: Any, name: str) -> tuple[int, int]:
    """(input, output) widths of a projection of a `ModelConfig`'s blocks."""
    c = model_config
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "q_proj": (c.hidden_size, heads),
        "k_proj": (c.hidden_size, kv),
        "v_proj": (c.hidden_size, kv),
        "o_proj": (heads, c.hidden_size),
        "gate_proj": (c.hidden_size, c.intermediate_size),
        "up_proj": (c.hidden_size, c.intermediate_size),
        "down_proj": (c.intermediate_size, c.hidden_size),
    }[name]


def module_of(name: str) -> str:
    """The block's submodule that holds a projection."""
    return "self_attn" if name in ATTENTION else "mlp"


def init_lora(key: Array, model_config: Any, config: LoraConfig) -> dict[str, Any]:
    """A LoRA tree, float32: `{"layers": {module: {projection: {"a", "b"}}}}`.

    `a [L, in, R]` is drawn as PEFT does, uniform in +-1/sqrt(in). `b [L, R, out]` is zero, so that
    training starts at the base model.
    """
    tree = {}
    for i, name in enumerate(config.targets):
        d_in, d_out = projection_shape(model_config, name)
        layers = model_config.num_layers
        bound = 1.0 / math.sqrt(d_in)
        a = jax.random.uniform(
            jax.random.fold_in(key, i), (layers, d_in, config.rank), jnp.float32, -bound, bound
        )
        b = jnp.zeros((layers, config.rank, d_out), jnp.float32)
        tree.setdefault(module_of(name), {})[name] = {"a": a, "b": b}
    return {"layers": tree}
