import sys

from icae_jax.cli import main

sys.exit(main())
