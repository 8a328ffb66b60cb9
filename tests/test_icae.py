"""Writing texts into memory and reading it: segments, masks, independence, and that memory is the
only way through.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FRAMING, TINY, close, random_trained

from icae_jax.compression import encoder
from icae_jax.compression import memory as memories
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.segments import Contexts, segment_contexts, segment_shape
from icae_jax.models import llama
from icae_jax.models.llama import FrozenModel
from icae_jax.objectives import loss, targets
from icae_jax.objectives.packing import pack

CONFIG = CompressionConfig(k=3, rate=4, layout="servable")
MODEL = llama.Llama(TINY, lora_scale=0.5)
TRAINED = random_trained(TINY, CONFIG.k)
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(3, 64, n).tolist() for n in (5, 12, 13, 25, 17)]


@jax.jit
def compress(params, trained, ids, lengths):
    return encoder.compress(
        FrozenModel(MODEL, params), trained, Contexts(ids, lengths, CONFIG.k), CONFIG
    )


def segments(texts, shape=None):
    return segment_contexts(texts, CONFIG, shape)


# ------------------------------------------------------------------------------------- independence


@pytest.fixture(scope="module")
def batch(tiny_params):
    ids, lengths = segments(TEXTS)
    return ids, lengths, jax.device_get(compress(tiny_params, TRAINED, ids, lengths))


def test_batch_neighbours_and_padding_do_not_change_slots(tiny_params, batch):
    """Breaks when padding is attended to, or positions count padded tokens: each text alone,
    unpadded, gives the same slots.
    """
    memory = batch[2]
    assert memory.slots.shape == (5, 9, 32)
    for b in (0, 2, 4):
        alone = jax.device_get(compress(tiny_params, TRAINED, *segments([TEXTS[b]])))
        M = alone.slots.shape[1]
        assert bool(alone.mask.all()) and alone.mask.shape == (
            1,
            3 * segment_shape(len(TEXTS[b]), CONFIG)[0],
        )
        assert np.asarray(memory.mask[b]).tolist() == [True] * M + [False] * (9 - M)
        close(memory.slots[b, :M], alone.slots[0])
        assert (
            memory.positions[b, :M].tolist() == alone.positions[0].tolist()
            and memory.end[b] == alone.end[0]
        )


def test_content_of_padding_never_matters(tiny_params, batch):
    """Breaks when any real slot depends on ids behind the text's end."""
    ids, lengths, memory = batch
    real = np.arange(ids.shape[2]) < lengths[..., None]
    other = compress(tiny_params, TRAINED, np.where(real, ids, 63), lengths)
    assert not bool(real.all())
    mask = np.asarray(memory.mask)
    np.testing.assert_array_equal(np.asarray(other.slots)[mask], np.asarray(memory.slots)[mask])


def test_segments_do_not_see_each_other(tiny_params, batch):
    """Breaks when segments share attention: a changed middle segment may change its own slots
    only.
    """
    ids, lengths, memory = batch
    ids = ids.copy()
    ids[3, 1, 0] = 63
    other = compress(tiny_params, TRAINED, ids, lengths)
    changed = np.abs(np.asarray(other.slots) - memory.slots).max(-1)
    assert (changed[3, 3:6] > 1e-4).all()
    changed[3, 3:6] = 0
    assert not changed.any()


def test_memory_tokens_see_those_before_them(tiny_params, batch):
    """Breaks when memory tokens stand in another order, or see later ones: row 1 of the table
    reaches slots 1 and 2 alone.
    """
    ids, lengths, memory = batch
    table = TRAINED["memory_table"].at[1].multiply(2.0)
    other = compress(tiny_params, TRAINED | {"memory_table": table}, ids, lengths)
    changed = np.abs(np.asarray(other.slots) - memory.slots).max(-1).reshape(5, 3, 3)
    assert not changed[:, :, 0].any() and (changed[:, :, 1:] > 1e-4).all()


# --------------------------------------------------------------------------- memory is the only way


@jax.jit
@functools.partial(jax.value_and_grad, argnums=1)
def decoder_loss(params, trained, ids, lengths, packed, cut, visible):
    """AE loss; cut: no gradient through the slots. visible: false hides the memory from the
    decoder.
    """
    memory = encoder.compress(
        FrozenModel(MODEL, params), trained, Contexts(ids, lengths, CONFIG.k), CONFIG
    )
    slots = memory.slots * (1 - cut) + jax.lax.stop_gradient(memory.slots) * cut
    memory = memory.replace(slots=slots, mask=memory.mask & visible)
    losses = loss.label_losses(
        Decoder.of(FrozenModel(MODEL, params), trained),
        memory,
        {"ae": packed},
        {"ae": ()},
        CONFIG.position_layout,
        8,
    )
    total, count = loss.objective_sums(losses, {"ae": packed})["ae"]
    return total / count


def test_decoder_learns_of_the_context_through_memory_alone(tiny_params):
    """Breaks when LoRA is on in the decoder, the decoder sees context tokens, or masked memory is
    still attended to.
    """
    packed = pack([[targets.ae_target(TEXTS[2], FRAMING)]], 1, 14, 14)
    context = segments([TEXTS[2]])
    one, other = context, (np.flip(context[0], 2), context[1])

    def run(context, cut, visible):
        value, gradient = decoder_loss(tiny_params, TRAINED, *context, packed, cut, visible)
        lora = max(
            float(np.abs(x).max()) for x in jax.tree.leaves(jax.device_get(gradient["lora"]))
        )
        return float(value), lora, np.abs(np.asarray(gradient["memory_table"])).max(1)

    value, lora, table = run(one, 0.0, True)
    assert (
        lora > 1e-4 and (table[:4] > 1e-4).all() and not table[4:].any()
    )  # k memory tokens and [AE]; no [LM], no [FT]
    cut_value, cut_lora, cut_table = run(one, 1.0, True)
    assert (
        cut_value == pytest.approx(value, abs=1e-6)
        and cut_lora == 0
        and not cut_table[:3].any()
        and cut_table[3] > 1e-4
    )
    assert abs(run(other, 0.0, True)[0] - value) > 1e-3
    assert run(other, 0.0, False)[0] == run(one, 0.0, False)[0] != value
    assert run(one, 0.0, False)[1] == 0


def test_head_runs_in_front_of_the_memory(tiny_params):
    """Breaks when the head's embeddings or positions are off (head and slots equal one longer
    memory), or the mask is ignored.
    """
    head, lengths = (1, 3), jnp.asarray([[5], [9]])
    slots = jnp.asarray(RNG.standard_normal((2, 3, 32)), jnp.float32)
    memory = memories.place(memories.Slots, {"slots": slots}, lengths, CONFIG)
    memory = memory.replace(
        mask=memory.mask.at[1, 1].set(False), positions=memory.positions + 1
    )  # holes and gaps, to see them
    in_front = jnp.broadcast_to(tiny_params["embed"][jnp.asarray(head)], (2, 2, 32))
    joined = memory.replace(
        slots=jnp.concatenate([in_front, slots], 1),
        mask=jnp.concatenate([jnp.ones((2, 2), bool), memory.mask], 1),
        positions=jnp.asarray([[0, 1, 3, 4, 5]] * 2),
    )
    read = jax.jit(memories.Memory.read, static_argnames="head")
    decoder = Decoder(FrozenModel(MODEL, tiny_params), None)
    got, want = read(memory, decoder, head=head), read(joined, decoder)
    assert got.mask.tolist() == [
        [True] * 5,
        [True, True, True, False, True],
    ] and got.end.tolist() == [5, 5]
    assert got.k.shape == (2, 2, 5, 2, 8)
    close(got.k, want.k)
    close(got.v, want.v)
    # What is masked does not reach what stands behind it.
    other = read(memory.replace(slots=slots.at[1, 1].add(9.0)), decoder, head=head)
    np.testing.assert_array_equal(
        np.delete(other.v[:, 1], 3, axis=1), np.delete(got.v[:, 1], 3, axis=1)
    )
