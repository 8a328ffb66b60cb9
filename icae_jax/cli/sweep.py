"""`icae sweep`."""

from icae_jax.cli import flags

HELP = "train a configuration at several values of a field, and compare them"


def run(argv):
    from icae_jax.workflows import sweep

    return sweep.main(flags.parser("sweep", HELP), argv)
