import sys

from icae_jax.cli import command

sys.exit(command())
