"""TFDS builders of the papers' data sets and of local corpora.

A set is prepared once from the user's own files, and then read in random order.
"""

import importlib

from icae_jax.errors import UserError

NAMES = ("pwc", "mrqa", "arxiv_abstracts", "arxivqa", "json_text")


def builder(name: str) -> type:
    """The builder class (a `common.LocalBuilder`) of a set. UserError if there is no such set."""
    if name not in NAMES:
        raise UserError(
            f"{name!r} is not a set that can be prepared; choose from {', '.join(NAMES)}"
        )
    # TFDS wants each builder in a folder of its own.
    return importlib.import_module(f"{__name__}.{name}.{name}_dataset_builder").Builder
