"""What the tests' import hook checks, and with what: beartype, with ints allowed as floats.

jaxtyping's hook wraps every function of the package, annotated or not, nested functions at each
call of the outer one, and every call binds the arguments and checks them twice. That made tests of
training take half as long again. `install` keeps it for functions that take or return arrays, whose
sizes must agree; other annotated functions are checked by beartype alone. A function's checks are
made when it is first called.
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
    """The function with its arguments and result checked; the check is made at the first call."""
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
