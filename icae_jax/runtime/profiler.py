"""Traces of the devices' work, for XProf and TensorBoard."""

import contextlib
import os
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def tracing(folder: str | os.PathLike) -> Iterator[None]:
    """Traces this process's devices within the context, into `folder`/plugins/profile/TIME."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing Python calls slows down the step under study
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield
