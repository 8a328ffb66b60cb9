"""The names and shapes of a model's tensors in the hub's checkpoints."""

from typing import NamedTuple

from icae_jax.models import llama, lora


class Place(NamedTuple):
    """Where a hub tensor, or some of its rows, is in our tree of parameters.

    layer: its index on the parameter's first axis, None if not stacked. transposed: the hub stores
    kernels as [out, in], our tree as [in, out]. first_row: of the hub tensor, where the parameter
    begins; other parameters may lie before and behind.
    """

    path: tuple[str, ...]
    layer: int | None
    transposed: bool
    first_row: int = 0


# The hub tensors that hold several projections, one below the other, where a model is `fused`.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_NORMS = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


def tensor_names(config: llama.ModelConfig) -> dict[str, tuple[Place, ...]]:
    """What every tensor of the model holds, from its first row on, by its name in the hub."""
    names = {
        "model.embed_tokens.weight": (Place(("embed",), None, False),),
        "model.norm.weight": (Place(("norm", "scale"), None, False),),
    }
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = (Place(("lm_head",), None, True),)
    q_and_k = ("q_norm", "k_norm") if config.qk_norm or config.qk_projection_norm else ()
    fused = FUSED if config.fused else {}
    whole = {part: name for name, parts in fused.items() for part in parts}
    # (path in the hub, path in our tree, first row), layer by layer.
    parts = [((name, "weight"), (name, "scale"), 0) for name in _NORMS[config.norms]]
    for hub_name, name in (("weight", "kernel"), ("bias", "bias")):
        row: dict[str, int] = {}  # behind what was placed in a hub tensor
        for part in lora.PROJECTIONS if name == "kernel" else config.biased:
            module, hub_part = lora.module_of(part), whole.get(part, part)
            first = row.get(hub_part, 0)
            parts.append(((module, hub_part, hub_name), (module, part, name), first))
            row[hub_part] = first + lora.projection_shape(config, part)[1]
    parts += [(("self_attn", n, "weight"), ("self_attn", n, "scale"), 0) for n in q_and_k]
    for i in range(config.num_layers):
        for hub_path, path, first in parts:
            place = Place(("layers", *path), i, path[-1] == "kernel", first)
            name = f"model.layers.{i}.{'.'.join(hub_path)}"
            names[name] = (*names.get(name, ()), place)
    return names


def hub_shapes(config: llama.ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model in the hub, by its name there."""
    params, shapes = llama.param_shapes(config), {}
    for name, places in tensor_names(config).items():
        for path, layer, transposed, first_row in places:
            leaf = params
            for key in path:
                leaf = leaf[key]
            rows, *columns = leaf.shape[0 if layer is None else 1 :][:: -1 if transposed else 1]
            shapes[name] = (first_row + rows, *columns)
    return shapes
