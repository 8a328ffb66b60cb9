"""The configuration of a compressor."""

import dataclasses
import math

import numpy as np

from icae_jax.compression import method as methods
from icae_jax.compression.layout import Layout
from icae_jax.compression.method import Method
from icae_jax.errors import UserError
from icae_jax.models.llama import ModelConfig

TRIGGERS = ("trained", "bos")
MASKS = ("causal", "slots", "all")
OPTIONS = {"anchor_vectors": ("one", "each")}  # fields of single methods, the default first
# What fields mean in files of versions that did not have them.
EARLIER = {
    "decoder_lora": False,
    "encoder_mask": "causal",
    "encoder_layers": 0,
    **{name: values[0] for name, values in OPTIONS.items()},
}


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
    """What is compressed into how much, by which method.

    Attributes:
      method: the name of a method (`compression.methods`); "" for the first one, icae.
      k: memory tokens per segment.
      rate: text tokens per memory token; a segment holds at most k x rate tokens.
      k_choices: the numbers of memory tokens that one model learns, rising up to k; each uses a
        prefix of the memory table. () for k alone.
      layout: the name of one of the method's position layouts; "" for its default.
      encoder_mask: what a token sees of its segment in the encoder: "causal", itself and what is
        before it; "slots", memory tokens see each other as well (arXiv 2510.20797, section 3);
        "all", everything; "" for the method's default. Where there is no memory token in the
        encoder, "slots" is "causal".
      encoder_layers: slots are read after so many layers of the encoder, without the final norm; 0:
        after the last, with it. Not for K/V, which are of all layers.
      anchor_vectors: what is added to the embeddings of SAC's anchors: "one" vector, as in the
        paper, or "each" its own, by its number, as in the authors' code.
      memory_init: "embedding" draws the memory table from N(mean, std) of the base's token
        embeddings, "normal" from N(0, 1).
      trigger: what asks for the text back: "trained", the table's [AE] row, or "bos", the
        tokenizer's own token; "" for the method's default.
      trigger_token: a token whose embedding the [AE] row starts from ("" for none); a base that was
        trained with a copying token already knows what to do after it. Where "bos" is replaced by
        "trained" for a base whose texts begin with none, "" is a newline.
      decoder_lora: the decoder has a LoRA tree of its own, with the sizes of `lora`.
    """

    method: str = ""
    k: int = 128
    rate: float = 4.0
    k_choices: tuple[int, ...] = ()
    layout: str = ""
    encoder_mask: str = ""
    encoder_layers: int = 0
    anchor_vectors: str = "one"
    memory_init: str = "embedding"
    trigger: str = ""
    trigger_token: str = ""
    decoder_lora: bool = False

    def __post_init__(self):
        object.__setattr__(self, "method", self.method or methods.default().name)
        method = methods.get(self.method)
        for name in ("k", "rate"):
            if not 0 < getattr(self, name) < math.inf:  # NaN too
                raise UserError(f"compression.{name} is {getattr(self, name)}; it must be positive")
        if self.segment_tokens < 1:
            raise UserError(
                f"compression.rate is {self.rate} with compression.k {self.k}: a segment holds no "
                "token; raise one of them"
            )
        choices = self.k_choices
        if choices and (
            min(choices) < 1 or list(choices) != sorted(set(choices)) or choices[-1] != self.k
        ):
            raise UserError(
                f"compression.k_choices is {choices}; give rising numbers from 1 on, the last of "
                f"them k ({self.k})"
            )
        if self.memory_init not in ("embedding", "normal"):
            raise UserError(
                f"compression.memory_init is {self.memory_init!r}; choose embedding or normal"
            )
        object.__setattr__(self, "layout", self.layout or method.default_layout)
        object.__setattr__(self, "trigger", self.trigger or method.trigger)
        if self.trigger not in TRIGGERS:
            raise UserError(f"compression.trigger is {self.trigger!r}; choose trained or bos")
        if self.layout not in method.layouts:
            raise UserError(
                f"compression.layout is {self.layout!r}, not one of method {self.method}; choose "
                f"from {', '.join(method.layouts)}"
            )
        object.__setattr__(self, "encoder_mask", self.encoder_mask or method.encoder_mask)
        if self.encoder_mask not in MASKS:
            raise UserError(
                f"compression.encoder_mask is {self.encoder_mask!r}; choose from {', '.join(MASKS)}"
            )
        if self.encoder_mask == "slots" and not (method.appends_memory_tokens or method.anchors):
            object.__setattr__(self, "encoder_mask", "causal")
        for name, values in OPTIONS.items():
            value = getattr(self, name)
            if value not in values:
                raise UserError(f"compression.{name} is {value!r}; choose from {', '.join(values)}")
            if value != values[0] and name not in method.options:
                raise UserError(
                    f"compression.{name} is {value!r}, but method {self.method} has no such "
                    f"choice; leave it {values[0]}"
                )
        if self.any_k and self.k > self.segment_tokens:
            raise UserError(
                f"compression.rate is {self.rate}: of {self.segment_tokens} tokens, method "
                f"{self.method} makes no {self.k} memory tokens; give a rate of 1 or more"
            )
        if self.encoder_layers < 0 or (self.encoder_layers and method.keeps != "hidden"):
            raise UserError(
                f"compression.encoder_layers is {self.encoder_layers}; "
                + (
                    "give a number of layers, or 0 for all"
                    if self.encoder_layers < 0
                    else f"the memory of method {self.method} is of all layers, so set 0"
                )
            )

    @property
    def spec(self) -> Method:
        """The `Method` of that name."""
        return methods.get(self.method)

    @property
    def position_layout(self) -> Layout:
        """The position layout of that name."""
        return self.spec.layouts[self.layout]

    @property
    def bos_before_text(self) -> bool:
        """Whether the encoder reads the text with the tokenizer's `<s>` in front."""
        return self.spec.bos_before_text and self.position_layout.bos_before_text

    @property
    def segment_tokens(self) -> int:
        """The most text tokens that a segment holds, whatever k is chosen for it."""
        return round(self.k * self.rate)

    @property
    def vectors(self) -> int:
        """The rows of the memory table before its special rows."""
        vectors = self.spec.vectors(self)
        return self.k if vectors is None else vectors

    @property
    def any_k(self) -> bool:
        """Whether any number of memory tokens can be asked for: none has a row of its own."""
        return self.spec.vectors(self) is not None

    def encoder_config(self, model: ModelConfig) -> ModelConfig:
        """The sizes of the part of a base that encodes. UserError if it has too few layers."""
        if self.encoder_layers > model.num_layers:
            raise UserError(
                f"compression.encoder_layers is {self.encoder_layers}; the base has "
                f"{model.num_layers} layers"
            )
        return model.first_layers(self.encoder_layers or model.num_layers)

    def encoder_tokens(self, segment_tokens: int) -> int:
        """Tokens that the encoder reads of a segment, with the most memory tokens."""
        return segment_tokens + (self.k if self.spec.appends_memory_tokens else 0)

    @property
    def choices(self) -> tuple[int, ...]:
        """The numbers of memory tokens per segment that were trained."""
        return self.k_choices or (self.k,)

    def choose(self, k: int | np.integer | None = None) -> int:
        """`k` if it can be asked for, the largest of `choices` if None. UserError otherwise."""
        if k is None:
            return self.k
        if self.any_k:
            if not 1 <= k <= self.segment_tokens:
                raise UserError(
                    f"k is {k}; give memory tokens per segment from 1 to the {self.segment_tokens} "
                    "tokens that a segment holds"
                )
            return int(k)
        if k not in self.choices:
            known = ", ".join(map(str, self.choices))
            raise UserError(
                f"k is {k}; this compressor was trained with {known} memory tokens per segment; "
                "choose one of these"
            )
        return int(k)
