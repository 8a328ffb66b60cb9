"""The decoder: its prefix and its optional LoRA, which is absent from the program by default."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FRAMING, TINY, close, random_lora, random_trained, random_trained_of

from icae_jax.compression import encoder, trained
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.segments import Contexts, segment_contexts
from icae_jax.models import llama, lora
from icae_jax.models.llama import FrozenModel
from icae_jax.objectives import loss, targets
from icae_jax.objectives.packing import pack
from icae_jax.performance import flops

MODEL = llama.Llama(TINY, lora_scale=0.5)
LORA = lora.LoraConfig(4)
TEXTS = [np.random.default_rng(n).integers(3, 64, n).tolist() for n in (5, 12)]
BATCH = {"ae": pack([[targets.ae_target(text, FRAMING)] for text in TEXTS], 1, 13, 13)}
HEADS = {"ae": (1, 3)}


def config(method="icae", **fields):
    return CompressionConfig(method, k=3, rate=4, **fields)


def loss_of(tree, params, c, model=MODEL, dropout_key=None):
    """The sum of AE losses behind a head."""
    base = FrozenModel(model, params)
    contexts = Contexts(*segment_contexts(TEXTS, c), c.k)
    memory = encoder.compress(base, tree, contexts, c, dropout_key)
    decoder = Decoder.of(base, tree, dropout_key)
    losses = loss.label_losses(decoder, memory, BATCH, HEADS, c.position_layout, 64)
    return loss.objective_sums(losses, BATCH)["ae"][0]


def test_it_has_a_lora_only_if_asked(tiny_params):
    """Breaks when the tree holds a decoder LoRA by default, or does not where it is configured."""
    key = jax.random.key(0)
    tree = trained.init(key, tiny_params["embed"], TINY, LORA, config())
    assert set(tree) == {"lora", "memory_table"}
    both = trained.init(key, tiny_params["embed"], TINY, LORA, config(decoder_lora=True))
    assert set(both) == {"lora", "memory_table", "decoder_lora"}
    jax.tree.map(np.testing.assert_array_equal, tree, {name: both[name] for name in tree})
    shapes = trained.shapes(TINY, LORA, config(decoder_lora=True))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), both) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )


@pytest.mark.parametrize("method", ["icae", "x500"])
def test_its_lora_is_that_of_merged_weights(tiny_params, method):
    """Breaks when a pass of the decoder goes without its LoRA, or the encoder with it."""
    c = config(method)
    tree = random_trained(TINY, c.k)
    adapter = random_lora(TINY, seed=5)
    value, gradient = jax.jit(jax.value_and_grad(loss_of), static_argnums=2)(
        tree | {"decoder_lora": adapter}, tiny_params, c
    )

    def merged(params, adapter):
        layers = jax.tree.map(lambda w: w, params["layers"])
        for module, projections in adapter["layers"].items():
            for name, ab in projections.items():
                update = 0.5 * jnp.einsum("lir,lro->lio", ab["a"], ab["b"])
                layers[module][name]["kernel"] = layers[module][name]["kernel"] + update
        return params | {"layers": layers}

    @jax.jit
    def by_merging(tree):
        base = FrozenModel(MODEL, tiny_params)
        memory = encoder.compress(base, tree, Contexts(*segment_contexts(TEXTS, c), c.k), c)
        decoder = Decoder.of(FrozenModel(MODEL, merged(tiny_params, adapter)), tree)
        losses = loss.label_losses(decoder, memory, BATCH, HEADS, c.position_layout, 64)
        return loss.objective_sums(losses, BATCH)["ae"][0]

    close(value, by_merging(tree))
    without = jax.jit(loss_of, static_argnums=2)(tree, tiny_params, c)
    assert abs(float(without) - float(value)) > 1e-2
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient["decoder_lora"]))


@pytest.mark.parametrize("method", ["pooled", "sac"])
def test_as_training_starts_it_changes_nothing(tiny_params, method):
    """Breaks when a decoder LoRA whose B is zero moves a loss, or its A gets a gradient."""
    c = config(method, decoder_lora=True)
    tree = random_trained_of(c)
    tree["decoder_lora"] = jax.tree_util.tree_map_with_path(
        lambda path, x: x * (path[-1].key != "b"), tree["decoder_lora"]
    )
    step = jax.jit(jax.value_and_grad(loss_of), static_argnums=2)
    value, gradient = step(tree, tiny_params, c)
    close(value, jax.jit(loss_of, static_argnums=2)(without_lora(tree), tiny_params, c))
    a, b = (
        [
            np.abs(x).max()
            for path, x in jax.tree_util.tree_leaves_with_path(gradient["decoder_lora"])
            if path[-1].key == name
        ]
        for name in "ab"
    )
    assert max(a) == 0 < min(b)


def without_lora(tree):
    return {name: x for name, x in tree.items() if name != "decoder_lora"}


def test_its_dropout_is_its_own(tiny_params):
    """Breaks when the decoder's LoRA is trained without dropout, or evaluated with it."""
    c = config()
    tree = random_trained(TINY, c.k) | {"decoder_lora": random_lora(TINY, seed=5)}
    tree["lora"] = jax.tree.map(jnp.zeros_like, tree["lora"])  # no dropout to see in the encoder
    model = MODEL.clone(lora_dropout=0.5)
    run = jax.jit(lambda key: loss_of(tree, tiny_params, c, model, key))
    dropped = [float(run(jax.random.key(seed))) for seed in (0, 0, 1)]
    plain = float(jax.jit(lambda: loss_of(tree, tiny_params, c, model))())
    assert dropped[0] == dropped[1] != dropped[2] and plain not in dropped


@pytest.mark.parametrize("method", ["icae", "x500"])
def test_its_flops_are_counted(method):
    """Breaks when a pass of its LoRA is not counted, or a head's gradient that it needs."""
    sizes = dataclasses.replace(TINY, hidden_size=256, intermediate_size=512, head_dim=64)
    lora_config = lora.LoraConfig(32, targets=("q_proj", "v_proj", "down_proj"))
    model = llama.Llama(sizes, unroll=sizes.num_layers)
    ratios = []
    for decoder_lora in (False, True):
        c = config(method, decoder_lora=decoder_lora)
        ids, _ = segment_contexts(TEXTS, c)
        batch = {"context": ids, "targets": BATCH, "k": c.k}
        least = flops.least(sizes, lora_config, c, batch, HEADS)
        lowered = jax.jit(jax.value_and_grad(loss_of), static_argnums=(2, 3)).lower(
            trained.shapes(sizes, lora_config, c), llama.param_shapes(sizes), c, model
        )
        # Attention's backward pass recomputes the scores: one of its six matmuls more.
        counted = lowered.cost_analysis()["flops"]
        ratios.append(counted / (least.total + least.attention / 6))
    # At these sizes what is no matmul is seen too; it is as much with the LoRA as without.
    assert 1 <= ratios[1] < 1.1 and abs(ratios[0] - ratios[1]) < 0.02
