"""The Llama family: equal to transformers' own, causal, and the same through KV prefixes, rematerialisation and unrolling."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, close, random_lora, shared
from test_attention import on_cpu

from icae_jax.interop import base as bases
from icae_jax.interop import config_json, weights
from icae_jax.models import attention, llama, rope

IDS = np.random.default_rng(0).integers(0, 64, (2, 24))
MODEL = llama.Llama(TINY)


def positions(start, stop):
    return jnp.arange(start, stop)[None]


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, ids):
    T = ids.shape[1]
    hidden, _ = llama.Llama(config).apply({"params": params}, ids, positions(0, T), llama.causal_mask(T))
    return hidden @ llama.head_kernel(params)


# ---------------------------------------------------------------------------------------------------- transformers' own

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GQA = {"num_key_value_heads": 2}
OPTIONS = {
    "llama_gqa": GQA,
    "llama_mha_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama_mqa_head_dim_theta": {
        "num_key_value_heads": 1,
        "head_dim": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    },
    "llama_llama3_eps": GQA | {"rope_parameters": {"rope_theta": 100.0, **LLAMA3}, "rms_norm_eps": 0.1},
    "llama_linear": GQA | {"rope_parameters": {"rope_theta": 100.0, "rope_type": "linear", "factor": 3.0}},
    "llama_yarn": GQA | {"rope_parameters": {"rope_theta": 100.0, **YARN}},
    "llama_yarn_options": GQA
    | {
        "rope_parameters": {
            "rope_theta": 100.0, **YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.3,
        }
    },
    "llama_yarn_magnitude": GQA | {"rope_parameters": {"rope_theta": 100.0, **YARN, "attention_factor": 1.7}},
    "mistral": GQA | {"sliding_window": None},
    "mistral_window": GQA | {"sliding_window": 7},
    "qwen2": GQA,
    "qwen2_tied_mha": {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6, **YARN}},
    "qwen2_window": {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3_head_dim": GQA | {"head_dim": 12},
    "qwen3_tied_window": GQA
    | {
        "head_dim": 8, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


def old_spelling(raw):
    """config.json as transformers 4 wrote it."""
    raw = dict(raw)
    rope = dict(raw.pop("rope_parameters"))
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return raw


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_equal_transformers(option, tmp_path, tiny_tokenizer):
    """Breaks when any part of a family, or the reading of config.json in either spelling of RoPE, strays from the hub's, or when what
    `save_base` writes of it is another model to transformers.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind = option.split("_")[0].capitalize()
    hub_config = getattr(transformers, f"{kind}Config")(**SIZES, **OPTIONS[option], max_position_embeddings=64, initializer_range=0.2)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(hub_config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight += 0.2 * torch.randn_like(weight)
        want = model(torch.from_numpy(IDS)).logits.numpy()
    model.save_pretrained(tmp_path / "hub")

    config = config_json.read_config(tmp_path / "hub")
    raw = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert "rope_parameters" in raw and config_json.parse_config(old_spelling(raw)) == config
    params = weights.load_params(tmp_path / "hub", config)
    assert ("lm_head" in params) == ("tied" not in option)
    got = logits(config, params, jnp.asarray(IDS))
    close(got, want, 1e-4)
    without = {"rope_scaling": None, "rope_theta": 10000.0, "windows": (), "qk_norm": False, "qkv_bias": False}
    for field in (f for f, plain in without.items() if getattr(config, f) != plain):
        other = logits(dataclasses.replace(config, **{field: without[field]}), params, jnp.asarray(IDS))
        assert np.abs(np.asarray(other - got)).max() > 0.01, f"{field} changes nothing here, so the comparison shows nothing of it"

    bases.save_base(tmp_path / "ours", config, params, tiny_tokenizer, dtype="float32")
    assert config_json.read_config(tmp_path / "ours") == config
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        close(again(torch.from_numpy(IDS)).logits.numpy(), want, 1e-5)


def test_real_model_equals_transformers():
    """Breaks when trained weights bring out what random ones do not."""
    folder = shared("data/stories260K")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids = np.asarray(
        [transformers.AutoTokenizer.from_pretrained(folder)("Once upon a time there was a little dog named Spot.")["input_ids"]]
    )
    with torch.no_grad():
        want = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.from_numpy(ids)).logits.numpy()
    config = config_json.read_config(folder)
    got = logits(config, weights.load_params(folder, config), jnp.asarray(ids))
    close(got, want, 1e-4)
    assert (np.argmax(got, -1) == np.argmax(want, -1)).all()


# ------------------------------------------------------------------------------------------------------- ways to call it


@functools.partial(jax.jit, static_argnames="return_kv")
def run(params, x, at, mask, prefix=None, keep=None, return_kv=False):
    return MODEL.apply({"params": params}, x, at, mask, prefix=prefix, return_kv=return_kv, keep=keep)


@pytest.fixture(scope="module")
def whole(tiny_params):
    """Hidden states and K/V of IDS in one pass."""
    return run(tiny_params, jnp.asarray(IDS), positions(0, 24), llama.causal_mask(24), return_kv=True)


def test_prefix_equals_the_tokens_in_front(tiny_params, whole):
    """Breaks when prefix keys are rotated wrongly, the prefix mask is ignored, or the causal mask is aligned with the prefix."""
    hidden, (k, v) = whole
    padded = [jnp.pad(t[:, :, :10], ((0, 0), (0, 0), (0, 3), (0, 0), (0, 0)), constant_values=9.0) for t in (k, v)]
    at = jnp.pad(positions(0, 10), ((0, 0), (0, 3)))
    mask = jnp.broadcast_to(jnp.arange(13)[None] < 10, (2, 13))
    prefix = (rope.rotate_keys(TINY, padded[0], at), padded[1], mask, jnp.broadcast_to(at, (2, 13)))
    got, kv = run(tiny_params, jnp.asarray(IDS[:, 10:]), positions(10, 24), llama.causal_mask(14), prefix)
    assert kv is None
    close(got, hidden[:, 10:])


def test_shared_prefix_equals_a_repeated_one(tiny_params, whole):
    """Breaks when rows read the prefix of another: 2 prefixes serve 3 rows each, the first the first three."""
    k, v = (t[:, :, :10] for t in whole[1])
    at = jnp.broadcast_to(positions(0, 10), (2, 10))
    prefix = (rope.rotate_keys(TINY, k, at), v, jnp.ones((2, 10), bool).at[1, 4].set(False), at)
    rows = jnp.asarray(np.random.default_rng(1).integers(0, 64, (6, 5)))
    repeated = (*(jnp.repeat(t, 3, axis=1) for t in prefix[:2]), *(jnp.repeat(t, 3, axis=0) for t in prefix[2:]))
    got, want = (run(tiny_params, rows, positions(10, 15), llama.causal_mask(5), p)[0] for p in (prefix, repeated))
    close(got, want)
    assert np.abs(np.asarray(got[:3] - got[3:])).max() > 1e-3


def test_windows_reach_into_the_prefix(tiny_params):
    """Breaks when a layer's window is not counted in positions, reaches only the sequence itself, or is the same in every layer:
    16 tokens in one pass, and the last 6 of them behind the K/V of the others, for one and for two rows on one prefix.
    """
    config = dataclasses.replace(TINY, windows=(5, 0))
    model, ids = llama.Llama(config), jnp.asarray(IDS[:, :16])

    @jax.jit
    def apply(x, at, mask, prefix=None):
        return model.apply({"params": tiny_params}, x, at, mask, prefix=prefix, return_kv=True)

    hidden, (k, v) = apply(ids, positions(0, 16), llama.causal_mask(16))
    first = positions(0, 10)
    prefix = (rope.rotate_keys(config, k[:, :, :10], first), v[:, :, :10], jnp.ones((2, 10), bool), jnp.broadcast_to(first, (2, 10)))
    got, _ = apply(ids[:, 10:], positions(10, 16), llama.causal_mask(6), prefix)
    close(got, hidden[:, 10:])
    shared, _ = apply(jnp.repeat(ids[:, 10:], 2, axis=0), positions(10, 16), llama.causal_mask(6), prefix)
    close(shared, jnp.repeat(hidden[:, 10:], 2, axis=0))
    for other in ((), (5, 5)):
        blind, _ = jax.jit(llama.Llama(dataclasses.replace(config, windows=other)).apply)(
            {"params": tiny_params}, ids, positions(0, 16), llama.causal_mask(16)
        )
        assert np.abs(np.asarray(blind - hidden))[:, 10:].max() > 1e-2


def test_kept_positions_are_those_asked_for(tiny_params, whole):
    """Breaks when `keep` means the last ones, or is sorted."""
    keep = jnp.asarray([7, 0, 23])
    hidden, kv = run(tiny_params, jnp.asarray(IDS), positions(0, 24), llama.causal_mask(24), keep=keep, return_kv=True)
    for got, every in zip((hidden, *kv), (whole[0], *(t[:, :, keep] for t in whole[1])), strict=True):
        close(got, every)
    assert kv[0].shape == (2, 2, 3, 2, 8)


@pytest.mark.parametrize(
    ("at", "windows"),
    [
        (np.arange(20, 24), ()),
        (np.asarray([7, 0, 23]), (5, 3)),
        (np.asarray([[5, 1], [23, 23]]), ()),
        (np.asarray([[5, 1], [23, 23]]), (5, 3)),
        (llama.NOWHERE, ()),
    ],
    ids=["tail", "any, windows", "each row its own", "each row its own, windows", "nowhere"],
)
def test_hidden_states_at_some_positions(at, windows, tiny_params):
    """Breaks when what is left out of the last layer is read after all, by hidden states, K/V or a gradient, or queries stand at the wrong
    position: masks, windows and RoPE go by it.
    """
    config = dataclasses.replace(TINY, windows=windows)
    model, real = llama.Llama(config, lora_scale=0.5), jnp.ones((2, 24), bool).at[1, 2:4].set(False)
    adapters, x = random_lora(config), llama.embed(tiny_params, jnp.asarray(IDS))
    each = jnp.asarray(at) if at.ndim == 2 else at
    keep = np.asarray([1, 22])

    @functools.partial(jax.jit, static_argnums=2)
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(x, adapters, cut):
        given = {"at": each} if cut else {}
        hidden, kv = model.apply({"params": tiny_params, "lora": adapters}, x, positions(0, 24), real, return_kv=True, keep=keep, **given)
        hidden = hidden if cut else llama.rows(hidden, each)
        return jnp.sum(jnp.sin(hidden)) + sum(jnp.sum(jnp.cos(t)) for t in kv), (hidden, kv)

    (value, found), gradient = run(x, adapters, True)
    (want, all_found), all_gradient = run(x, adapters, False)
    close(value, want)
    assert found[0].shape == (2, at.shape[-1], 32)
    jax.tree.map(close, found[1], all_found[1])
    if at.size:
        close(found[0], all_found[0])
        jax.tree.map(close, gradient, all_gradient)
    else:  # what only the last layer's queries and MLP would have moved stays put
        close(gradient[0], all_gradient[0])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_a_block_s_queries_at_some_positions_behind_any_mask(implementation, window, tiny_params, monkeypatch):
    """Breaks when queries at some positions see what those at the first ones see: each has a row of the mask of its own, wherever it
    stands and however that is told, with and without a prefix and a window.
    """
    on_cpu(monkeypatch)
    block = llama.Block(TINY, 1.0, 0.0, implementation, False, False)
    params = jax.tree.map(lambda w: w[0], tiny_params["layers"])
    rng = np.random.default_rng(2)
    mask = jnp.asarray(np.tril(rng.random((2, 24, 24)) < 0.6) | np.eye(24, dtype=bool))
    k, v = jnp.asarray(rng.normal(size=(2, 1, 6, 2, 8)), jnp.float32)
    prefix = (k, v, jnp.asarray([[True] * 5 + [False]]), jnp.arange(6)[None])
    at = positions(6, 30)

    @jax.jit
    def run(told):
        x, cos_sin = llama.embed(tiny_params, jnp.asarray(IDS)), rope.tables(TINY, at)

        def hidden(mask, before, at=None):
            return block.apply({"params": params}, x, before, window, cos_sin, positions(6, 30), mask, at)[0]

        return [
            (hidden(*seen), [hidden(*seen, at) for at in (*ats, *told)])
            for seen in ((mask, None), (mask[:1], prefix), (mask[:, 23:], prefix))
        ]

    ats = [np.asarray(at) for at in ([4, 6], [22, 23], [[5, 1], [23, 20]])]
    for whole, found in run([jnp.asarray(at) for at in ats]):
        for at, got in zip(ats * 2, found, strict=True):
            close(got, llama.rows(whole, at))


def test_hidden_states_at_some_positions_behind_a_mask_of_rows(tiny_params):
    """Breaks when the last layer's queries see what the first positions see, where their positions are known when the program is traced."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(at):
        at = None if at is None else np.asarray(at)
        return MODEL.apply({"params": tiny_params}, jnp.asarray(IDS), positions(0, 24), llama.causal_mask(24), at=at)[0]

    close(run((4, 6)), run(None)[:, np.asarray([4, 6])])


def test_embeddings_equal_ids(tiny_params, whole):
    """Breaks when embeddings given as input are treated otherwise than those looked up, such as scaled."""
    x = llama.embed(tiny_params, jnp.asarray(IDS))
    close(run(tiny_params, x, positions(0, 24), llama.causal_mask(24))[0], whole[0])


def test_masked_keys_do_not_matter(tiny_params, whole):
    """Breaks when the mask's axes are swapped: with key 3 hidden, later tokens change, and do not depend on its content."""
    mask = llama.causal_mask(24).at[:, :, 3].set(False)
    one, other = (run(tiny_params, jnp.asarray(ids), positions(0, 24), mask)[0] for ids in (IDS, np.where(np.arange(24) == 3, 5, IDS)))
    assert np.abs(np.asarray(one - whole[0]))[:, 4:].max() > 1e-3
    np.testing.assert_array_equal(np.delete(one, 3, axis=1), np.delete(other, 3, axis=1))


def test_no_token_depends_on_later_ones(tiny_params):
    """Breaks when the mask lets the future through: the gradient of token 4 reaches tokens 0 … 4 and no other."""
    x = llama.embed(tiny_params, jnp.asarray(IDS[:1, :9]))
    hidden = lambda x: MODEL.apply({"params": tiny_params}, x, positions(0, 9), llama.causal_mask(9))[0]  # noqa: E731
    reach = np.abs(np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(hidden(x)[:, 4] ** 2 * jnp.arange(32.0)[None])))(x))).max(-1)[0]
    assert (reach[:5] > 1e-4).all() and not reach[5:].any()


def test_rematerialised_and_unrolled_layers_compute_the_same(tiny_params):
    """Breaks when remat or unrolling changes values or gradients, or is not done at all (the programs must differ)."""
    ids = jnp.asarray(IDS[:, :8])

    def program(remat, unroll):
        model = llama.Llama(TINY, remat=remat, unroll=unroll)

        def loss(params):
            hidden, _ = model.apply({"params": params}, ids, positions(0, 8), llama.causal_mask(8))
            return jnp.sum(jnp.sin(hidden @ llama.head_kernel(params)))

        return jax.value_and_grad(loss)

    programs = {how: program(*how) for how in (("none", 1), ("frozen", 1), ("dots", 1), ("full", 2))}
    texts = {how: str(jax.make_jaxpr(f)(tiny_params)) for how, f in programs.items()}
    matmuls = [t.count("dot_general[") for t in texts.values()]
    # Frozen recomputes no matmul, but the two norms, whose scaling is written as one.
    assert matmuls[0] + 2 == matmuls[1] < matmuls[2] < matmuls[3], "full takes all matmuls anew, dots those of attention"
    assert "unroll=2" in texts["full", 2] and "unroll=2" not in texts["dots", 1] and "prevent_cse=True" in texts["full", 2]
    value, gradient = jax.jit(programs["none", 1])(tiny_params)
    for how in (("frozen", 1), ("dots", 1), ("full", 2)):
        got_value, got_gradient = jax.jit(programs[how])(tiny_params)
        close(got_value, value)
        jax.tree.map(close, got_gradient, gradient)


# --------------------------------------------------------------------------------------------------------------- sizes


def test_impossible_sizes_are_refused():
    """Breaks when a wrong size is only found by a shape error deep in the model."""
    for field, value, message in (
        ("num_layers", 0, "num_layers of the model is 0"),
        ("num_kv_heads", 3, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ("head_dim", 7, "head_dim is 7"),
        ("windows", (4,), r"windows of the model are \(4,\); give one >= 0 for each of the 2 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **{field: value})


def test_initial_parameters():
    """Breaks when tied models get a head, or output projections are not scaled down by 1/sqrt(2 L)."""
    params = jax.jit(llama.init_params, static_argnums=1)(jax.random.key(0), dataclasses.replace(TINY, num_layers=8))
    assert params["lm_head"].shape == (32, 64)
    assert "lm_head" not in llama.param_shapes(dataclasses.replace(TINY, tie_word_embeddings=True))
    stds = {p: float(params["layers"]["mlp"][p]["kernel"].std()) for p in ("up_proj", "down_proj")}
    assert stds == pytest.approx({"up_proj": 0.02, "down_proj": 0.005}, rel=0.05)
