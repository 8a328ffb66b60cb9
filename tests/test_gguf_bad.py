"""Damaged GGUF files: one clear error each, nothing written, no hang and no huge allocation."""

import dataclasses
import struct

import gguf_files
import numpy as np
import pytest
from conftest import random_params
from fuzzing import READ, examples
from hypothesis import strategies as st

from icae_jax.errors import UserError
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import gguf_file
from icae_jax.models import llama
from icae_jax.models.families import tensor_names

TOKENIZER = gguf_files.words_tokenizer(["cat", "dog"])
CONFIG = llama.ModelConfig(
    vocab_size=len(TOKENIZER["tokenizer.ggml.tokens"]),
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_position_embeddings=64,
)
SIZES = gguf_files.sizes(
    {
        "max_position_embeddings": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
    },
    "llama",
)
METADATA = SIZES | TOKENIZER


def hub_tensors():
    from icae_jax.interop.hub import weights

    names = list(tensor_names.tensor_names(CONFIG))
    return weights._hub_tensors(CONFIG, random_params(CONFIG), names, np.float32)


TENSORS = {gguf_files.name_in_file(name, "llama"): value for name, value in hub_tensors().items()}


def written(path, metadata=METADATA, tensors=TENSORS, architecture="llama", **kw):
    return gguf_files.write(path, architecture, metadata, tensors, **kw)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ICAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of a good file, with quantised tensors."""
    path = written(tmp_path_factory.mktemp("good") / "m.gguf", default="Q8_0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert bases.load_base(path).config == dataclasses.replace(CONFIG)
    return path.read_bytes()


def refused(path, message, cache, made=False):
    """Loading is refused with the file's name, and nothing is left behind but what may be."""
    for load in (bases.load_base,) if made else (bases.load_base, bases.sizes, bases.identify):
        with pytest.raises(UserError, match=message) as error:
            load(path)
        assert path.name in str(error.value) and "\n" not in str(error.value)
    if not made:
        assert not cache.exists() or not list(cache.iterdir())


HUGE = struct.pack("<Q", 1 << 60)


def replaced(content, old, new):
    assert content.count(old) == 1 and len(old) == len(new)
    return content.replace(old, new)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: b"", "the file is empty"),
        (lambda c: c[:3], "not a GGUF file"),
        (lambda c: b"GGML" + c[4:], "not a GGUF file"),
        (lambda c: c[:500], "its header ends after 500 bytes"),
        (lambda c: c[:-1000], "it is truncated: tensor .* ends at byte"),
        (lambda c: c[:4] + struct.pack("<I", 1) + c[8:], "GGUF version 1 is not read"),
        (lambda c: c[:4] + struct.pack(">I", 3) + c[8:], "for big-endian machines"),
        (lambda c: c[:8] + HUGE + c[16:], "not a readable GGUF file"),
        (lambda c: c[:16] + HUGE + c[24:], "not a readable GGUF file"),
        (lambda c: c[:24] + HUGE + c[32:], "a name of 1,152,921,504,606,846,976 bytes"),
        (
            lambda c: replaced(
                c,
                b"ggml.merges" + struct.pack("<IIQ", 9, 8, len(TOKENIZER["tokenizer.ggml.merges"])),
                b"ggml.merges" + struct.pack("<II", 9, 8) + HUGE,
            ),
            "tokenizer.ggml.merges has 1,152,921,504,606,846,976 items",
        ),
        (
            lambda c: replaced(
                c,
                b"output_norm.weight" + struct.pack("<IQI", 1, 32, 0),
                b"output_norm.weight" + struct.pack("<IQI", 1, 1 << 60, 0),
            ),
            "it is truncated: tensor output_norm.weight",
        ),
        (
            lambda c: replaced(
                c,
                b"output_norm.weight" + struct.pack("<IQI", 1, 32, 0),
                b"output_norm.weight" + struct.pack("<IQI", 1, 32, 999),
            ),
            "tensor output_norm.weight has blocks of type 999, which cannot be dequantised",
        ),
        (
            lambda c: replaced(
                c,
                b"output_norm.weight" + struct.pack("<IQI", 1, 32, 0),
                b"output_norm.weight" + struct.pack("<IQI", 1, 32, 9),
            ),
            "tensor output_norm.weight has blocks of type Q8_1, which",
        ),
        (
            lambda c: replaced(
                c,
                b"output_norm.weight" + struct.pack("<IQI", 1, 32, 0),
                b"output_norm.weight" + struct.pack("<IQI", 1, 64, 0),
            ),
            "tensors .* and .* overlap",
        ),
    ],
)
def test_damaged_files(spoil, message, content, tmp_path, cache):
    """Breaks when a damaged header gives a traceback, a hang or a model."""
    path = tmp_path / "m.gguf"
    path.write_bytes(spoil(content))
    refused(path, message, cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_norm.weight": None}, "1 tensor missing: model.norm.weight"),
        ({"token_embd.weight": None}, "the embedding table, token_embd.weight, is missing"),
        (
            {"blk.0.attn_q.weight": np.ones((48, 32))},
            r"q_proj.weight has shape \(48, 32\) in m.gguf, config.json implies \(32, 32\)",
        ),
        ({"blk.0.attn_qkv.weight": np.ones((8, 32))}, "tensor blk.0.attn_qkv.weight is not one of"),
        ({"blk.1.ffn_up.weight": np.ones((32, 32))}, r"not in the model of config\.json"),
        (
            {"token_embd.weight": np.ones((50, 32))},
            f"has {CONFIG.vocab_size} tokens, but the embedding table only 50 rows",
        ),
    ],
)
def test_unexpected_tensors(changes, message, tmp_path, cache):
    """Breaks when a tensor is missing, of another shape, or left unread."""
    tensors = {name: value for name, value in (TENSORS | changes).items() if value is not None}
    path = written(tmp_path / "m.gguf", tensors=tensors)
    refused(path, message, cache, made=True)


@pytest.mark.parametrize(
    ("changes", "architecture", "message"),
    [
        ({}, "mamba", "architecture 'mamba', which is not supported"),
        ({"tokenizer.ggml.pre": "viking"}, "llama", "'viking', which is not known; known: gpt-2"),
        ({"tokenizer.ggml.token_type": [1]}, "llama", "tokens, but the types of 1"),
        ({"llama.rope.scaling.type": "longrope"}, "llama", "'longrope', which is not computed"),
        ({"llama.expert_count": 8}, "llama", "'llama.expert_count' is 8"),
        ({"llama.embedding_length": 2**31}, "llama", "hidden_size is 2147483648"),
    ],
)
def test_what_is_not_read(changes, architecture, message, tmp_path, cache):
    """Breaks when what is unknown is guessed."""
    path = written(tmp_path / "m.gguf", METADATA | changes, architecture=architecture)
    refused(path, message, cache)


def test_a_file_without_a_tokenizer(tmp_path):
    """Breaks when it passes where texts are read, or cannot be loaded where none are."""
    path = written(tmp_path / "m.gguf", SIZES)
    with pytest.raises(UserError, match=r"m\.gguf: it holds no tokenizer"):
        bases.load_base(path)
    assert bases.load_base(path, need_tokenizer=False).tokenizer is None


def test_scales_that_are_not_finite(content, tmp_path):
    """Breaks when a damaged block's NaN are taken for weights."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tensor = gguf_file.read(path).tensors["blk.0.ffn_up.weight"]
    spoiled = bytearray(content)
    spoiled[tensor.start : tensor.start + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(spoiled)
    with pytest.raises(UserError, match=r"up_proj\.kernel holds numbers that are not finite"):
        assert bases.load_base(path).identity


def test_names_that_are_no_files(content, tmp_path, monkeypatch):
    """Breaks when a folder is taken for a file, or a message does not say what to give."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.gguf").write_bytes(content)
    (tmp_path / "x.gguf").mkdir()
    (tmp_path / "many").mkdir()
    for i in (1, 2):
        (tmp_path / "many" / f"m-{i:05}-of-00002.gguf").touch()
    monkeypatch.chdir(tmp_path)
    for name, message in {
        "one": r"has no config\.json: it holds a\.gguf; give the file, one/a\.gguf",
        "many/": r"it holds m-00001-of-00002\.gguf; give the file, many/m-00001-of-00002\.gguf",
        "x.gguf": r"base 'x\.gguf' has no config\.json.*the folder is empty",
        "absent.gguf": "no such file; give a GGUF file that is here, one of the hub as",
    }.items():
        with pytest.raises(UserError, match=message):
            bases.load_base(name)


# -------------------------------------------------------------------------------------------- fuzz


def loaded(path):
    """The base, None if it is refused by the file's name."""
    try:
        return bases.load_base(path)
    except UserError as error:
        assert path.name in str(error) or str(error).startswith(("parameter", "num_heads")), error
        return None


@examples(data=st.data())
def test_any_bytes(fixture, data):
    """Breaks when a file with changed or missing bytes gives a traceback, a hang, or a model whose
    sizes are not its tensors'."""
    content = fixture("content")
    header = content.index(b"blk.0.ffn_norm.weight") + 2000
    kind = data.draw(st.sampled_from(["bytes", "bits", "word", "cut"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif kind == "word":
        at = data.draw(st.integers(4, header))
        word = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
        content = content[:at] + word + content[at + 8 :]
    else:
        places = data.draw(st.dictionaries(st.integers(4, header), st.integers(0, 255), max_size=4))
        content = bytearray(content)
        for at, byte in places.items():
            content[at] = byte if kind == "bytes" else content[at] ^ (1 << byte % 8)
    path = fixture("tmp_path_factory").getbasetemp() / "fuzzed.gguf"
    path.write_bytes(bytes(content))
    base = loaded(path)
    if base is not None:
        READ.append(1)
        assert base.params["embed"].shape == (base.config.vocab_size, base.config.hidden_size)


PLAIN = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32),
    st.text(max_size=5),
    st.lists(st.integers(0, 400), min_size=1, max_size=3),
    st.lists(st.text(max_size=3), min_size=1, max_size=3),
)


@examples(
    changes=st.dictionaries(
        st.sampled_from([*METADATA, "llama.rope.scaling.type", "general.alignment", "split.count"]),
        PLAIN | st.none(),
        min_size=1,
        max_size=2,
    )
)
def test_any_metadata(fixture, changes):
    """Breaks when metadata of odd values give a traceback, or sizes that are not numbers."""
    metadata = {
        key: value for key, value in (METADATA | changes).items() if value not in (None, [])
    }
    path = fixture("tmp_path_factory").getbasetemp() / "odd.gguf"
    try:
        written(path, metadata)
    except (TypeError, ValueError, UnicodeError, struct.error):  # what the format does not hold
        return
    base = loaded(path)
    if base is not None:
        READ.append(1)
