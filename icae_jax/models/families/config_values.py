"""Checked values of config.json."""

import math

from icae_jax import errors
from icae_jax.errors import UserError

MOST_POSITIONS = 2**31 - 1


def number(
    value: object,
    name: str,
    source: object,
    *,
    whole: bool = False,
    most: int | float = math.inf,
    zero: bool = False,
) -> int | float:
    """A positive, finite number, which may be written as a string.

    Args:
        value: the field's value.
        name: the field, for messages.
        source: the file, for messages.
        whole: return an int; a fraction of 0 is allowed, any other is not.
        most: the largest allowed value.
        zero: whether 0 is allowed.

    Raises:
        UserError: the value is not such a number.
    """
    try:
        parsed = value if isinstance(value, int) else float(value)
        valid = (
            not isinstance(value, bool)
            and (parsed > 0 or (zero and parsed == 0))
            and parsed <= most
            and math.isfinite(parsed)
        )
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid or (whole and parsed != int(parsed)):
        kind = f"a {'whole' if whole else 'finite'} number {'from 0' if zero else 'above 0'}"
        kind += f" to {most}" if most < math.inf else ""
        raise UserError(f"{source}: {name} is {errors.shown(value)}, which is not {kind}")
    return int(parsed) if whole else float(parsed)


def flag(raw: dict, name: str, source: object) -> bool | None:
    """A boolean field; None where it is missing or null. UserError on any other value."""
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(
            f"{source}: {name} is {errors.shown(value)}, which is neither true nor false"
        )
    return value
