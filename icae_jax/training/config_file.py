"""Configuration files with overrides, as `--config FILE[:arg] --config.field=value …` name them."""

import pathlib
import stat
import traceback

from icae_jax import errors
from icae_jax.errors import UserError
from icae_jax.training.config import from_dict


def load_raw(argv, need_workdir=True):
    """The nested dicts of `--config FILE[:arg] [--config.field=value …]`, and the workdir (None where none is given nor needed)."""
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "configuration file",
        flag_values=values,
        lock_config=True,
        sys_argv=["icae", *argv],
    )
    flags.DEFINE_string(
        "workdir", None, "where checkpoints, metrics and the result go", flag_values=values
    )
    named = next(
        (
            a.partition("=")[2] or b
            for a, b in zip(argv, [*argv[1:], ""], strict=True)
            if a.split("=")[0] == "--config"
        ),
        None,
    )
    if named is None:
        raise UserError(
            "--config is not given; give a configuration such as --config configs/icae.py"
        )
    path = named.partition(":")[0]
    if not errors.is_there(path, stat.S_ISREG):
        raise UserError(
            f"--config {path}: no such file; configurations are in the repository's configs/ folder (not in a wheel)"
        )
    try:
        _, *stray = values(["icae", *argv])
        if not hasattr(values.config, "to_dict"):
            raise TypeError(
                f"get_config of {path} returns {type(values.config).__name__}, not an ml_collections.ConfigDict"
            )
        raw = values.config.to_dict()
    except Exception as error:  # of the flags, or any of the file's own: it is the user's
        raise UserError(f"--config: {_told(error, path)}") from error
    if stray:
        raise UserError(f"{stray[0]!r} is no flag; fields are written --config.FIELD=VALUE")
    if need_workdir and not values.workdir:
        raise UserError(
            "--workdir is not given; give a folder for checkpoints, metrics and the result"
        )
    return raw, values.workdir and pathlib.Path(values.workdir)


def _told(error, path):
    """In one line what is wrong with the flags, or with a configuration file, and where in it."""
    inner = error
    while (
        isinstance(inner, KeyError | AttributeError)
        and inner.args
        and isinstance(inner.args[0], KeyError)
    ):
        inner = inner.args[0]
    lines = str(inner.args[0] if isinstance(inner, KeyError) and inner.args else inner).split("\n")
    lines = [line.strip() for line in lines if line.strip()] or [repr(error)]
    # ml_collections writes a whole traceback into what it says of a ValueError of the file's.
    told = (
        lines[-1]
        if any(line.startswith("Traceback") for line in lines)
        else ": ".join(line.removesuffix(":") for line in lines)
    )
    if isinstance(inner, KeyError) and told.startswith(
        "'"
    ):  # a field that the configuration has not, and perhaps what is meant
        return f"no field {told}"
    within = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.endswith(path)
    ]
    return f"{path}:{within[-1]}: {type(error).__name__}: {told}" if within else told


def load_config(kind, argv):
    """The frozen configuration of what `load_raw` reads, and the workdir."""
    raw, workdir = load_raw(argv)
    return from_dict(kind, raw), workdir
