"""A training run's configuration: frozen dataclasses that check their values when made."""

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.trained import DECODER_LORA
from icae_jax.data.config import DataConfig
from icae_jax.errors import UserError
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.models.llama import REMAT_POLICIES
from icae_jax.models.lora import LoraConfig
from icae_jax.models.schemes import parse_scheme
from icae_jax.objectives.targets import OBJECTIVES, TAUGHT
from icae_jax.runtime import attention_choice
from icae_jax.runtime.sharding import MeshConfig

SCRATCH = "scratch"  # as init_from: fine-tune without a pretrained compressor


@dataclasses.dataclass(frozen=True)
class ObjectivesConfig:
    """Weights of the objectives' mean losses (arXiv 2307.06945, eq. 3 and 5).

    Attributes:
      ae, lm, qa: weight of an objective; 0 leaves it out.
      kl: weight of the KL to the full-context teacher beside the cross-entropy of LM and QA; 0:
        none (`objectives.distil`).
      teacher: "" for the base alone; "decoder_lora" for the base with the decoder LoRA that is
        trained; or an adapter (folder, workdir, hub id, URL), for the base with that adapter's
        decoder LoRA.
      template: how questions and answers are framed (`objectives.targets`).
      pad_labels: also train AE on the padding of layout `reference`, as the authors' 500xCompressor
        does.
    """

    ae: float = 0.5
    lm: float = 0.5
    qa: float = 0.0
    kl: float = 0.0
    teacher: str = ""
    template: str = "plain"
    pad_labels: bool = False

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the objectives that are trained."""
        return {o: getattr(self, o) for o in OBJECTIVES if getattr(self, o) > 0}

    @property
    def taught(self) -> tuple[str, ...]:
        """The objectives with a KL to the teacher."""
        return tuple(o for o in TAUGHT if o in self.weights) if self.kl > 0 else ()

    @property
    def teacher_adapter(self) -> str:
        """The adapter whose decoder LoRA the teacher has; "" if it needs none."""
        return self.teacher if self.taught and self.teacher != DECODER_LORA else ""

    def check_teacher(self, decoder_lora: bool) -> None:
        """UserError if there is nothing to teach, or no such teacher.

        decoder_lora: whether one is trained.
        """
        if not 0 <= self.kl < math.inf:
            raise UserError(
                f"objectives.kl is {self.kl}; give a weight >= 0, such as 1, or 0 for none"
            )
        if self.kl and not self.taught:
            raise UserError(
                f"objectives.kl is {self.kl}, but the teacher knows nothing of AE; train "
                f"{' or '.join(f'objectives.{o}' for o in TAUGHT)} too, or set objectives.kl to 0"
            )
        if self.taught and self.teacher == DECODER_LORA and not decoder_lora:
            raise UserError(
                f"objectives.teacher is {DECODER_LORA}, which needs "
                f"compression.{DECODER_LORA}=True; set it, or leave the teacher empty for the base "
                "alone"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate.

    Attributes:
      name: "adamw", or "muon": orthogonalised momentum for kernels, AdamW at 0.3 of the rate for
        the rest; small bases learn in fewer steps.
      warmup_steps: linear, from 0.
      schedule: "constant", or "cosine", to 0 at decay_steps.
      decay_steps: 0 means the run's last step.
      weight_decay: decoupled, on every trained tensor.
      clip: largest global gradient norm.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 300
    schedule: str = "constant"
    decay_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 2.0

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise UserError(
                f"optimizer.learning_rate is {self.learning_rate}; it must be positive, "
                "such as 1e-4"
            )
        if self.name not in ("adamw", "muon"):
            raise UserError(f"optimizer.name is {self.name!r}; choose adamw or muon")
        if self.schedule not in ("constant", "cosine"):
            raise UserError(f"optimizer.schedule is {self.schedule!r}; choose constant or cosine")
        if self.warmup_steps < 0 or self.decay_steps < 0 or not self.clip > 0:
            raise UserError("optimizer.warmup_steps and decay_steps must be >= 0, and clip > 0")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What every kind of training shares.

    Attributes:
      accumulate: microbatches per step; divides batch_size.
      dtype: of activations and the frozen base, "float32" or "bfloat16"; trained parameters are
        float32.
      remat: rematerialisation policy (`models.llama`).
      attention: an implementation in `models.attention`, or "auto" (`runtime.attention_choice`).
      unroll: layers per iteration of the scan.
      loss_chunk: label positions whose logits exist at once.
      eval_every: steps between evaluations.
      eval_examples: held-out examples, at most.
      checkpoint_every: steps between checkpoints; every evaluation makes one too.
      mesh: how the devices are arranged (`runtime.sharding`).
    """

    # For messages, and not fields: the command; fields of others that it has not, and why.
    COMMAND = "icae train"
    REFUSED = types.MappingProxyType({})

    seed: int = 0
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    dtype: str = "float32"
    remat: str = "none"
    attention: str = attention_choice.AUTO
    unroll: int = 1
    loss_chunk: int = 128
    log_every: int = 10
    eval_every: int = 200
    eval_examples: int = 64
    checkpoint_every: int = 200
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        positive = ("steps", "batch_size", "accumulate", "unroll", "loss_chunk")
        for name in (*positive, "log_every", "eval_every", "checkpoint_every"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.seed < 2**32:  # JAX keys keep 32 bits: a larger seed repeats a smaller one
            raise UserError(f"seed is {self.seed}; give a whole number from 0 on, below 2**32")
        if self.eval_examples < 0:
            raise UserError(f"eval_examples is {self.eval_examples}; it must be 0 or more")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype is {self.dtype!r}; choose float32 or bfloat16")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat is {self.remat!r}; choose from {', '.join(REMAT_POLICIES)}")
        if self.attention not in attention_choice.CHOICES:
            choices = ", ".join(attention_choice.CHOICES)
            raise UserError(f"attention is {self.attention!r}; choose from {choices}")

    @property
    def jnp_dtype(self) -> jnp.dtype:
        """`dtype` as JAX's."""
        return jnp.dtype(self.dtype)


@dataclasses.dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """Training of a compressor.

    Attributes:
      phase: "pretrain" (AE, LM) or "finetune" (QA, AE).
      base: folder, hub id or URL of the base model.
      quantize: of the frozen base, a scheme of `models.schemes`, such as "int8"; "" for none, or
        for the one of a base that is stored quantised.
      init_from: an adapter folder, a checkpoint, or the workdir of an earlier phase; fine-tuning
        needs one, or "scratch".
      draw_k: phases in which every step draws its number of memory tokens from
        `compression.k_choices`; other phases train `compression.k` alone.
      sum_k: where one pass of the encoder serves all of `k_choices` (method pooled), such a step
        trains all of them, instead of drawing one.
      remat_decoder: the decoder's policy; "" for the encoder's, `remat`.
    """

    phase: str = "pretrain"
    base: str = ""
    quantize: str = ""
    init_from: str = ""
    draw_k: tuple[str, ...] = ("finetune",)
    sum_k: bool = True
    remat_decoder: str = ""
    compression: CompressionConfig = CompressionConfig()
    lora: LoraConfig = LoraConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()
    data: DataConfig = DataConfig()

    def __post_init__(self):
        super().__post_init__()
        parse_scheme(self.quantize)
        if self.remat_decoder and self.remat_decoder not in REMAT_POLICIES:
            raise UserError(
                f"remat_decoder is {self.remat_decoder!r}; choose from "
                f"{', '.join(REMAT_POLICIES)}, or '' for that of remat"
            )
        for name, phases in (("phase", (self.phase,)), ("draw_k", self.draw_k)):
            unknown = [p for p in phases if p not in ("pretrain", "finetune")]
            if unknown:
                raise UserError(f"{name} is {unknown[0]!r}; choose pretrain or finetune")
        if self.objectives.pad_labels and not self.compression.position_layout.fixed_length:
            raise UserError(
                "objectives.pad_labels is for compression.layout reference; "
                f"with {self.compression.layout} padding is masked"
            )
        weights = [getattr(self.objectives, o) for o in OBJECTIVES]
        if min(weights) < 0 or not sum(weights) > 0:
            raise UserError(
                f"objectives ae, lm, qa are {weights}; "
                "give weights >= 0, at least one of them positive"
            )
        self.objectives.check_teacher(self.compression.decoder_lora)
        absent = "qa" if self.phase == "pretrain" else "lm"
        if (weight := getattr(self.objectives, absent)) > 0:
            raise UserError(
                f"objectives.{absent} is {weight} in phase {self.phase}, "
                "which has no such targets; set 0"
            )
        for name, value in (("base", self.base), ("data.train", self.data.train)):
            if not value:
                raise UserError(f"{name} is not set; give it with --config.{name}=PATH")
        if self.phase == "finetune" and not self.init_from:
            raise UserError(
                "init_from is not set; fine-tuning starts from a pretrained compressor: "
                f"--config.init_from=WORKDIR (or {SCRATCH}, to see what pretraining is worth)"
            )

    @property
    def trained_compression(self) -> CompressionConfig:
        """`compression` with only the numbers of memory tokens that this phase trains."""
        if self.phase in self.draw_k:
            return self.compression
        return dataclasses.replace(self.compression, k_choices=())

    @property
    def ks(self) -> tuple[int, ...]:
        """The numbers of memory tokens that a step trains; () if it draws one."""
        c = self.trained_compression
        if len(c.choices) == 1 or (self.sum_k and c.spec.write_several):
            return c.choices
        return ()


def compression_on(
    config: TrainConfig, tokenizer: Any, run: Mapping[str, Any] | None = None
) -> tuple[CompressionConfig, list[str]]:
    """What a configuration trains on a base with that tokenizer, and notes on what differs.

    The trigger "bos" is for bases that begin texts with it. Elsewhere it may mean anything: behind
    SmolLM2's, which begins a turn of a chat, the base expects a role and nothing of the memory.

    run: what a run that goes on has recorded (`workdir.recorded`); its trigger stays.
    """
    compression = config.trained_compression
    if compression.trigger != "bos":
        return compression, []
    has_bos = tokenizer.bos_token_id is not None
    if run:  # earlier versions did not record it
        trigger = run.get("identity.trigger", "bos" if has_bos else "trained")
    else:
        trigger = "bos" if tokenizers.bos_id(tokenizer) is not None else "trained"
    if trigger == "bos":
        return compression, []
    why = "puts no bos token in front of texts" if has_bos else "has no bos token"
    note = f"compression.trigger: the base's tokenizer {why}; a trained trigger is used"
    return dataclasses.replace(compression, trigger="trained"), [note]


@dataclasses.dataclass(frozen=True)
class TinyModelConfig:
    """Sizes of a base model that is trained from scratch, on the vocabulary of its corpus."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    embedding_std: float = 0.02


@dataclasses.dataclass(frozen=True)
class BaseConfig(LoopConfig):
    """Training of a small base model on the synthetic corpus.

    Attributes:
      mixture: stages of document kinds (`base_task.parse_mixture`).
    """

    COMMAND = "icae train base"
    REFUSED = types.MappingProxyType(
        {"quantize": "it trains every parameter, in full precision; leave it out"}
    )

    model: TinyModelConfig = TinyModelConfig()
    mixture: tuple[str, ...] = ("0 questions=0.7 repeat=0.3",)
