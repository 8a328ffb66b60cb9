"""`icae quickstart`."""

import time

from icae_jax.cli import flags

HELP = "train a compressor in minutes on a small shipped base, and show what a memory is worth"


def run(argv):
    began = time.perf_counter()  # importing takes seconds
    from icae_jax.workflows import quickstart

    return quickstart.main(flags.parser("quickstart", HELP), argv, began)
