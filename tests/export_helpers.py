"""What the tests of exports share: texts, questions, and a compressor with their memory."""

import numpy as np
from conftest import TINY, WORDS, random_trained, random_trained_of

from icae_jax.compression.config import CompressionConfig
from icae_jax.inference.compressor import Compressor
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.export.reader import NamedMemory, Reader
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets

RNG = np.random.default_rng(7)
# Of 2, 1, 2, 3 and 1 segments.
TEXTS = [" ".join(RNG.choice(WORDS[8:], size=n)) for n in (30, 5, 17, 40, 9)]
QUESTIONS = [
    "who saw the cat ?",
    "where ?",
    "what did the old king eat in the house ?",
    "when did it run",
    "why ?",
]
IDS = ["a", "b", "c", "d", "e"]
NEW = 10  # tokens decoded
MEMORIES = {}  # by (base, method, layout): a memory does not depend on the template


def make(base, method="icae", layout="", template="plain", decoder_lora=False):
    """(`Compressor` with a random adapter, its memory of TEXTS)."""
    compression = CompressionConfig(
        method=method, k=4, rate=4, layout=layout, decoder_lora=decoder_lora
    )
    trained = random_trained_of(compression) | random_trained(TINY, compression.vectors)
    adapter = adapters.Adapter(
        compression,
        LoraConfig(4, 2.0, 0.0),
        targets.make_template(template, base.tokenizer),
        trained,
        str(base.path),
        base.fingerprint,
    )
    compressor = Compressor(base, adapter, "adapter")
    key = base.path, method, layout
    if key not in MEMORIES:
        MEMORIES[key] = compressor.compress(TEXTS)
    return compressor, MEMORIES[key]


def reader_of(compressor):
    return Reader(compressor.base, compressor.adapter, compressor.decoder)


def named(memory, ids=IDS):
    return NamedMemory(memory, ids)


def ours(compressor, memory, objective, questions=QUESTIONS):
    """The ids that we decode of each text, shown to be telling: no ties, texts that differ, and no
    single word repeated.
    """
    if objective == "ask":
        generations = compressor.ask(memory, questions, NEW, details=True)
    else:
        generations = compressor.restore(memory, NEW, details=True)
    assert not any(g.ties for g in generations)
    ids = [g.ids for g in generations]
    assert len({tuple(row) for row in ids}) >= len(ids) - 1
    assert len({token for row in ids for token in row}) >= 6
    return ids
