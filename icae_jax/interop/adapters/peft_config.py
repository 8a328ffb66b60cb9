"""adapter_config.json: PEFT's configuration of a LoRA, matched to modules as PEFT matches it.

Every known field is computed, changes no result, or is refused at any value but its default. An
unknown field may change what PEFT computes, so it is refused unless it is null.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any, NoReturn

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub import locations

# Computed: see `LoraFields`.
COMPUTED = {
    *("peft_type", "base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "init_lora_weights",
}
# Results do not depend on these: notes, how the adapter was initialised, how it is run.
HARMLESS = {
    *("task_type", "inference_mode", "auto_mapping", "peft_version", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "merge_weights"),
    "megatron_core",  # counts only with megatron_config
    "qalora_group_size",  # counts only with use_qalora
    "ensure_weight_tying",  # counts only for embeddings and modules_to_save
    "fan_in_fan_out",  # PEFT sets it to false for a Linear, which all projections are
}
# Refused at any value but the default, see `_is_default`.
REFUSED = {
    *("bias", "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices"),
    *("target_parameters", "layer_replication", "use_qalora", "megatron_config"),
    *("alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config", "velora_config"),
    *("monteclora_config", "enable_lora"),
}
# Initialisations that leave the base's weights as they are. The others (PiSSA, OLoRA, CorDA,
# LoftQ, LoRA-GA) subtract from them.
PLAIN_INIT = ("gaussian", "eva", "orthogonal", "mica")
ALL_LINEAR = "all-linear"


def _is_default(name, value):
    """Whether a field of `REFUSED` has no effect."""
    return (
        value is None or value is False or value in ([], {}) or (name == "bias" and value == "none")
    )


def _or_default(raw: dict, name: str, default: Any) -> Any:
    value = raw.get(name)
    return default if value is None else value


def _refuse(source, name, value, why) -> NoReturn:
    raise UserError(f"{source}: {name} is {errors.shown(value)}, {why}")


def _whole(value):
    """A whole number of at most 32 bits, also if written 8.0; None for anything else."""
    return (
        int(value)
        if files.is_kind(value, float) and abs(value) < 2**31 and value == int(value)
        else None
    )


def _number(value):
    """A finite number as float; None for anything else."""
    try:
        return float(value) if files.is_kind(value, float) and math.isfinite(value) else None
    except OverflowError:  # a whole number of more than 308 digits
        return None


def _texts(raw, name, source):
    """A field that holds a regular expression (str) or names (tuple); () if absent or empty."""
    value = raw.get(name)
    if value is None or value == "":
        return ()
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if not isinstance(value, str):
        _refuse(source, name, value, "which is neither a text nor a list of texts")
    _check_compiles(value, name, source)
    return value


def _check_compiles(pattern, name, source):
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"{source}: {name} holds {errors.shown(pattern)}, which is not a regular expression "
            f"({error})"
        ) from error


def _pattern(raw, name, source, convert: Callable, what):
    """A field that maps regular expressions for modules to numbers, in the file's order."""
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        _refuse(source, name, value, f"which is not an object that gives modules each a {what}")
    for key, number in value.items():
        _check_compiles(key, name, source)
        if convert(number) is None:
            _refuse(source, f"{name}[{key!r}]", number, f"which is not a {what}")
    return {key: convert(number) for key, number in value.items()}


def _matching(pattern: dict, module: str, default):
    """The value of the first key that matches the end of a module's name, as PEFT looks it up."""
    return next(
        (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default
    )


@dataclasses.dataclass(frozen=True)
class LoraFields:
    """Fields of adapter_config.json. Modules have PEFT's names, `model.layers.0.mlp.up_proj`.

    Attributes:
        source: the file.
        base: the base model's folder, URL or hub id (with `@revision`); "" if not stated.
        rank: r, of modules that `rank_pattern` does not match.
        alpha: of modules that `alpha_pattern` does not match.
        rslora: whether the scale is alpha / sqrt(r) instead of alpha / r.
        dropout: on the LoRA's input.
        targets: names of modules or their ends, a regular expression, or "all-linear".
        excluded: names or a regular expression.
        layers: which layers have LoRA, () for all.
        layers_patterns: what stands before a layer's number.
        rank_pattern: ranks by regular expression.
        alpha_pattern: alphas by regular expression.
    """

    source: pathlib.Path
    base: str
    rank: int
    alpha: float
    rslora: bool
    dropout: float
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] = ()
    layers_patterns: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)

    def _scale(self, alpha, rank):
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    @property
    def scale(self) -> float:
        """The factor of B @ A, in modules that no pattern matches."""
        return self._scale(self.alpha, self.rank)

    def rank_of(self, module: str) -> int:
        """The rank of a module's LoRA."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of a module's B @ A."""
        alpha = _matching(self.alpha_pattern, module, self.alpha)
        return self._scale(alpha, self.rank_of(module))

    def has_lora(self, module: str) -> bool:
        """Whether PEFT gives a module LoRA (`check_target_module_exists` in its tuners_utils)."""
        if isinstance(self.excluded, str):
            if re.fullmatch(self.excluded, module):
                return False
        elif _ends_in(module, self.excluded):
            return False
        if isinstance(self.targets, str):
            # "all-linear" leaves the output head out.
            return (
                module.endswith("_proj")
                if self.targets.lower() == ALL_LINEAR
                else bool(re.fullmatch(self.targets, module))
            )
        if module in self.targets:
            return True
        return _ends_in(module, self.targets) and (
            not self.layers or self._layer_of(module) in self.layers
        )

    def _layer_of(self, module):
        patterns = [rf"(?:^|.*?\.){p}" for p in self.layers_patterns] or [r".*?\.[^.]*"]
        matches = (re.match(rf"{pattern}\.(?P<idx>\d+)\.", module) for pattern in patterns)
        return next((int(match["idx"]) for match in matches if match), None)


def _ends_in(module, names):
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layers(raw, source):
    value = raw.get("layers_to_transform")
    listed = value if isinstance(value, list) else [] if value is None else [value]
    numbers = tuple(_whole(v) for v in listed)
    if None in numbers:
        _refuse(
            source,
            "layers_to_transform",
            value,
            "which is neither a whole number nor a list of them",
        )
    return numbers


def _base(raw, source):
    """The base model's name, with the revision that PEFT keeps in a field of its own."""
    for name in ("base_model_name_or_path", "revision"):
        if raw.get(name) is not None and not isinstance(raw[name], str):
            _refuse(source, name, raw[name], "which is not a text")
    base, revision = raw.get("base_model_name_or_path") or "", raw.get("revision") or ""
    is_hub_id = locations.is_remote(base) and "://" not in base
    return f"{base}@{revision}" if revision and is_hub_id and "@" not in base else base


def _check_refused(raw, source):
    """UserError naming the first field that is not computed here and not at its default."""
    for name, value in raw.items():
        if name in REFUSED and not _is_default(name, value):
            _refuse(
                source,
                name,
                value,
                "which is not computed here; give an adapter of plain LoRA, trained without it",
            )
        if name not in COMPUTED | HARMLESS | REFUSED and value is not None:
            why = (
                "an unknown field, which may change what the adapter computes; take it out if you "
                "know that it does not"
            )
            _refuse(source, errors.field(name), value, why)
    init = raw.get("init_lora_weights")
    plain = (
        init is None
        or isinstance(init, bool)
        or (isinstance(init, str) and init.lower() in PLAIN_INIT)
    )
    if not plain:
        why = (
            "which may have changed the base's weights before training; save the adapter as plain "
            "LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
        _refuse(source, "init_lora_weights", init, why)


def read(path: pathlib.Path) -> LoraFields:
    """Reads adapter_config.json.

    UserError names the first field that is missing, of another type, contradictory or not computed
    here.
    """
    raw = files.read_json(path, "the LoRA's configuration")
    needed = ("peft_type", "r", "lora_alpha", "target_modules")
    missing = [name for name in needed if name not in raw]
    if missing:
        raise UserError(
            f"{path}: {', '.join(missing)} missing; is the file complete? (PEFT would assume r and "
            "lora_alpha to be 8)"
        )
    if raw["peft_type"] != "LORA":
        _refuse(path, "peft_type", raw["peft_type"], "and only LORA is read")
    _check_refused(raw, path)
    rank, alpha = _whole(raw["r"]), _number(raw["lora_alpha"])
    dropout = _number(_or_default(raw, "lora_dropout", 0.0))
    if rank is None or rank < 1:
        _refuse(
            path,
            "r",
            raw["r"],
            "which is not a positive whole number; give the rank that it was trained with",
        )
    if not alpha:
        _refuse(
            path,
            "lora_alpha",
            raw["lora_alpha"],
            "which is not a number other than 0; give the alpha that it was trained with",
        )
    if dropout is None or not 0 <= dropout < 1:
        _refuse(path, "lora_dropout", raw["lora_dropout"], "which is not a number in [0, 1)")
    rslora = _or_default(raw, "use_rslora", False)
    if not isinstance(rslora, bool):
        _refuse(path, "use_rslora", rslora, "which is neither true nor false")
    targets = _texts(raw, "target_modules", path)
    if not targets:
        _refuse(
            path,
            "target_modules",
            raw["target_modules"],
            "which names no module; name those that have LoRA",
        )
    layers, patterns = _layers(raw, path), _texts(raw, "layers_pattern", path)
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    for pattern in patterns:
        _check_compiles(pattern, "layers_pattern", path)
    if layers and isinstance(targets, str):
        _refuse(
            path,
            "layers_to_transform",
            raw["layers_to_transform"],
            "which PEFT takes only where target_modules is a list",
        )
    if patterns and not layers:
        _refuse(
            path,
            "layers_pattern",
            raw["layers_pattern"],
            "without layers_to_transform, which it belongs to",
        )

    def positive(value):
        number = _whole(value)
        return number if number and number > 0 else None

    return LoraFields(
        source=path,
        base=_base(raw, path),
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        dropout=dropout,
        targets=targets,
        excluded=_texts(raw, "exclude_modules", path),
        layers=layers,
        layers_patterns=patterns,
        rank_pattern=_pattern(raw, "rank_pattern", path, positive, "positive whole number"),
        alpha_pattern=_pattern(raw, "alpha_pattern", path, _number, "number"),
    )
