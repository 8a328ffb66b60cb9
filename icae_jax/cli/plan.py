"""`icae plan`."""

from icae_jax.cli import flags

HELP = "say what a configuration takes on a TPU slice, by compiling it for one"


def run(argv):
    from icae_jax.performance import plan

    return plan.main(flags.parser("plan", HELP), argv)
