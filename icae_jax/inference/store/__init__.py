"""Compressed documents in a folder, to be found and read again; see README.md."""

from icae_jax.inference.store.entries import Entry, Known, NewEntry
from icae_jax.inference.store.index import exists
from icae_jax.inference.store.info import DTYPES, Info
from icae_jax.inference.store.reader import Store, memory_of, open_store
from icae_jax.inference.store.upkeep import compact, verify
from icae_jax.inference.store.writer import Writer

__all__ = [
    "DTYPES",
    "Entry",
    "Info",
    "Known",
    "NewEntry",
    "Store",
    "Writer",
    "compact",
    "exists",
    "memory_of",
    "open_store",
    "verify",
]
