"""Controls without a memory: the same base reads plain tokens, such as the full context or none.

Where the decoder has a LoRA of its own, the base reads with it too (`Compressor.decoder`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.errors import UserError
from icae_jax.inference.batching import batch_starts, few_shapes, round_up
from icae_jax.inference.compressor import Compressor
from icae_jax.inference.devices import Devices
from icae_jax.inference.engine import Engine
from icae_jax.inference.reading import Generation, Score, generation
from icae_jax.inference.requests import Request
from icae_jax.inference.sampling import Sampling
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.prompts import without_memory, without_trained
from icae_jax.models.llama import FrozenModel, ModelConfig
from icae_jax.objectives import loss, targets
from icae_jax.objectives.packing import pack

Ids = Sequence[int]

STEP = 64  # lengths are padded to multiples of this, so that few shapes are compiled
LOSS_CHUNK = 128


def no_prefix(config: ModelConfig, rows: int, dtype: DTypeLike = jnp.float32) -> Prefix:
    """A prefix of no positions: the decoder starts at position 0."""
    empty = np.zeros((config.num_layers, rows, 0, config.num_kv_heads, config.head_dim), dtype)
    return Prefix(
        empty,
        empty,
        np.zeros((rows, 0), bool),
        np.zeros((rows, 0), np.int32),
        np.zeros(rows, np.int32),
    )


def template_of(compressor: Compressor, name: str | None = None) -> targets.Template:
    """The template in which the base alone is asked.

    name: of `objectives.targets.TEMPLATES`; by default the adapter's.
    """
    template = compressor.adapter.template
    if name:
        template = targets.make_template(name, compressor.base.tokenizer)
    return without_trained(template)


def prompt(
    base: bases.Base, template: targets.Template, context_ids: Ids, question_ids: Ids
) -> list[int]:
    """What the decoder reads for a question, with text (or part, or none) in the memory's place."""
    prompt_ids = template.prompt(question_ids)
    return without_memory(template, base.tokenizer, context_ids, prompt_ids)


def generate(
    compressor: Compressor,
    prompts: Sequence[Ids],
    limits: Sequence[int],
    batch_size: int = 32,
    stop: int | None = None,
    decoder: Decoder | None = None,
) -> list[Generation]:
    """Greedy continuations of prompts by the base alone, of at most `limits` new tokens each.

    stop: an id that ends a text beside the base's own. decoder: in place of the base alone.
    Otherwise as `generate_by_base`.
    """
    decoder, base = decoder or compressor.plain_decoder, compressor.base
    return generate_by_base(base, decoder, prompts, limits, compressor.devices, batch_size, stop)


def generate_by_base(
    base: bases.Base,
    decoder: Decoder,
    prompts: Sequence[Ids],
    limits: Sequence[int],
    devices: Devices | None = None,
    batch_size: int = 32,
    stop: int | None = None,
) -> list[Generation]:
    """Greedy continuations of prompts, of at most `limits` new tokens each.

    decoder: the base, perhaps with a LoRA. devices: where it runs; by default the default device.
    UserError where a prompt is empty, or leaves too few of the base's positions.
    """
    devices = devices or Devices(None, base.config)
    if not all(map(len, prompts)):
        raise UserError(
            "a prompt without a memory has no tokens; the base has nothing to go on from"
        )
    tokenizers.check_ids(prompts, base.config.vocab_size, lambda i: f"prompt {i}", base.tokenizer)
    _check([len(p) + n for p, n in zip(prompts, limits, strict=True)], base.config)
    stop_ids = tuple(sorted({*base.stop_ids, *([] if stop is None else [stop])}))
    batch_starts(len(prompts), batch_size)
    if not prompts:
        return []
    engine = Engine(
        decoder,
        devices,
        rows=few_shapes(min(len(prompts), batch_size), batch_size),
        tokens=max(len(p) + n for p, n in zip(prompts, limits, strict=True)),
    )
    requests = (
        Request(list(prompt), Sampling(max_new_tokens=limits[i]), stop_ids=stop_ids, tag=i)
        for i, prompt in enumerate(prompts)
    )
    ended = {running.request.tag: running for running in engine.run(requests)}
    return [generation(base, ended[i]) for i in range(len(prompts))]


@jax.jit
def _losses(base: FrozenModel, lora, ids_BT, label_at_BU, labels_BU):
    B = ids_BT.shape[0]
    decoder = Decoder(base, jnp.zeros((1, base.config.hidden_size)), lora)  # no special rows
    prefix, starts = no_prefix(base.config, B, base.dtype), jnp.zeros(B, jnp.int32)
    hidden = decoder.label_hidden(prefix, starts, ids_BT[:, None], label_at_BU[:, None])
    return loss.frozen_head_losses(hidden, base.head, labels_BU, LOSS_CHUNK)


def score(
    compressor: Compressor,
    rows: Sequence[targets.Target],
    batch_size: int = 32,
    decoder: Decoder | None = None,
) -> list[Score]:
    """`score_by_base` for a compressor's base, on its devices. decoder: as for `generate`."""
    decoder = decoder or compressor.plain_decoder
    base, devices = compressor.base, compressor.devices
    return score_by_base(base, decoder.base, rows, devices, batch_size, decoder.lora)


def score_by_base(
    base: bases.Base,
    model: FrozenModel,
    rows: Sequence[targets.Target],
    devices: Devices | None = None,
    batch_size: int = 32,
    lora: Any = None,
) -> list[Score]:
    """Log-probabilities of targets' labels under the base alone.

    Args:
        base: the base.
        model: that base, computed in a dtype.
        rows: the targets.
        devices: where it runs; by default the default device.
        batch_size: targets scored at once.
        lora: a LoRA tree that the base is taken with; none by default.

    Raises:
        UserError: a target leaves the base's positions, or an id has no embedding.
    """
    devices = devices or Devices(None, base.config)
    tokenizers.check_ids(
        [row.ids for row in rows], base.config.vocab_size, lambda i: f"target {i}", base.tokenizer
    )
    _check([len(row.ids) - 1 for row in rows], base.config)
    scores = []
    for start in batch_starts(len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        size = devices.rows(batch_size if start else len(chunk))
        T = round_up(max(len(row.ids) - 1 for row in chunk), STEP)
        U = round_up(max(len(row.ids) - row.label_start for row in chunk), STEP)
        packed = pack([[row] for row in chunk] + [[]] * (size - len(chunk)), 1, T, U)
        batch = {name: x[:, 0] for name, x in packed.items()}
        placed = devices.put((batch["ids"], batch["label_at"], batch["labels"]))
        with devices.active():
            losses = np.asarray(_losses(model, lora, *placed))
        sums, counts = np.where(batch["label_mask"], losses, 0).sum(1), batch["label_mask"].sum(1)
        scores += [Score(-float(sums[i]), int(counts[i])) for i in range(len(chunk))]
    return scores


def answer(
    compressor: Compressor,
    questions: Sequence[Sequence[str]],
    contexts: Sequence[str] | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
) -> list[list[str]]:
    """Greedy answers of the base alone, nested as the questions are.

    contexts: a text for each row of questions, or None for no context.
    """
    template = template_of(compressor)
    prompts = []
    for i, row in enumerate(questions):
        context = compressor.ids(contexts[i]) if contexts else []
        prompts += [prompt(compressor.base, template, context, compressor.ids(q)) for q in row]
    limits = [max_new_tokens] * len(prompts)
    answers = iter(generate(compressor, prompts, limits, batch_size, template.stop))
    return [[next(answers).text for _ in row] for row in questions]


def _check(needed: Sequence[int], config: ModelConfig) -> None:
    over = [n for n in needed if n > config.max_position_embeddings]
    if over:
        raise UserError(
            f"{over[0]} tokens without a memory exceed the base's "
            f"{config.max_position_embeddings} positions"
        )
