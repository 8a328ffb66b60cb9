"""The names and shapes of a model's tensors in the hub's checkpoints."""

from typing import NamedTuple

from icae_jax.models import llama, lora


class Place(NamedTuple):
    """Where a hub tensor is in our tree of parameters.

    layer: its index on the parameter's first axis, None if not stacked. transposed: the hub stores
    kernels as [out, in], our tree as [in, out].
    """

    path: tuple[str, ...]
    layer: int | None
    transposed: bool


def tensor_names(config: llama.ModelConfig) -> dict[str, Place]:
    """The place of every tensor of the model, by its name in the hub."""
    names = {
        "model.embed_tokens.weight": Place(("embed",), None, False),
        "model.norm.weight": Place(("norm", "scale"), None, False),
    }
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = Place(("lm_head",), None, True)
    norms = (("input_layernorm",), ("post_attention_layernorm",))
    head_norms = (("self_attn", "q_norm"), ("self_attn", "k_norm")) if config.qk_norm else ()
    projections = {name: (lora.module_of(name), name) for name in lora.PROJECTIONS}
    parts = [(path, "weight", "scale") for path in norms]
    parts += [(path, "weight", "kernel") for path in projections.values()]
    parts += [(projections[name], "bias", "bias") for name in config.biased]
    parts += [(path, "weight", "scale") for path in head_norms]
    for i in range(config.num_layers):
        for path, hub_name, name in parts:
            names[f"model.layers.{i}.{'.'.join(path)}.{hub_name}"] = Place(
                ("layers", *path, name), i, name == "kernel"
            )
    return names


def hub_shapes(config: llama.ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model in the hub, by its name there."""
    params, shapes = llama.param_shapes(config), {}
    for name, (path, layer, transposed) in tensor_names(config).items():
        leaf = params
        for key in path:
            leaf = leaf[key]
        shape = leaf.shape[0 if layer is None else 1 :]
        shapes[name] = shape[::-1] if transposed else shape
    return shapes
