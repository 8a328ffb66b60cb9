"""What a compression method is: one `Method`, registered by name. Nothing else knows its name.

A method is one file in `compression.methods`: a function that writes contexts into a memory, and a
call of `register`. How a memory is read belongs to its kind (`compression.memory`); a new kind is a
subclass of `Memory`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from icae_jax.compression.layout import Layout
from icae_jax.errors import UserError

PROMPT_EMBEDS = "prompt_embeds"  # a server's prompt embeddings
HF_CACHE = "hf_cache"  # a key/value cache of transformers
VLLM_KV = "vllm_kv"  # keys and values for a KV connector of vLLM
PEFT = "peft"  # a plain PEFT folder with code that writes the memory
EXPORTS = {  # and the command that makes each
    PROMPT_EMBEDS: "icae export prompt_embeds",
    HF_CACHE: "icae export hf_cache",
    VLLM_KV: "icae export vllm_kv",
    PEFT: "icae convert adapter --format peft",
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to compress contexts.

    Attributes:
      name: in configurations, adapters and memory files.
      title: in print.
      memory: the kind of memory that is written, a subclass of `memory.Memory`.
      layouts: position layouts by their names in configurations, the default first.
      write: `write(base, trained, contexts, config, dropout_key) -> Memory`, see
        `encoder.compress`.
      write_several: in its place, if the encoder's pass does not depend on k: `write_several(base,
        trained, contexts, ks, config, dropout_key) -> (Memory of each k)` in one pass. Training
        then learns all of `compression.k_choices` in every step.
      trigger: by default, what asks for the text back: "trained", the [AE] row, or "bos", the
        tokenizer's own token.
      bos_before_text: whether the encoder reads the text as the base would, with the tokenizer's
        `<s>`.
      appends_memory_tokens: whether the encoder reads k memory tokens behind each segment;
        otherwise the text alone.
      encoder_mask: what a token of the encoder sees by default, one of `config.MASKS`.
      keeps: which outputs of the encoder become the memory, at k tokens of each segment: "hidden",
        the last hidden states, or "kv", keys and values of every layer. FLOPs are counted by it.
      pools: whether the memory is made of the last hidden states of all tokens, not of k of them. A
        PEFT folder's code takes the means of near-equal groups, times each of `tensors`.
      anchors: whether memory tokens are k of the text's own, the centres of near-equal parts, with
        rows of the memory table added to their embeddings.
      vectors: `vectors(config) -> int`, the rows of the memory table before its special rows, for
        methods that need no row for each memory token and so know every k; or None: k rows.
      tensors: `tensors(model_config, config) -> {name: array}`: what is trained beside LoRA and
        memory table, as training starts; float32, in `memory.safetensors` under these names.
      options: fields of the configuration that concern this method alone (`config.OPTIONS`).
      flops: `flops(model_config, shape, k) -> {part: FLOPs}` of what writing contexts of shape `(B,
        S, N)` costs beside the encoder's pass, by the parts of `performance.flops.Flops`.
      exports: the exports it has, of `EXPORTS`.
    """

    name: str
    title: str
    memory: type
    layouts: Mapping[str, Layout]
    write: Callable[..., Any] | None = None
    write_several: Callable[..., tuple[Any, ...]] | None = None
    trigger: Literal["trained", "bos"] = "trained"
    bos_before_text: bool = True
    appends_memory_tokens: bool = True
    encoder_mask: str = "causal"
    keeps: Literal["hidden", "kv"] = "hidden"
    pools: bool = False
    anchors: bool = False
    vectors: Callable[[Any], int | None] = lambda config: None
    tensors: Callable[..., Mapping[str, Any]] | None = None
    options: tuple[str, ...] = ()
    flops: Callable[..., Mapping[str, int]] | None = None
    exports: tuple[str, ...] = ()

    def __post_init__(self):
        if (self.write is None) == (self.write_several is None):
            raise ValueError(f"method {self.name}: give one of write and write_several")
        ways = (self.appends_memory_tokens, self.pools, self.anchors)
        if PEFT in self.exports and sum(ways) != 1:
            raise ValueError(
                f"method {self.name}: a PEFT folder's code appends memory tokens, pools, or marks "
                "anchors, and this method does not do one of these; leave PEFT out of its exports"
            )

    @property
    def default_layout(self) -> str:
        """The name of the layout that is taken where none is named."""
        return next(iter(self.layouts))

    def check_export(self, export: str) -> None:
        """UserError if the method does not have an export."""
        if export not in self.exports:
            others = ", ".join(f"`{EXPORTS[name]}`" for name in self.exports) or "none"
            raise UserError(
                f"method {self.name} ({self.title}) has no export {export}; what it has: {others}"
            )


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Makes a method known by its name."""
    METHODS[method.name] = method
    return method


def get(name: str, field: str = "compression.method") -> Method:
    """The method of that name. UserError, which calls the name `field`, if there is none."""
    if name not in METHODS:
        raise UserError(f"{field} is {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]


def default() -> Method:
    """The method of a configuration that names none: the first one registered."""
    return next(iter(METHODS.values()))
