"""Memories of a store in the place of compressing, so that what its dtype costs is measured."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError, shown
from icae_jax.evaluation.examples import Text
from icae_jax.inference import store
from icae_jax.inference.compressor import Compressor
from icae_jax.inference.texts import Size, content_hash

SUITES = ("qa", "autoencode")  # that read memories of whole texts


class StoredMemories:
    """Finds the stored memory of a text: by its content, else by its id.

    Args:
        opened: the store.
        compressor: what reads it.
        texts: all that may be asked for.

    Attributes:
        ks: memory tokens per segment that the store holds, rising.
        bytes_per_token: on disk.
    """

    def __init__(self, opened: store.Store, compressor: Compressor, texts: Iterable[Text]):
        self.opened, self.config = opened, compressor.config
        self._texts = {tuple(compressor.context_ids(text.text)): text for text in texts}
        self._by_hash = {entry.content_hash: entry.id for entry in opened.find()}
        self.ks = tuple(sorted({entry.k for entry in opened.find()}))
        self.bytes_per_token = opened.info.nbytes(opened.info.memory_shape(1))

    def read(self, contexts: Sequence[Sequence[int]], k: int) -> Memory:
        """The memory of framed contexts. UserError that names a text without one of that k."""
        return store.memory_of([self._entry(context, k) for context in contexts], self.config)

    def _entry(self, context, k) -> store.Entry:
        text = self._texts.get(tuple(context))
        if text is not None:
            own_hash = content_hash(text.text, Size(k=k).asked(self.config))
            for entry_id in (self._by_hash.get(own_hash), text.id):
                if entry_id is not None and entry_id in self.opened:
                    entry = self.opened[entry_id]
                    if (entry.k, entry.tokens) == (k, len(context)):
                        return entry
        what = f"text {shown(text.id)}" if text is not None else "a part of a text"
        raise UserError(
            f"--store {self.opened.path} has no memory of {what} ({len(context)} tokens, k {k}); "
            "fill it from the same --data"
        )

    def identity(self) -> dict[str, Any]:
        """What two evaluations must have alike for one to continue the other."""
        held = hashlib.sha256()
        for entry in self.opened.find():
            held.update(f"{entry.content_hash} {entry.checksum}".encode())
        return {"dtype": self.opened.info.dtype, "entries": held.hexdigest()}
