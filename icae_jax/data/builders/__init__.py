"""TFDS builders of the papers' data sets and of local corpora: prepared once, from files that the user has, and read at random."""

import importlib

from icae_jax.errors import UserError

NAMES = ("pwc", "mrqa", "arxiv_abstracts", "arxivqa", "json_text")


def builder(name):
    """The builder class of a set. UserError names those there are."""
    if name not in NAMES:
        raise UserError(
            f"{name!r} is not a set that can be prepared; choose from {', '.join(NAMES)}"
        )
    return importlib.import_module(
        f"{__name__}.{name}.{name}_dataset_builder"
    ).Builder  # each in a folder of its own, as TFDS wants it
