"""Compress a language model's context into a few memory tokens, in JAX.

`load(adapter, base=None)` gives a `Compressor` with `compress`, `restore`, `ask` and `score`; see `icae --help` for the command line.
"""

from icae_jax.runtime import platforms

__version__ = "0.1.0"


def load(adapter, base=None, **options):
    """Loads an adapter folder with its base model; see `icae_jax.inference.compressor.load`."""
    platforms.quiet_libraries()
    from icae_jax.inference.compressor import (
        load as load_compressor,  # imported late: jax takes seconds
    )

    return load_compressor(adapter, base, **options)
