"""The controls without a memory: the same base answering with the full context in its prompt, or with none."""

import jax.numpy as jnp
import numpy as np

from icae_jax.compression.memory import Prefix
from icae_jax.inference import generate
from icae_jax.interop import base as bases

BATCH = 32


def no_prefix(config, rows, dtype=jnp.float32):
    """A prefix of no positions: the decoder starts at position 0."""
    empty = jnp.zeros((config.num_layers, rows, 0, config.num_kv_heads, config.head_dim), dtype)
    return Prefix(empty, empty, jnp.zeros((rows, 0), bool), jnp.zeros((rows, 0), jnp.int32), jnp.zeros(rows, jnp.int32))


def answer(compressor, questions, contexts=None, max_new_tokens=32):
    """Greedy answers of the base alone. questions: `[[question, …], …]`; contexts: one text for each list, or None for no context.

    The prompt is `<s>` (where the tokenizer sets one), the template's head, the context, the templated question: what the compressor's
    decoder reads, with the text itself in the memory's place. Returns answers nested as the questions are.
    """
    template, base = compressor.adapter.template, compressor.base
    bos = bases.bos_id(base.tokenizer)
    start = template.head or (() if bos is None else (bos,))
    if min(template.before + template.after, default=0) < 0:
        raise ValueError(f"template {template.name} holds trained tokens, which the base alone cannot read; use plain or chat")
    prompts = []
    for i, row in enumerate(questions):
        context = base.tokenizer(contexts[i], add_special_tokens=False)["input_ids"] if contexts else []
        prompts += [[*start, *context, *template.prompt(base.tokenizer(q, add_special_tokens=False)["input_ids"])] for q in row]
    width = max(len(p) for p in prompts)
    texts = []
    for at in range(0, len(prompts), BATCH):
        part = prompts[at : at + BATCH]
        ids, lengths = np.zeros((BATCH, width), np.int32), np.ones(BATCH, np.int32)
        for i, prompt in enumerate(part):
            ids[i, : len(prompt)], lengths[i] = prompt, len(prompt)
        out = generate.greedy(
            compressor.model, base.params, compressor.trained["memory_table"], no_prefix(base.config, BATCH),
            jnp.zeros(BATCH, jnp.int32), ids, lengths, max_new_tokens=max_new_tokens, stop_ids=(*base.stop_ids, template.stop),
        )  # fmt: skip
        for i in range(len(part)):
            new = np.asarray(out.ids[i, : int(out.lengths[i])]).tolist()
            texts.append(base.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    rest = iter(texts)
    return [[next(rest) for _ in row] for row in questions]
