"""What a step of training a compressor computes, without data or weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from icae_jax.compression import encoder
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.segments import Contexts, position_budget
from icae_jax.compression.trained import DECODER_LORA
from icae_jax.data.collate import bucket_shape
from icae_jax.models import llama
from icae_jax.models.llama import FrozenModel, ModelConfig
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import distil, loss
from icae_jax.objectives.loss import KL
from icae_jax.runtime import attention_choice
from icae_jax.training.config import TrainConfig
from icae_jax.training.task import LossSums

TEACHER_LORA = "teacher_lora"  # among the frozen parameters: the LoRA of a teacher that has its own
FULL_TEXT = "full_text"  # in a batch: what the teacher reads, if it is not the contexts


def base_positions(
    objectives: Any,
    pad_labels: bool,
    compression: CompressionConfig,
    longest: int,
    qa: int = 0,
    head: int = 0,
) -> int:
    """Positions of the base that contexts of up to `longest` tokens take with these objectives.

    qa: tokens of the longest question with its answer behind the memory. head: tokens before the
    memory.
    """
    segments, size = bucket_shape(longest, compression)
    restored = (segments * compression.segment_tokens if pad_labels else longest) + 1
    behind = max(qa, restored if {"ae", "lm"} & set(objectives) else 0)
    budget = position_budget(
        compression, longest, segments=segments, segment_tokens=size, head=head
    )
    return budget.needed(behind)


def teacher_positions(
    objectives: Any, longest: int, qa: int = 0, before: int = 0, skipped: int = 0
) -> int:
    """Positions of the base that the teacher takes of contexts of up to `longest` tokens.

    objectives: those that are taught; none takes no positions. qa: as for `base_positions`. before,
    skipped: tokens before the text, and tokens of the context that are not read.
    """
    if not objectives:
        return 0
    text = longest - skipped
    return before + text + max(qa, text - 1 if "lm" in objectives else 0)


def ks_of(batch: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of memory tokens per segment that a batch is trained or measured with."""
    k = batch["k"]
    return tuple(map(int, k)) if isinstance(k, tuple) else (int(k),)


class CompressorLosses:
    """What a training step computes, without data or weights: the AE, LM and QA losses of batches.

    config: its attention must be decided (`with_attention`), not "auto". model_config: the base's
    sizes. compression: what is trained on that base (`compression_on`). head: ids before the memory
    where questions are asked. bos: what the tokenizer puts before a text.

    Attributes:
      weights: of the objectives and, named with `KL` behind them, of their KL to the teacher.
      before: by objective that is taught, the ids before the text that the teacher reads.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        compression: CompressionConfig,
        head: tuple[int, ...] = (),
        bos: tuple[int, ...] = (),
    ):
        c = config
        if c.attention == attention_choice.AUTO:
            raise ValueError("attention is auto; decide it first, see `with_attention`")
        objectives, self.config, self.compression = c.objectives, c, compression
        self.weights = dict(objectives.weights)
        self.heads = {o: head if o == "qa" else () for o in self.weights}
        taught = objectives.taught
        self.weights |= {o + KL: objectives.kl * self.weights[o] for o in taught}
        # As the base alone is asked: without trained tokens, and with one `<s>` at most.
        self.before = {o: tuple(i for i in self.heads[o] if i >= 0) or bos for o in taught}
        self.skipped = len(bos) if compression.bos_before_text else 0
        self.model = llama.Llama(
            model_config,
            lora_scale=c.lora.scale,
            lora_dropout=c.lora.dropout,
            dtype=c.jnp_dtype,
            remat=c.remat,
            unroll=c.unroll,
            attention=c.attention,
        )
        self.decoder = self.model.clone(remat=c.remat_decoder or c.remat)

    def counts(self, batch: PyTree) -> dict[str, Float[Array, ""]]:
        """Label tokens by objective, those behind every memory of a context."""
        return {
            o: len(ks_of(batch)) * jnp.sum(t["label_mask"]).astype(jnp.float32)
            for o, t in self._with_kl(batch["targets"]).items()
        }

    def _with_kl(self, targets):
        """Targets with those of KL terms, which have the labels of their objectives."""
        return targets | {o + KL: targets[o] for o in self.before}

    def tokens(self, batch: PyTree) -> Float[Array, ""]:
        """Context tokens encoded and label tokens predicted."""
        read = jnp.sum(batch["lengths"]).astype(jnp.float32)
        counts = self.counts(batch)
        return read + sum(counts[o] for o in batch["targets"])

    @property
    def teacher_lora(self) -> LoraConfig | None:
        """Sizes of the teacher's LoRA, None if it has none. An adapter's own may be of others."""
        objectives = self.config.objectives
        return self.config.lora if objectives.taught and objectives.teacher else None

    def losses(
        self, trained: PyTree, frozen: PyTree, batch: PyTree, dropout_key: jax.Array | None
    ) -> LossSums:
        """(sum, count) of losses by objective. The decoder sees a context through its memory.

        A batch with several k has the losses behind the memories of all. The KL to the teacher is
        beside them, see `loss.distilled_head_losses`; only the teacher sees the context itself, or
        what is `FULL_TEXT` in the batch.
        """
        c, targets, ks = self.compression, batch["targets"], ks_of(batch)
        teaching = self._teaching(trained, frozen, batch) if self.before else None
        contexts = Contexts(batch["context"], batch["lengths"], max(ks))
        base = FrozenModel(self.model, frozen)
        memories = encoder.compress_several(base, trained, contexts, ks, c, dropout_key)
        decoder = Decoder.of(FrozenModel(self.decoder, frozen), trained, dropout_key)
        layout, chunk = c.position_layout, self.config.loss_chunk
        by_k = [
            loss.objective_sums(
                loss.label_losses(decoder, memory, targets, self.heads, layout, chunk, teaching),
                self._with_kl(targets),
            )
            for memory in memories
        ]
        return jax.tree.map(lambda *of_each: sum(of_each), *by_k)

    def _teaching(self, trained, frozen, batch):
        objectives, text = self.config.objectives, batch.get(FULL_TEXT, batch)
        own = objectives.teacher == DECODER_LORA
        lora = trained[DECODER_LORA] if own else frozen.get(TEACHER_LORA)
        hidden = distil.teach(
            Decoder(FrozenModel(self.decoder, frozen), None, lora),
            text["context"],
            text["lengths"],
            batch["targets"],
            self.before,
            self.skipped,
        )
        return loss.Teaching(hidden, objectives.kl)
