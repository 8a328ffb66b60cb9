"""The task of training a compressor on a frozen base: data, losses, evaluation, export."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from icae_jax.compression import icae
from icae_jax.data import batches, tokens
from icae_jax.interop import adapter as adapters
from icae_jax.interop import base as bases
from icae_jax.models import llama, lora
from icae_jax.objectives import loss, targets


class CompressorTask:
    """LoRA and memory table trained by AE, LM and QA losses behind a frozen base (`TrainConfig`)."""

    def __init__(self, config):
        c = config
        self.config, self.weights = c, c.objectives.weights
        self.base = bases.load_base(c.base, c.jnp_dtype)
        self.template = targets.make_template(c.objectives.template, self.base.tokenizer)
        self.start_from = None
        if c.init_from:
            self.start_from = adapters.load_adapter(adapters.adapter_folder(c.init_from), self.base)
            self._check_start()
        self.heads = {o: self.template.head if o == "qa" else () for o in self.weights}
        self.model = llama.Llama(
            self.base.config, lora_scale=c.lora.scale, lora_dropout=c.lora.dropout, dtype=c.jnp_dtype, remat=c.remat, unroll=c.unroll
        )
        self.frozen = self.base.params
        self.train_examples = self._examples(c.data.train)
        self.eval_examples = self._examples(c.data.eval) if c.data.eval and c.eval_examples else None
        self._check_positions()
        self.identity = {"base": self.base.fingerprint, "data.train": self.train_examples.tokens.key}
        if self.start_from:
            self.identity["init_from"] = self.start_from.fingerprint

    def _check_positions(self):
        c, most = self.config, self.base.config.max_position_embeddings
        longest = max(c.data.context_lengths)
        segments, size = icae.segment_shape(longest, c.compression)
        behind = max(e.qa_shape[0] for e in (self.train_examples, self.eval_examples) if e) if "qa" in self.weights else 0
        if "ae" in self.weights or "lm" in self.weights:
            behind = max(behind, longest + 1)
        memory = longest + 1 if c.compression.layout == "uniform" else segments * c.compression.k
        needed = max(size + c.compression.k + 1, len(self.template.head) + memory + behind)
        if needed > most:
            raise ValueError(
                f"data.context_lengths holds {longest}, which needs {needed} positions with compression.k {c.compression.k}; "
                f"the base has {most}. Use shorter contexts (or data.max_target_tokens), or a smaller k"
            )

    def _check_start(self):
        for name in ("compression", "lora"):
            old, new = getattr(self.start_from, name), getattr(self.config, name)
            fields = {"compression": ("method", "k", "layout"), "lora": ("rank", "scale", "targets")}[name]
            for field in fields:
                if getattr(old, field) != getattr(new, field):
                    raise ValueError(
                        f"{name}.{field} is {getattr(new, field)!r}, but init_from {self.config.init_from} was trained with "
                        f"{getattr(old, field)!r}; give --config.{name}.{field}={getattr(old, field)}"
                    )

    def _examples(self, source):
        c, tokenizer = self.config, self.base.tokenizer
        data = tokens.tokenise(source, tokenizer, c.data.cache_dir, c.data.tfds_dir or None)
        bos, eos = bases.bos_id(tokenizer), tokenizer.eos_token_id
        return batches.Examples(data, c.data, c.compression, c.phase, tuple(self.weights), self.template, bos, eos)

    def notes(self):
        """Lines worth saying before training: what was left out of the data."""
        named = (("data.train", self.train_examples), ("data.eval", self.eval_examples))
        return [f"{name}: left out {count} {reason}" for name, e in named if e for reason, count in e.dropped.items()]

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
                raise ValueError(f"compression.trigger_token {c.compression.trigger_token!r} is not a token of the base's tokenizer")
        table = icae.init_memory_table(jax.random.fold_in(key, 1), self.frozen, c.compression, trigger)
        return {"lora": lora.init_lora(jax.random.fold_in(key, 2), self.base.config, c.lora), "memory_table": table}

    def train_batches(self, start, stop):
        c = self.config
        return batches.train_batches(self.train_examples, c.seed, c.batch_size, start, stop, jax.process_index(), jax.process_count())

    def eval_batches(self):
        """Fixed held-out batches, each as `{"memory": batch, "wrong_memory": batch}`: `reads [B]` names the row whose memory each row
        reads, its own or its neighbour's.
        """
        if self.eval_examples is None:
            return
        size = self.config.batch_size
        share = size // jax.process_count()
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        for bucket, rows in self.eval_examples.held_out(size, self.config.eval_examples):
            batch = self.eval_examples.collate(bucket, rows[mine])
            own, other, count = np.arange(size, dtype=np.int32), np.arange(size, dtype=np.int32), int((rows >= 0).sum())
            other[:count] = np.roll(other[:count], -1) if count > 1 else size - 1  # a single example reads a blank memory
            yield {"memory": batch | {"reads": own[mine]}, "wrong_memory": batch | {"reads": other[mine]}}

    def counts(self, batch):
        return {o: jnp.sum(t["label_mask"]).astype(jnp.float32) for o, t in batch["targets"].items()}

    def tokens(self, batch):
        """Context tokens encoded and label tokens predicted."""
        return jnp.sum(batch["lengths"]).astype(jnp.float32) + sum(self.counts(batch).values())

    def losses(self, trained, frozen, batch, dropout_key):
        """`{objective: (sum, count)}`. The decoder sees a context through its memory alone, that of row `reads` where given."""
        c = self.config
        memory = icae.compress(self.model, frozen, trained, batch["context"], batch["lengths"], c.compression, dropout_key)
        if "reads" in batch:
            memory = jax.tree.map(lambda x: jnp.take(x, batch["reads"], axis=0), memory)
        losses = loss.label_losses(
            self.model, frozen, trained, memory, batch["targets"], self.heads, c.compression.layout, c.loss_chunk
        )
        return loss.objective_sums(losses, batch["targets"])

    def export(self, workdir, trained):
        """Writes the adapter folder."""
        c = self.config
        adapter = adapters.Adapter(c.compression, c.lora, self.template, trained, c.base, self.base.fingerprint)
        adapters.save_adapter(pathlib.Path(workdir) / adapters.IN_WORKDIR, adapter)
        return pathlib.Path(workdir) / adapters.IN_WORKDIR

