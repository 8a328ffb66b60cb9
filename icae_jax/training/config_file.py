"""Loads a configuration: a dataclass's defaults, a file's fields, then overrides.

A configuration file defines `get_config()` or `get_config(arg)`, which returns the fields that
differ from the defaults, as an `ml_collections.ConfigDict` or a dict. `--config` names it as
`FILE[:arg]`, or, for a file of the shipped `configs/`, as `NAME[:arg]`.
"""

import ast
import dataclasses
import difflib
import math
import os
import pathlib
import re
import runpy
import stat
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

import icae_jax
from icae_jax import errors
from icae_jax.errors import UserError
from icae_jax.models.families import sizes
from icae_jax.training.config import LoopConfig

Config = TypeVar("Config")

_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


# --------------------------------------------------------------------------------- loading a file


def load(
    kind: type[Config],
    config: str | None,
    overrides: Mapping[str, Any] = types.MappingProxyType({}),
    fallbacks: Mapping[str, Any] = types.MappingProxyType({}),
) -> Config:
    """The configuration that `--config` and its overrides name, filled up with `kind`'s defaults.

    Args:
      kind: the frozen dataclass to make.
      config: `FILE[:arg]`, or `NAME[:arg]` of a shipped file.
      overrides: `{dotted field: value}`; a text is parsed by the field's type.
      fallbacks: `{dotted field: value}` for fields that are unset or `""` after the overrides.

    Raises:
      UserError: names the file, the field or the value that is wrong.
    """
    if not config:
        raise UserError(
            "--config is not given; give a configuration file, or one of "
            f"{', '.join(shipped())}, such as --config icae:pretrain"
        )
    path, arg = find(config)
    known = field_types(kind)
    given = {name: _parsed(text, known.get(name)) for name, text in overrides.items()}
    raw = _config_of_file(path, arg)
    _check_base_of_shipped(raw, path, config)
    fields = _override(raw, given)
    fields |= {name: value for name, value in fallbacks.items() if fields.get(name, "") == ""}
    for name in sorted(fields.keys() - known.keys()):
        raise UserError(_unknown(name, known, kind))
    base = fields.get("base")
    if isinstance(base, str) and base in sizes.SHORT_NAMES and not os.path.isdir(base):
        fields["base"] = sizes.hub_id(base)
    merged = ConfigDict(nested(default_fields(kind), kind.__name__), type_safe=False).lock()
    merged.update_from_flattened_dict(fields)
    return from_dict(kind, merged.to_dict())


def _unknown(name: str, known: Mapping[str, Any], kind: type) -> str:
    """What to say of a field that a configuration does not have."""
    if group := [field for field in known if field.startswith(f"{name}.")]:
        return f"{name} is a group of fields; give one of them, such as {group[0]}"
    command = kind.COMMAND
    if name in kind.REFUSED:
        return f"`{command}` has no {name}: {kind.REFUSED[name]}"
    for other in LoopConfig.__subclasses__():
        if other is not kind and name in field_types(other):
            return (
                f"{name} is not a field of a configuration for `{command}` but of one for "
                f"`{other.COMMAND}`; is that meant?"
            )
    near = difflib.get_close_matches(name, known, 1)
    meant = f"; is {near[0]} meant?" if near else f"; `{command} --help` lists the fields"
    return f"{name or repr(name)} is not a field of a configuration for `{command}`{meant}"


def shipped() -> list[str]:
    """The names of the configuration files that come with the package."""
    folder = _shipped_folder()
    return sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__") if folder else []


def _shipped_folder() -> pathlib.Path | None:
    """`configs/`: inside the package if installed from a wheel, beside it in a checkout."""
    package = pathlib.Path(icae_jax.__file__).parent
    folders = (package / "configs", package.parent / "configs")
    return next((folder for folder in folders if folder.is_dir()), None)


def find(config: str) -> tuple[pathlib.Path, str]:
    """Splits `FILE[:arg]` or `NAME[:arg]` into the file's path and `arg` ("" if absent)."""
    name, _, arg = config.partition(":")
    if errors.is_there(name, stat.S_ISREG):
        return pathlib.Path(name), arg
    if name in shipped():
        return _shipped_folder() / f"{name}.py", arg
    raise UserError(
        f"--config {name}: no such file, and not one of the shipped configurations, "
        f"{', '.join(shipped())}"
    )


def _config_of_file(path: pathlib.Path, arg: str) -> ConfigDict:
    """What `get_config` returns. Any error in the file is the user's."""
    try:
        get_config = runpy.run_path(str(path))["get_config"]
        raw = get_config(arg) if arg else get_config()
        if isinstance(raw, Mapping):
            raw = ConfigDict(nested(raw, path))
        if not isinstance(raw, ConfigDict):
            raise TypeError(f"get_config returns {type(raw).__name__}, not a dict or ConfigDict")
        raw.to_dict()  # computes what is derived by a FieldReference
    except UserError as error:
        raise UserError(f"--config: {error}") from error
    except Exception as error:
        raise UserError(f"--config: {_in_one_line(error, path)}") from error
    return raw


def _override(raw: ConfigDict, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a file with overrides, flat.

    Fields that the file sets are set in its ConfigDict, so that what it derives from them by a
    `FieldReference` follows.
    """
    its_own = flatten(raw.to_dict())
    with raw.unlocked(), raw.ignore_type():
        raw.update_from_flattened_dict({k: v for k, v in given.items() if k in its_own})
    return flatten(raw.to_dict()) | given


def _in_one_line(error: Exception, path: pathlib.Path) -> str:
    """What went wrong in a configuration file, and where."""
    if isinstance(error, KeyError) and error.args == ("get_config",):
        return f"{path} defines no get_config"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    place = f"{path}:{lines[-1]}" if lines else str(path)
    return f"{place}: {type(error).__name__}: {' '.join(str(error).split())}"


def _check_base_of_shipped(raw: ConfigDict, path: pathlib.Path, config: str) -> None:
    """UserError if a shipped file took a word of its argument for a base that is not known."""
    base = raw.get("base")
    if base and path.parent == _shipped_folder() and base not in sizes.SHORT_NAMES:
        raise UserError(
            f"--config {config}: {base!r} is not known; give a phase (pretrain or finetune), what "
            "else get_config of that file explains, and at most one base: "
            f"{', '.join(sizes.SHORT_NAMES)}"
        )


# ------------------------------------------------------------------------------------- conversion


def from_dict(kind: type[Config], raw: object, path: str = "config") -> Config:
    """Builds the frozen dataclass `kind` from nested mappings.

    UserError names unknown fields and values of the wrong type; `path` stands before their names.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{path} is {raw!r}; expected a group of fields")
    hints = typing.get_type_hints(kind)
    for name in sorted(raw.keys() - hints.keys()):
        raise UserError(
            f"{path}.{name} is not a field; the fields of {path} are {', '.join(hints)}"
        )
    return kind(
        **{name: _checked(hints[name], value, f"{path}.{name}") for name, value in raw.items()}
    )


def _checked(hint: Any, value: object, where: str) -> Any:
    """A value as the type that its field asks for; UserError if it is of another."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if isinstance(hint, types.GenericAlias):
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {value!r}; expected a tuple of {item.__name__}")
        return tuple(_checked(item, v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} is {value!r}; expected {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{where} is {value}; expected a finite number")
    return value


def _parsed(text: Any, hint: Any) -> Any:
    """A text as `hint`; unchanged if it does not parse, for `from_dict` to refuse."""
    if not isinstance(text, str) or hint in (str, None):
        return text
    try:
        if hint is bool:
            return _BOOLEANS.get(text.lower(), text)
        if isinstance(hint, types.GenericAlias):
            value = ast.literal_eval(text)
            value = sorted(value) if isinstance(value, set) else value
            return value if isinstance(value, list | tuple) else (value,)
        return int(text, 0) if hint is int else hint(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return tuple(text.split(",")) if typing.get_args(hint)[:1] == (str,) else text


# ------------------------------------------------------------------- fields by their dotted names


def flatten(groups: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as `{dotted field: value}`."""
    flat = {}
    for name, value in groups.items():
        is_group = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{name}.") if is_group else {f"{prefix}{name}": value}
    return flat


def nested(flat: Mapping[str, Any], source: object) -> dict[str, Any]:
    """`{dotted field: value}` as nested groups.

    UserError, which names `source`, where one name is that of a field and of a group.
    """
    root: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, leaf = name.split(".")
        node = root
        for group in groups:
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                raise UserError(
                    f"{source}: {name} and {group} are both there; {group} is a group of fields"
                )
        if isinstance(node.get(leaf), dict):
            raise UserError(
                f"{source}: {leaf} is {value!r}, and there are fields {name}.…; "
                f"{leaf} is a group of fields"
            )
        node[leaf] = value
    return root


def field_types(kind: type) -> dict[str, Any]:
    """`{dotted field: its type}` of a configuration."""
    hints = typing.get_type_hints(kind)
    groups = {
        name: field_types(h) if dataclasses.is_dataclass(h) else h for name, h in hints.items()
    }
    return flatten(groups)


def default_fields(kind: type) -> dict[str, Any]:
    """`{dotted field: default}` of a configuration, as its dataclasses state them."""
    hints = typing.get_type_hints(kind)
    groups = {
        field.name: default_fields(hints[field.name])
        if dataclasses.is_dataclass(hints[field.name])
        else field.default
        for field in dataclasses.fields(kind)
    }
    return flatten(groups)


def overrides(arguments: Sequence[str]) -> dict[str, str | bool]:
    """`{dotted field: text}` of `--config.field=value …` (or `--config.field value`) arguments.

    UserError for an argument of any other form.
    """
    given, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("--noconfig."):
            given[argument.removeprefix("--noconfig.")] = False
            continue
        if not re.match(r"--?config\.", argument):
            raise UserError(
                f"unknown argument {argument!r}; fields are set by --config.FIELD=VALUE"
            )
        field, equals, text = argument.lstrip("-").removeprefix("config.").partition("=")
        if equals:
            given[field] = text
        elif rest and not rest[0].startswith("--"):  # the value follows
            given[field] = rest.pop(0)
        else:  # a switch; of a field that is none, True is refused for its type
            given[field] = True
    return given
