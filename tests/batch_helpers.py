"""Small sources and their examples, for tests of batches."""

import numpy as np

from icae_jax.compression.config import CompressionConfig
from icae_jax.data.config import DataConfig
from icae_jax.data.examples import Examples
from icae_jax.data.index import ExampleSpec
from icae_jax.data.tokens import Tokens
from icae_jax.objectives.targets import AE, Framing, Template

BOS, EOS = 1, 2
TEMPLATE = Template("plain", (), (3,), (4,), EOS)
COMPRESSION = CompressionConfig(k=5, rate=8)  # 40 tokens a segment
SHARES = ([0, 3], [1, 2])  # rows of a batch of four that two processes make


def flat(pieces):
    return np.concatenate(
        [np.zeros(0, np.int32), *(np.asarray(p, np.int32) for p in pieces)]
    ), np.cumsum([0, *map(len, pieces)])


def make_tokens(lengths, questions=()):
    """Texts of the given lengths (text i holds 1000 i, 1000 i + 1, …); questions: for each text
    (prompt, answer) lengths.
    """
    questions = [*questions, *[[]] * (len(lengths) - len(questions))]
    pairs = [pair for group in questions for pair in group]
    texts = flat([range(1000 * (i + 1), 1000 * (i + 1) + n) for i, n in enumerate(lengths)])
    prompts, answers = (
        flat(
            [
                range(100 * (q + 1) + 50 * j, 100 * (q + 1) + 50 * j + p[j])
                for q, p in enumerate(pairs)
            ]
        )
        for j in (0, 1)
    )
    return Tokens(*texts, *prompts, *answers, np.cumsum([0, *map(len, questions)]), "key")


def pretrain(lengths, objectives=("ae", "lm"), bos=(BOS,), **config):
    framing = Framing(bos, AE, EOS)
    data = DataConfig(**config)
    spec = ExampleSpec(data, COMPRESSION, "pretrain", objectives, TEMPLATE, framing)
    return Examples(make_tokens(lengths), spec)


def finetune(lengths, questions, objectives=("qa",), **config):
    framing = Framing((BOS,), AE, EOS)
    data = DataConfig(**config)
    spec = ExampleSpec(data, COMPRESSION, "finetune", objectives, TEMPLATE, framing)
    return Examples(make_tokens(lengths, questions), spec)


def target(batch, objective, b, g=0):
    """(input ids, labels) of one packed target, None where it is absent."""
    t = batch["targets"][objective]
    count = int(t["label_mask"][b, g].sum())
    inputs = t["label_at"][b, g, count - 1] + 1
    return (t["ids"][b, g, :inputs].tolist(), t["labels"][b, g, :count].tolist()) if count else None


def context(batch, b):
    return [
        t
        for ids, n in zip(batch["context"][b], batch["lengths"][b], strict=True)
        for t in ids[:n].tolist()
    ]


def seq(text, start, stop):
    return list(range(1000 * (text + 1) + start, 1000 * (text + 1) + stop))
