"""The Llama family: equal to transformers' own, causal, and the same through KV prefixes,
rematerialisation and unrolling.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, close, head_kernel, random_lora, shared
from test_attention import on_cpu

from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import weights
from icae_jax.models import blocks, llama, rope
from icae_jax.models.families import config_json

IDS = np.random.default_rng(0).integers(0, 64, (2, 24))
MODEL = llama.Llama(TINY)
CAUSAL = np.asarray(llama.causal_mask(24))
rotate_keys = jax.jit(rope.rotate_keys, static_argnums=0)


def causal(length):
    return CAUSAL[:, :length, :length]


def positions(start, stop):
    return np.arange(start, stop)[None]


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, ids):
    T = ids.shape[1]
    hidden, _ = llama.Llama(config).apply(
        {"params": params}, ids, positions(0, T), llama.causal_mask(T)
    )
    return hidden @ head_kernel(params)


# -------------------------------------------------------------------------------- transformers' own

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
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
    "llama_llama3_eps": GQA
    | {"rope_parameters": {"rope_theta": 100.0, **LLAMA3}, "rms_norm_eps": 0.1},
    "llama_linear": GQA
    | {"rope_parameters": {"rope_theta": 100.0, "rope_type": "linear", "factor": 3.0}},
    "llama_yarn": GQA | {"rope_parameters": {"rope_theta": 100.0, **YARN}},
    "llama_yarn_options": GQA
    | {
        "rope_parameters": {
            "rope_theta": 100.0,
            **YARN,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "truncate": False,
            "mscale": 0.7,
            "mscale_all_dim": 0.3,
        }
    },
    "llama_yarn_magnitude": GQA
    | {"rope_parameters": {"rope_theta": 100.0, **YARN, "attention_factor": 1.7}},
    "llama_bias_attention": GQA | {"attention_bias": True},
    "llama_bias_mlp": GQA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": GQA | {"sliding_window": None},
    "mistral_window": GQA | {"sliding_window": 7},
    "qwen2": GQA,
    "qwen2_tied_mha": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1e6, **YARN},
    },
    "qwen2_window": GQA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3_head_dim": GQA | {"head_dim": 12},
    "qwen3_bias": GQA | {"head_dim": 8, "attention_bias": True},
    "qwen3_tied_window": GQA
    | {
        "head_dim": 8,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


TURNED = (
    "llama_linear",
    "llama_yarn",
    "llama_yarn_options",
)  # differ from others in how far they turn queries and keys
UNSEEN = "{} changes nothing here, so the comparison shows nothing of it"


def blank(params, kind):
    """Parameters as if the projections of that kind had no bias, or queries and keys no scale of
    their own in their norms.
    """

    def leaf(path, x):
        name = ".".join(part.key for part in path)
        if not name.endswith(kind) or "layernorm" in name:
            return x
        return np.ones_like(x) if kind == "norm.scale" else np.zeros_like(x)

    return params | {"layers": jax.tree_util.tree_map_with_path(leaf, params["layers"])}


def old_spelling(raw):
    """config.json as transformers 4 wrote it."""
    raw = dict(raw)
    rope = dict(raw.pop("rope_parameters"))
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return raw


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_equal_transformers(option, tmp_path, tiny_tokenizer, monkeypatch):
    """Breaks when any part of a family, or the reading of config.json in either spelling of RoPE,
    strays from the hub's, or when what `save_base` writes of it is another model to transformers.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind = option.split("_")[0].capitalize()
    hub_config = getattr(transformers, f"{kind}Config")(
        **SIZES, **OPTIONS[option], max_position_embeddings=64, initializer_range=0.2
    )
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
    assert ("lm_head" in params) != config.tie_word_embeddings
    turned = jax.device_get(rope.tables(config, np.arange(24)))
    for field, plain in (("rope_scaling", None), ("rope_theta", 10000.0)):
        other = rope.tables(dataclasses.replace(config, **{field: plain}), np.arange(24))
        assert getattr(config, field) == plain or np.abs(np.subtract(turned, other)).max() > 0.1, (
            UNSEEN.format(field)
        )
    if option in TURNED:  # all else is as in another option
        hub = model.model.rotary_emb
        angles = np.arange(24)[:, None] * hub.inv_freq.numpy()
        close(turned, hub.attention_scaling * np.stack([np.cos(angles), np.sin(angles)]))
    else:
        got = np.asarray(logits(config, params, IDS))
        close(got, want, 1e-4)
        without = (
            ["windows"] * bool(config.windows)
            + ["norm.scale"] * config.qk_norm
            + [f"{name}.bias" for name in config.biased]
        )
        for what in without:
            plain = dataclasses.replace(config, windows=()) if what == "windows" else config
            assert np.abs(logits(plain, blank(params, what), IDS) - got).max() > 0.01, (
                UNSEEN.format(what)
            )

    monkeypatch.setattr(
        bases.tokenizers, "read_alike", lambda folder: True
    )  # of the architecture that it is, whatever its tokenizer
    bases.save_base(tmp_path / "ours", config, params, tiny_tokenizer, dtype="float32")
    assert config_json.read_config(tmp_path / "ours") == config
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    )
    with torch.no_grad():
        close(again(torch.from_numpy(IDS)).logits.numpy(), want, 1e-5)


def test_real_model_equals_transformers():
    """Breaks when trained weights bring out what random ones do not."""
    folder = shared("data/stories260K")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids = np.asarray(
        [
            transformers.AutoTokenizer.from_pretrained(folder)(
                "Once upon a time there was a little dog named Spot."
            )["input_ids"]
        ]
    )
    with torch.no_grad():
        want = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            torch.from_numpy(ids)
        ).logits.numpy()
    config = config_json.read_config(folder)
    got = logits(config, weights.load_params(folder, config), ids)
    close(got, want, 1e-4)
    assert (np.argmax(got, -1) == np.argmax(want, -1)).all()


# ---------------------------------------------------------------------------------- ways to call it


@functools.partial(jax.jit, static_argnames="return_kv")
def run(params, x, at, mask, prefix=None, keep=None, return_kv=False):
    return MODEL.apply(
        {"params": params}, x, at, mask, prefix=prefix, return_kv=return_kv, keep=keep
    )


@pytest.fixture(scope="module")
def whole(tiny_params):
    """Hidden states and K/V of IDS in one pass."""
    return jax.device_get(run(tiny_params, IDS, positions(0, 24), causal(24), return_kv=True))


def test_prefix_equals_the_tokens_in_front(tiny_params, whole):
    """Breaks when prefix keys are rotated wrongly, the prefix mask is ignored, or the causal mask
    is aligned with the prefix.
    """
    hidden, (k, v) = whole
    padded = [
        np.pad(t[:, :, :10], ((0, 0), (0, 0), (0, 3), (0, 0), (0, 0)), constant_values=9.0)
        for t in (k, v)
    ]
    at = np.tile(np.pad(positions(0, 10), ((0, 0), (0, 3))), (2, 1))
    prefix = (rotate_keys(TINY, padded[0], at), padded[1], np.tile(np.arange(13) < 10, (2, 1)), at)
    got, kv = run(tiny_params, IDS[:, 10:], positions(10, 24), causal(14), prefix)
    assert kv is None
    close(got, hidden[:, 10:])


def test_shared_prefix_equals_a_repeated_one(tiny_params, whole):
    """Breaks when rows read the prefix of another: 2 prefixes serve 3 rows each, the first the
    first three.
    """
    k, v = (t[:, :, :10] for t in whole[1])
    at = np.tile(positions(0, 10), (2, 1))
    real = np.ones((2, 10), bool)
    real[1, 4] = False
    prefix = (np.asarray(rotate_keys(TINY, k, at)), v, real, at)
    rows = np.random.default_rng(1).integers(0, 64, (6, 5))
    repeated = (
        *(np.repeat(t, 3, axis=1) for t in prefix[:2]),
        *(np.repeat(t, 3, axis=0) for t in prefix[2:]),
    )
    got, want = (
        np.asarray(run(tiny_params, rows, positions(10, 15), causal(5), p)[0])
        for p in (prefix, repeated)
    )
    close(got, want)
    assert np.abs(got[:3] - got[3:]).max() > 1e-3


def test_windows_reach_into_the_prefix(tiny_params, whole):
    """Breaks when a layer's window is not counted in positions, reaches only the sequence itself,
    or is the same in every layer: 16 tokens in one pass, and the last 6 of them behind the K/V of
    the others, for one and for two rows on one prefix.
    """
    config = dataclasses.replace(TINY, windows=(5, 0))
    ids, first = IDS[:, :16], np.tile(positions(0, 10), (2, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def apply(config, x, at, mask, prefix=None):
        variables = {"params": tiny_params}
        return llama.Llama(config).apply(
            variables, x, at, mask, prefix=prefix, return_kv=prefix is None
        )

    hidden, (k, v) = jax.device_get(apply(config, ids, positions(0, 16), causal(16)))
    prefix = (rotate_keys(config, k[:, :, :10], first), v[:, :, :10], np.ones((2, 10), bool), first)
    for rows in (1, 2):
        got, _ = apply(
            config, np.repeat(ids[:, 10:], rows, axis=0), positions(10, 16), causal(6), prefix
        )
        close(got, np.repeat(hidden[:, 10:], rows, axis=0))
    alike, _ = apply(dataclasses.replace(config, windows=(5, 5)), ids, positions(0, 16), causal(16))
    for other in (whole[0][:, :16], alike):  # no window, and the same in both layers
        assert np.abs(other - hidden)[:, 10:].max() > 1e-2


def test_kept_positions_are_those_asked_for(tiny_params, whole):
    """Breaks when `keep` means the last ones, or is sorted."""
    keep = np.asarray([7, 0, 23])
    hidden, kv = run(tiny_params, IDS, positions(0, 24), causal(24), keep=keep, return_kv=True)
    for got, every in zip(
        (hidden, *kv), (whole[0], *(t[:, :, keep] for t in whole[1])), strict=True
    ):
        close(got, every)
    assert kv[0].shape == (2, 2, 3, 2, 8)


@functools.partial(jax.jit, static_argnames=("config", "known"))
def at_some(config, params, adapters, at=None, weights=None, known=None):
    """((a value, (hidden states, K/V)), gradients of embeddings and adapters) of positions told
    while it runs, known before, or all: these count by weights.
    """
    real = jnp.ones((2, 24), bool).at[1, 2:4].set(False)
    given = {} if weights is not None else {"at": at if known is None else np.asarray(known, int)}
    model = llama.Llama(config, lora_scale=0.5)

    def of(x, adapters):
        variables = {"params": params, "lora": adapters}
        hidden, kv = model.apply(
            variables, x, positions(0, 24), real, return_kv=True, keep=np.asarray([1, 22]), **given
        )
        one = jnp.sin(hidden) if weights is None else jnp.sin(hidden) * weights[..., None]
        return jnp.sum(one) + sum(jnp.sum(jnp.cos(t)) for t in kv), (hidden, kv)

    return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(
        llama.embed(params, TINY, IDS, jnp.float32), adapters
    )


@pytest.mark.parametrize(
    ("at", "windows"),
    [
        (np.arange(20, 24), ()),
        (np.asarray([7, 0, 23]), (5, 3)),
        (np.asarray([[5, 1], [23, 23]]), ()),
        (np.asarray([[5, 1], [23, 23]]), (5, 3)),
        (blocks.NOWHERE, ()),
    ],
    ids=["tail", "any, windows", "each row its own", "each row its own, windows", "nowhere"],
)
def test_hidden_states_at_some_positions(at, windows, tiny_params):
    """Breaks when what is left out of the last layer is read after all, by hidden states, K/V or a
    gradient, or queries stand at the wrong position: masks, windows and RoPE go by it.
    """
    config, asked = (
        dataclasses.replace(TINY, windows=windows),
        np.broadcast_to(at, (2, at.shape[-1])),
    )
    run = functools.partial(at_some, config, tiny_params, random_lora(config))
    weights = np.stack(
        [np.bincount(row, minlength=24) for row in asked]
    )  # how often each one is asked for
    (want, every), all_gradient = jax.device_get(run(weights=weights))
    (value, found), gradient = jax.device_get(
        run(at) if at.ndim == 2 else run(known=tuple(at.tolist()))
    )
    close(value, want)
    assert found[0].shape == (2, at.shape[-1], 32)
    jax.tree.map(close, found[1], every[1])
    if at.size:
        close(found[0], np.take_along_axis(every[0], asked[..., None], 1))
        jax.tree.map(close, gradient, all_gradient)
    else:  # what only the last layer's queries and MLP would have moved stays put
        close(gradient[0], all_gradient[0])


# Behind a mask with a line for each query, splash is computed as xla is; a window is part of the
# mask.
@pytest.mark.parametrize(
    ("implementation", "window"), [("xla", None), ("xla", 5), ("cudnn", 5), ("splash", None)]
)
def test_a_block_s_queries_at_some_positions_behind_any_mask(
    implementation, window, tiny_params, monkeypatch
):
    """Breaks when queries at some positions see what those at the first ones see: each has a row of
    the mask of its own, wherever it stands and however that is told, with and without a prefix and
    a window.
    """
    on_cpu(monkeypatch)
    block = blocks.Block(TINY, 1.0, 0.0, implementation, False, False)
    params = jax.tree.map(lambda w: np.asarray(w)[0], tiny_params["layers"])
    rng = np.random.default_rng(2)
    mask = np.tril(rng.random((2, 24, 24)) < 0.6) | np.eye(24, dtype=bool)
    k, v = rng.normal(size=(2, 1, 6, 2, 8)).astype(np.float32)
    prefix = (k, v, np.asarray([[True] * 5 + [False]]), np.arange(6)[None])
    at = positions(6, 30)

    @jax.jit
    def run(told):
        x, cos_sin = llama.embed(tiny_params, TINY, IDS, jnp.float32), rope.tables(TINY, at)

        def hidden(mask, before, at=None):
            return block.apply(
                {"params": params}, x, before, window, cos_sin, positions(6, 30), mask, at
            )[0]

        return [
            (hidden(*seen), [hidden(*seen, at) for at in (*ats[:2], *told)])
            for seen in ((mask, None), (mask[:1], prefix), (mask[:, 23:], prefix))
        ]

    ats = [np.asarray(at) for at in ([4, 6], [22, 23], [[5, 1], [23, 20]])]
    for whole, found in jax.device_get(run([ats[0], ats[2]])):
        for at, got in zip((ats[0], ats[1], ats[0], ats[2]), found, strict=True):
            close(got, np.take_along_axis(whole, np.broadcast_to(at, (2, 2))[..., None], 1))


def test_hidden_states_at_some_positions_behind_a_mask_of_rows(tiny_params, whole):
    """Breaks when the last layer's queries see what the first positions see, where their positions
    are known when the program is traced.
    """

    at = np.asarray([4, 6])
    got = jax.jit(
        lambda: MODEL.apply({"params": tiny_params}, IDS, positions(0, 24), causal(24), at=at)[0]
    )()
    close(got, whole[0][:, at])


def test_embeddings_equal_ids(tiny_params, whole):
    """Breaks when embeddings given as input are treated otherwise than those looked up, such as
    scaled.
    """
    x = np.asarray(tiny_params["embed"])[IDS]
    close(run(tiny_params, x, positions(0, 24), causal(24))[0], whole[0])


def test_masked_keys_do_not_matter(tiny_params, whole):
    """Breaks when the mask's axes are swapped: with key 3 hidden, later tokens change, and do not
    depend on its content.
    """
    mask = causal(24) & (np.arange(24) != 3)
    one, other = (
        np.asarray(run(tiny_params, ids, positions(0, 24), mask)[0])
        for ids in (IDS, np.where(np.arange(24) == 3, 5, IDS))
    )
    assert np.abs(one - whole[0])[:, 4:].max() > 1e-3
    np.testing.assert_array_equal(np.delete(one, 3, axis=1), np.delete(other, 3, axis=1))


def test_no_token_depends_on_later_ones(tiny_params):
    """Breaks when the mask lets the future through: the gradient of token 4 reaches tokens 0 … 4
    and no other.
    """
    x = np.asarray(tiny_params["embed"])[IDS[:1, :9]]
    hidden = lambda x: MODEL.apply({"params": tiny_params}, x, positions(0, 9), causal(9))[0]  # noqa: E731
    reach = np.abs(
        np.asarray(
            jax.jit(jax.grad(lambda x: jnp.sum(hidden(x)[:, 4] ** 2 * jnp.arange(32.0)[None])))(x)
        )
    ).max(-1)[0]
    assert (reach[:5] > 1e-4).all() and not reach[5:].any()


def test_rematerialised_and_unrolled_layers_compute_the_same(tiny_params):
    """Breaks when remat or unrolling changes values or gradients, or is not done at all (the
    programs must differ).
    """
    ids = IDS[:, :8]

    def program(remat, unroll):
        model = llama.Llama(TINY, remat=remat, unroll=unroll)

        def loss(params):
            hidden, _ = model.apply({"params": params}, ids, positions(0, 8), causal(8))
            return jnp.sum(jnp.sin(hidden @ head_kernel(params)))

        return jax.value_and_grad(loss)

    programs = {
        how: jax.jit(program(*how)).trace(tiny_params)
        for how in (("none", 1), ("frozen", 1), ("dots", 1), ("full", 2))
    }
    texts = {how: str(traced.jaxpr) for how, traced in programs.items()}
    matmuls = [t.count("dot_general[") for t in texts.values()]
    # Frozen recomputes no matmul.
    assert matmuls[0] == matmuls[1] < matmuls[2] < matmuls[3], (
        "full takes all matmuls anew, dots those of attention"
    )
    assert (
        "unroll=2" in texts["full", 2]
        and "unroll=2" not in texts["dots", 1]
        and "prevent_cse=True" in texts["full", 2]
    )
    (value, gradient), *others = (
        traced.lower().compile()(tiny_params) for traced in programs.values()
    )
    for got_value, got_gradient in others:
        close(got_value, value)
        jax.tree.map(close, got_gradient, gradient)


# -------------------------------------------------------------------------------------------- sizes


def test_impossible_sizes_are_refused():
    """Breaks when a wrong size is only found by a shape error deep in the model."""
    for field, value, message in (
        ("num_layers", 0, "num_layers of the model is 0"),
        ("num_kv_heads", 3, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ("head_dim", 7, "head_dim is 7"),
        (
            "windows",
            (4,),
            r"windows of the model are \(4,\); give one >= 0 for each of the 2 layers",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **{field: value})


def test_initial_parameters():
    """Breaks when tied models get a head, or output projections are not scaled down by 1/sqrt(2
    L).
    """
    params = jax.jit(llama.init_params, static_argnums=1)(
        jax.random.key(0), dataclasses.replace(TINY, num_layers=8)
    )
    assert params["lm_head"].shape == (32, 64)
    assert "lm_head" not in llama.param_shapes(dataclasses.replace(TINY, tie_word_embeddings=True))
    stds = {p: float(params["layers"]["mlp"][p]["kernel"].std()) for p in ("up_proj", "down_proj")}
    assert stds == pytest.approx({"up_proj": 0.02, "down_proj": 0.005}, rel=0.05)
