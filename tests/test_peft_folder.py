"""The plain PEFT folder: its README's code gives our memory, PEFT merges what we compute."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, WORDS, close, random_params, random_trained_of

from icae_jax.compression.config import MASKS, CompressionConfig
from icae_jax.compression.layout import Layout, spread
from icae_jax.compression.method import METHODS
from icae_jax.errors import UserError
from icae_jax.inference.compressor import Compressor
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import info, peft_folder
from icae_jax.interop.hub import base as bases
from icae_jax.models import rope
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives.targets import Template

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

RNG = np.random.default_rng(5)
TEXTS = [" ".join(RNG.choice(WORDS[8:], size=n)) for n in (7, 37)]  # of one segment and of three


@pytest.fixture(scope="module")
def base(tiny_base):
    return bases.load_base(tiny_base)


def make_adapter(base, method="icae", layout="", **compression):
    compression = CompressionConfig(method=method, k=3, rate=5, layout=layout, **compression)
    return adapters.Adapter(
        compression,
        LoraConfig(4, 1.5, 0.1),
        Template("plain", (), (5,), (6,), 2),
        random_trained_of(compression, base.config, 4),
        str(base.path),
        base.fingerprint,
    )


rotate_keys = jax.jit(rope.rotate_keys, static_argnums=0)
encoder_positions = jax.jit(Layout.encoder_positions, static_argnums=(0, 1, 2))


def code_of(folder):
    """The code in README.md that compresses."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return blocks[0]


@pytest.mark.parametrize(
    ("method", "layout"),
    [(method, layout) for method in METHODS for layout in METHODS[method].layouts],
)
def test_the_readme_makes_our_memory(base, tmp_path, monkeypatch, method, layout):
    """Breaks when the code in README.md cuts, frames, pads or places a text otherwise than we do,
    or keeps another state.
    """
    check_readme(make_adapter(base, method, layout), base, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("method", "mask"),
    [
        (name, mask)
        for name, method in METHODS.items()
        for mask in MASKS
        if mask != method.encoder_mask
    ],
)
def test_the_readme_sees_what_our_encoder_sees(base, tmp_path, monkeypatch, method, mask):
    """Breaks when memory tokens or text see more or less than `compression.encoder_mask` says."""
    adapter = make_adapter(base, method, encoder_mask=mask)
    slots = check_readme(adapter, base, tmp_path, monkeypatch)
    if mask == "slots" and METHODS[method].pools:
        return
    other = dataclasses.replace(
        adapter, compression=dataclasses.replace(adapter.compression, encoder_mask="")
    )
    plain = np.asarray(next(iter(compress(base, other).contents.values())))
    assert np.abs(plain - slots).max() > 0.01


@pytest.mark.parametrize(
    ("method", "layers"), [("icae", 1), ("icae", TINY.num_layers), ("pooled", 1)]
)
def test_the_readme_stops_where_our_encoder_stops(base, tmp_path, monkeypatch, method, layers):
    """Breaks when slots are of another layer, or go through the final norm, as those of the last
    layer do in transformers' list of hidden states.
    """
    adapter = make_adapter(base, method, encoder_layers=layers)
    check_readme(adapter, base, tmp_path, monkeypatch)


def test_anchors_may_have_vectors_of_their_own(base, tmp_path, monkeypatch):
    """Breaks when an anchor gets another one's vector, or one that is an anchor twice gets two."""
    adapter = make_adapter(base, "sac", anchor_vectors="each")
    check_readme(adapter, base, tmp_path, monkeypatch, [*TEXTS, "cat dog"])


def test_the_readme_takes_any_k(base, tmp_path, monkeypatch):
    """Breaks when the code's groups are those of the k of training alone."""
    adapter = make_adapter(base, "pooled")
    check_readme(adapter, base, tmp_path, monkeypatch, [*TEXTS, "cat dog"], k=7)


GEMMA = dataclasses.replace(
    TINY,
    norms="both",
    norm_plus_one=True,
    activation="gelu_tanh",
    qk_norm=True,
    embedding_multiplier=32**0.5,
    windows=(18, 0),  # as long as a segment and its memory
    ropes=("local", "global"),
    local_rope_theta=20.0,
)


@pytest.mark.parametrize(
    ("method", "mask"), [("icae", ""), ("icae", "slots"), ("x500", ""), ("pooled", ""), ("sac", "")]
)
def test_the_readme_serves_a_gemma(method, mask, tmp_path, tiny_tokenizer, monkeypatch):
    """Breaks when memory tokens are multiplied as embeddings are, layers share one RoPE, or a mask
    does not reach the layers with windows.
    """
    params = random_params(GEMMA)
    bases.save_base(tmp_path / "base", GEMMA, params, tiny_tokenizer, dtype="float32")
    base = bases.load_base(tmp_path / "base")
    assert base.config == GEMMA
    check_readme(make_adapter(base, method, encoder_mask=mask), base, tmp_path, monkeypatch)


def compress(base, adapter, texts=TEXTS, k=None):
    return Compressor(base, adapter, "adapter").compress(texts, k=k)


def check_readme(adapter, base, tmp_path, monkeypatch, texts=TEXTS, k=None):
    """The code in README.md makes the memory that we make; the first of its contents."""
    config = adapter.compression
    layout, chosen = config.position_layout, k or 3
    peft_folder.save(tmp_path / "out", adapter, base.config)
    monkeypatch.chdir(tmp_path / "out")
    code = code_of(tmp_path / "out")
    plain = config.spec.appends_memory_tokens and config.encoder_mask == "causal"
    most = 25 if plain and not config.encoder_layers else 30
    assert 18 <= len([line for line in code.splitlines() if line.strip()]) <= most
    names = {}
    exec(code, names)
    every = compress(base, adapter, texts, k)
    for i, text in enumerate(texts):
        got = names["compress"](text) if k is None else names["compress"](text, k)
        memory, real = every[i], every.mask[i]
        if config.spec.keeps == "hidden":
            slots = memory.slots[0][real]
            close(got.numpy(), slots)
            assert len(text) < 10 or np.abs(slots[:3] - slots[-1]).max() > 0.1
            continue
        # Our K is kept before RoPE: rotated to where the encoder had it, it is the one in the
        # cache.
        lengths = memory.segment_lengths[0]
        lengths = lengths[lengths > 0]
        lengths = np.full_like(lengths, 15) if layout.fixed_length else lengths
        if config.spec.anchors:
            at = np.concatenate([np.asarray(spread(chosen, n)) for n in lengths])
        else:
            at = np.concatenate(
                [np.asarray(encoder_positions(layout, 15, 3, n))[15:] for n in lengths]
            )
        k_real = rotate_keys(base.config, memory.k[:, :, real], at[None])
        for mine, theirs in ((k_real, got[0]), (memory.v[:, :, real], got[1])):
            close(theirs.numpy(), np.moveaxis(np.asarray(mine)[:, 0], 1, 2))
    return np.asarray(next(iter(every.contents.values())))


def test_peft_merges_what_we_compute(base, tiny_base, tmp_path):
    """Breaks when PEFT would read other names, another scale (its silent alpha = r = 8) or
    transposed kernels.
    """
    adapter = make_adapter(base)
    peft_folder.save(tmp_path / "out", adapter, TINY)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (
        4,
        6.0,
        ["q_proj", "v_proj"],
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    before = {name: value.clone().numpy() for name, value in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    assert merged.keys() == before.keys()
    changed = {name for name in before if not np.array_equal(merged[name].numpy(), before[name])}
    names = {
        f"model.layers.{i}.self_attn.{p}.weight": (i, p)
        for i in range(TINY.num_layers)
        for p in ("q_proj", "v_proj")
    }
    assert changed == set(names)
    for name, (i, projection) in names.items():
        pair = adapter.trained["lora"]["layers"]["self_attn"][projection]
        close(
            merged[name].numpy(),
            before[name] + 1.5 * np.asarray(pair["a"][i] @ pair["b"][i]).T,
            1e-6,
        )


def test_nothing_else_is_lost(base, tmp_path):
    """Breaks when the memory table, or how the adapter is read, does not travel with the LoRA; or a
    dtype is not the one asked for.
    """
    adapter = make_adapter(base)
    peft_folder.save(tmp_path / "out", adapter, TINY)
    table = safetensors.numpy.load_file(tmp_path / "out" / "memory.safetensors")[
        adapters.MEMORY_TABLE
    ]
    np.testing.assert_array_equal(table, adapter.trained["memory_table"])
    assert json.loads((tmp_path / "out" / "icae.json").read_text()) == json.loads(
        json.dumps(info.icae_json(adapter))
    )
    peft_folder.save(tmp_path / "half", adapter, TINY, "bfloat16")
    for name in ("adapter_model.safetensors", "memory.safetensors"):
        for full, value in safetensors.numpy.load_file(tmp_path / "out" / name).items():
            half = safetensors.numpy.load_file(tmp_path / "half" / name)[full]
            assert half.dtype == jnp.bfloat16
            close(half, value, 0.01)


def test_bad_input(base, tmp_path):
    """Breaks when something is overwritten, or code is written that would not give our memory."""
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not an empty folder"):
        peft_folder.save(tmp_path, make_adapter(base), TINY)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    with pytest.raises(ValueError, match="dtype is int8; choose float32, bfloat16 or float16"):
        peft_folder.save(tmp_path / "out", make_adapter(base), TINY, "int8")
    narrow, wide = (dataclasses.replace(TINY, windows=(0, w)) for w in (17, 18))
    with pytest.raises(
        ValueError, match=r"layout is servable.* windows of 17; .* \(18 tokens\) fit"
    ):
        peft_folder.save(tmp_path / "out", make_adapter(base), narrow)
    assert not (tmp_path / "out").exists()
    peft_folder.save(tmp_path / "out", make_adapter(base), wide)
    peft_folder.save(tmp_path / "other", make_adapter(base, "icae", "sequential"), narrow)


@pytest.mark.parametrize(
    ("method", "fields", "window", "message"),
    [
        ("icae", {"layout": "sequential", "encoder_mask": "slots"}, 18, "encoder_mask is slots"),
        ("pooled", {}, 15, "encoder_mask is all"),
        ("pooled", {"encoder_mask": "causal"}, 1, ""),
        ("sac", {}, 16, "encoder_mask is all"),
        ("sac", {"encoder_mask": "causal"}, 16, "the last 15 keys and values"),
        ("x500", {"layout": "sequential"}, 4, "the last 3 keys and values"),
    ],
)
def test_windows(base, method, fields, window, message):
    """Breaks when a window is passed over where the code brings a mask of its own, or cuts off the
    keys that it keeps; or a base is refused whose windows cut off nothing.
    """
    adapter = make_adapter(base, method, **fields)
    windows = (0, window)
    peft_folder.check(adapter, dataclasses.replace(TINY, windows=windows))
    if message:
        with pytest.raises(UserError, match=f"{message}.* in a window of {window}, or"):
            peft_folder.check(adapter, dataclasses.replace(TINY, windows=(0, window - 1)))
    # Layers behind those that encode do not matter.
    if METHODS[method].keeps == "hidden":
        first = make_adapter(base, method, **fields, encoder_layers=1)
        peft_folder.check(first, dataclasses.replace(TINY, windows=(0, 1)))


def test_a_multiplied_base(base, tmp_path):
    """Breaks when rows of the table go unmultiplied into a base that multiplies its embeddings, or
    a method without such rows is refused.
    """
    granite = dataclasses.replace(TINY, embedding_multiplier=3.0, logits_divisor=0.5)
    for method in ("icae", "sac"):
        with pytest.raises(UserError, match="multiplies input embeddings by 3"):
            peft_folder.check(make_adapter(base, method), granite)
    peft_folder.check(make_adapter(base, "pooled"), granite)


def test_a_decoder_lora_has_a_folder_of_its_own(base, tmp_path, monkeypatch):
    """Breaks when the decoder's LoRA is lost, is the encoder's, or the README's lines that load it
    do not run; or it does not come back.
    """
    adapter = make_adapter(base, "pooled", encoder_layers=1, decoder_lora=True)
    peft_folder.save(tmp_path / "out", adapter, TINY)
    loaded = adapters.load_adapter(tmp_path / "out", base)
    jax.tree.map(np.testing.assert_array_equal, loaded.trained, adapter.trained)
    assert loaded.compression == adapter.compression
    monkeypatch.chdir(tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "--enable-lora --max-lora-rank 8 --lora-modules decoder=./decoder" in readme
    encodes, reads = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names = {}
    exec(encodes.partition("tokenizer =")[0] + reads, names)
    assert names["decoder"].active_adapter == "decoder"
    weights = dict(names["decoder"].get_base_model().named_modules())
    for i in range(TINY.num_layers):
        module = weights[f"model.layers.{i}.self_attn.v_proj"]
        pair = adapter.trained["decoder_lora"]["layers"]["self_attn"]["v_proj"]
        want = 1.5 * np.asarray(pair["a"][i] @ pair["b"][i]).T
        close(module.get_delta_weight("decoder").detach().numpy(), want, 1e-6)


def test_a_revision_of_the_base(base, tmp_path):
    """Breaks when PEFT is given `org/name@revision` as a name, or the revision of the base is lost
    on the way out and back.
    """
    adapter = dataclasses.replace(make_adapter(base), base_path="org/base@v2")
    peft_folder.save(tmp_path / "out", adapter, TINY)
    stated = peft.PeftConfig.from_pretrained(tmp_path / "out")
    assert (stated.base_model_name_or_path, stated.revision) == ("org/base", "v2")
    assert code_of(tmp_path / "out").count('from_pretrained(base, revision="v2"') == 2
    assert adapters.load_adapter(tmp_path / "out", base).base_path == "org/base@v2"
