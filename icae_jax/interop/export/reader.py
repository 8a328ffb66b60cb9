"""What every export needs: memories with names, and what reads them."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

from icae_jax.compression.decoder import Decoder
from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import peft_folder
from icae_jax.interop.adapters.adapter import Adapter
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.objectives import targets

DECODER_LORA = "decoder_lora"  # the folder of the decoder's LoRA, as PEFT reads it
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

    def check_export(self, export: str) -> None:
        """UserError if the method does not have an export, or PEFT not the decoder's LoRA."""
        self.adapter.compression.spec.check_export(export)
        if self.adapter.has_decoder_lora:
            peft_folder.check_modules(self.base.config)

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

    def save_decoder_lora(self, folder: pathlib.Path) -> None:
        """Writes the decoder's LoRA, if any, as PEFT reads it: `decoder_lora/` in a folder."""
        if self.adapter.has_decoder_lora:
            adapters.save_lora(folder / DECODER_LORA, self.adapter, adapters.DECODER)

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
