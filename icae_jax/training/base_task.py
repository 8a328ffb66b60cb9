"""Training a small base model from scratch on the synthetic corpus, so that a compressor can be tried without any download."""

import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax

from icae_jax.data import synthetic
from icae_jax.data.prefetch import prefetch
from icae_jax.errors import UserError
from icae_jax.interop.hub import base as bases
from icae_jax.models import llama
from icae_jax.runtime import attention_choice, sharding
from icae_jax.training.config import BaseConfig

BASE = "base"  # the folder in a workdir that training writes


class BaseTask:
    """Plain language modelling of `data.synthetic.base_document`, every parameter trained (`BaseConfig`).

    A step's documents are drawn from (seed, step), their kinds as `config.mixture` says for that stage of the run.
    """

    def __init__(self, config: BaseConfig):
        self.config, self.weights, self.frozen = config, {"lm": 1.0}, {}
        self.tokenizer = synthetic.build_tokenizer()
        m = config.model
        self.model_config = llama.ModelConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=m.hidden_size,
            intermediate_size=m.intermediate_size,
            num_layers=m.num_layers,
            num_heads=m.num_heads,
            num_kv_heads=m.num_kv_heads,
            head_dim=m.hidden_size // m.num_heads,
            max_position_embeddings=m.max_position_embeddings,
            rope_theta=m.rope_theta,
            tie_word_embeddings=True,
        )
        self.stages = parse_mixture(config.mixture)
        self.identity, self._ids, self._lengths = {}, {}, {}
        self.placement = sharding.Placement(sharding.make_mesh(config.mesh), self.model_config)
        length, rows = (
            max(map(self._length, self.stages[-1][1])),
            config.batch_size // config.accumulate,
        )
        name, self._notes = attention_choice.choose(
            config.attention,
            self.model_config,
            self.placement.mesh,
            rows=rows,
            length=length,
            dtype=config.jnp_dtype,
        )
        self.model = llama.Llama(
            self.model_config,
            dtype=config.jnp_dtype,
            remat=config.remat,
            unroll=config.unroll,
            attention=name,
        )

    def shared_by_processes(self) -> dict[str, object]:
        """What all processes must have alike, beside the configuration: nothing, its data are made of that."""
        return {}

    def notes(self):
        """Lines worth saying before training."""
        return self.placement.notes() + self._notes

    def init(self):
        """Random parameters; embeddings at `model.embedding_std`, the final norm alike, so that a tied head starts near uniform."""
        params = llama.init_params(jax.random.key(self.config.seed), self.model_config)
        std = self.config.model.embedding_std
        params["embed"] = params["embed"] * (std / 0.02)
        params["norm"]["scale"] = params["norm"]["scale"] * std
        return params

    # ---------------------------------------------------------------------------------------------------------- data

    def _tokenise(self, text):
        if text not in self._ids:
            if len(self._ids) > 100_000:
                self._ids.clear()
            self._ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._ids[text]

    def _collate(self, documents, length):
        ids = np.zeros((len(documents), length + 1), np.int32)
        weights = np.zeros((len(documents), length + 1), np.float32)
        for b, parts in enumerate(documents):
            flat, w = [self.tokenizer.bos_token_id], [0.0]
            for text, weight in parts:
                piece = self._tokenise(text)
                flat += piece
                w += [weight] * len(piece)
            used = min(len(flat), length + 1)
            ids[b, :used], weights[b, :used] = flat[:used], w[:used]
        return {"ids": ids[:, :-1], "labels": ids[:, 1:], "weights": weights[:, 1:]}

    def _stage(self, step):
        """The shares of document kinds that hold at a step, `{kind: share}`."""
        return next(
            (kinds for until, kinds in self.stages if until == 0 or step < until),
            self.stages[-1][1],
        )

    def _length(self, kind):
        """Tokens of the longest of a sample of documents, rounded up. A rare longer document loses its end."""
        if kind not in self._lengths:
            sample = [synthetic.base_document(i, kind) for i in range(200)]
            longest = max(sum(len(self._tokenise(text)) for text, _ in parts) for parts in sample)
            self._lengths[kind] = -(-longest // 8) * 8
        return self._lengths[kind]

    def batch(self, step):
        """Documents of the kinds of that stage: `ids [B, T]`, `labels [B, T]`, `weights [B, T]`."""
        kinds = self._stage(step)
        drawn = random.Random(f"{self.config.seed} {step}").choices(
            list(kinds), list(kinds.values()), k=self.config.batch_size
        )
        documents = [
            synthetic.base_document(f"{self.config.seed} {step} {i}", kind)
            for i, kind in enumerate(drawn)
        ]
        return self._collate(documents, max(map(self._length, kinds)))

    def train_batches(self, start, stop, rows=slice(None)):
        """Batches of steps start … stop - 1. rows: those that are made, by default all."""
        return prefetch(
            lambda step: jax.tree.map(lambda x: x[rows], self.batch(step)), range(start, stop)
        )

    def eval_batches(self, rows=slice(None)):
        """Held-out documents of every kind of the last stage; losses are named by kind. rows: as for `train_batches`."""
        for kind in self.stages[-1][1]:
            for start in range(0, self.config.eval_examples, self.config.batch_size):
                documents = [
                    synthetic.base_document(f"held out {start + i}", kind)
                    for i in range(self.config.batch_size)
                ]
                yield {
                    kind: jax.tree.map(
                        lambda x: x[rows], self._collate(documents, self._length(kind))
                    )
                }

    def describe(self, batch):
        """What a line of metrics should say of a batch: nothing."""
        return {}

    def held_out_loss(self, losses):
        """One number to rank checkpoints by: the loss on the first kind of the last stage."""
        return next(iter(losses.values()))["lm"]

    # ---------------------------------------------------------------------------------------------------------- loss

    def counts(self, batch):
        return {"lm": jnp.sum(batch["weights"])}

    def tokens(self, batch):
        return jnp.sum(batch["weights"] > 0).astype(jnp.float32)

    def least_flops(self, batch):
        """Not counted: this is no run whose utilisation anyone looks at."""
        return None

    def losses(self, trained, frozen, batch, dropout_key):
        """`{"lm": (weighted sum of token losses, sum of weights)}`."""
        T = batch["ids"].shape[1]
        hidden, _ = self.model.apply(
            {"params": trained}, batch["ids"], jnp.arange(T)[None], jnp.ones((1, T), bool)
        )
        logits = jnp.einsum(
            "btd,dv->btv", hidden, llama.head_kernel(trained), preferred_element_type=jnp.float32
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return {"lm": (jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"]))}

    def export(self, workdir, trained):
        """Writes the base in model-hub format, bfloat16."""
        folder = pathlib.Path(workdir) / BASE
        bases.save_base(folder, self.model_config, trained, self.tokenizer)
        return folder


def parse_mixture(lines):
    """Stages of a run, `[(last step or 0, {kind: share}), …]`, of lines such as

        "500 quiz=2 repeat=1"

    which holds until step 500; 0 means until the end. UserError names the line.
    """
    stages = []
    for line in lines:
        try:
            until, *kinds = line.split()
            stage = (
                int(until),
                {kind: float(share) for kind, share in (item.split("=") for item in kinds)},
            )
            if not stage[1] or not all(
                kind in synthetic.DOCUMENTS and share > 0 for kind, share in stage[1].items()
            ):
                raise UserError(f"kinds are {', '.join(synthetic.DOCUMENTS)}, shares positive")
        except ValueError as error:
            raise UserError(
                f"mixture line {line!r}: {error}; write 'STEPS KIND=SHARE …'"
            ) from error
        stages.append(stage)
    if not stages:
        raise UserError("mixture is empty; give at least one stage, such as '0 questions=1'")
    return stages
