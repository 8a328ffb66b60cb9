"""`python -m icae_jax`: the same as `icae`."""

import sys

from icae_jax.cli.main import command

sys.exit(command())
