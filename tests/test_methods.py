"""What must hold for every method, layout and encoder mask: k prefixes of one table, joined
memories, independence, memory as the only way.
"""

import functools

import jax
import numpy as np
import pytest
from conftest import FRAMING, TINY, close, random_trained_of

from icae_jax.compression import encoder
from icae_jax.compression import memory as memories
from icae_jax.compression.config import MASKS, CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.method import METHODS
from icae_jax.compression.segments import Contexts, segment_contexts
from icae_jax.models import llama
from icae_jax.models.llama import FrozenModel
from icae_jax.objectives import loss, targets
from icae_jax.objectives.packing import pack

# Every layout with one method, each method and mask with several: a layout is positions and
# padding, a method what is taken of the encoder's pass, a mask what its tokens see. `ALL`: all.
EVERY = [
    ("icae", "servable", "causal"),
    ("icae", "sequential", "slots"),
    ("icae", "padded", "causal"),
    ("x500", "reference", "causal"),
    ("x500", "uniform", "all"),
    ("pooled", "servable", "all"),
    ("sac", "uniform", "slots"),
]
ALL = [
    (method.name, layout, mask)
    for method in METHODS.values()
    for layout in method.layouts
    for mask in MASKS
]
MODEL = llama.Llama(TINY, lora_scale=0.5)
RNG = np.random.default_rng(0)
TEXTS = [
    RNG.integers(3, 64, n).tolist() for n in (24, 7, 12)
]  # two equal segments, one short, one full


@pytest.fixture(params=EVERY, ids=lambda p: "-".join(p))
def config(request):
    """k 4 (or 2), 12 tokens a segment."""
    return configured(*request.param)


def configured(method, layout, mask, **fields):
    sizes = {"k": 4, "rate": 3, "k_choices": (2, 4)} | fields
    return CompressionConfig(method=method, layout=layout, encoder_mask=mask, **sizes)


@functools.partial(jax.jit, static_argnames=("config", "k"))
def _compress(params, trained, ids, lengths, config, k):
    return encoder.compress(
        FrozenModel(MODEL, params),
        trained,
        Contexts(ids, lengths, config.k if k is None else k),
        config,
    )


def compress(params, texts, config, k=None, trained=None, shape=None, pad_id=2):
    arrays = segment_contexts(texts, config, shape, pad_id)
    trained = random_trained_of(config) if trained is None else trained
    return jax.device_get(_compress(params, trained, *arrays, config=config, k=k))


def first_segment(memory):
    """Memories of texts of one segment, without the room for others."""
    k, axis = memory.tokens_per_segment, memory.TEXT_AXIS + 1
    assert not memory.mask[:, k:].any()
    cut = {name: np.take(x, range(k), axis) for name, x in memory.contents.items()}
    return memory.replace(
        **cut,
        mask=memory.mask[:, :k],
        positions=memory.positions[:, :k],
        segment_lengths=memory.segment_lengths[:, :1],
    )


def tokens_of(memory):
    """`{field: [B, M, …]}` of what was written, texts and tokens in front."""
    return {
        name: np.moveaxis(np.asarray(x), (memory.TEXT_AXIS, memory.TEXT_AXIS + 1), (0, 1))
        for name, x in memory.contents.items()
    }


def assert_same(got, want):
    """The same tokens at the same positions, contents to float32 accuracy; what is masked does not
    matter.
    """
    assert type(got) is type(want)
    for name in ("mask", "end", "segment_lengths"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    mask = np.asarray(want.mask)
    np.testing.assert_array_equal(np.asarray(got.positions)[mask], np.asarray(want.positions)[mask])
    for name, value in tokens_of(want).items():
        close(tokens_of(got)[name][mask], value[mask])


def test_every_layout_is_tried():
    """Breaks when a layout is added that nothing here runs, or one of them goes to a method that
    does not know it.
    """
    tried = {METHODS[method].layouts[layout] for method, layout, _ in EVERY}
    assert tried == {layout for m in METHODS.values() for layout in m.layouts.values()}


def test_the_configuration_decides_the_kind(tiny_params, config):
    memory = compress(tiny_params, TEXTS, config)
    assert type(memory) is METHODS[config.method].memory
    assert (
        memory.tokens.tolist() == [8, 4, 4]
        and memory.tokens_per_segment == 4
        and memory.lengths.tolist() == [24, 7, 12]
    )


def test_a_chosen_k_equals_a_model_of_that_k(tiny_params, config):
    """Breaks when a smaller k uses other rows, cuts the text into other segments, or keeps
    positions or masks of the larger one.
    """
    layout = config.method, config.layout, config.encoder_mask
    small = configured(*layout, k=2, rate=6, k_choices=())
    trained = random_trained_of(config)
    table = np.asarray(trained["memory_table"])
    if not config.any_k:
        table = table[[0, 1, 4, 5, 6]]  # two memory tokens, and the special rows
    alone = compress(tiny_params, TEXTS, small, trained=trained | {"memory_table": table})
    chosen, largest = compress(tiny_params, TEXTS, config, 2), compress(tiny_params, TEXTS, config)
    assert_same(chosen, alone)
    assert chosen.tokens.tolist() == [4, 2, 2] and largest.tokens.tolist() == [8, 4, 4]
    # A token spread over the text sits elsewhere when there are fewer; behind the text it does not.
    moved = config.layout in ("servable", "clean", "uniform")
    moved |= config.encoder_mask != "causal"  # or sees more of them
    for name, value in tokens_of(chosen).items():
        assert np.allclose(value[2, :2], tokens_of(largest)[name][2, :2], atol=1e-5) != moved


def test_an_unknown_k_is_refused(tiny_params, config):
    k, message = 3, "k is 3; this compressor was trained with 2, 4 memory tokens"
    if config.any_k:
        k, message = 13, "k is 13; give memory tokens per segment from 1 to the 12 tokens"
    with pytest.raises(ValueError, match=message):
        compress(tiny_params, TEXTS, config, k)


def test_joined_memories_equal_segments_compressed_at_once(tiny_params, config):
    """Breaks when a joined memory's positions, order or masks differ from those of one text of two
    segments.
    """
    every = compress(tiny_params, TEXTS, config)
    parts = compress(
        tiny_params, [TEXTS[0][:12], TEXTS[0][12:], TEXTS[2]], config, shape=(2, 12)
    )  # the same program
    halves = [first_segment(parts[b]) for b in (0, 1)]
    assert_same(memories.join(halves, config), every[0])
    with pytest.raises(
        ValueError, match=r"memories of 4, 2 memory tokens per segment cannot be joined"
    ):
        memories.join([halves[0], compress(tiny_params, TEXTS, config, 2)[0]], config)
    assert len(memories.join([every[:0], every[:0]], config)) == 0
    with pytest.raises(ValueError, match=r"memories of 1, 3 texts cannot be joined"):
        memories.join([halves[0], every], config)


def test_a_missing_segment_in_the_middle_goes_to_the_end(tiny_params, config):
    """Breaks when a joined memory of a short and a long text leaves a gap where the short one has
    no second segment: positions would be lost, and a saved memory refused when it is loaded.
    """
    memory = compress(tiny_params, TEXTS, config)[:2]
    joined = memories.join([memory, memory], config)
    whole = memories.join([first_segment(memory[1])] * 2, config)
    assert np.asarray(joined.mask[1]).tolist() == [True] * 8 + [False] * 8
    np.testing.assert_array_equal(joined.positions[1][:8], whole.positions[0])
    assert joined.end[1] == whole.end[0]
    for name, tokens in tokens_of(joined).items():
        np.testing.assert_array_equal(tokens[1][:8], tokens_of(whole)[name][0])
        np.testing.assert_array_equal(tokens[0], np.concatenate([tokens_of(memory)[name][0]] * 2))


def test_neighbours_and_padding_do_not_change_a_memory(tiny_params, config):
    """Breaks when a text's memory depends on the batch that it was compressed in: its rows,
    segments or (but for fixed layouts) tokens.
    """
    assert_same(
        first_segment(compress(tiny_params, TEXTS, config)[1]),
        compress(tiny_params, [TEXTS[1]], config),
    )


@functools.partial(jax.jit, static_argnames="config")
def _loss(params, trained, ids, lengths, packed, scale, config):
    """AE loss; scale: 0 cuts the gradient through what was written, and None of it may pass another
    way.
    """

    def of(embeddings, trained):
        # The encoder reads a copy of the embeddings, so that a gradient there is one of the
        # context.
        memory = encoder.compress(
            FrozenModel(MODEL, params | {"embed": embeddings}),
            trained,
            Contexts(ids, lengths, config.k),
            config,
        )
        contents = {
            name: scale * x + (1 - scale) * jax.lax.stop_gradient(x)
            for name, x in memory.contents.items()
        }
        losses = loss.label_losses(
            Decoder.of(FrozenModel(MODEL, params), trained),
            memory.replace(**contents),
            {"ae": packed},
            {"ae": ()},
            config.position_layout,
            8,
        )
        total, count = loss.objective_sums(losses, {"ae": packed})["ae"]
        return total / count

    return jax.value_and_grad(of, argnums=(0, 1))(params["embed"], trained)


@pytest.mark.parametrize(
    ("method", "layout", "mask"), ALL, ids=["-".join(combination) for combination in ALL]
)
def test_a_memory_is_of_its_own_text_alone(tiny_params, method, layout, mask):
    """Breaks when, for one method, mask and layout, a memory depends on its neighbours, on padding
    (unless the layout reads it), on other segments, or not on each of its own tokens.
    """
    config = configured(method, layout, mask)
    trained = random_trained_of(config)

    def written(texts, pad_id=2):
        return compress(tiny_params, texts, config, None, trained, (2, 12), pad_id)

    memory = written(TEXTS)
    pad_id = 2 if config.position_layout.fixed_length else 5
    others = written([TEXTS[2], TEXTS[1], TEXTS[0][:9]], pad_id)
    assert_same(others[1], memory[1])
    assert_same(others[0], memory[2])
    # The second segment of the first text is that of a text that differs in the first one.
    changed = written([[5] * 12 + TEXTS[0][12:], TEXTS[1][:-1] + [60], [61] + TEXTS[2][1:]], pad_id)
    k = config.k
    for name, value in tokens_of(memory).items():
        other = tokens_of(changed)[name]
        close(other[0, k:], value[0, k:])
        for text in range(3):
            assert np.abs(other[text, :k] - value[text, :k]).max() > 1e-4


@pytest.mark.parametrize(
    "config",
    [
        ("icae", "padded", "slots"),
        ("x500", "uniform", "causal"),
        ("pooled", "servable", "all"),
        ("sac", "uniform", "all"),
    ],
    indirect=True,
    ids="-".join,
)
def test_the_decoder_learns_of_the_context_through_what_was_written_alone(tiny_params, config):
    """Breaks when context, LoRA or memory rows reach the loss past the memory's contents."""
    ids, lengths = segment_contexts(TEXTS, config, pad_id=2)
    packed = pack([[targets.ae_target(t, FRAMING)] for t in TEXTS], 1, 25, 25)
    tree = random_trained_of(config)
    values, gradients = zip(
        *(
            _loss(tiny_params, tree, ids, lengths, packed, scale, config=config)
            for scale in (1.0, 0.0)
        ),
        strict=True,
    )
    assert float(values[0]) == pytest.approx(float(values[1]), abs=1e-5)
    for gradient, cut in zip(jax.device_get(gradients), (False, True), strict=True):
        context, trained = gradient
        table = np.abs(np.asarray(trained["memory_table"])).max(1)
        memory = {name: x for name, x in trained.items() if name != "memory_table"}
        written = [float(np.abs(x).max()) for x in jax.tree.leaves(memory)]
        n = config.vectors
        # [AE] is used in the decoder; [LM] and [FT] are not.
        assert table[n] > 1e-5 and not table[n + 1 :].any()
        if cut:
            assert not np.any(context) and not any(written) and not table[:n].any()
        else:
            assert float(np.abs(context).max()) > 1e-5 and (table[:n] > 1e-6).all()
            assert max(written) > 1e-5
            if "projection" in trained:
                assert float(np.abs(trained["projection"]).max()) > 1e-5
