"""Weights of a base model: the hub's safetensors files into our tree, and back."""

import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from icae_jax.interop import files
from icae_jax.models import llama, lora


def tensor_names(config):
    """Every tensor of the hub's checkpoint with its place in our tree: `name -> (path, layer or None, transposed)`."""
    names = {"model.embed_tokens.weight": (("embed",), None, False), "model.norm.weight": (("norm", "scale"), None, False)}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = (("lm_head",), None, True)
    for i in range(config.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names[f"model.layers.{i}.{norm}.weight"] = (("layers", norm, "scale"), i, False)
        for p in lora.PROJECTIONS:
            names[f"model.layers.{i}.{lora.module_of(p)}.{p}.weight"] = (("layers", lora.module_of(p), p, "kernel"), i, True)
        for p in ("q_proj", "k_proj", "v_proj") if config.qkv_bias else ():
            names[f"model.layers.{i}.self_attn.{p}.bias"] = (("layers", "self_attn", p, "bias"), i, False)
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            names[f"model.layers.{i}.self_attn.{norm}.weight"] = (("layers", "self_attn", norm, "scale"), i, False)
    return names


def weight_files(folder):
    """The folder's safetensors files; the index names them where there are many."""
    folder = pathlib.Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted({folder / name for name in files.read_json(index, "the weight index")["weight_map"].values()})
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise ValueError(f"{folder}: no model.safetensors and no model.safetensors.index.json; pickled weights (.bin, .pt) are not read")


def load_params(folder, config, dtype=jnp.float32):
    """Parameters of a hub folder in our tree, layers stacked `[L, …]`, kernels `[in, out]`, in `dtype`.

    Read tensor by tensor into the stacked arrays. ValueError lists the tensors that are missing, or names one of the wrong shape.
    """
    names, shapes = tensor_names(config), llama.param_shapes(config)
    tree, left = {}, set(names)
    for path in weight_files(folder):
        if not path.exists():
            raise ValueError(f"{path}: named in the weight index but not there; download the folder again")
        try:
            with safetensors.safe_open(path, framework="numpy") as f:
                for name in sorted(left.intersection(f.keys())):
                    where, layer, transposed = names[name]
                    stored = f.get_tensor(name)
                    value = stored.T if transposed else stored
                    want = shapes
                    for key in where:
                        want = want[key]
                    shape = want.shape if layer is None else want.shape[1:]
                    if value.shape != shape:
                        implied = shape[::-1] if transposed else shape
                        raise ValueError(f"{path}: {name} has shape {stored.shape}, config.json implies {implied}")
                    node = tree
                    for key in where[:-1]:
                        node = node.setdefault(key, {})
                    if layer is None:
                        node[where[-1]] = value.astype(dtype)
                    else:
                        node.setdefault(where[-1], np.empty(want.shape, dtype))[layer] = value.astype(dtype)
                    left.remove(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if left:
        some = ", ".join(sorted(left)[:5])
        raise ValueError(f"{folder}: {len(left)} tensors missing: {some}{', …' if len(left) > 5 else ''}")
    return _to_device(tree)


def _to_device(tree):
    return {k: _to_device(v) if isinstance(v, dict) else jnp.asarray(v) for k, v in tree.items()}


def _leaf(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def save_params(folder, config, params, dtype="bfloat16"):
    """Writes the tree's tensors under the hub's names: model.safetensors."""
    np_dtype = jnp.dtype(dtype)
    tensors = {}
    for name, (path, layer, transposed) in tensor_names(config).items():
        value = np.asarray(_leaf(params, path))
        value = value if layer is None else value[layer]
        tensors[name] = np.ascontiguousarray((value.T if transposed else value).astype(np_dtype))
    safetensors.numpy.save_file(tensors, pathlib.Path(folder) / "model.safetensors", metadata={"format": "pt"})
