import sys

from icae_jax.cli.main import command

sys.exit(command())
