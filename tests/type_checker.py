"""What the tests' import hook checks, and with what: beartype, with ints allowed as floats.

jaxtyping's hook decorates every function of the package, also those without annotations and those
made anew at each call of another, and then binds their arguments and checks them twice: half of a
test's time. `install` keeps that for functions that take or return arrays, whose sizes must agree.
The others go to beartype alone if they are annotated at all, and all when they are first called.
"""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))
_everything_checked = jaxtyping.jaxtyped


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its arguments and result checked from its first call on."""
    checked = None

    @functools.wraps(function)
    def check_and_call(*args, **kwargs):
        nonlocal checked
        if checked is None:
            checked = _beartype(function)
        return checked(*args, **kwargs)

    return check_and_call


def has_arrays(annotation: object) -> bool:
    """Whether a type is one of jaxtyping's or holds one; a string may be one."""
    if isinstance(annotation, str) or getattr(annotation, "__module__", "") == "jaxtyping":
        return True
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(has_arrays, typing.get_args(annotation)))


def _as_annotated(function: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """`jaxtyping.jaxtyped`, as far as the function's annotations need it."""
    if function is None:
        return functools.partial(_as_annotated, typechecker=typechecker)
    if inspect.isfunction(function):
        if not function.__annotations__:
            return function
        if not any(map(has_arrays, function.__annotations__.values())):
            return typechecker(function)
    return _everything_checked(function, typechecker=typechecker)


def install() -> None:
    """Lets the hook decorate with `_as_annotated`; to be called before the package is imported."""
    jaxtyping.jaxtyped = jaxtyping._decorator.jaxtyped = _as_annotated
