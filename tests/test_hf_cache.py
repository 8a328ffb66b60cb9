"""A filled cache, read by transformers' own `generate`."""

import dataclasses
import importlib.util
import runpy

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, close, random_params
from export_helpers import IDS, NEW, QUESTIONS, make, named, ours, reader_of

import icae_jax
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.method import METHODS
from icae_jax.errors import UserError
from icae_jax.interop.export import hf_cache
from icae_jax.interop.export.reader import OBJECTIVES, Reader
from icae_jax.interop.hub import base as bases
from icae_jax.models import rope
from icae_jax.workflows import inspection

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# An export knows kinds of memory: icae and x500 have every layout of theirs, others their default.
LAYOUTS = [
    (name, layout)
    for name, method in METHODS.items()
    for layout in method.layouts
    if name in ("icae", "x500") or layout == method.default_layout
]


@pytest.fixture(scope="module")
def base(tiny_base):
    return bases.load_base(tiny_base)


@pytest.fixture(scope="module")
def hub_model(tiny_base):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


def script(folder):
    """The module use_cache.py of an export."""
    spec = importlib.util.spec_from_file_location("use_cache", folder / "use_cache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def export(base, folder, objective, *how):
    """(use_cache module, what we decode, compressor, memory)."""
    compressor, memory = make(base, *how)
    hf_cache.save_cache(folder, named(memory), reader_of(compressor), objective)
    return script(folder), ours(compressor, memory, objective), compressor, memory


def theirs(used, model, base, objective):
    return used.generate(
        model, base.tokenizer, QUESTIONS if objective == "ask" else [""] * 5, max_new_tokens=NEW
    )


# A template says how to ask, nothing of restoring.
@pytest.mark.parametrize(
    ("objective", "template"),
    [("ask", "plain"), ("ask", "mistral"), ("ask", "v1"), ("restore", "mistral")],
)
@pytest.mark.parametrize(("method", "layout"), LAYOUTS)
def test_unpatched_generate_decodes_what_we_decode(
    base, hub_model, tmp_path, method, layout, template, objective
):
    """Breaks when a key sits at another position than in our decoder, padded segments are seen, or
    head or special rows are lost.
    """
    used, want, _, _ = export(base, tmp_path / "out", objective, method, layout, template)
    assert theirs(used, hub_model, base, objective) == want
    # Another text's memory is another answer.
    used.TENSORS["key"], used.TENSORS["value"] = (
        used.TENSORS[name].roll(1, 1) for name in ("key", "value")
    )
    used.TENSORS["attention_mask"] = used.TENSORS["attention_mask"].roll(1, 0)
    wrong = theirs(used, hub_model, base, objective)
    assert sum(a != b for a, b in zip(wrong, want, strict=True)) >= 4


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", ["icae", "x500"])  # one of each kind of memory
def test_turn_and_mask_are_needed(base, hub_model, tmp_path, monkeypatch, method, objective):
    """Breaks when the test above could not notice: keys left where they are, or padding seen, must
    give other texts.
    """
    used, want, compressor, memory = export(
        base, tmp_path / "out", objective, method, "uniform", "mistral"
    )
    used.TENSORS["attention_mask"] = torch.ones_like(used.TENSORS["attention_mask"])
    unmasked = theirs(used, hub_model, base, objective)
    assert unmasked[3] == want[3]  # of the most segments, so without padding
    assert all(unmasked[i] != want[i] for i in (0, 1, 2, 4))
    monkeypatch.setattr(hf_cache, "rotate_further", lambda config, k, offsets: k)
    hf_cache.save_cache(tmp_path / "unturned", named(memory), reader_of(compressor), objective)
    unturned = theirs(script(tmp_path / "unturned"), hub_model, base, objective)
    assert sum(a != b for a, b in zip(unturned, want, strict=True)) >= 4


YARN = rope.YarnScaling(factor=4.0, original_max_position_embeddings=64, attention_factor=1.3)
FAMILIES = {
    "mistral": {"rope_scaling": YARN, "windows": (70, 70)},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "rope_scaling": rope.LinearScaling(2.0)},
    "gemma3_text": {
        "norms": "both",
        "norm_plus_one": True,
        "activation": "gelu_tanh",
        "qk_norm": True,
        "embedding_multiplier": 32**0.5,
        "windows": (70, 0),
        "ropes": ("local", "global"),
        "local_rope_theta": 20.0,
    },
    "granite": {"embedding_multiplier": 3.0, "logits_divisor": 0.5},
}


# K behind a head holds both what x500 kept and what the base made of the head, as of ICAE's slots.
@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param("mistral", "icae", marks=pytest.mark.nightly),
        pytest.param("qwen2", "x500", marks=pytest.mark.nightly),
        pytest.param("qwen3", "x500", marks=pytest.mark.nightly),
        ("gemma3_text", "x500"),
        ("granite", "icae"),
    ],
)
def test_every_family(tmp_path, tiny_tokenizer, family, method, monkeypatch):
    """Breaks when K is kept without a family's bias or norm, what RoPE scales is scaled again by
    the turn, or windows cut off what our decoder sees.
    """
    monkeypatch.setattr(
        bases.tokenizers, "read_alike", lambda folder: True
    )  # of that family, whatever its tokenizer
    config = dataclasses.replace(TINY, **FAMILIES[family])
    bases.save_base(
        tmp_path / "base", config, random_params(config), tiny_tokenizer, dtype="float32"
    )
    base = bases.load_base(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32
    )
    assert base.config == config and model.config.model_type == family
    for objective in OBJECTIVES:
        used, want, _, _ = export(
            base, tmp_path / objective, objective, method, "uniform", "mistral"
        )
        assert theirs(used, model, base, objective) == want


@pytest.mark.parametrize(
    ("method", "objective"), [("icae", "ask"), ("icae", "restore"), ("sac", "ask")]
)
def test_a_decoder_with_a_lora(base, tiny_base, tmp_path, method, objective):
    """Breaks when the cache is computed without the decoder's LoRA, which slots run through, and
    the head before K and V; or transformers decodes without it.
    """
    compressor, memory = make(base, method, "", "mistral", True)
    hf_cache.save_cache(tmp_path / "out", named(memory), reader_of(compressor), objective)
    used, want = script(tmp_path / "out"), ours(compressor, memory, objective)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"give with_lora\(model\)"):
        theirs(used, model, base, objective)
    with torch.no_grad():
        assert theirs(used, used.with_lora(model), base, objective) == want
    plain = dataclasses.replace(compressor.adapter, trained=without(compressor.adapter.trained))
    cache = hf_cache.filled_cache(
        memory, Reader(base, plain, Decoder.of(compressor.decoder.base, plain.trained)), objective
    )
    assert np.abs(cache.key - np.moveaxis(used.TENSORS["key"].numpy(), 3, 2)).max() > 0.01


def without(trained):
    return {name: x for name, x in trained.items() if name != "decoder_lora"}


def test_a_cache_serves_many_calls(base, hub_model, tmp_path):
    """Breaks when a call spoils the next one's cache, rows are mixed up, or a prompt of ordinary
    tokens cannot be given as ids.
    """
    used, want, compressor, memory = export(base, tmp_path / "out", "ask", "x500", "clean", "plain")
    both = used.generate(hub_model, base.tokenizer, QUESTIONS[:2], rows=[3, 3], max_new_tokens=NEW)
    assert (
        both == [g.ids for g in compressor.ask(memory[3], QUESTIONS[:2], NEW, details=True)]
        and both[0] != both[1]
    )
    assert theirs(used, hub_model, base, "ask") == want == theirs(used, hub_model, base, "ask")
    ids = torch.tensor(
        [
            used.INFO["before"]
            + base.tokenizer(QUESTIONS[1], add_special_tokens=False)["input_ids"]
            + used.INFO["after"]
        ]
    )
    for _ in range(2):
        cache, mask = used.load(hub_model, [1])
        entries = cache.get_seq_length()
        out = hub_model.generate(
            input_ids=ids,
            attention_mask=torch.cat([mask, torch.ones_like(ids)], 1),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=0,
        )
        assert (
            out[0, ids.shape[1] :].tolist() == want[1]
            and cache.get_seq_length() > entries == mask.shape[1]
        )


def test_what_is_written(base, hub_model, tmp_path):
    """Breaks when a reader cannot tell whose memory it is, or shapes and dtype are others than
    documented.
    """
    used, _, compressor, memory = export(
        base, tmp_path / "out", "ask", "x500", "reference", "mistral"
    )
    P = 2 + int(memory.tokens.max())
    assert (
        used.TENSORS["key"].shape
        == used.TENSORS["value"].shape
        == (TINY.num_layers, 5, TINY.num_kv_heads, P, TINY.head_dim)
    )
    assert used.TENSORS["attention_mask"].sum(1).tolist() == (2 + memory.tokens).tolist()
    close(used.TENSORS["special"].numpy(), compressor.trained["memory_table"][-3:], 0)
    want = {
        "format_version": 1,
        "icae_jax_version": icae_jax.__version__,
        "ids": IDS,
        "objective": "ask",
        "method": "x500",
        "layout": "reference",
        "before": [-1],
        "after": [4],
        "stop": [2],
        "room": 256 - P,
        "base": str(base.path),
        "base_fingerprint": base.fingerprint,
        "base_identity": base.identity,
        "adapter_fingerprint": compressor.adapter.fingerprint,
        "decoder_lora": False,
        "dtype": "float32",
    }
    assert want == used.INFO
    hf_cache.save_cache(
        tmp_path / "half", named(memory[[1]], ["b"]), reader_of(compressor), "restore", "bfloat16"
    )
    half = script(tmp_path / "half")
    assert (
        half.INFO["before"] == [1]
        and half.INFO["after"] == []
        and half.TENSORS["key"].dtype == torch.bfloat16
    )
    assert half.TENSORS["key"].shape[3] == 4  # no padding for the texts that were left out, no head
    cache, _ = half.load(hub_model)
    assert cache.layers[0].keys.dtype == torch.float32  # the model's


def test_use_cache_runs_alone(base, tiny_base, tmp_path, capsys, monkeypatch):
    """Breaks when the script does not run from a shell, or prints other texts than we restore."""
    compressor, memory = make(base)
    hf_cache.save_cache(
        tmp_path / "out", named(memory[:2], IDS[:2]), reader_of(compressor), "restore"
    )
    file = tmp_path / "out" / "cache.safetensors"
    about = inspection.describe(file)
    assert "use_cache.py" in about["what"] and about["objective"] == "restore"
    with pytest.raises(UserError, match="is an export for transformers"):
        compressor.load_memory(file)
    monkeypatch.setattr("sys.argv", ["use_cache.py", str(tiny_base)])
    runpy.run_path(str(tmp_path / "out" / "use_cache.py"), run_name="__main__")
    want = compressor.restore(memory[:2], 128)
    assert capsys.readouterr().out.splitlines() == [f"a\t{want[0]}", f"b\t{want[1]}"]


def test_turned_keys_are_keys_rotated_further(base):
    """Breaks when a turn is of other frequencies, goes the other way, scales what was scaled
    before, or touches keys that stay.
    """
    rng = np.random.default_rng(0)
    k = rng.standard_normal((2, 3, 5, 2, 8)).astype(np.float32)
    at, turns = rng.integers(0, 60, (3, 5)), np.array([0, 7, -19])
    yarn = rope.YarnScaling(factor=4.0, original_max_position_embeddings=32, attention_factor=1.3)
    for config in (TINY, dataclasses.replace(TINY, rope_scaling=yarn)):
        rotated = np.asarray(rope.rotate_keys(config, jnp.asarray(k), jnp.asarray(at)))
        turned = hf_cache.rotate_further(config, rotated, turns)
        close(turned, rope.rotate_keys(config, jnp.asarray(k), jnp.asarray(at + turns[:, None])))
        np.testing.assert_array_equal(turned[:, 0], rotated[:, 0])
        assert np.abs(turned[:, 1:] - rotated[:, 1:]).max() > 0.5
    half = rotated.astype(jnp.bfloat16)
    assert hf_cache.rotate_further(TINY, half, turns).dtype == half.dtype


def test_room(base, hub_model, tmp_path):
    """Breaks when more is promised than the base has positions for, or than it sees where it
    attends to a window.
    """
    compressor, memory = make(base)
    P = int(memory.tokens.max())

    def reader(**sizes):
        other = dataclasses.replace(base, config=dataclasses.replace(TINY, **sizes))
        return dataclasses.replace(reader_of(compressor), base=other)

    def save(reader, ids=IDS, **how):
        hf_cache.save_cache(tmp_path / "out", named(memory, ids), reader, **how)

    assert hf_cache.filled_cache(memory, reader()).room == 256 - P
    assert hf_cache.filled_cache(memory, reader(windows=(0, 40))).room == 40 - P
    with pytest.raises(ValueError, match=f"attends to windows of {P + 1}; nothing fits"):
        save(reader(windows=(0, P + 1)))
    with pytest.raises(
        ValueError, match=f"ends at position {P} and the base has {P + 1} positions"
    ):
        save(reader(max_position_embeddings=P + 1))
    with pytest.raises(ValueError, match="--for is score; choose from ask, restore"):
        save(reader(), objective="score")
    with pytest.raises(ValueError, match="--dtype is float16; choose from float32, bfloat16"):
        save(reader(), dtype="float16")
    with pytest.raises(ValueError, match="1 ids for 5 memories"):
        save(reader(), ["a"])
    assert not (tmp_path / "out").exists()
    save(reader())
    with pytest.raises(
        ValueError,
        match=f"a prompt takes {256 - P + 1} tokens, and {256 - P} of prompt and answer fit",
    ):
        script(tmp_path / "out").generate(
            hub_model, base.tokenizer, ["cat " * (256 - P - 1)], rows=[3]
        )
