"""Compress a language model's context into a few memory tokens, in JAX.

`load(adapter, base=None)` gives a `Compressor` with `compress`, `restore`, `ask` and `score`. The
command line is `icae --help`.
"""

import os
from typing import TYPE_CHECKING, Any

from icae_jax.runtime import platforms

if TYPE_CHECKING:
    import icae_jax.inference.compressor
    import icae_jax.inference.store

__version__ = "0.2.0"


def load(
    adapter: str | os.PathLike, base: str | os.PathLike | None = None, **options: Any
) -> "icae_jax.inference.compressor.Compressor":
    """Loads an adapter with its base model; see `icae_jax.inference.loading.load`."""
    platforms.quiet_libraries()
    from icae_jax.inference import loading  # importing JAX takes seconds

    return loading.load(adapter, base, **options)


def open_store(path: str | os.PathLike) -> "icae_jax.inference.store.Store":
    """Opens a folder of compressed documents that `icae compress --store` filled, to read them.

    `open_store(DIR)["doc"].memory` is the memory of one document. UserError if DIR is no store.
    """
    platforms.quiet_libraries()
    from icae_jax.inference import store

    return store.open_store(path)
