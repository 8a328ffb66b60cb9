"""The task of training a compressor on a frozen base: data, losses, evaluation, export."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from icae_jax.compression import encoder, layout, methods
from icae_jax.data import batches, mixture, sources, tokens
from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.models import llama, lora
from icae_jax.objectives import loss, targets
from icae_jax.performance import flops
from icae_jax.runtime import attention_choice, sharding
from icae_jax.training.config import SCRATCH, recorded

CHECKED = 1 << 22  # ids looked through at once
_init_lora = jax.jit(
    lora.init_lora, static_argnums=(1, 2)
)  # one program, not one for every array's shape


def compression_on(config, tokenizer):
    """(what a `TrainConfig` trains on a base with that tokenizer, lines on what is done otherwise than it asks)."""
    compression = config.trained_compression
    if compression.trigger != "bos" or tokenizer.bos_token_id is not None:
        return compression, []
    note = "compression.trigger: the base's tokenizer has no bos token; a trained one asks for the text instead"
    return dataclasses.replace(compression, trigger="trained"), [note]


class CompressorLosses:
    """What a training step computes, without data or weights: the AE, LM and QA losses of batches (`TrainConfig`, whose attention of
    "auto" is plain here: what is fastest is for those to say who have the devices).

    model_config: the base's sizes. compression: what is trained on that base (`compression_on`). head: ids that stand before the memory
    where questions are asked.
    """

    def __init__(self, config, model_config, compression, head=()):
        c = config
        self.config, self.weights, self.compression = c, c.objectives.weights, compression
        self.heads = {o: head if o == "qa" else () for o in self.weights}
        self.model = llama.Llama(
            model_config, lora_scale=c.lora.scale, lora_dropout=c.lora.dropout, dtype=c.jnp_dtype, remat=c.remat, unroll=c.unroll,
            attention="xla" if c.attention == attention_choice.AUTO else c.attention,
        )  # fmt: skip
        self.decoder = self.model.clone(remat=c.remat_decoder or c.remat)

    def counts(self, batch):
        """Label tokens by objective."""
        return {
            o: jnp.sum(t["label_mask"]).astype(jnp.float32) for o, t in batch["targets"].items()
        }

    def tokens(self, batch):
        """Context tokens encoded and label tokens predicted."""
        return jnp.sum(batch["lengths"]).astype(jnp.float32) + sum(self.counts(batch).values())

    def least_flops(self, batch):
        """The fewest FLOPs that a step on a batch of these shapes takes (`performance.flops`)."""
        return flops.least(
            self.model.config, self.config.lora, self.compression, batch, self.heads
        ).total

    def losses(self, trained, frozen, batch, dropout_key):
        """`{objective: (sum, count)}`. The decoder sees a context through its memory alone."""
        c = self.compression
        memory = methods.compress(
            self.model,
            frozen,
            trained,
            batch["context"],
            batch["lengths"],
            c,
            batch["k"],
            dropout_key,
        )
        losses = loss.label_losses(
            self.decoder,
            frozen,
            trained,
            memory,
            batch["targets"],
            self.heads,
            c.layout,
            self.config.loss_chunk,
        )
        return loss.objective_sums(losses, batch["targets"])


def with_attention(config, model_config, compression, mesh, length):
    """(the configuration with the attention that is computed on a mesh, lines on how it was found), see `runtime.attention_choice`.

    length: tokens of the contexts that most of the work is for.
    """
    segments, size = batches.segment_shape(length, compression)
    rows = config.batch_size // config.accumulate * segments
    name, notes = attention_choice.choose(
        config.attention,
        model_config,
        mesh,
        rows=rows,
        length=size + compression.k,
        dtype=config.jnp_dtype,
    )
    return dataclasses.replace(config, attention=name), notes


def positions(objectives, pad_labels, compression, longest, qa=0, head=0):
    """Positions of the base that contexts of so many tokens take with the objectives of these names.

    qa: tokens of the longest question and answer behind the memory; head: of what stands before it.
    """
    segments, size = batches.segment_shape(longest, compression)
    restored = (segments * compression.segment_tokens if pad_labels else longest) + 1
    behind = max(qa, restored if {"ae", "lm"} & set(objectives) else 0)
    where = layout.get(compression.layout)
    written, memory, start = layout.positions_needed(
        where, longest, segments, size, compression.k, compression.segment_tokens
    )
    return max(written, head + memory, head + start + behind)


class CompressorTask(CompressorLosses):
    """LoRA and memory table trained on a frozen base: its losses, its data, and where all of it lies.

    base: what `config.base` names, where it is loaded already, in the configuration's dtype and on its mesh. workdir: of a run that may
    have begun: the ids of its template are kept there, which a chat template that writes today's date would make otherwise on another day.
    """

    def __init__(self, config, base=None, workdir=None):
        c = config
        start = None
        if c.init_from and c.init_from != SCRATCH:
            start = adapters.locate(c.init_from, progress=jax.process_index() == 0).folder
            adapters.read_adapter_info(
                start, c.init_from
            )  # before the base is loaded, which takes minutes
        self.placement = sharding.Placement(sharding.make_mesh(c.mesh), bases.sizes(c.base))
        self.base = base or bases.load_base(
            c.base, c.jnp_dtype, self.placement.parameter, progress=jax.process_index() == 0
        )
        tokenizer = self.base.tokenizer
        compression, self._notes = compression_on(c, tokenizer)
        c, notes = with_attention(
            c, self.base.config, compression, self.placement.mesh, max(c.data.context_lengths)
        )
        self._notes += notes
        self.template = self._template(c.objectives.template, workdir)
        super().__init__(c, self.base.config, compression, self.template.head)
        self.framing = targets.make_framing(self.compression, tokenizer, tokenizers.bos_id(tokenizer))
        self._check_frames()
        self.start_from = None
        if start:
            self.start_from = adapters.load_adapter(start, self.base)
            self._check_start()
        self.frozen = self.base.params
        self.train_examples = (
            self._mixture() if c.data.train_weights else self._examples(c.data.train)
        )
        self.eval_examples = (
            self._examples(c.data.eval) if c.data.eval and c.eval_examples else None
        )
        self._check_positions()
        data = (self.train_examples.key, self.train_examples.earlier_key)
        self.identity = {
            "base": self.base.fingerprint,
            "data.train": data,
            "template": self.template.as_json(),
            **self.base.identity,
        }
        if self.start_from:
            self.identity["init_from"] = self.start_from.fingerprint

    def _template(self, name, workdir):
        """The run's template: that with which it began, or, of a new run, the tokenizer's of today."""
        made = targets.make_template(name, self.base.tokenizer)
        kept = recorded(workdir).get("identity.template") if workdir is not None else None
        if kept is None or kept == made.as_json():
            return made
        template = targets.Template.from_json(kept, pathlib.Path(workdir) / "config.json")
        if template.name != name:  # another configuration, which `check_workdir` refuses
            return made
        self._notes.append(
            "objectives.template: the words with which the run began are kept; the base's tokenizer makes others of it today"
        )
        return template

    def _check_frames(self):
        """UserError where an id that stands round a text or a question has no row."""
        rows, tokenizer = self.base.config.vocab_size, self.base.tokenizer
        adapters.check_template(self.template, self.base, "objectives.template")
        around = [*self.framing.start, self.framing.trigger, self.framing.eos]
        tokenizers.check_ids(
            [around],
            rows,
            lambda _: "what stands round a text (bos, eos)",
            tokenizer,
            encoder.SPECIAL_ROWS,
        )

    def _check_positions(self):
        c, most = self.config, self.base.config.max_position_embeddings
        longest = max(c.data.context_lengths)
        qa = (
            max(e.qa_shape[0] for e in (self.train_examples, self.eval_examples) if e)
            if "qa" in self.weights
            else 0
        )
        needed = positions(
            self.weights,
            c.objectives.pad_labels,
            self.compression,
            longest,
            qa,
            len(self.template.head),
        )
        if needed > most:
            raise UserError(
                f"data.context_lengths holds {longest}, which needs {needed} positions with compression.k {c.compression.k}; "
                f"the base has {most}. Use shorter contexts (or data.max_target_tokens), or a smaller k"
            )

    def _check_start(self):
        for name in ("compression", "lora"):
            old, new = (
                getattr(self.start_from, name),
                {"compression": self.compression, "lora": self.config.lora}[name],
            )
            fields = {
                "compression": ("method", "k", "layout", "trigger"),
                "lora": ("rank", "scale", "targets"),
            }[name]
            if name == "compression" and layout.get(new.layout).fixed_length:
                fields += ("rate",)  # there it fixes the memory's positions
            for field in fields:
                unlike = (
                    set(old.targets) != set(new.targets)
                    if field == "targets"
                    else getattr(old, field) != getattr(new, field)
                )
                if unlike:  # the order of targets counts only where they are drawn
                    raise UserError(
                        f"{name}.{field} is {getattr(new, field)!r}, but init_from {self.config.init_from} was trained with "
                        f"{getattr(old, field)!r}; give --config.{name}.{field}={getattr(old, field)}"
                    )

    def _examples(self, source):
        c, tokenizer = self.config, self.base.tokenizer
        strict = "data.strict" if c.data.strict else ""
        data = tokens.tokenise(
            source,
            tokenizer,
            c.data.cache_dir,
            c.data.tfds_dir or None,
            c.data.max_row_bytes,
            c.data.no_answer,
            strict,
        )
        self._check_ids(source, data)
        return batches.Examples(
            data,
            c.data,
            self.compression,
            c.phase,
            tuple(self.weights),
            self.template,
            self.framing,
            c.objectives.pad_labels,
        )

    def _check_ids(self, source, data):
        """UserError where a source's tokens hold one without a row; looked for only where the tokenizer knows such tokens at all."""
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
                    named = f"data source {source}: {kind} {number} (from 0)"
                    tokenizers.check_ids(
                        [ids[at : at + 1]], rows, lambda _, named=named: named, tokenizer
                    )

    def _mixture(self):
        weighted = zip(
            sources.split_source(self.config.data.train),
            self.config.data.train_weights,
            strict=True,
        )
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

    def shared_by_processes(self) -> dict[str, object]:
        """What all processes must have alike, beside the configuration: what its paths stand for, and the shapes of the batches."""
        found = {f"identity.{name}": value for name, value in self.identity.items()}
        for name, examples in (
            ("data.train", self.train_examples),
            ("data.eval", self.eval_examples),
        ):
            if examples:
                found |= {f"identity.{name}": examples.key, f"shapes of {name}": examples.shapes}
        return found

    def notes(self):
        """Lines worth saying before training: what is done otherwise than asked, what was left out of the data."""
        named = (("data.train", self.train_examples), ("data.eval", self.eval_examples))
        left_out = [
            f"{name}: left out {count} {reason}"
            for name, e in named
            if e
            for reason, count in e.dropped.items()
        ]
        return self.placement.notes() + self._notes + left_out

    def init(self):
        """The trained tree: from `init_from`, or new."""
        if self.start_from:
            return self.start_from.trained
        c = self.config
        key = jax.random.key(c.seed)
        trigger = None
        if c.compression.trigger_token:
            trigger = self.base.tokenizer.convert_tokens_to_ids(c.compression.trigger_token)
            if trigger is None or trigger == self.base.tokenizer.unk_token_id:
                raise UserError(
                    f"compression.trigger_token {c.compression.trigger_token!r} is not a token of the base's tokenizer"
                )
            tokenizers.check_ids(
                [[trigger]],
                self.base.config.vocab_size,
                lambda _: "compression.trigger_token",
                self.base.tokenizer,
            )
        embeddings = {"embed": sharding.on_host(self.frozen["embed"])}
        table = encoder.init_memory_table(
            jax.random.fold_in(key, 1), embeddings, c.compression, trigger
        )
        return {
            "lora": _init_lora(jax.random.fold_in(key, 2), self.base.config, c.lora),
            "memory_table": table,
        }

    def train_batches(self, start, stop, rows=slice(None)):
        """Batches of steps start … stop - 1. rows: those that are made, by default all."""
        c = self.config
        return batches.train_batches(
            self.train_examples, c.seed, c.batch_size, start, stop, self.compression.choices, rows
        )

    def describe(self, batch):
        """What a line of metrics should say of a batch: its k, where there are several."""
        return {"k": int(batch["k"])} if len(self.compression.choices) > 1 else {}

    def held_out_loss(self, losses):
        """One number to rank checkpoints by: the weighted loss with the right memory, mean over the numbers of memory tokens."""
        right = [of for kind, of in losses.items() if kind.startswith("memory")]
        return sum(self.weights[o] * v for of in right for o, v in of.items()) / len(right)

    def eval_batches(self, rows=slice(None)):
        """Fixed held-out batches, each as `{"memory": batch, "wrong_memory": batch}`: the same targets, with their own contexts and with
        those of other texts. Where all held-out data are one text, there is no `wrong_memory`. Where k is drawn, `memory` is the largest
        and `memory_k4`, `wrong_memory_k4`, … the others. rows: as for `train_batches`.
        """
        if self.eval_examples is None:
            return
        size = self.config.batch_size
        for bucket, chosen in self.eval_examples.held_out(size, self.config.eval_examples):
            batch, others = (
                self.eval_examples.collate(bucket, chosen[rows]),
                self.eval_examples.other_contexts(bucket, chosen[rows]),
            )
            read, kinds = (
                {"memory": batch} | ({"wrong_memory": batch | others} if others else {}),
                {},
            )
            for k in sorted(self.compression.choices, reverse=True):
                suffix = "" if k == self.compression.k else f"_k{k}"
                kinds |= {
                    kind + suffix: of | {"k": batches.StaticInt(k)} for kind, of in read.items()
                }
            yield kinds

    def export(self, workdir, trained):
        """Writes the adapter folder."""
        c = self.config
        identity = {"base_fingerprint": self.base.fingerprint, "base_identity": self.base.identity}
        adapter = adapters.Adapter(
            self.compression, c.lora, self.template, trained, c.base, **identity
        )
        adapters.save_adapter(pathlib.Path(workdir) / adapters.IN_WORKDIR, adapter)
        return pathlib.Path(workdir) / adapters.IN_WORKDIR
