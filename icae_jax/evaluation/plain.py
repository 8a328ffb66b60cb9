"""The controls without a memory: the same base reading plain tokens, such as the full context, a part of it, or none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from icae_jax.compression.memory import Prefix
from icae_jax.errors import UserError
from icae_jax.inference import generate as decoding
from icae_jax.inference.compressor import Score, batches
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.models import llama
from icae_jax.objectives import loss, targets

STEP = 64  # lengths are padded to multiples of this, so that few shapes are compiled
LOSS_CHUNK = 128


def _up(n, step=STEP):
    return -(-n // step) * step


def no_prefix(config, rows, dtype=jnp.float32):
    """A prefix of no positions: the decoder starts at position 0."""
    empty = np.zeros((config.num_layers, rows, 0, config.num_kv_heads, config.head_dim), dtype)
    return Prefix(
        empty,
        empty,
        np.zeros((rows, 0), bool),
        np.zeros((rows, 0), np.int32),
        np.zeros(rows, np.int32),
    )


def start_ids(compressor):
    """The ids that the tokenizer sets in front of a text: `<s>`, or nothing."""
    bos = tokenizers.bos_id(compressor.base.tokenizer)
    return () if bos is None else (bos,)


def template_of(compressor, name=None):
    """The template in which the base alone is asked: by default the adapter's, less its trained tokens, which only a memory makes sense of.

    name: another of `objectives.targets.TEMPLATES`.
    """
    template = (
        targets.make_template(name, compressor.base.tokenizer)
        if name
        else compressor.adapter.template
    )
    plain = {
        part: tuple(i for i in getattr(template, part) if i >= 0)
        for part in ("head", "before", "after")
    }
    return targets.Template(template.name, *plain.values(), template.stop)


def prompt(compressor, template, context_ids, question_ids):
    """The ids of a prompt: what the compressor's decoder reads, with the text itself (or part of it, or nothing) in the memory's place.

    They begin with the template's head, else with `<s>` (where the tokenizer sets one).
    """
    return [*(template.head or start_ids(compressor)), *context_ids, *template.prompt(question_ids)]


def generate(compressor, prompts, limits, batch_size=32, stop=None):
    """Greedy `Generation`s of the base alone behind each prompt (lists of ids). limits: most new tokens of each.

    stop: an id that ends a text beside those of the base. UserError where a prompt and its limit leave the base's positions, or a prompt
    is empty.
    """
    base, result = compressor.base, []
    if not all(map(len, prompts)):
        raise UserError(
            "a prompt without a memory has no tokens; the base has nothing to go on from"
        )
    tokenizers.check_ids(prompts, base.config.vocab_size, lambda i: f"prompt {i}", base.tokenizer)
    _check([len(p) + n for p, n in zip(prompts, limits, strict=True)], base.config)
    for at in batches(len(prompts), batch_size):
        part = prompts[at : at + batch_size]
        rows = compressor.rows(batch_size if at else len(part))
        ids = np.zeros((rows, _up(max(map(len, part)))), np.int32)
        lengths, most = np.ones(rows, np.int32), np.ones(rows, np.int32)
        for i, one in enumerate(part):
            ids[i, : len(one)], lengths[i], most[i] = one, len(one), limits[at + i]
        with compressor.on_devices():
            out = decoding.greedy(
                compressor.model, base.params, compressor.trained["memory_table"], no_prefix(base.config, rows, compressor.model.dtype),
                np.zeros(rows, np.int32), *compressor.put((ids, lengths, most)), max_new_tokens=_up(int(most.max()), 32),
                stop_ids=tuple(sorted({*base.stop_ids, *([] if stop is None else [stop])})),
            )  # fmt: skip
        out = jax.device_get(out)
        result += [compressor.generation(out, i) for i in range(len(part))]
    return result


@functools.partial(jax.jit, static_argnames="model")
def _losses(model, params, ids_BT, label_at_BU, labels_BU):
    B = ids_BT.shape[0]
    hidden = loss.label_hidden(
        model, params, {"memory_table": jnp.zeros((1, params["embed"].shape[1]))}, no_prefix(model.config, B, model.dtype),
        jnp.zeros(B, jnp.int32), ids_BT[:, None], label_at_BU[:, None],
    )  # fmt: skip
    return loss.frozen_head_losses(hidden, llama.head_kernel(params), labels_BU, LOSS_CHUNK)


def score(compressor, rows, batch_size=32):
    """Log-probability of the labels of each `objectives.targets.Target` under the base alone: `Score`s.

    UserError where a target leaves the base's positions.
    """
    base = compressor.base
    tokenizers.check_ids(
        [row.ids for row in rows], base.config.vocab_size, lambda i: f"target {i}", base.tokenizer
    )
    _check([len(row.ids) - 1 for row in rows], base.config)
    scores = []
    for at in batches(len(rows), batch_size):
        part = rows[at : at + batch_size]
        size = compressor.rows(batch_size if at else len(part))
        T, U = (
            _up(max(n))
            for n in ([len(r.ids) - 1 for r in part], [len(r.ids) - r.label_start for r in part])
        )
        batch = targets.pack([[row] for row in part] + [[]] * (size - len(part)), 1, T, U)
        batch = {name: x[:, 0] for name, x in batch.items()}
        placed = compressor.put((batch["ids"], batch["label_at"], batch["labels"]))
        with compressor.on_devices():
            losses = np.asarray(_losses(compressor.model, compressor.base.params, *placed))
        sums, counts = np.where(batch["label_mask"], losses, 0).sum(1), batch["label_mask"].sum(1)
        scores += [Score(-float(sums[i]), int(counts[i])) for i in range(len(part))]
    return scores


def answer(compressor, questions, contexts=None, max_new_tokens=32, batch_size=32):
    """Greedy answers of the base alone. questions: `[[question, …], …]`; contexts: one text for each list, or None for no context.

    Returns answers nested as the questions are.
    """
    template = template_of(compressor)
    prompts = []
    for i, row in enumerate(questions):
        context = compressor.ids(contexts[i]) if contexts else []
        prompts += [prompt(compressor, template, context, compressor.ids(q)) for q in row]
    made = iter(
        generate(compressor, prompts, [max_new_tokens] * len(prompts), batch_size, template.stop)
    )
    return [[next(made).text for _ in row] for row in questions]


def _check(needed, config):
    over = [n for n in needed if n > config.max_position_embeddings]
    if over:
        raise UserError(
            f"{over[0]} tokens without a memory exceed the base's {config.max_position_embeddings} positions"
        )
