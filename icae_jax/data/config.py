"""The data of a training run: sources, context lengths and limits."""

import dataclasses
import math

from icae_jax.data.places import split_source
from icae_jax.data.reading import MAX_ROW_BYTES
from icae_jax.data.rows import check_no_answer
from icae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run trains and evaluates on.

    Attributes:
      train, eval: sources (`data.sources`).
      train_weights: share of the training examples that each source of `train` supplies, in any
        unit. Empty: all sources form one set.
      context_lengths: buckets: most tokens of a context, with the tokenizer's `<s>`.
      context_weights: how often pretraining draws each bucket. Empty: equally often.
      questions_per_context: most QA targets of one example; a context with more questions makes
        several examples.
      max_target_tokens: longer QA targets are left out and counted.
      max_row_bytes: most bytes of one line of a file, or of a text file, once unpacked.
      cache_dir: the cache folder, if not the default one.
      tfds_dir: where prepared TFDS sets are, if not in TFDS's default folder.
      no_answer: the answer to train unanswerable questions with. Empty: they are left out and
        counted.
      strict: empty rows are an error instead of being left out.
    """

    train: str = ""
    eval: str = ""
    train_weights: tuple[float, ...] = ()
    context_lengths: tuple[int, ...] = (512,)
    context_weights: tuple[float, ...] = ()
    questions_per_context: int = 4
    max_target_tokens: int = 256
    max_row_bytes: int = MAX_ROW_BYTES
    cache_dir: str = ""
    tfds_dir: str = ""
    no_answer: str = ""
    strict: bool = False

    def __post_init__(self):
        check_no_answer(self.no_answer, "data.no_answer")
        lengths = self.context_lengths
        if not lengths or min(lengths) < 2 or list(lengths) != sorted(set(lengths)):
            raise UserError(
                f"data.context_lengths is {lengths}; give rising lengths of at least 2 tokens, "
                "such as (256, 512)"
            )
        weights = self.context_weights
        if weights and (len(weights) != len(lengths) or min(weights) < 0):
            raise UserError(
                f"data.context_weights {weights} must give one weight >= 0 for each of "
                "data.context_lengths"
            )
        _check_positive_sum("context_weights", weights)
        weights = self.train_weights
        if weights:
            sources = split_source(self.train)
            if len(weights) != len(sources) or not all(0 <= w < math.inf for w in weights):
                raise UserError(
                    f"data.train_weights {weights} must hold a weight >= 0 for each source of "
                    f"data.train, {', '.join(sources)}"
                )
        _check_positive_sum("train_weights", weights)
        for name in ("questions_per_context", "max_target_tokens", "max_row_bytes"):
            if getattr(self, name) <= 0:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be positive")


def _check_positive_sum(name, weights):
    if weights and not sum(weights) > 0:
        raise UserError(f"data.{name} {weights} are all zero; give at least one a positive weight")
