"""`icae prepare`."""

from icae_jax.cli import flags

HELP = "make a data set of downloaded files, for training and evaluation to read"


def run(argv):
    from icae_jax.workflows import prepare

    return prepare.main(flags.parser("prepare", HELP), argv)
