"""The methods, one file each. Importing a file registers its method; the order is that of lists and choices."""

from icae_jax.compression.methods import icae as icae
from icae_jax.compression.methods import x500 as x500
