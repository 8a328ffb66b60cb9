"""What fuzz tests share: odd JSON values, and a decorator that runs a test on many examples."""

import functools
import math

import hypothesis
import pytest
from hypothesis import strategies as st

FEW, MANY = 150, 2000  # examples of each test, in every run and in nightly runs

READ = []  # results of the running test's examples that were accepted


def examples(**strategies):
    """Runs a test with a few examples, the same every time, and with many, marked `nightly`.

    A test none of whose examples is accepted fails, since it would show nothing. A test gets
    `request.getfixturevalue` and an example of each strategy.
    """
    return functools.partial(_runs, strategies)


def _runs(strategies, test):
    @pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.nightly)])
    def run(request, count):
        settings = hypothesis.settings(
            max_examples=count,
            derandomize=count == FEW,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        READ.clear()
        settings(hypothesis.given(**strategies)(test))(request.getfixturevalue)
        print(
            f"{test.__name__}: {count} examples gave {len(READ)} results, the others were refused"
        )
        assert READ

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


ODD_TEXTS = [
    "",
    "8",
    "8.0",
    "1e-05",
    "nan",
    "inf",
    "null",
    "silu",
    "linear",
    "yarn",
    "\ud83d",
    "\x00",
    "../x",
    "a" * 300,
]
ODD_NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    8,
    2**31,
    2**63,
    10**400,
    -0.0,
    0.5,
    8.0,
    1e-9,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(ODD_NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(ODD_TEXTS) | st.text(max_size=8), inner, max_size=4)
    ),
)


def changed(valid, more=()):
    """A valid JSON object with some fields removed, and some replaced or added with any value.

    more: names of fields to add, beside random ones.
    """
    names = st.sampled_from([*valid, *more]) | st.text(max_size=8)

    def change(removed, fields):
        return {name: value for name, value in valid.items() if name not in removed} | fields

    return st.builds(
        change,
        st.sets(st.sampled_from(list(valid)), max_size=2),
        st.dictionaries(names, VALUES, max_size=3),
    )


def finite(values):
    """Whether all numbers among the values are finite."""
    return all(
        math.isfinite(value)
        for value in values
        if isinstance(value, int | float) and abs(value) < 10**300
    )
