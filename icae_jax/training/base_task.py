"""Trains a small base model on a synthetic corpus, to try compressors without any download."""

import os
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from icae_jax.data import synthetic
from icae_jax.data.prefetch import prefetch
from icae_jax.errors import UserError
from icae_jax.interop.hub import base as bases
from icae_jax.models import llama
from icae_jax.runtime import attention_choice, sharding
from icae_jax.training.config import BaseConfig
from icae_jax.training.task import LossSums, MeanLosses, Rows

BASE = "base"  # the folder of a workdir that the trained base is written to
Stage = tuple[int, dict[str, float]]  # (last step or 0, share of each document kind)


class BaseTask:
    """Next-token prediction on `data.synthetic.base_document`; every parameter is trained.

    A step's documents depend on (seed, step); `config.mixture` gives their kinds by stage.
    """

    def __init__(self, config: BaseConfig):
        self.config, self.weights, self.frozen = config, {"lm": 1.0}, {}
        self.identity = {}
        self.tokenizer = synthetic.build_tokenizer()
        self._ids, self._lengths = {}, {}  # caches: ids by text, padded length by document kind
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
        self.placement = sharding.Placement(sharding.make_mesh(config.mesh), self.model_config)
        attention, self._attention_notes = attention_choice.choose(
            config.attention,
            self.model_config,
            self.placement.mesh,
            rows=config.batch_size // config.accumulate,
            length=max(map(self._length, self.stages[-1][1])),
            dtype=config.jnp_dtype,
        )
        self.model = llama.Llama(
            self.model_config,
            dtype=config.jnp_dtype,
            remat=config.remat,
            unroll=config.unroll,
            attention=attention,
        )

    def shared_by_processes(self) -> dict[str, object]:
        """Nothing: the data follow from the configuration."""
        return {}

    def notes(self) -> list[str]:
        """Lines to log before training."""
        return self.placement.notes() + self._attention_notes

    def init(self) -> PyTree:
        """Random parameters; a tied head starts near uniform.

        For that, embeddings and the final norm are scaled by `model.embedding_std`.
        """
        params = llama.init_params(jax.random.key(self.config.seed), self.model_config)
        std = self.config.model.embedding_std
        params["embed"] = params["embed"] * (std / 0.02)
        params["norm"]["scale"] = params["norm"]["scale"] * std
        return params

    # ---------------------------------------------------------------------------------------- data

    def _tokenise(self, text: str) -> list[int]:
        if text not in self._ids:
            if len(self._ids) > 100_000:
                self._ids.clear()
            self._ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._ids[text]

    def _collate(self, documents, length: int) -> dict[str, np.ndarray]:
        ids = np.zeros((len(documents), length + 1), np.int32)
        weights = np.zeros((len(documents), length + 1), np.float32)
        for b, pieces in enumerate(documents):
            flat, flat_weights = [self.tokenizer.bos_token_id], [0.0]
            for text, weight in pieces:
                piece = self._tokenise(text)
                flat += piece
                flat_weights += [weight] * len(piece)
            used = min(len(flat), length + 1)
            ids[b, :used], weights[b, :used] = flat[:used], flat_weights[:used]
        return {"ids": ids[:, :-1], "labels": ids[:, 1:], "weights": weights[:, 1:]}

    def _kinds(self, step: int) -> dict[str, float]:
        """The shares of document kinds at a step."""
        return next(
            (kinds for until, kinds in self.stages if until == 0 or step < until),
            self.stages[-1][1],
        )

    def _length(self, kind: str) -> int:
        """Tokens of the longest of 200 sample documents, rounded up to a multiple of 8.

        A rare longer document is cut at its end.
        """
        if kind not in self._lengths:
            sample = [synthetic.base_document(i, kind) for i in range(200)]
            longest = max(sum(len(self._tokenise(text)) for text, _ in doc) for doc in sample)
            self._lengths[kind] = -(-longest // 8) * 8
        return self._lengths[kind]

    def batch(self, step: int) -> dict[str, Int[np.ndarray, "B T"] | Float[np.ndarray, "B T"]]:
        """The documents of a step: `ids`, `labels` and loss `weights`."""
        kinds = self._kinds(step)
        drawn = random.Random(f"{self.config.seed} {step}").choices(
            list(kinds), list(kinds.values()), k=self.config.batch_size
        )
        documents = [
            synthetic.base_document(f"{self.config.seed} {step} {i}", kind)
            for i, kind in enumerate(drawn)
        ]
        return self._collate(documents, max(map(self._length, kinds)))

    def train_batches(self, start: int, stop: int, rows: Rows = slice(None)) -> Iterator[PyTree]:
        """Batches of steps `start` to `stop - 1`, cut to `rows`."""
        return prefetch(
            lambda step: jax.tree.map(lambda x: x[rows], self.batch(step)), range(start, stop)
        )

    def eval_batches(self, rows: Rows = slice(None)) -> Iterator[dict[str, PyTree]]:
        """Held-out documents of each kind of the last stage, cut to `rows`."""
        size = self.config.batch_size
        for kind in self.stages[-1][1]:
            for start in range(0, self.config.eval_examples, size):
                documents = [
                    synthetic.base_document(f"held out {start + i}", kind) for i in range(size)
                ]
                batch = self._collate(documents, self._length(kind))
                yield {kind: jax.tree.map(lambda x: x[rows], batch)}

    def describe(self, batch: PyTree) -> dict[str, Any]:
        """No extra fields for the batch's metrics line."""
        return {}

    def held_out_loss(self, losses: MeanLosses) -> float:
        """The loss on the first kind of the last stage."""
        return next(iter(losses.values()))["lm"]

    # ---------------------------------------------------------------------------------------- loss

    def counts(self, batch: PyTree) -> dict[str, Float[Array, ""]]:
        """The sum of label weights."""
        return {"lm": jnp.sum(batch["weights"])}

    def tokens(self, batch: PyTree) -> Float[Array, ""]:
        """The number of labels."""
        return jnp.sum(batch["weights"] > 0).astype(jnp.float32)

    def losses(
        self, trained: PyTree, frozen: PyTree, batch: PyTree, dropout_key: jax.Array | None
    ) -> LossSums:
        """The weighted sum of token losses, and the sum of weights."""
        T = batch["ids"].shape[1]
        hidden_BTD, _ = self.model.apply(
            {"params": trained}, batch["ids"], jnp.arange(T)[None], jnp.ones((1, T), bool)
        )
        logits_BTV = llama.head(trained, self.model_config).logits(hidden_BTD)
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["labels"])
        return {"lm": (jnp.sum(losses_BT * batch["weights"]), jnp.sum(batch["weights"]))}

    def export(self, workdir: str | os.PathLike, trained: PyTree) -> pathlib.Path:
        """Writes the base in the model hub's format, bfloat16, and returns its folder."""
        folder = pathlib.Path(workdir) / BASE
        bases.save_base(folder, self.model_config, trained, self.tokenizer)
        return folder


def parse_mixture(lines: Sequence[str]) -> list[Stage]:
    """Parses stages such as "500 quiz=2 repeat=1", which holds until step 500 (0: to the end).

    UserError names the line.
    """
    stages = []
    for line in lines:
        try:
            until, *kinds = line.split()
            shares = {kind: float(share) for kind, share in (item.split("=") for item in kinds)}
            stage = (int(until), shares)
            if not shares or not all(
                kind in synthetic.DOCUMENTS and share > 0 for kind, share in shares.items()
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
