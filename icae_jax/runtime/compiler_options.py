"""What programs that decode ask of XLA on a backend."""

import functools

import jax

# With few rows, XLA's CPU backend multiplies faster through Eigen than through YNNPACK, which packs
# the weights at every call.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def for_decoding() -> dict[str, str]:
    """`jax.jit`'s compiler_options on the default backend, none where it does not know them."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x + 1, compiler_options=_CPU).lower(1.0).compile()
    except (jax.errors.JaxRuntimeError, ValueError):  # another version's names
        return {}
    return _CPU
