"""What both methods share: segments, the memory table, and what a configuration may say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.segments import segment_contexts, segment_shape
from icae_jax.compression.trained import init_memory_table
from icae_jax.models import llama
from icae_jax.models.llama import FrozenModel
from icae_jax.objectives import targets

CONFIG = CompressionConfig(k=3, rate=4)
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(3, 64, n).tolist() for n in (5, 12, 13, 25, 17)]

# ----------------------------------------------------------------------------------------- segments


@pytest.mark.parametrize(
    ("tokens", "shape"),
    [
        (1, (1, 1)),
        (11, (1, 11)),
        (12, (1, 12)),
        (13, (2, 7)),
        (24, (2, 12)),
        (25, (3, 9)),
        (120, (10, 12)),
    ],
)
def test_segment_shape(tokens, shape):
    """Breaks when segments are cut full, full, rest; when k x rate tokens need two; or when a
    rounding is the other way.
    """
    assert segment_shape(tokens, CONFIG) == shape


def test_segments_hold_the_text_in_order():
    """Breaks when tokens are lost, repeated or reordered, or lengths do not say which are real."""
    ids, lengths = segment_contexts(TEXTS, CONFIG)
    assert ids.shape == (5, 3, 12)
    assert lengths.tolist() == [[5, 0, 0], [12, 0, 0], [7, 6, 0], [9, 9, 7], [9, 8, 0]]
    for b, text in enumerate(TEXTS):
        assert [t for s in range(3) for t in ids[b, s, : lengths[b, s]].tolist()] == text
        assert all(not ids[b, s, lengths[b, s] :].any() for s in range(3))
    blank, none = segment_contexts([[], [5]], CONFIG, (2, 3))
    assert blank.shape == (2, 2, 3) and none.tolist() == [[0, 0], [1, 0]]


def test_a_full_segment_fits_in_the_shape_of_a_longer_text():
    """Breaks when a batch of up to 13 tokens, two segments of 7, gets no room for a text of 12
    tokens, one segment.
    """
    ids, lengths = segment_contexts([TEXTS[2], TEXTS[1]], CONFIG)
    assert ids.shape == (2, 2, 12) and lengths.tolist() == [[7, 6], [12, 0]]


def test_fixed_length_pads_to_the_whole_segment_with_the_given_id():
    """Breaks when the reference layout's texts are padded to the batch, or with another id than
    eos.
    """
    config = CompressionConfig(method="x500", layout="reference", k=3, rate=4)
    ids, lengths = segment_contexts([[5, 6, 7], [8]], config, pad_id=2)
    assert ids.tolist() == [[[5, 6, 7] + [2] * 9], [[8] + [2] * 11]] and lengths.tolist() == [
        [3],
        [1],
    ]
    assert segment_contexts([[5]], config, (2, 3), 2)[0].shape == (1, 2, 12)


# ------------------------------------------------------------------------------------ configuration


def test_defaults_of_a_method():
    """Breaks when a method falls back to the other's layout or trigger."""
    icae, x500 = CompressionConfig(), CompressionConfig(method="x500")
    assert (icae.layout, icae.trigger, icae.segment_tokens) == ("servable", "trained", 512)
    assert (x500.layout, x500.trigger) == ("clean", "bos")
    assert CompressionConfig(method="x500", trigger="trained").trigger == "trained"


@pytest.mark.parametrize(("k", "rate"), [(16, 31.25), (4, 125), (1, 500), (3, 500 / 3)])
def test_segments_may_hold_any_number_of_tokens(k, rate):
    """Breaks when a rate that is no whole number loses tokens of the segment."""
    assert CompressionConfig(k=k, rate=rate).segment_tokens == 500


def test_choosing_k():
    """Breaks when an unknown k gets through, or none does not mean the largest."""
    one, many = (
        CompressionConfig(k=16),
        CompressionConfig(k=16, k_choices=(1, 4, 16)),
    )
    assert (one.choose(), one.choose(16), many.choose(), many.choose(np.int64(1))) == (
        16,
        16,
        16,
        1,
    )
    assert many.segment_tokens == one.segment_tokens == 64
    with pytest.raises(
        ValueError, match="k is 4; this compressor was trained with 16 memory tokens"
    ):
        one.choose(4)
    with pytest.raises(
        ValueError, match="k is 2; this compressor was trained with 1, 4, 16 memory tokens"
    ):
        many.choose(2)


# ------------------------------------------------------------------------------------- memory table


def test_memory_table_starts_like_token_embeddings():
    """Breaks when mean or std of the embeddings is ignored, taken over the wrong axis, or the
    trigger row is another.
    """
    embeddings = RNG.standard_normal((500, 4)) * [0.1, 0.2, 0.3, 0.4] + [0, 1, 2, 3]
    params, key = {"embed": jnp.asarray(embeddings, jnp.bfloat16)}, jax.random.key(0)
    table = init_memory_table(key, params["embed"], CompressionConfig(k=4000), trigger_id=7)
    assert table.shape == (4003, 4) and table.dtype == jnp.float32
    np.testing.assert_allclose(table.mean(0), embeddings.mean(0), atol=0.03)
    np.testing.assert_allclose(table.std(0), embeddings.std(0), rtol=0.05)
    np.testing.assert_array_equal(
        table[4000 + targets.AE + 3], np.asarray(params["embed"], np.float32)[7]
    )
    normal = init_memory_table(
        key, params["embed"], CompressionConfig(k=4000, memory_init="normal")
    )
    np.testing.assert_allclose(normal.mean(0), np.zeros(4), atol=0.06)
    np.testing.assert_allclose(normal.std(0), np.ones(4), rtol=0.05)


def test_negative_ids_are_rows_of_the_table_from_its_end():
    """Breaks when [AE], [LM], [FT] take each other's rows or a memory token's, or id 0 is taken for
    one of them.
    """
    base = {"embed": np.arange(10.0, dtype=np.float32).reshape(5, 2)}
    table = 100 + np.arange(12.0, dtype=np.float32).reshape(6, 2)
    ids = np.asarray([[targets.AE, 0], [targets.LM, 4], [targets.FT, 1]])
    model = FrozenModel(llama.Llama(TINY), base)
    out = np.asarray(jax.jit(Decoder.embed)(Decoder(model, table), ids))
    assert (
        out[:, 0].tolist() == table[3:].tolist()
        and out[:, 1].tolist() == base["embed"][[0, 4, 1]].tolist()
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "x"}, "compression.method is 'x'"),
        ({"k": 0}, "compression.k is 0"),
        ({"rate": -1}, "compression.rate is -1"),
        ({"memory_init": "zero"}, "compression.memory_init is 'zero'"),
        (
            {"layout": "spiral"},
            "layout is 'spiral', not one of method icae; choose from servable, sequential, uniform",
        ),
        (
            {"layout": "clean"},
            "layout is 'clean', not one of method icae; choose from servable, sequential, uniform",
        ),
        (
            {"method": "x500", "layout": "servable"},
            "not one of method x500; choose from clean, sequential, reference, uniform",
        ),
        ({"k_choices": (1, 4)}, "k_choices is \\(1, 4\\); .* the last of them k \\(128\\)"),
        ({"k_choices": (4, 1, 128)}, "k_choices is .* rising"),
        ({"k_choices": (0, 128)}, "k_choices is .* from 1 on"),
        ({"k_choices": (128, 128)}, "k_choices is .* rising"),
        ({"k": 1, "rate": 0.1}, "a segment holds no token"),
        ({"trigger": "ae"}, "compression.trigger is 'ae'; choose trained or bos"),
    ],
)
def test_bad_configuration_is_named(fields, message):
    """Breaks when a bad value gets through, or the error does not name it."""
    with pytest.raises(ValueError, match=message):
        CompressionConfig(**fields)
