"""`icae inspect`."""

from icae_jax.cli import flags

HELP = "say what a file or folder is, its sizes, its method, and which bases fit"


def run(argv):
    from icae_jax.workflows import inspection

    return inspection.main(flags.parser("inspect", HELP), argv)
