"""What the training loop asks of a task. `CompressorTask` and `BaseTask` are the two there are."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from icae_jax.runtime import sharding

Rows = Int[np.ndarray, " rows"] | slice
"""The rows of a global batch that a process makes: those its devices hold."""

LossSums = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
"""By objective: the summed loss in nats, and the number (or weight) of labels it is summed over."""

MeanLosses = dict[str, dict[str, float]]
"""By kind of held-out batch and objective: nats per label."""


@runtime_checkable
class Objectives(Protocol):
    """What a step differentiates: `sum(weights[o] * loss_sum[o] / count[o])` over objectives."""

    weights: dict[str, float]

    def counts(self, batch: PyTree) -> dict[str, Float[Array, ""]]:
        """Label counts by objective, known without running the model."""

    def tokens(self, batch: PyTree) -> Float[Array, ""]:
        """Tokens that the batch makes the model process, for throughput."""

    def losses(
        self, trained: PyTree, frozen: PyTree, batch: PyTree, dropout_key: jax.Array | None
    ) -> LossSums:
        """Loss sums and counts of one (micro)batch; without dropout if `dropout_key` is None."""


@runtime_checkable
class Task(Objectives, Protocol):
    """Objectives with their data, initial parameters, device placement and result.

    `identity` holds fingerprints of what paths in the configuration stand for; a workdir is
    continued only under the same ones.
    """

    placement: sharding.Placement
    frozen: PyTree
    identity: dict[str, Any]

    def shared_by_processes(self) -> dict[str, object]:
        """What all processes must agree on beside the configuration, as JSON values by name."""

    def notes(self) -> list[str]:
        """Lines to log before training."""

    def init(self) -> PyTree:
        """The initial trained parameters."""

    def train_batches(self, start: int, stop: int, rows: Rows = ...) -> Iterator[PyTree]:
        """Host batches of steps `start` to `stop - 1`, cut to `rows`."""

    def eval_batches(self, rows: Rows = ...) -> Iterator[dict[str, PyTree]]:
        """Fixed held-out host batches by kind, cut to `rows`; none without held-out data."""

    def describe(self, batch: PyTree) -> dict[str, Any]:
        """Extra fields for the metrics line of a step on this host batch."""

    def held_out_loss(self, losses: MeanLosses) -> float:
        """The single number by which checkpoints are ranked; lower is better."""

    def export(self, workdir: str | os.PathLike, trained: PyTree) -> pathlib.Path:
        """Writes the result of training into the workdir and returns its folder."""
