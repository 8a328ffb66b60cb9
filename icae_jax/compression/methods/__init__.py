"""The methods, one file each. Importing a file registers its method; lists are in this order."""

from icae_jax.compression.methods import icae as icae
from icae_jax.compression.methods import pooled as pooled
from icae_jax.compression.methods import sac as sac
from icae_jax.compression.methods import x500 as x500
