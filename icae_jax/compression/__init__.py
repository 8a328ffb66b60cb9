"""The idea of the package: an encoder writes a context into a memory, the frozen base reads it."""

from icae_jax.compression import methods as methods  # registers the methods
