"""LoRA tensors as PEFT names and shapes them: per projection A `[r, in]` and B `[out, r]`."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from icae_jax.errors import UserError
from icae_jax.interop.adapters.peft_config import LoraFields
from icae_jax.models import lora as loras
from icae_jax.models.llama import ModelConfig

_LORA = r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_(A|B)(?:\.default)?\.weight"
_LORA_NAME = re.compile(rf"(?:^|\.){_LORA}$")
# The prefix is PEFT's, for a causal LM or for its inner model.
_IN_PEFT_FILE = re.compile(rf"(?:base_model\.(?:model\.)?)?{_LORA}")
_FLOATS = {  # as numpy and as safetensors spell them
    *("float64", "float32", "float16", "bfloat16"),
    *("f64", "f32", "f16", "bf16"),
}


class LoraName(NamedTuple):
    """The parts of a LoRA tensor's name. matrix: "A" or "B"."""

    layer: int
    module: str
    projection: str
    matrix: str


def parse_lora_name(name: str) -> LoraName | None:
    """Splits a LoRA tensor's name, whatever its prefix; None for other tensors."""
    match = _LORA_NAME.search(name)
    return None if match is None else LoraName(int(match[1]), *match.groups()[1:])


def is_lora(name: str) -> bool:
    """Whether a tensor of that name belongs to a LoRA."""
    return parse_lora_name(name) is not None


def is_peft_name(name: str) -> bool:
    """Whether PEFT would read a tensor of that name in adapter_model.safetensors."""
    return _IN_PEFT_FILE.fullmatch(name) is not None


def lora_to_hub(
    lora: dict, prefix: str = "base_model.model.", infix: str = ""
) -> dict[str, Float[np.ndarray, "rows columns"]]:
    """PEFT's tensors for a LoRA tree, one A and one B per layer, float32.

    Named `{prefix}model.layers.{i}.{module}.{projection}.lora_{A,B}{infix}.weight`; the defaults
    are how PEFT names them in a saved adapter.
    """
    tensors = {}
    for module, projections in lora["layers"].items():
        for projection, pair in projections.items():
            for matrix, stacked in (("A", pair["a"]), ("B", pair["b"])):
                for i, layer in enumerate(np.asarray(stacked, np.float32)):
                    name = f"model.layers.{i}.{module}.{projection}.lora_{matrix}{infix}.weight"
                    tensors[prefix + name] = np.ascontiguousarray(layer.T)
    return tensors


def read_floats(tensor: Any, name: str, problems: list[str]) -> Float[np.ndarray, "..."]:
    """A tensor as float32.

    Appends a line to `problems` if its dtype is not a float type that we read, or if it holds NaN
    or infinity.
    """
    if str(tensor.dtype).lower() not in _FLOATS:
        problems.append(
            f"unreadable {name}: of type {tensor.dtype}; store it as float32, bfloat16 or float16"
        )
        return np.zeros(tensor.shape, np.float32)
    with np.errstate(over="ignore"):  # float64 values too large for float32 become infinite
        values = np.asarray(tensor).astype(np.float32)
    if not np.isfinite(values).all():
        problems.append(
            f"unreadable {name}: it holds NaN or infinity; the training that wrote it had "
            "diverged, or the file is damaged"
        )
    return values


def misfits(what: str, lines: list[str], most: int = 20) -> str:
    """One error message that lists tensors that do not fit, at most `most` of them."""
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return f"{what}: {'; '.join([*lines[:most], *more])}"


@dataclasses.dataclass(frozen=True)
class _Naming:
    """How one file names its tensors: `{prefix}model.layers.{i}.….lora_{A,B}{infix}.weight`."""

    prefix: str
    infix: str

    @classmethod
    def of(cls, names: list[str]) -> "_Naming":
        example = names[0] if names else ""
        infix = ".default" if ".default." in example else ""
        return cls(example.partition("model.layers.")[0], infix)

    def tensor(self, layer: int, projection: str, matrix: str) -> str:
        module = f"{self.prefix}model.layers.{layer}.{loras.module_of(projection)}"
        return f"{module}.{projection}.lora_{matrix}{self.infix}.weight"

    @property
    def inner_model(self) -> str:
        """PEFT's name of the module that holds the layers, with a dot behind it unless empty."""
        return f"{self.prefix}model.".removeprefix("base_model.model.")

    def module(self, layer: int, projection: str) -> str:
        """A projection's module as PEFT names it when it matches target_modules."""
        return f"{self.inner_model}layers.{layer}.{loras.module_of(projection)}.{projection}"


def _names_by_place(tensors: Mapping, lines: list[str]) -> dict[tuple[int, str, str], str]:
    """`{(layer, projection, matrix): name}`; appends a line per unknown or repeated projection."""
    names: dict[tuple[int, str, str], str] = {}
    for name in tensors:
        parsed = parse_lora_name(name)
        if parsed is None:
            continue
        layer, module, projection, matrix = parsed
        place = layer, projection, matrix
        if projection not in loras.PROJECTIONS or module != loras.module_of(projection):
            lines.append(
                f"unexpected {name}: {module}.{projection} is not a projection of this model"
            )
        elif place in names:
            lines.append(f"unexpected {name}: {names[place]} is the same tensor of the same layer")
        else:
            names[place] = name
    return names


def _ranks(
    tensors: Mapping,
    names: dict[tuple[int, str, str], str],
    num_layers: int,
    stated: LoraFields | None,
    lines: list[str],
) -> dict[tuple[int, str], int]:
    """The rank of each `(layer, projection)` that has LoRA, by `stated` or by the tensors."""
    naming = _Naming.of(list(names.values()))
    all_places = [(i, name) for name in loras.PROJECTIONS for i in range(num_layers)]
    if stated is None:
        ranks = [
            tensors[name].shape[0]
            for (_, _, matrix), name in names.items()
            if matrix == "A" and len(tensors[name].shape) == 2
        ]
        common = max(set(ranks), key=ranks.count) if ranks else 0
        targets = {projection for _, projection, _ in names}
        return {place: common for place in all_places if place[1] in targets}
    lines += [
        f"missing {module}: adapter_config.json gives it LoRA, but only the projections of "
        "layers can have it here"
        for module in ("lm_head", f"{naming.inner_model}embed_tokens")
        if stated.has_lora(module)
    ]
    modules = {place: naming.module(*place) for place in all_places}
    return {
        place: stated.rank_of(module)
        for place, module in modules.items()
        if stated.has_lora(module)
    }


def lora_from_hub(
    tensors: Mapping[str, Any],
    model_config: ModelConfig,
    problems: list[str] | None = None,
    stated: LoraFields | None = None,
) -> dict | None:
    """The LoRA tree of tensors named as in `lora_to_hub`, with any prefix; others are ignored.

    Without `stated` (adapter_config.json) every projection that some layer has is expected in all
    layers, with the rank that most A tensors have. With it, modules may differ in rank and scale:
    the tree has the largest rank, zero-padded, and scales relative to `stated.scale` are folded
    into B.

    Raises UserError listing every tensor that is missing, that belongs to no layer of the base,
    that has another shape than the base's, or that is not finite. With `problems`, these lines are
    appended there instead and the result is None.
    """
    lines: list[str] = []
    names = _names_by_place(tensors, lines)
    if not names and not lines:
        lines.append("no LoRA tensors (names ending in lora_A.weight and lora_B.weight)")
    naming = _Naming.of(list(names.values()))
    ranks = _ranks(tensors, names, model_config.num_layers, stated, lines)
    values = {}
    for place in [(*place, matrix) for place in ranks for matrix in "AB"]:
        layer, projection, matrix = place
        d_in, d_out = loras.projection_shape(model_config, projection)
        rank = ranks[layer, projection]
        want = (rank, d_in) if matrix == "A" else (d_out, rank)
        if place not in names:
            lines.append(f"missing {naming.tensor(*place)} {want}")
        elif tuple(tensors[names[place]].shape) != want:
            by = "this base" if stated is None else f"this base and r {rank} in adapter_config.json"
            have = tuple(tensors[names[place]].shape)
            lines.append(f"mis-shaped {names[place]}: {have}, with {by} it is {want}")
        else:
            values[place] = read_floats(tensors[names[place]], names[place], lines)
    for (layer, projection, _), name in names.items():
        if layer >= model_config.num_layers:
            lines.append(f"unexpected {name}: the base has {model_config.num_layers} layers")
        elif (layer, projection) not in ranks:
            lines.append(
                f"unexpected {name}: by adapter_config.json (target_modules and the like), "
                f"{naming.module(layer, projection)} has no LoRA"
            )
    if lines and problems is None:
        raise UserError(misfits("the adapter's tensors do not fit this base", lines))
    if lines:
        problems += lines
        return None
    return _tree(values, ranks, model_config, stated, naming)


def _tree(
    values: dict[tuple[int, str, str], np.ndarray],
    ranks: dict[tuple[int, str], int],
    model_config: ModelConfig,
    stated: LoraFields | None,
    naming: _Naming,
) -> dict:
    """Stacks A and B over layers; where ranks differ, the smaller ones are padded with zeros."""
    most, tree = max(ranks.values()), {}
    for projection in dict.fromkeys(projection for _, projection in ranks):
        d_in, d_out = loras.projection_shape(model_config, projection)
        a = np.zeros((model_config.num_layers, d_in, most), np.float32)
        b = np.zeros((model_config.num_layers, most, d_out), np.float32)
        for layer in range(model_config.num_layers):
            rank = ranks.get((layer, projection), 0)
            if not rank:
                continue
            ratio = 1.0
            if stated is not None:
                ratio = stated.scale_of(naming.module(layer, projection)) / stated.scale
            with np.errstate(over="ignore"):
                a[layer, :, :rank] = values[layer, projection, "A"].T
                b[layer, :rank] = values[layer, projection, "B"].T * np.float32(ratio)
        if not np.isfinite(b).all():
            raise UserError(
                f"{stated.source}: alpha_pattern gives {projection} scales beyond what float32 "
                "holds; is alpha right?"
            )
        pair = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
        tree.setdefault(loras.module_of(projection), {})[projection] = pair
    return {"layers": tree}


def targets_and_rank(lora: dict) -> tuple[tuple[str, ...], int]:
    """The projections of a LoRA tree, in its order, and its rank."""
    pairs = {
        name: pair for projections in lora["layers"].values() for name, pair in projections.items()
    }
    return tuple(pairs), next(iter(pairs.values()))["a"].shape[2]
