"""The task of training a compressor on a frozen base: data, losses, evaluation, export."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from icae_jax.compression import trained as trained_tree
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.trained import DECODER_LORA, SPECIAL_ROWS
from icae_jax.data import mixture, places, prefetch, tokens
from icae_jax.data.collate import bucket_shape
from icae_jax.data.drawing import StaticInt
from icae_jax.data.examples import Examples
from icae_jax.data.index import ExampleSpec
from icae_jax.errors import UserError, counted
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.models.llama import ModelConfig
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets
from icae_jax.runtime import attention_choice, sharding
from icae_jax.training import trained
from icae_jax.training.compressor_losses import (
    FULL_TEXT,
    TEACHER_LORA,
    CompressorLosses,
    base_positions,
    ks_of,
    teacher_positions,
)
from icae_jax.training.config import SCRATCH, TrainConfig, compression_on
from icae_jax.training.task import MeanLosses, Rows
from icae_jax.training.workdir import recorded

CHECKED = 1 << 22  # ids looked through at once


def with_attention(
    config: TrainConfig,
    model_config: ModelConfig,
    compression: CompressionConfig,
    mesh: jax.sharding.Mesh | None,
    length: int,
) -> tuple[TrainConfig, list[str]]:
    """The configuration with its attention decided on a mesh, and notes (`attention_choice`).

    length: tokens of the contexts that most of the work is for.
    """
    segments, size = bucket_shape(length, compression)
    name, notes = attention_choice.choose(
        config.attention,
        model_config,
        mesh,
        rows=config.batch_size // config.accumulate * segments,
        length=compression.encoder_tokens(size),
        dtype=config.jnp_dtype,
        mask=compression.encoder_mask,
    )
    if name == "splash":
        notes = [*notes, "attention: xla in the last layer of targets, where splash cannot be used"]
    return dataclasses.replace(config, attention=name), notes


class CompressorTask(CompressorLosses):
    """LoRA and memory table trained on a frozen base: losses, data, and where all of it lies.

    base: what `config.base` names, if it is loaded already, in the configuration's dtype and on its
    mesh. workdir: of a run that may have begun. The ids of its template are kept there: a chat
    template that writes today's date would make others on another day.
    """

    def __init__(
        self,
        config: TrainConfig,
        base: bases.Base | None = None,
        workdir: str | os.PathLike | None = None,
    ):
        c = config
        start = teacher = None  # both are checked before the base takes minutes
        if c.init_from and c.init_from != SCRATCH:
            start = trained.find_whole(c.init_from, progress=jax.process_index() == 0)
        if c.objectives.teacher_adapter:
            teacher = trained.find_whole(
                c.objectives.teacher_adapter, progress=jax.process_index() == 0
            )
            if not trained.stated_compression(teacher).get(DECODER_LORA):
                raise UserError(
                    f"objectives.teacher {c.objectives.teacher} has no decoder LoRA, so it would "
                    "teach what the base alone does; give an adapter that was trained with "
                    f"compression.{DECODER_LORA}, or leave it empty for the base alone"
                )
        sizes = bases.sizes(c.base)
        c.compression.encoder_config(sizes)
        self.placement = sharding.Placement(sharding.make_mesh(c.mesh), sizes)
        self.base = base or bases.load_base(
            c.base,
            c.jnp_dtype,
            self.placement.parameter,
            progress=jax.process_index() == 0,
            quantize=c.quantize,
        )
        tokenizer = self.base.tokenizer
        run = {} if workdir is None else recorded(workdir)
        compression, self._notes = compression_on(c, tokenizer, run)
        c, notes = with_attention(
            c, self.base.config, compression, self.placement.mesh, max(c.data.context_lengths)
        )
        self._notes += notes
        self.template = self._template(c.objectives.template, run, workdir)
        bos = tokenizers.bos_id(tokenizer)
        before_text = () if bos is None else (bos,)
        super().__init__(c, self.base.config, compression, self.template.head, before_text)
        self.framing = targets.make_framing(self.compression, tokenizer, bos)
        self._check_framing()
        self.start_from = None
        if start:
            _, self.start_from = trained.open_adapter(start, self.base)
            self._check_start()
        self.frozen = self.base.params
        if teacher:
            _, self.teacher = trained.open_adapter(teacher, self.base)
            self._check_teacher()
            lora = self.teacher.trained[DECODER_LORA]
            lora = sharding.put(lora, self.placement.tree(lora))
            self.frozen = self.frozen | {TEACHER_LORA: lora}
        self.train_examples = (
            self._mixture() if c.data.train_weights else self._examples(c.data.train)
        )
        self.eval_examples = None
        if c.data.eval and c.eval_examples:
            self.eval_examples = self._examples(c.data.eval)
        self._check_positions()
        self.identity = {
            "base": self.base.fingerprint,
            "data.train": (self.train_examples.key, self.train_examples.earlier_key),
            "template": self.template.as_json(),
            "trigger": compression.trigger,
            **self.base.identity,
        }
        if self.base.quantize:
            self.identity["quantize"] = self.base.quantize
        if self.start_from:
            self.identity["init_from"] = self.start_from.fingerprint
        if self.before:
            own = c.objectives.teacher or "base"
            self.identity["teacher"] = self.teacher.fingerprint if teacher else own

    # --------------------------------------------------------------------------- what it is made of

    def _template(self, name, run, workdir):
        """The template that the run began with, or the tokenizer's for a new run."""
        template = targets.make_template(name, self.base.tokenizer)
        stored = run.get("identity.template")
        if stored is None or stored == template.as_json():
            return template
        first = targets.Template.from_json(stored, pathlib.Path(workdir) / "config.json")
        if first.name != name:  # another configuration, which `check_workdir` refuses
            return template
        self._notes.append(
            "objectives.template: the run goes on with the words that it began with; the base's "
            "tokenizer would make others of it today"
        )
        return first

    def _examples(self, source):
        c, tokenizer = self.config, self.base.tokenizer
        data = tokens.tokenise(
            source,
            tokenizer,
            c.data.cache_dir,
            c.data.tfds_dir or None,
            c.data.max_row_bytes,
            c.data.no_answer,
            "data.strict" if c.data.strict else "",
        )
        self._check_ids(source, data)
        spec = ExampleSpec(
            c.data,
            self.compression,
            c.phase,
            tuple(c.objectives.weights),
            self.template,
            self.framing,
            c.objectives.pad_labels,
        )
        return Examples(data, spec)

    def _mixture(self):
        c = self.config.data
        weighted = zip(places.split_source(c.train), c.train_weights, strict=True)
        parts = {}
        for number, (source, weight) in enumerate(weighted):
            if weight > 0:
                try:
                    parts[number] = self._examples(source), weight
                except UserError as error:
                    raise UserError(
                        f"data.train source {source}, of weight {weight:g}: {error}"
                    ) from error
        return mixture.Mixture(parts)

    # --------------------------------------------------------------------------------------- checks

    def _check_framing(self):
        """UserError if an id around a text or a question has no row in the embedding table."""
        adapters.check_template(self.template, self.base, "objectives.template")
        tokenizers.check_ids(
            [[*self.framing.start, self.framing.trigger, self.framing.eos]],
            self.base.config.vocab_size,
            lambda _: "what stands around a text (bos, eos)",
            self.base.tokenizer,
            SPECIAL_ROWS,
        )

    def _check_positions(self):
        c, most = self.config, self.base.config.max_position_embeddings
        longest, qa = max(c.data.context_lengths), 0
        if "qa" in self.weights:
            qa = max(e.qa_shape[0] for e in (self.train_examples, self.eval_examples) if e)
        pad_labels, head = c.objectives.pad_labels, len(self.template.head)
        needed = base_positions(self.weights, pad_labels, self.compression, longest, qa, head)
        if needed > most:
            raise UserError(
                f"data.context_lengths holds {longest}, which needs {needed} positions with "
                f"compression.k {c.compression.k}; the base has {most}. Use shorter contexts (or "
                "data.max_target_tokens), or a smaller k"
            )
        before = max(map(len, self.before.values()), default=0)
        needed = teacher_positions(self.before, longest, qa, before, self.skipped)
        if needed > most:
            raise UserError(
                f"objectives.kl is {c.objectives.kl}, whose teacher reads whole contexts: "
                f"data.context_lengths holds {longest}, which takes it {needed} positions; the "
                f"base has {most}. Use shorter contexts (or data.max_target_tokens), or set "
                "objectives.kl to 0"
            )

    def _check_teacher(self):
        """UserError if the teacher's LoRA is of another scale, of which a program has one only."""
        theirs, ours = self.teacher.lora.scale, self.config.lora.scale
        if theirs != ours:
            raise UserError(
                f"lora.scale is {ours}, but objectives.teacher {self.config.objectives.teacher} "
                f"was trained with {theirs}; give --config.lora.scale={theirs}, or another teacher"
            )

    def _check_start(self):
        """UserError if `init_from` was trained with another memory or LoRA."""
        fields = ["method", "layout", "trigger", "decoder_lora", "encoder_mask", "encoder_layers"]
        fields += ["anchor_vectors"] + (["k"] if not self.compression.any_k else [])
        if self.compression.position_layout.fixed_length:
            fields.append("rate")  # there it determines the memory's positions
        groups = (
            ("compression", self.start_from.compression, self.compression, fields),
            ("lora", self.start_from.lora, self.config.lora, ("rank", "scale", "targets")),
        )
        for group, old, new, names in groups:
            for name in names:
                before, now = getattr(old, name), getattr(new, name)
                # The order of LoRA's targets matters only when they are drawn.
                same = set(before) == set(now) if name == "targets" else before == now
                if not same:
                    raise UserError(
                        f"{group}.{name} is {now!r}, but init_from {self.config.init_from} was "
                        f"trained with {before!r}; give --config.{group}.{name}={before}"
                    )

    def _check_ids(self, source, data):
        """UserError if a source's tokens hold one without a row.

        They are searched only if the tokenizer knows such tokens at all.
        """
        rows, tokenizer = self.base.config.vocab_size, self.base.tokenizer
        if tokenizers.highest_id(tokenizer) < rows:
            return
        for kind, name in (("text", "text"), ("question", "prompt"), ("answer", "answer")):
            ids, offsets = getattr(data, f"{name}_ids"), getattr(data, f"{name}_offsets")
            for start in range(0, len(ids), CHECKED):
                beyond = np.flatnonzero(ids[start : start + CHECKED] >= rows)
                if len(beyond):
                    at = start + int(beyond[0])
                    number = np.searchsorted(offsets, at, side="right") - 1
                    where = f"data source {source}: {kind} {number} (from 0)"
                    tokenizers.check_ids(
                        [ids[at : at + 1]], rows, lambda _, where=where: where, tokenizer
                    )

    @property
    def teacher_lora(self) -> LoraConfig | None:
        """Sizes of the teacher's LoRA, those of its own adapter if it has one."""
        own = self.config.objectives.teacher_adapter
        return self.teacher.lora if own else super().teacher_lora

    # --------------------------------------------------------------------------------- the protocol

    def shared_by_processes(self) -> dict[str, object]:
        """What all processes must agree on: the data's identity and shapes."""
        shared = {f"identity.{name}": value for name, value in self.identity.items()}
        for name, examples in self._sources():
            shared |= {f"identity.{name}": examples.key, f"shapes of {name}": examples.shapes}
        return shared

    def _sources(self):
        named = {"data.train": self.train_examples, "data.eval": self.eval_examples}
        return [(name, examples) for name, examples in named.items() if examples]

    def notes(self) -> list[str]:
        """Lines for the log: what differs from what was asked, and which data are left out."""
        left_out = [
            f"{name}: left out {counted(count, reason)}"
            for name, examples in self._sources()
            for reason, count in examples.dropped.items()
        ]
        return self.placement.notes() + self._notes + left_out

    def init(self) -> PyTree:
        """The trained tree: from `init_from`, or new."""
        if self.start_from:
            return self.start_from.trained
        c, trigger = self.config, self._trigger_id()
        key, embeddings = jax.random.key(c.seed), sharding.on_host(self.frozen["embed"])
        return trained_tree.init(key, embeddings, self.base.config, c.lora, c.compression, trigger)

    def _trigger_id(self) -> int | None:
        """The token whose embedding the [AE] row starts from, None for a random row."""
        tokenizer, token = self.base.tokenizer, self.config.compression.trigger_token
        if not token:
            # In place of bos: behind a newline a base looks back at what it has read
            # (launch/experiments/README.md).
            replaced = self.compression.trigger != self.config.compression.trigger
            trigger = tokenizers.token_id(tokenizer, "\n") if replaced else None
            return None if (trigger or 0) >= self.base.config.vocab_size else trigger
        what, trigger = "compression.trigger_token", tokenizers.token_id(tokenizer, token)
        if trigger is None:
            raise UserError(f"{what} {token!r} is not a token of the base's tokenizer")
        tokenizers.check_ids([[trigger]], self.base.config.vocab_size, lambda _: what, tokenizer)
        return trigger

    def train_batches(self, start: int, stop: int, rows: Rows = slice(None)) -> Iterator[PyTree]:
        """Batches of steps `start` to `stop - 1`, cut to `rows`."""
        c = self.config
        steps, choices = range(start, stop), self.compression.choices
        return prefetch.train_batches(
            self.train_examples, c.seed, c.batch_size, steps, choices, rows, all_k=len(c.ks) > 1
        )

    def describe(self, batch: PyTree) -> dict[str, Any]:
        """Fields of a batch's metrics line: its k, if one of several was drawn."""
        ks = ks_of(batch)
        return {"k": ks[0]} if len(self.compression.choices) > 1 and len(ks) == 1 else {}

    def held_out_loss(self, losses: MeanLosses) -> float:
        """The weighted loss with the right memory, averaged over k, to rank checkpoints by.

        Without KL, so that it ranks runs with and without a teacher alike.
        """
        right = [by_objective for kind, by_objective in losses.items() if kind.startswith("memory")]
        weights = self.config.objectives.weights
        total = sum(weights[o] * losses[o] for losses in right for o in losses if o in weights)
        return total / len(right)

    def eval_batches(self, rows: Rows = slice(None)) -> Iterator[dict[str, PyTree]]:
        """Fixed held-out batches, cut to `rows`, by kind.

        "memory" has each target behind its own context, "wrong_memory" behind another text's; the
        latter is missing if all held-out data are one text. Of several k, these two are of the
        largest, and "memory_k4", "wrong_memory_k4", … of the others. A teacher reads the right text
        for either.
        """
        examples = self.eval_examples
        if examples is None:
            return
        for bucket, chosen in examples.held_out(self.config.batch_size, self.config.eval_examples):
            batch = examples.collate(bucket, chosen[rows])
            if self.before:
                batch[FULL_TEXT] = {name: batch[name] for name in ("context", "lengths")}
            others = examples.other_contexts(bucket, chosen[rows])
            kinds = {"memory": batch} | ({"wrong_memory": batch | others} if others else {})
            by_k = {}
            for k in sorted(self.compression.choices, reverse=True):
                suffix = "" if k == self.compression.k else f"_k{k}"
                by_k |= {kind + suffix: b | {"k": StaticInt(k)} for kind, b in kinds.items()}
            yield by_k

    def export(self, workdir: str | os.PathLike, trained: PyTree) -> pathlib.Path:
        """Writes the adapter folder and returns its path."""
        adapter = adapters.Adapter(
            self.compression,
            self.config.lora,
            self.template,
            trained,
            self.config.base,
            base_fingerprint=self.base.fingerprint,
            base_identity=self.base.identity,
            base_quantize=self.base.quantize,
        )
        folder = pathlib.Path(workdir) / adapters.IN_WORKDIR
        adapters.save_adapter(folder, adapter)
        return folder
