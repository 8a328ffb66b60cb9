"""What must hold for every method and layout: k prefixes of one table, joined memories, independence, memory as the only way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FRAMING, TINY, close, random_trained

from icae_jax.compression import encoder, methods
from icae_jax.compression import memory as memories
from icae_jax.models import llama
from icae_jax.objectives import loss, targets

EVERY = [(method, layout) for method, layouts in encoder.METHOD_LAYOUTS.items() for layout in layouts]
MODEL = llama.Llama(TINY, lora_scale=0.5)
TRAINED = random_trained(TINY, 4)
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(3, 64, n).tolist() for n in (24, 7, 12)]  # two equal segments, one short, one full


@pytest.fixture(params=EVERY, ids=lambda p: "-".join(p))
def config(request):
    """k 4 (or 2), 12 tokens a segment."""
    method, layout = request.param
    return encoder.CompressionConfig(method=method, layout=layout, k=4, rate=3, k_choices=(2, 4))


@functools.partial(jax.jit, static_argnames=("config", "k"))
def _compress(params, trained, ids, lengths, config, k):
    return methods.compress(MODEL, params, trained, ids, lengths, config, k)


def compress(params, texts, config, k=None, trained=TRAINED):
    ids, lengths = encoder.segment_contexts(texts, config, pad_id=2)
    return _compress(params, trained, jnp.asarray(ids), jnp.asarray(lengths), config=config, k=k)


def tokens_of(memory):
    """`{field: [B, M, …]}` of what was written, texts and tokens in front."""
    return {name: np.moveaxis(np.asarray(x), (memory.TEXT_AXIS, memory.TEXT_AXIS + 1), (0, 1)) for name, x in memory.contents.items()}


def assert_same(got, want):
    """The same tokens at the same positions, contents to float32 accuracy; what is masked does not matter."""
    assert type(got) is type(want)
    for name in ("mask", "end", "segment_lengths"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    mask = np.asarray(want.mask)
    np.testing.assert_array_equal(np.asarray(got.positions)[mask], np.asarray(want.positions)[mask])
    for name, value in tokens_of(want).items():
        close(tokens_of(got)[name][mask], value[mask])


def test_the_configuration_decides_the_kind(tiny_params, config):
    memory = compress(tiny_params, TEXTS, config)
    assert type(memory) is methods.KINDS[config.method]
    assert memory.tokens.tolist() == [8, 4, 4] and memory.tokens_per_segment == 4 and memory.lengths.tolist() == [24, 7, 12]


def test_a_chosen_k_equals_a_model_of_that_k(tiny_params, config):
    """Breaks when a smaller k uses other rows, cuts the text into other segments, or keeps positions or masks of the larger one."""
    small = encoder.CompressionConfig(method=config.method, layout=config.layout, k=2, rate=6)
    rows = jnp.asarray([0, 1, 4, 5, 6])  # two memory tokens, and the special rows
    alone = compress(tiny_params, TEXTS, small, trained=TRAINED | {"memory_table": TRAINED["memory_table"][rows]})
    chosen, largest = compress(tiny_params, TEXTS, config, 2), compress(tiny_params, TEXTS, config)
    assert_same(chosen, alone)
    assert chosen.tokens.tolist() == [4, 2, 2] and largest.tokens.tolist() == [8, 4, 4]
    # A token spread over the text sits elsewhere when there are fewer; behind the text it does not.
    moved = config.layout in ("servable", "clean", "uniform")
    for name, value in tokens_of(chosen).items():
        assert np.allclose(value[2, :2], tokens_of(largest)[name][2, :2], atol=1e-5) != moved


def test_an_unknown_k_is_refused(tiny_params, config):
    with pytest.raises(ValueError, match="k is 3; this compressor was trained with 2, 4 memory tokens"):
        compress(tiny_params, TEXTS, config, 3)


def test_joined_memories_equal_segments_compressed_at_once(tiny_params, config):
    """Breaks when a joined memory's positions, order or masks differ from those of one text of two segments."""
    whole = compress(tiny_params, TEXTS[:1], config)
    halves = [compress(tiny_params, [TEXTS[0][part]], config) for part in (slice(0, 12), slice(12, 24))]
    assert_same(memories.join(halves, config), whole)
    with pytest.raises(ValueError, match=r"memories of 4, 2 memory tokens a segment cannot be joined"):
        memories.join([halves[0], compress(tiny_params, [TEXTS[2]], config, 2)], config)
    with pytest.raises(ValueError, match=r"memories of 1, 3 texts cannot be joined"):
        memories.join([halves[0], compress(tiny_params, TEXTS, config)], config)


def test_a_missing_segment_in_the_middle_takes_no_positions(tiny_params, config):
    """Breaks when a joined memory of a short and a long text leaves a gap where the short one has no second segment."""
    memory = compress(tiny_params, TEXTS[:2], config)
    joined = memories.join([memory, memory], config)
    whole = memories.join([compress(tiny_params, [TEXTS[1]], config)] * 2, config)
    mask = np.asarray(joined.mask[1])
    assert mask.tolist() == [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4
    np.testing.assert_array_equal(np.asarray(joined.positions[1])[mask], whole.positions[0])
    assert joined.end[1] == whole.end[0]


def test_neighbours_and_padding_do_not_change_a_memory(tiny_params, config):
    """Breaks when a text's memory depends on the batch that it was compressed in."""
    together = compress(tiny_params, TEXTS, config)
    for b in (1, 2):
        alone = compress(tiny_params, [TEXTS[b]], config)
        row = together[b]
        cut = {name: np.take(np.asarray(x), range(4), axis=row.TEXT_AXIS + 1) for name, x in row.contents.items()}
        first = row.replace(**cut, mask=row.mask[:, :4], positions=row.positions[:, :4], segment_lengths=row.segment_lengths[:, :1])
        assert_same(first, alone)


@functools.partial(jax.jit, static_argnames="config")
def _loss(params, trained, ids, lengths, packed, scale, config):
    """AE loss; scale: 0 cuts the gradient through what was written, and None of it may pass another way."""

    def of(embeddings, trained):
        # The encoder reads a copy of the embeddings, so that a gradient there is one of the context.
        memory = methods.compress(MODEL, params | {"embed": embeddings}, trained, ids, lengths, config)
        contents = {name: scale * x + (1 - scale) * jax.lax.stop_gradient(x) for name, x in memory.contents.items()}
        losses = loss.label_losses(MODEL, params, trained, memory.replace(**contents), {"ae": packed}, {"ae": ()}, config.layout, 8)
        total, count = loss.objective_sums(losses, {"ae": packed})["ae"]
        return total / count

    return jax.value_and_grad(of, argnums=(0, 1))(params["embed"], trained)


def test_the_decoder_learns_of_the_context_through_what_was_written_alone(tiny_params, config):
    """Breaks when context, LoRA or memory rows reach the loss past the memory's contents."""
    ids, lengths = map(jnp.asarray, encoder.segment_contexts(TEXTS, config, pad_id=2))
    packed = jax.tree.map(jnp.asarray, targets.pack([[targets.ae_target(t, FRAMING)] for t in TEXTS], 1, 25, 25))
    values, gradients = zip(*(_loss(tiny_params, TRAINED, ids, lengths, packed, scale, config=config) for scale in (1.0, 0.0)), strict=True)
    assert float(values[0]) == pytest.approx(float(values[1]), abs=1e-5)
    for gradient, cut in ((gradients[0], False), (gradients[1], True)):
        context, trained = gradient
        table = np.abs(np.asarray(trained["memory_table"])).max(1)
        lora = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(trained["lora"]))
        assert table[4] > 1e-5 and not table[5:].any()  # [AE] is used in the decoder; [LM] and [FT] are not
        if cut:
            assert not np.any(context) and lora == 0 and not table[:4].any()
        else:
            assert float(jnp.abs(context).max()) > 1e-5 and lora > 1e-5 and (table[:4] > 1e-6).all()
