"""Every family equals transformers' own, both ways; what families compute differently goes through
prefixes, windows, LoRA, rematerialisation, decoding, quantised leaves and compressors.
"""

import dataclasses
import functools
import json

import decoding_helper
import greedy_loop
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import (
    FRAMING,
    TINY,
    close,
    eight_devices,
    random_lora,
    random_params,
    random_trained,
)
from test_attention import on_cpu
from test_quantize import dequantized

from icae_jax.compression import encoder, memory, trained
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.segments import Contexts, segment_contexts
from icae_jax.errors import UserError
from icae_jax.evaluation.plain import no_prefix
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import peft_folder
from icae_jax.interop.export import hf_cache, prompt_embeds
from icae_jax.interop.export.reader import Reader
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import remote_rows, stored, weights
from icae_jax.models import attention, llama, lora, rope, schemes
from icae_jax.models.families import architectures, config_json, tensor_names
from icae_jax.models.llama import FrozenModel, Head
from icae_jax.models.quantize import is_quantized
from icae_jax.objectives import loss, targets
from icae_jax.objectives.packing import pack
from icae_jax.runtime import attention_choice, sharding
from icae_jax.workflows import convert_base

RNG = np.random.default_rng(3)
IDS = RNG.integers(3, 64, (2, 24))


def positions(start, stop):
    return np.arange(start, stop)[None]


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, ids):
    T = ids.shape[1]
    hidden, _ = llama.Llama(config).apply(
        {"params": params}, ids, positions(0, T), llama.causal_mask(T)
    )
    return llama.head(params, config).logits(hidden)


# -------------------------------------------------------------------------------- transformers' own

GQA = {"num_key_value_heads": 2}
GEMMA = GQA | {"head_dim": 12, "query_pre_attn_scalar": 5, "sliding_window": 6}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.9,
    "logits_scaling": 4.0,
}
ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
OPTIONS = {
    "gemma2": GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    "gemma2 uncapped, biased, untied": GEMMA
    | {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "layer_types": TYPES[::-1],
    },
    "gemma3_text": GEMMA | {"layer_types": TYPES, "rope_parameters": ROPES},
    "gemma3_text capped, all local": GEMMA
    | {"final_logit_softcapping": 2.0, "layer_types": TYPES[:1] * 3, "rope_parameters": ROPES},
    "olmo2": GQA,
    "olmo2 biased": {"attention_bias": True, "tie_word_embeddings": True},
    "phi3": GQA
    | {
        "sliding_window": 7,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 50.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "phi3 plain": {"tie_word_embeddings": True},
    "granite": GQA | MULTIPLIERS,
    "granite biased": GQA
    | MULTIPLIERS
    | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "smollm3": GQA
    | {"no_rope_layers": [1, 0, 1], "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
    "smollm3 biased": GQA
    | {
        "no_rope_layer_interval": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
}
# Fields whose place in the program takes other parameters; the parameters show that they matter.
SHAPES = ("norms", "qk_norm", "qk_projection_norm", "qkv_bias", "o_bias", "mlp_bias", "fused")


def hub_model(kind, options, hidden_size=32):
    """A random model of transformers, all of whose weights matter."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[kind](
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        attn_implementation="eager",  # the one that computes soft caps
        **options,
    )
    torch.manual_seed(0)
    return shaken(transformers.AutoModelForCausalLM.from_config(config))


def shaken(model):
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight += 0.3 * torch.randn_like(weight)
    return model.eval()


def run_hub(model, ids=IDS):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def old_spelling(raw):
    """config.json as transformers 4 wrote it."""
    raw = dict(raw)
    ropes = dict(raw.pop("rope_parameters"))
    if "full_attention" in ropes:
        raw["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        ropes = dict(ropes["full_attention"])
    raw["rope_theta"] = ropes.pop("rope_theta")
    if "partial_rotary_factor" in ropes:
        raw["partial_rotary_factor"] = ropes.pop("partial_rotary_factor")
    raw["rope_scaling"] = None if ropes["rope_type"] == "default" else ropes
    return raw


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_equal_transformers(option, tmp_path, tiny_tokenizer, monkeypatch):
    """Breaks when any part of a family, or the reading of config.json in either spelling of RoPE,
    strays from the hub's, or when what `save_base` writes of it is another model to transformers.
    """
    model = hub_model(option.split()[0], OPTIONS[option])
    want = run_hub(model)
    model.save_pretrained(tmp_path / "hub")
    config = config_json.read_config(tmp_path / "hub")
    raw = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert "rope_parameters" in raw and config_json.parse_config(old_spelling(raw)) == config
    params = weights.load_params(tmp_path / "hub", config)
    assert ("lm_head" in params) != config.tie_word_embeddings
    got = np.asarray(logits(config, params, IDS))
    close(got, want, 1e-4)

    changed = []
    for field in dataclasses.fields(config):
        name, plain = field.name, field.default
        if plain is dataclasses.MISSING or name in SHAPES or getattr(config, name) == plain:
            continue
        if name in ("rms_norm_eps", "tie_word_embeddings", "local_rope_theta"):
            continue
        if name in ("rope_theta", "rope_scaling") and rope.GLOBAL not in rope.kinds(config):
            continue
        other = logits(dataclasses.replace(config, **{name: plain}), params, IDS)
        assert np.abs(other - got).max() > 0.01, f"{name} changes nothing here"
        changed.append(name)
    family = config_json.FAMILIES[raw["architectures"][0]]
    assert {*family.always, *changed} - {"qkv_bias"} or "biased" in option

    monkeypatch.setattr(bases.tokenizers, "read_alike", lambda folder: True)
    bases.save_base(tmp_path / "ours", config, params, tiny_tokenizer, dtype="float32")
    assert config_json.read_config(tmp_path / "ours") == config
    import torch
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    close(run_hub(again), want, 1e-5)
    assert again.config.model_type == raw["model_type"]


def test_a_multiplier_is_rounded_as_transformers_does():
    """Breaks when embeddings are multiplied by the exact root of D: in bfloat16, that of 1,152 is
    34.0 and not 33.94.
    """
    torch = pytest.importorskip("torch")
    model = hub_model("gemma3_text", GEMMA, hidden_size=44)
    table = model.get_input_embeddings().to(torch.bfloat16)
    with torch.no_grad():
        want = table(torch.from_numpy(IDS)).float().numpy()
    config = dataclasses.replace(TINY, hidden_size=44, embedding_multiplier=44**0.5)
    params = {"embed": jnp.asarray(table.weight.detach().float().numpy(), jnp.bfloat16)}
    got = llama.embed(params, config, IDS, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)
    exact = (np.asarray(params["embed"], np.float32)[IDS] * 44**0.5).astype(got.dtype)
    assert (np.asarray(got) != exact).any()


# ------------------------------------------------------------------------------- multimodal folders


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """(folder of a Gemma 3 with a vision tower, its logits of IDS)."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    vision = dict.fromkeys(("hidden_size", "intermediate_size", "image_size", "patch_size"), 8)
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = transformers.Gemma3Config(
        text_config=text
        | GEMMA
        | {"num_attention_heads": 4, "layer_types": TYPES, "rope_parameters": ROPES},
        vision_config=vision | {"num_hidden_layers": 1, "num_attention_heads": 2},
        mm_tokens_per_image=1,
        image_token_index=63,
        boi_token_index=62,
        eoi_token_index=61,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = shaken(transformers.Gemma3ForConditionalGeneration(config))
    folder = tmp_path_factory.mktemp("multimodal") / "hub"
    model.save_pretrained(folder)
    return folder, run_hub(model, np.where(IDS > 60, 5, IDS))


def renamed(folder, to, rename):
    """A copy of a folder whose tensors have other names."""
    to.mkdir()
    (to / "config.json").write_text((folder / "config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / stored.WHOLE)
    safetensors.numpy.save_file({rename(k): v for k, v in tensors.items()}, to / stored.WHOLE)
    return to


def test_the_text_part_of_a_multimodal_checkpoint(multimodal, tmp_path, capsys):
    """Breaks when the text part's tensors are not found under the names of transformers 5 or those
    of earlier versions, or its reading is not said, or a converted base still claims a vision
    tower.
    """
    folder, want = multimodal
    ids = np.where(IDS > 60, 5, IDS)
    saved = safetensors.numpy.load_file(folder / stored.WHOLE)
    old = any(name.startswith("language_model.model.") for name in saved)
    parts = ("language_model.model.", "model.language_model.")
    this, other = parts if old else parts[::-1]
    both = folder, renamed(folder, tmp_path / "other", lambda name: name.replace(this, other))
    for source in both:
        base = bases.load_base(source, need_tokenizer=False)
        close(logits(base.config, base.params, ids), want, 1e-4)
        assert bases.identify(source) == (base.config, base.fingerprint)
        opener = functools.partial(lambda at, name: (at / name).open("rb"), source)
        norm = remote_rows.read_rows(source, opener, "model.norm.weight")
        np.testing.assert_array_equal(norm[0], base.params["norm"]["scale"])
    said = capsys.readouterr().err
    assert "not of this model and not read" in said and "vision_tower" in said
    base = convert_base.convert(folder, tmp_path / "text")
    raw = json.loads((tmp_path / "text" / "config.json").read_text())
    assert raw["architectures"] == ["Gemma3ForCausalLM"] and "vision_config" not in raw
    import torch
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "text", dtype=torch.float32
    )
    close(run_hub(again, ids), want, 1e-5)
    assert base.fingerprint == bases.identify(tmp_path / "text")[1]


def test_multimodal_configurations(capsys):
    """Breaks when a field that only the whole states is lost, a text part of an unknown family is
    read as another, or the reading is not said.
    """
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7}
    raw = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", **small, "sliding_window": 1024}
        | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        "vision_config": {"hidden_size": 8, "anything": 1},
        "mm_tokens_per_image": 256,
    }
    config = config_json.parse_config(raw, "multi.json")
    assert config == dataclasses.replace(
        config_json.parse_config(raw | {"architectures": []}, "multi.json"), vocab_size=262208
    )
    assert config.windows == (1024,) * 5 + (0, 1024) and config.tie_word_embeddings
    assert config.ropes == ("local",) * 5 + ("global", "local")
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)
    assert config.rope_scaling == rope.LinearScaling(8.0) and config.head_dim == 256
    said = capsys.readouterr().err
    assert "of Gemma3ForConditionalGeneration the text part is read, as Gemma3ForCausalLM" in said
    llava = raw | {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "tie_word_embeddings": True,
        "text_config": {**small, "vocab_size": 64, "num_attention_heads": 4},
    }
    plain = config_json.parse_config(llava)
    assert plain.tie_word_embeddings and not plain.norm_plus_one
    for change, message in (
        ({"text_config": None}, "text_config of LlavaForConditionalGeneration is None"),
        ({"text_config": {"model_type": "opt"}}, "of model_type 'opt', which is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
    ):
        with pytest.raises(UserError, match=message):
            config_json.parse_config(llava | change)


# ------------------------------------------------------------------------------- configurations

RAW = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def parse(name, **fields):
    return config_json.parse_config(RAW | {"architectures": [name]} | fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("Gemma2", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("Gemma2", {"sliding_window": None}, "sliding_window is null, and layers have one"),
        ("Gemma2", {"sliding_window_pattern": 3}, "sliding_window_pattern is 3.*only 2"),
        ("Gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("Gemma2", {"layer_types": ["full_attention"]}, "layer_types is"),
        ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("Gemma3", {"rope_parameters": {"rope_theta": 1e4}}, "it must have the RoPE of full"),
        (
            "Gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "RoPE of sliding_attention has factor 2.0",
        ),
        (
            "Gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "RoPE type 'yarn' of sliding_attention",
        ),
        ("Gemma3", {"rope_local_base_freq": -1.0}, "rope_theta of sliding_attention is -1.0"),
        ("Llama", {"rope_local_base_freq": 1e4}, "rope_local_base_freq is 10000.0, an unknown"),
        ("Llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("Phi3", {"rope_scaling": {"type": "longrope"}}, "RoPE type 'longrope' is not supported"),
        ("Phi3", {"rope_scaling": {"type": "su"}}, "RoPE type 'su' is not supported"),
        (
            "Phi3",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "RoPE type yarn of phi3 is not supported; supported: default",
        ),
        ("Phi3", {"partial_rotary_factor": 0.4}, "RoPE rotates 3 numbers of a head of 8"),
        ("Phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ("Granite", {"residual_multiplier": 0}, "residual_multiplier is 0"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers is"),
        ("SmolLM3", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers is"),
        ("SmolLM3", {"use_sliding_window": True, "sliding_window": 5}, "sliding_window is 5"),
        ("Olmo2", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ],
)
def test_what_is_not_computed_is_refused(name, fields, message):
    """Breaks when a field that changes the logits is passed over."""
    with pytest.raises(UserError, match=message):
        parse(f"{name}ForCausalLM", **fields)


def test_defaults_and_harmless_fields():
    """Breaks when a family's own defaults are lost where config.json omits a field, null stands
    for a default where it means "none", or the hub's files are refused for what they carry.
    """
    gemma2 = parse("Gemma2ForCausalLM")
    assert (gemma2.attention_softcap, gemma2.final_softcap) == (50.0, 30.0)
    assert gemma2.windows == (4096, 0, 4096) and gemma2.head_dim == 256 and gemma2.num_kv_heads == 4
    assert gemma2.attention_scale is None  # 256, as the head
    assert parse("Gemma2ForCausalLM", attn_logit_softcapping=None).attention_softcap is None
    gemma3 = parse("Gemma3ForCausalLM", sliding_window_pattern=2, sliding_window=5)
    assert gemma3.windows == (5, 0, 5) and gemma3.ropes == ("local", "global", "local")
    assert gemma3.final_softcap is None
    saved = {"_sliding_window_pattern": 6, "layer_types": TYPES, "hidden_activation": None}
    assert parse("Gemma3ForCausalLM", **saved, sliding_window=5) == gemma3
    assert parse("SmolLM3ForCausalLM", num_hidden_layers=4).ropes == ("global",) * 3 + ("none",)
    smollm3 = parse("SmolLM3ForCausalLM", no_rope_layer_interval=2, rope_theta=5e6)
    assert smollm3.ropes == ("global", "none", "global") and smollm3.rope_theta == 5e6
    assert parse("SmolLM3ForCausalLM").rope_theta == 2e6
    stated = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}
    stated["layer_types"] = ["full_attention"] * 3
    assert parse("SmolLM3ForCausalLM", **stated) == parse("SmolLM3ForCausalLM")
    granite = parse("GraniteForCausalLM")
    assert granite.attention_scale == 1.0 and granite.rms_norm_eps == 1e-6
    code = {"AutoConfig": "configuration_phi3.Phi3Config"}
    code["AutoModelForCausalLM"] = "modeling_phi3.Phi3ForCausalLM"
    phi3 = parse("Phi3ForCausalLM", auto_map=code, sliding_window=2047, embd_pdrop=0.1)
    assert phi3.fused and phi3.windows == (2047,) * 3 and phi3.rms_norm_eps == 1e-5
    with pytest.raises(UserError, match="auto_map names the repository's own code"):
        parse("Phi3ForCausalLM", auto_map={"AutoModelForCausalLM": "other.Phi3ForCausalLM"})


def test_models_that_no_architecture_computes():
    """Breaks when a model is written as one that lacks a part of it."""
    for fields in (
        {"norms": "both"},
        {"final_softcap": 3.0},
        {"ropes": ("none", "local"), "local_rope_theta": 9.0},
        {"rotary_dim": 4},
        {"fused": True, "rope_scaling": rope.LinearScaling(2.0)},
    ):
        with pytest.raises(UserError, match="no architecture of the hub"):
            config_json.hub_config(dataclasses.replace(TINY, **fields), "float32", {})
    for fields, message in (
        ({"norms": "around"}, "norms of the model is 'around'; choose from before, after, both"),
        ({"activation": "relu"}, "activation of the model is 'relu'"),
        ({"ropes": ("none",)}, "give one of global, local, none for each of the 2 layers"),
        ({"ropes": ("local", "global")}, "local_rope_theta of the model is missing"),
        ({"attention_softcap": 0.0}, "attention_softcap of the model is 0"),
        ({"rotary_dim": 10}, "RoPE rotates 10 numbers of a head of 8"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(TINY, **fields)


# Everything that families compute differently, in two programs.
GEMMA_LIKE = dataclasses.replace(
    TINY,
    num_layers=3,
    tie_word_embeddings=True,
    norms="both",
    norm_plus_one=True,
    activation="gelu_tanh",
    qk_norm=True,
    embedding_multiplier=32**0.5,
    attention_scale=0.4,
    attention_softcap=2.0,
    final_softcap=3.0,
    windows=(6, 0, 6),
    ropes=("local", "global", "local"),
    local_rope_theta=20.0,
    rope_scaling=rope.YarnScaling(4.0, 16, 1.2),
)
OTHERS = dataclasses.replace(
    TINY,
    num_layers=3,
    norms="after",
    qk_projection_norm=True,
    embedding_multiplier=3.0,
    residual_multiplier=0.5,
    attention_scale=0.9,
    logits_divisor=4.0,
    rotary_dim=4,
    rope_theta=9.0,
    ropes=("global", "none", "global"),
)
CONFIGS = {"gemma-like": GEMMA_LIKE, "others": OTHERS}


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@functools.lru_cache
def params_of(config):
    return random_params(config)


@functools.partial(jax.jit, static_argnums=0)
def run(config, variables, x, at, real, prefix=None):
    return llama.Llama(config, lora_scale=0.5).apply(
        variables, x, at, real, prefix=prefix, return_kv=True
    )


rotate_keys = jax.jit(rope.rotate_keys, static_argnums=0)


def test_prefix_and_continuation_are_the_whole_text(config):
    """Breaks when keys of a prefix are rotated by another layer's RoPE, LoRA bypasses a norm, or a
    window is counted otherwise than in one pass.
    """
    variables = {
        "params": params_of(config),
        "lora": random_lora(config, targets=lora.PROJECTIONS),
    }
    real = np.ones((1, 24), bool)
    hidden, (k, v) = run(config, variables, IDS, positions(0, 24), real)
    first = np.tile(positions(0, 14), (2, 1))
    prefix = rotate_keys(config, k[:, :, :14], first), v[:, :, :14], np.ones((2, 14), bool), first
    got, kv = run(config, variables, IDS[:, 14:], positions(14, 24), real[:, 14:], prefix)
    close(got, hidden[:, 14:])
    for mine, theirs in zip(kv, (k, v), strict=True):
        close(mine, theirs[:, :, 14:])
    uniform = dataclasses.replace(config, ropes=())
    wrong = rotate_keys(uniform, k[:, :, :14], first), *prefix[1:]
    other, _ = run(config, variables, IDS[:, 14:], positions(14, 24), real[:, 14:], wrong)
    assert np.abs(other - got).max() > 0.01, "the layers' RoPEs are alike"


def test_lora_equals_merged_weights(config):
    """Breaks when a projection's update is added behind what follows the projection."""
    params, adapters_ = params_of(config), random_lora(config, targets=lora.PROJECTIONS)

    def merge(path, w):
        keys = [key.key for key in path]
        if keys[-1] != "kernel":
            return w
        pair = adapters_["layers"][keys[1]][keys[2]]
        return w + 0.5 * jnp.einsum("lir,lro->lio", pair["a"], pair["b"])

    merged = jax.tree_util.tree_map_with_path(merge, params)
    real = np.ones((1, 24), bool)
    want, _ = run(config, {"params": merged}, IDS, positions(0, 24), real)
    got, _ = run(config, {"params": params, "lora": adapters_}, IDS, positions(0, 24), real)
    plain, _ = run(config, {"params": params}, IDS, positions(0, 24), real)
    close(got, want, 1e-4)
    assert np.abs(plain - got).max() > 0.1


@pytest.mark.nightly
def test_rematerialised_and_unrolled_layers_compute_the_same(config):
    """Breaks when remat or unrolling changes values or gradients: a residual that "frozen" saves is
    read for another, or the backward pass takes another layer's RoPE.
    """
    params, real = params_of(config), np.ones((1, 12), bool)
    adapters_ = random_lora(config, targets=lora.PROJECTIONS)
    x = llama.embed(params, config, IDS[:, :12], jnp.float32)

    def program(remat, unroll, at=None):
        model = llama.Llama(config, lora_scale=0.5, remat=remat, unroll=unroll)

        def value(x, adapters_):
            variables = {"params": params, "lora": adapters_}
            hidden, _ = model.apply(variables, x, positions(0, 12), real, at=at)
            head = llama.head(params, config)
            return jnp.sum(jnp.sin(head.logits(hidden if at is not None else hidden[:, 9:])))

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))

    want = program("none", 1)(x, adapters_)
    for how in (
        ("frozen", 1),
        ("dots", 1),
        ("full", 3),
        ("frozen", 1, np.arange(9, 12)),  # the last layer for some positions only
    ):
        got = program(*how)(x, adapters_)
        jax.tree.map(lambda mine, theirs: close(mine, theirs, 1e-4), got, want)


def test_greedy_decoding_equals_the_full_forward_pass(config):
    """Breaks when decoding embeds, rotates, masks or caps otherwise than one pass over the text."""
    params, n = params_of(config), 10
    decoder = Decoder(FrozenModel(llama.Llama(config), params), jnp.zeros((1, config.hidden_size)))
    prompts = greedy_loop.Prompts(
        jnp.asarray(IDS[:, :9]), jnp.full(2, 9), jnp.zeros(2, int), jnp.full(2, n)
    )
    prefix = no_prefix(config, 2, jnp.float32)
    out = decoding_helper.greedy(decoder, prefix, prompts, max_new_tokens=n, stop_ids=())
    assert not np.asarray(out.ties).any()
    text = np.concatenate([IDS[:, :9], out.ids], 1)
    every = np.asarray(logits(config, params, text))
    np.testing.assert_array_equal(every[:, 8:-1].argmax(-1), text[:, 9:])
    assert len(set(text[:, 9:].ravel().tolist())) > 4


def test_on_a_mesh(config):
    """Breaks when a norm of whole projections sees one device's heads only, or what is scanned by
    layer cannot be split.
    """
    params = params_of(config)
    want = logits(config, params, IDS)
    with eight_devices():
        mesh = sharding.make_mesh(sharding.MeshConfig(1, 2, 2), jax.devices()[:4])
        placement = sharding.Placement(mesh, config)
        shardings = placement.tree(params)
        kernel = shardings["layers"]["self_attn"]["q_proj"]["kernel"]
        assert tuple(kernel.spec) == (None, "fsdp", "tensor")
        with placement.active():
            got = logits(config, jax.device_put(params, shardings), IDS)
        close(jax.device_get(got), want)


def test_further_rotation_is_that_of_each_layer(config):
    """Breaks when an exported cache turns all layers' keys by one RoPE, or turns what is not
    rotated.
    """
    shape = (config.num_layers, 2, 5, config.num_kv_heads, config.head_dim)
    k, at = RNG.standard_normal(shape).astype(np.float32), np.tile(positions(3, 8), (2, 1))
    offsets = np.asarray([4, 11])
    want = np.asarray(rotate_keys(config, k, at + offsets[:, None]))
    close(hf_cache.rotate_further(config, np.asarray(rotate_keys(config, k, at)), offsets), want)
    other = dataclasses.replace(config, ropes=(), rotary_dim=None)
    assert np.abs(np.asarray(rotate_keys(other, k, at + offsets[:, None])) - want).max() > 0.1


# -------------------------------------------------------------------------------------- soft caps


def test_a_soft_cap_of_scores_and_its_gradient():
    """Breaks when the hand-written backward pass of attention misses the cap's slope, or the cap
    is put before the scale or behind the mask.
    """
    q, k, v = (RNG.standard_normal((2, 9, n, 8)).astype(np.float32) for n in (4, 2, 2))
    p_k, p_v = (RNG.standard_normal((2, 5, 2, 8)).astype(np.float32) for _ in range(2))
    real, p_real = np.ones((2, 9), bool), np.ones((2, 5), bool)
    real[1, 3] = p_real[0, 2] = False

    def ours(q, k, v, p_k, p_v, softcap=1.3):
        prefix = p_k, p_v, p_real
        return attention.attend(q, k, v, real, prefix, scale=0.7, softcap=softcap)

    def plain(q, k, v, p_k, p_v):
        keys, values = (
            jnp.repeat(jnp.concatenate(both, 1), 2, axis=2) for both in ((p_k, k), (p_v, v))
        )
        seen = jnp.concatenate(
            [jnp.repeat(p_real[:, None], 9, 1), real[:, None] & llama.causal_mask(9)], 2
        )
        scores = 1.3 * jnp.tanh(0.7 * jnp.einsum("btnh,bsnh->bnts", q, keys) / 1.3)
        scores = jnp.where(seen[:, None], scores, -1e30)
        out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1), values)
        return out.reshape(2, 9, -1)

    def graded(function):
        return jax.jit(
            jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(3 * function(*x))), tuple(range(5)))
        )

    arrays = (q, k, v, p_k, p_v)
    got, want = graded(ours)(*arrays), graded(plain)(*arrays)
    jax.tree.map(lambda mine, theirs: close(mine, theirs, 1e-4), got, want)
    uncapped = graded(functools.partial(ours, softcap=None))(*arrays)
    assert np.abs(uncapped[1][0] - got[1][0]).max() > 0.01
    for name in ("cudnn", "splash"):
        with pytest.raises(UserError, match=f"attention {name} has no soft cap; choose xla"):
            attention.attend(q, k, v, real, softcap=1.3, implementation=name)
        platform = {"cudnn": "gpu", "splash": "tpu"}[name]
        sizes_ = {"dtype": jnp.bfloat16, "head_dim": 128}
        assert attention.supported(name, platform, **sizes_) is None
        assert "soft cap" in attention.supported(name, platform, **sizes_, softcap=True)
    with pytest.raises(UserError, match="attention is 'cudnn', but"):
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        attention_choice.choose("cudnn", GEMMA_LIKE, mesh, rows=1, length=8, dtype=jnp.bfloat16)


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_kernels_scale_scores_as_xla_does(name, monkeypatch):
    """Breaks when a kernel scales by H^-1/2 whatever it is told, or twice."""
    on_cpu(monkeypatch)
    q, k, v = (RNG.standard_normal((1, 9, n, 8)).astype(np.float32) for n in (4, 2, 2))
    real = np.ones((1, 9), bool)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def attend(name, scale):
        return attention.attend(q, k, v, real, scale=scale, implementation=name)

    want = np.asarray(attend("xla", 1.5))
    close(attend(name, 1.5), want)
    assert np.abs(np.asarray(attend("xla", None)) - want).max() > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_the_frozen_head_s_gradient_knows_caps_and_divisors(tied):
    """Breaks when the loss, which forms the gradient of hidden states by hand, forms that of plain
    logits.
    """
    h = RNG.standard_normal((2, 7, 8)).astype(np.float32)
    w = RNG.standard_normal((17, 8) if tied else (8, 17)).astype(np.float32)
    labels, g = RNG.integers(0, 17, (2, 7)), RNG.standard_normal((2, 7)).astype(np.float32)

    def ours(h, **how):
        return jnp.sum(loss.frozen_head_losses(h, Head(w, tied=tied, **how), labels, 3) * g)

    def plain(h):
        logits_ = 2.0 * jnp.tanh(h @ (w.T if tied else w) / 0.8 / 2.0)
        chosen = jnp.take_along_axis(logits_, labels[..., None], -1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits_, -1) - chosen) * g)

    how = {"divisor": 0.8, "softcap": 2.0}
    got = jax.jit(jax.value_and_grad(functools.partial(ours, **how)))(h)
    want = jax.jit(jax.value_and_grad(plain))(h)
    jax.tree.map(close, got, want)
    for name in how:
        other = jax.jit(jax.grad(functools.partial(ours, **{name: how[name]})))(h)
        assert np.abs(other - want[1]).max() > 0.05


# ---------------------------------------------------------------------------------- compressors

TEXTS = [np.random.default_rng(n).integers(3, 64, n).tolist() for n in (5, 12)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def ae_loss(config, compression, tree, params):
    base = FrozenModel(llama.Llama(config, lora_scale=0.5, remat="frozen"), params)
    contexts = Contexts(*segment_contexts(TEXTS, compression), compression.k)
    packed = pack([[targets.ae_target(text, FRAMING)] for text in TEXTS], 1, 13, 13)
    written = encoder.compress(base, tree, contexts, compression)
    decoder, batch = Decoder.of(base, tree), {"ae": packed}
    losses = loss.label_losses(decoder, written, batch, {"ae": ()}, compression.position_layout, 5)
    return loss.objective_sums(losses, batch)["ae"][0]


graded_ae_loss = jax.jit(jax.value_and_grad(ae_loss, argnums=2), static_argnums=(0, 1))


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["icae", "x500"])
def test_a_compressor_learns_on_a_gemma(method):
    """Breaks when gradients do not reach the adapter through memory, four norms and soft caps, or
    are those of another function: the loss must fall as the gradient says.
    """
    compression, params = CompressionConfig(method, k=3, rate=4), params_of(GEMMA_LIKE)
    tree = random_trained(GEMMA_LIKE, 3)
    before, gradient = graded_ae_loss(GEMMA_LIKE, compression, tree, params)
    square = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient["lora"]))
    step = 1e-2 / square
    moved = jax.tree.map(lambda w, g: w - step * g, tree, gradient)
    after, _ = graded_ae_loss(GEMMA_LIKE, compression, moved, params)
    assert float(before - after) == pytest.approx(1e-2, rel=0.1)


@pytest.mark.nightly
def test_a_quantised_gemma_computes_what_its_numbers_say():
    """Breaks when a norm's scale is quantised, or the multiplier of embeddings or the head's cap is
    lost on quantised leaves.
    """
    compression, params = CompressionConfig(k=3, rate=4), params_of(GEMMA_LIKE)
    args = GEMMA_LIKE, compression, random_trained(GEMMA_LIKE, 3)
    stored_ = schemes.quantize_params(params, "int8+ends")
    same = dequantized(stored_)
    assert is_quantized(stored_["embed"])
    (got, d_got), (want, d_want) = graded_ae_loss(*args, stored_), graded_ae_loss(*args, same)
    close(got, want)
    jax.tree.map(lambda mine, theirs: close(mine, theirs, 1e-4), d_got["lora"], d_want["lora"])
    assert abs(float(graded_ae_loss(*args, params)[0]) - float(want)) > 1e-3


def test_memory_starts_among_multiplied_embeddings():
    """Breaks when memory tokens start many times smaller than the embeddings among which they
    stand, or are multiplied as ids are.
    """
    config = dataclasses.replace(GEMMA_LIKE, embedding_multiplier=50.0)
    embed = 0.02 * RNG.standard_normal((64, 32)).astype(np.float32)
    init = functools.partial(trained.init, jax.random.key(0), embed, config, lora.LoraConfig(2))
    table = init(CompressionConfig(k=400, rate=1), trigger_id=7)["memory_table"]
    assert float(table[:400].std()) == pytest.approx(50 * embed.std(), rel=0.1)
    close(table[400], 50 * embed[7])
    base = FrozenModel(llama.Llama(config), {"embed": jnp.asarray(embed)})
    decoder = Decoder(base, table)
    close(decoder.embed(np.asarray([targets.AE, 7])), np.stack([table[400], 50 * embed[7]]))


# ----------------------------------------------------------------------- storage, identity, exports


def test_fused_tensors_are_the_rows_of_their_parts(tmp_path):
    """Breaks when q, k and v, or gate and up, are taken from each other's rows, in whole or by
    shards.
    """
    config = dataclasses.replace(TINY, fused=True)
    params = random_params(config)
    weights.save_params(tmp_path, config, params, "float32")
    hub = safetensors.numpy.load_file(tmp_path / stored.WHOLE)
    layer = params["layers"]["self_attn"]
    want = np.concatenate([layer[f"{n}_proj"]["kernel"][1].T for n in "qkv"])
    np.testing.assert_array_equal(hub["model.layers.1.self_attn.qkv_proj.weight"], want)
    assert {name: x.shape for name, x in hub.items()} == tensor_names.hub_shapes(config)
    jax.tree.map(np.testing.assert_array_equal, weights.load_params(tmp_path, config), params)
    config_json_ = config_json.hub_config(config, "float32", {})
    assert config_json_["architectures"] == ["Phi3ForCausalLM"]


def test_fingerprints_hold():
    """Breaks when a field that a base does not use, or that only says how it is stored, changes its
    fingerprint, or one that changes what it computes does not.
    """
    params = random_params(TINY)
    plain = bases.fingerprint(TINY, params)
    assert bases.fingerprint(dataclasses.replace(TINY, fused=True), params) == plain
    others = [
        bases.fingerprint(dataclasses.replace(TINY, **change), params)
        for change in ({"final_softcap": 30.0}, {"norms": "after"}, {"ropes": ("none", "global")})
    ]
    assert len({plain, *others}) == 4


def adapter_on(config, tokenizer):
    return adapters.Adapter(
        CompressionConfig("icae", k=4, rate=4, layout="servable"),
        lora.LoraConfig(4, 2.0, 0.0),
        targets.make_template("plain", tokenizer),
        random_trained(config, 4),
        "base",
        "fingerprint",
    )


def test_exports_that_would_be_read_otherwise_are_refused(tiny_tokenizer):
    """Breaks when an adapter of separate projections is written for PEFT, which would adapt them as
    one, or vectors that are not multiplied go where they would be.
    """
    granite = dataclasses.replace(TINY, embedding_multiplier=3.0)
    assert architectures.input_multiplier(granite) == 3.0
    assert architectures.input_multiplier(TINY) == 1.0
    for config, message in (
        (dataclasses.replace(TINY, fused=True), r"qkv_proj \(q_proj, k_proj, v_proj\)"),
        (granite, "multiplies input embeddings by 3"),
    ):
        with pytest.raises(UserError, match=message):
            peft_folder.readme(adapter_on(config, tiny_tokenizer), config)
    gemma = parse("Gemma3ForCausalLM", sliding_window=5, layer_types=TYPES)
    assert architectures.input_multiplier(gemma) == 1.0

    one = np.ones((1, 1), int)
    slots = memory.Slots(np.zeros((1, 1, 32)), one > 0, one - 1, one[0], one)
    for config in (granite, parse("Gemma2ForCausalLM")):
        base = bases.Base(config, {}, tiny_tokenizer, (2,), "fingerprint", "base")
        decoder = Decoder(FrozenModel(llama.Llama(config), {}), np.zeros((1, 32)))
        reader = Reader(base, adapter_on(config, tiny_tokenizer), decoder)
        with pytest.raises(UserError, match="vLLM does the same to prompt embeddings"):
            prompt_embeds.check_readable(slots, reader)
    reader = dataclasses.replace(reader, base=dataclasses.replace(base, config=gemma))
    prompt_embeds.check_readable(slots, reader)


def test_first_layers():
    """Breaks when what differs by layer is cut off wrongly."""
    first = GEMMA_LIKE.first_layers(2)
    assert (first.num_layers, first.windows, first.ropes) == (2, (6, 0), ("local", "global"))
    assert TINY.first_layers(1) == dataclasses.replace(TINY, num_layers=1)
