"""`icae cache`."""

from icae_jax.cli import flags

HELP = "say what is kept on disk to be used again, and remove what was used least recently"


def run(argv):
    from icae_jax import cache
    from icae_jax.data.tokens import CACHE_VERSION

    return cache.main(flags.parser("cache", HELP), argv, CACHE_VERSION)
