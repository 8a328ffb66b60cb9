"""A trained compressor, apart from its base."""

import dataclasses
import hashlib

import jax
import numpy as np

from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.trained import DECODER_LORA
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives.targets import Template


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A trained compressor, apart from its base.

    Attributes:
        compression: how it compresses.
        lora: sizes of its LoRA.
        template: how it is asked questions.
        trained: the tree of `compression.trained.init`.
        base_path: the base that it was trained on: folder, hub id or URL.
        base_fingerprint: that base's `Base.fingerprint`.
        origin: of a converted adapter, where it comes from and how well it restored a text.
        base_identity: that base's `Base.identity`, as far as the file says it.
        base_quantize: that base's `Base.quantize`.
    """

    compression: CompressionConfig
    lora: LoraConfig
    template: Template
    trained: dict
    base_path: str
    base_fingerprint: str
    origin: dict | None = None
    base_identity: dict[str, str] = dataclasses.field(default_factory=dict)
    base_quantize: str = ""

    @property
    def fingerprint(self) -> str:
        """sha256 over the trained tensors, in float32."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.trained):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf, np.float32).tobytes())
        return digest.hexdigest()

    @property
    def has_decoder_lora(self) -> bool:
        """Whether the decoder reads with a LoRA of its own."""
        return DECODER_LORA in self.trained

    @property
    def was_forced(self) -> bool:
        """Whether it was converted without evidence that its base is the one of training."""
        return bool(self.origin and self.origin.get("forced"))
