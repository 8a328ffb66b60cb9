"""What `real_base.py` measures, each request in a process of its own."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from streamed_load import Memory

from icae_jax.data import sources
from icae_jax.errors import UserError
from icae_jax.evaluation import plain
from icae_jax.inference import loading
from icae_jax.inference.requests import Request
from icae_jax.inference.sampling import Sampling
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.text import user_ids
from icae_jax.models.llama import FrozenModel, Llama
from icae_jax.objectives.targets import Target, ae_target
from icae_jax.performance import worker
from icae_jax.training import trained

NEW_TOKENS, ANSWERS = 32, 5
QUESTION = "What is this text about?"
BATCH = 10


def load(base: str, form: str) -> dict[str, Any]:
    """Seconds and anonymous memory of loading a base, and the bytes of its parameters."""
    jax.block_until_ready(jax.device_put(np.zeros(8)))  # the runtime's own memory is there before
    memory, began = Memory(lambda: 0), time.perf_counter()
    try:
        params = jax.block_until_ready(loading.load_base(base, form).params)
        seconds = time.perf_counter() - began
    finally:
        memory.stop()
    return {
        "seconds": seconds,
        "peak_bytes": memory.peak - memory.before,
        "params_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
    }


def quality(
    base: str,
    form: str,
    texts: str,
    count: int,
    tokens: int,
    adapter: str,
    windows: int,
    window: int,
) -> dict[str, Any]:
    """[nats, labels] of each text under the base alone, and of each window behind memories.

    Args:
        base: the base.
        form: its format.
        texts: a data source.
        count: texts read by the base alone, the first ones.
        tokens: of each of these at most.
        adapter: a compressor, which writes and reads with this base; "" for none.
        windows: windows restored, the first tokens of as many texts that are long enough.
        window: tokens of a window.
    """
    loaded = loading.load_base(base, form)
    activations, _ = bases.precision(form)
    rows = [user_ids(loaded.tokenizer, row.text) for row in sources.read_texts(texts, "--texts")]
    bos = tokenizers.bos_id(loaded.tokenizer)
    start = [] if bos is None else [bos]
    labelled = [Target(start + ids[:tokens], max(1, len(start))) for ids in rows[:count]]
    model = FrozenModel(Llama(loaded.config, dtype=jnp.dtype(activations)), loaded.params)
    scores = plain.score_by_base(loaded, model, labelled, batch_size=BATCH)
    result = {"base": _sums(scores)}
    if not adapter:
        return result
    compressor = _compressor(adapter, loaded, activations)
    long_enough = [compressor.framed(ids[:window]) for ids in rows if len(ids) >= window]
    if len(long_enough) < max(windows, 2):
        raise UserError(
            f"--windows is {windows}, but {len(long_enough)} texts of {texts} have {window} "
            "tokens; give fewer, at least 2, or a smaller --window"
        )
    contexts = long_enough[:windows]
    memory = compressor.compress_ids(contexts, BATCH)
    restored = [[ae_target(context, compressor.framing)] for context in contexts]
    for name, shift in (("own", 0), ("other", 1)):
        behind = memory[np.roll(np.arange(windows), shift)]
        scored = compressor.score_targets(behind, restored, "ae", BATCH)
        result[name] = _sums(row[0] for row in scored)
    return result


def ask(base: str, form: str, texts: str, adapter: str, window: int) -> dict[str, Any]:
    """Seconds of answering with 32 tokens, whatever they say, from a memory that is at hand.

    The median of some answers, after one that compiles. The memory is in the host's memory, as a
    memory file's is.
    """
    activations, _ = bases.precision(form)
    compressor = _compressor(adapter, loading.load_base(base, form), activations)
    ids = compressor.ids(sources.read_texts(texts, "--texts")[0].text)[:window]
    memory = compressor.compress_ids([compressor.framed(ids)])
    prompt = compressor.adapter.template.prompt(compressor.question_ids(QUESTION))
    engine = compressor.reader.engine(
        "qa", rows=1, tokens=len(prompt) + NEW_TOKENS, memory_tokens=memory.mask.shape[1]
    )
    start = int(compressor.config.position_layout.target_starts("qa", memory.end)[0])
    start += len(compressor.reader.head("qa"))
    sampling = Sampling(max_new_tokens=NEW_TOKENS)

    def answer():
        prefix = compressor.reader.read(memory, "qa")
        request = Request(prompt, sampling, start, prefix)
        return next(engine.run([request]))

    assert len(answer().ids) == NEW_TOKENS
    seconds = []
    for _ in range(ANSWERS):
        began = time.perf_counter()
        answer()
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds)}


def _compressor(adapter, base, activations):
    return loading.load_onto(base, trained.find_whole(adapter), activations)


def _sums(scores):
    return [[-score.log_prob, score.tokens] for score in scores]


if __name__ == "__main__":
    worker.answer_request({"load": load, "quality": quality, "ask": ask})
