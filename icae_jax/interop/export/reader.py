"""What every export needs: memories with names, and what reads them."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

from icae_jax.compression.decoder import Decoder
from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError
from icae_jax.interop.adapters.folder import Adapter
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.objectives import targets

OBJECTIVES = {"ask": "qa", "restore": "ae"}  # what a reader does -> the objective it was trained on


@dataclasses.dataclass(frozen=True)
class NamedMemory:
    """The memory of several texts, each with an id (a text or a number)."""

    memory: Memory
    ids: Sequence[str | int | float]

    def __post_init__(self):
        if len(self.ids) != len(self.memory):
            raise UserError(
                f"{len(self.ids)} ids for {len(self.memory)} memories; give one id per text"
            )


@dataclasses.dataclass(frozen=True)
class Reader:
    """What reads a memory.

    Attributes:
        base: its tokenizer, stop ids and identity.
        adapter: the template and the position layout.
        decoder: the base's parameters and the trained embeddings.
    """

    base: bases.Base
    adapter: Adapter
    decoder: Decoder

    @functools.cached_property
    def framing(self) -> targets.Framing:
        """What stands around a text."""
        tokenizer = self.base.tokenizer
        return targets.make_framing(
            self.adapter.compression, tokenizer, tokenizers.bos_id(tokenizer)
        )

    @property
    def base_path(self) -> str:
        """The base's folder as an absolute path; a hub id or URL as it is."""
        path = pathlib.Path(self.base.path)
        return str(path.resolve()) if path.exists() else self.base.path

    @property
    def positions(self) -> int:
        """The base's number of positions."""
        return self.base.config.max_position_embeddings

    def head(self, objective: str) -> tuple[int, ...]:
        """Ids before the memory. objective: a key of `OBJECTIVES`."""
        return tuple(self.adapter.template.head) if objective == "ask" else ()

    def stop_ids(self, objective: str) -> list[int]:
        """Ids that end an answer or a restored text, rising."""
        template_stop = {self.adapter.template.stop} if objective == "ask" else set()
        return sorted({*self.base.stop_ids, *template_stop})
