"""GGUF files as bases: equal to the hub folders they were made of, wherever a base is named."""

import dataclasses
import gzip
import json
import os
import pathlib

import gguf
import gguf_files
import hub_server
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from conftest import WORDS, close, random_params, random_trained, same, shared, training
from test_llama import logits

import icae_jax
from icae_jax.cli.main import main
from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import peft_config
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import (
    fetching,
    gguf_config,
    gguf_file,
    gguf_folder,
    gguf_tensors,
    locations,
)
from icae_jax.interop.hub.text import user_ids
from icae_jax.models import llama, lora
from icae_jax.models.families import config_json
from icae_jax.objectives import targets
from icae_jax.performance import subject
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.workflows import convert_base, inspection

SMALL = llama.ModelConfig(
    vocab_size=90,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)
FAMILIES = {
    "llama": SMALL,
    "qwen2": dataclasses.replace(SMALL, qkv_bias=True, tie_word_embeddings=True),
    "qwen3": dataclasses.replace(SMALL, qk_norm=True),
}
TOKENIZER = gguf_files.words_tokenizer([w for w in WORDS if w.isalpha()])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What is made of files here must not come from, or go into, this user's cache."""
    monkeypatch.setenv("ICAE_CACHE", str(tmp_path_factory.getbasetemp() / "gguf_cache"))


@pytest.fixture(scope="module")
def hub_tokenizer():
    """The tokenizer of TOKENIZER's metadata, made by hand."""
    import tokenizers as library
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors

    tokens = TOKENIZER["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in TOKENIZER["tokenizer.ggml.merges"]]
    backend = library.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory, hub_tokenizer):
    """`{architecture: (hub folder, GGUF file)}` of the same random models, in float32."""
    folder, result = tmp_path_factory.mktemp("models"), {}
    for name, config in FAMILIES.items():
        config = dataclasses.replace(config, vocab_size=len(hub_tokenizer))
        bases.save_base(folder / name, config, random_params(config), hub_tokenizer, "float32")
        path = folder / f"{name}.gguf"
        # save_base may write a Qwen2 as a Llama, whose tokenizer class reads the file as it is.
        hub = json.loads((folder / name / "config.json").read_text())
        result[name] = folder / name, gguf_files.from_folder(path, folder / name, name, TOKENIZER)
        assert hub["vocab_size"] == len(hub_tokenizer)
    return result


@pytest.fixture
def llama_file(models):
    return models["llama"][1]


IDS = np.random.default_rng(0).integers(0, 90, (2, 24))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen2"])
def test_a_file_is_the_folder_that_it_was_made_of(models, name):
    """Breaks when rows of q or k stay permuted, by heads of the wrong number, when a tensor gets
    another's name, or dimensions are not reversed."""
    folder, path = models[name]
    hub, file = bases.load_base(folder), bases.load_base(path)
    assert file.config == hub.config and file.fingerprint == hub.fingerprint
    same(file.params, hub.params)
    assert file.identity == hub.identity and file.stop_ids == hub.stop_ids == (2,)
    assert bases.sizes(path) == hub.config and bases.identify(path)[1] == hub.fingerprint
    assert np.array_equal(file.tokenizer("the cat saw")["input_ids"][:1], [1])
    assert file.path == str(path)


def test_blocks_are_dequantised(models, tmp_path):
    """Breaks when a block's numbers are in another order or of another scale, by rows or columns,
    for a device's shard too, or memory holds more than the blocks that are read."""
    folder, _ = models["llama"]
    kinds = {"blk.0.attn_q.weight": "Q8_0", "blk.1.attn_k.weight": "Q4_1", "output.weight": "F16"}
    path = gguf_files.from_folder(
        tmp_path / "q.gguf", folder, "llama", TOKENIZER, kinds=kinds, default="Q8_0"
    )
    hub, file = bases.load_base(folder), bases.load_base(path)
    for one, other in zip(*map(jax.tree.leaves, (hub.params, file.params)), strict=True):
        assert np.abs(one - other).max() <= 0.08 * np.abs(one).max()
    close(*(logits(b.config, b.params, IDS % b.config.vocab_size) for b in (file, hub)), 0.5)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), "x")
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    narrow = bases.load_base(path, jnp.bfloat16, where)
    jax.tree.map(lambda a, b: close(a.astype(jnp.float32), b, 2**-8), narrow.params, file.params)


@pytest.mark.parametrize(
    "kind", [k.name for k in gguf.GGMLQuantizationType if gguf_file.block_type(k.value)[1]]
)
def test_any_part_of_a_tensor_is_that_of_the_whole(kind, tmp_path):
    """Breaks when rows or columns that begin or end within a block are cut wrongly, for any type of
    block, or rows are taken back into the hub's order wrongly."""
    rng, code = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[code]
    width = 2 * numbers if numbers > 1 else 40
    data = rng.integers(0, 64, (24, width // numbers * size), np.uint8)
    (tmp_path / "t").write_bytes(b"0" * 32 + data.tobytes())
    tensor = gguf_file.Tensor(tmp_path / "t", (24, width), kind, (numbers, size), 32)
    whole = np.asarray(gguf.dequantize(data, code), np.float32)
    plain = gguf_tensors.TensorSlice(tensor, 0, -1.0)
    near = dict(rtol=1e-6, atol=0, equal_nan=True)
    for rows, columns in ((slice(3, 9), slice(5, width - 3)), (slice(0, 24), slice(0, 1))):
        got = plain[rows, columns]
        assert got.dtype == np.float32
        assert np.allclose(got, whole[rows, columns] + np.float32(-1), **near)
    back = gguf_tensors.TensorSlice(tensor, 3)
    assert np.allclose(gguf_files.permuted(back[:, :], 3), whole, **near)
    assert np.allclose(back[5:17], back[:, :][5:17], **near)
    assert tuple(back.get_shape()) == (24, width) and back.get_dtype() == "F32"


def test_codes_and_scales_are_read_as_they_are(models, tmp_path):
    """Breaks when codes and scales of Q8_0 are not those of the dequantised rows, in the hub's
    order, or other blocks claim to have some."""
    path = gguf_files.from_folder(
        tmp_path / "q.gguf", models["llama"][0], "llama", TOKENIZER, default="Q8_0"
    )
    tensors = gguf_folder.open_tensors(gguf_folder.folder_of(path))
    name = "model.layers.0.self_attn.k_proj.weight"
    tensor = tensors.get_slice(name)
    codes, scales = tensor.read_q8_0(slice(3, 20))
    assert codes.dtype == np.int8 and scales.dtype == np.float16 and scales.shape == (17, 2)
    again = codes.astype(np.float32) * np.repeat(scales.astype(np.float32), 32, axis=1)
    np.testing.assert_array_equal(again, tensor[3:20])
    assert not hasattr(tensors.get_slice("model.norm.weight"), "read_q8_0")


def test_a_changed_file_is_read_anew(models, tmp_path):
    """Breaks when a file that replaced another is taken for it."""
    folder, first = models["llama"]
    path = tmp_path / "m.gguf"
    path.write_bytes(first.read_bytes())
    assert bases.load_base(path).stop_ids == (2,)
    more = {"tokenizer.ggml.eot_token_id": 5, "llama.context_length": 99}
    gguf_files.from_folder(path, folder, "llama", TOKENIZER, more)
    base = bases.load_base(path)
    assert base.config.max_position_embeddings == 99 and base.stop_ids == (2, 5)
    content, status = path.read_bytes(), path.stat()  # and one of the same size and time
    path.write_bytes(content.replace(np.int32(99).tobytes(), np.int32(98).tobytes(), 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert bases.load_base(path).config.max_position_embeddings == 98


GEMMAS = {
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 16,
        "rope_local_base_freq": 10000.0,
    },
}


@pytest.mark.parametrize("name", GEMMAS)
def test_gemmas_files(name, hub_tokenizer, tmp_path):
    """Breaks when a Gemma's norms keep the 1 that is added to them, one of its four norms gets
    another's place, or its configuration is not the hub's."""
    raw = {
        "vocab_size": len(hub_tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "sliding_window": 8,
        "tie_word_embeddings": True,
        **GEMMAS[name],
    }
    config = config_json.parse_config(raw)
    bases.save_base(tmp_path / "hub", config, random_params(config), hub_tokenizer, "float32")
    (tmp_path / "hub" / "config.json").write_text(json.dumps(raw))
    more = {f"{name}.attention.sliding_window": 8}
    more |= {
        f"{name}.{key}": raw[key]
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
        if key in raw
    }
    path = gguf_files.from_folder(tmp_path / "m.gguf", tmp_path / "hub", name, TOKENIZER, more)
    hub, file = bases.load_base(tmp_path / "hub"), bases.load_base(path)
    assert file.config == hub.config == config
    jax.tree.map(lambda a, b: close(a, b, 1e-6), file.params, hub.params)


# ------------------------------------------------------------------------------------ split files


@pytest.fixture
def split(models, tmp_path):
    """The paths of a file in three parts."""
    _, whole = models["llama"]
    raw = json.loads((models["llama"][0] / "config.json").read_text())
    reader = gguf.GGUFReader(whole)
    tensors = {t.name: np.asarray(t.data) for t in reader.tensors}
    names, paths = sorted(tensors), []
    metadata = gguf_files.sizes(raw, "llama") | TOKENIZER
    for i in range(3):
        own = {name: tensors[name] for name in names[i::3]}
        path = tmp_path / f"m-{i + 1:05}-of-00003.gguf"
        header = metadata if i == 0 else {}
        paths.append(gguf_files.write(path, "llama", header, own, split=(i, 3, len(names))))
    return paths


def test_a_split_file(models, split):
    """Breaks when a part is not read, or an absent part or one that is not the first passes."""
    whole = bases.load_base(models["llama"][1])
    same(bases.load_base(split[0]).params, whole.params)
    with pytest.raises(UserError, match=r"part 2 of 3 of a split file; give the first, m-00001"):
        bases.load_base(split[1])
    split[1].rename(split[1].with_name("elsewhere.gguf"))
    with pytest.raises(UserError, match=r"1 part of 3 missing beside it, m-00002-of-00003\.gguf"):
        bases.load_base(split[0])
    split[2].rename(split[1])
    split[2].write_bytes(split[1].read_bytes())
    with pytest.raises(UserError, match="it says that it is part 3 of 3"):
        bases.load_base(split[0])


# ------------------------------------------------------------------------------ a pretrained model


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """(hub folder, GGUF file) of a pretrained Llama with a SentencePiece tokenizer."""
    folder = shared("data/stories260K")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = gguf_files.sentencepiece_tokenizer(model)
    path = tmp_path_factory.mktemp("stories") / "stories260K.gguf"
    return folder, gguf_files.from_folder(path, folder, "llama", tokenizer)


def texts(*names):
    """All texts of the reference data's files."""
    for name in names:
        with gzip.open(shared(f"data/{name}.jsonl.gz"), "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield row.get("text") or row["context"]


def test_a_pretrained_model(stories):
    """Breaks when a pretrained model's logits, tokens or identity differ from its hub folder's."""
    hub, file = map(bases.load_base, stories)
    assert file.config == hub.config and file.fingerprint == hub.fingerprint
    assert file.identity["weights"] == hub.identity["weights"]
    assert file.stop_ids == hub.stop_ids
    rows = list(texts("tinystories/valid", "fairytaleqa/valid", "squad/valid"))
    assert user_ids(file.tokenizer, rows) == user_ids(hub.tokenizer, rows)
    ids = np.asarray([file.tokenizer(row)["input_ids"][:64] for row in rows[:4]])
    assert (ids[:, 0] == 1).all()
    close(*(logits(b.config, b.params, ids) for b in (file, hub)), 1e-6)
    assert file.tokenizer.decode(ids[0], skip_special_tokens=True) == hub.tokenizer.decode(
        ids[0], skip_special_tokens=True
    )


# ---------------------------------------------------------------------------------- configurations


def header(**changes):
    """A header with the metadata of a small Llama, changed; None removes a key."""
    raw = json.loads(json.dumps(dataclasses.asdict(SMALL)))
    names = {
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "max_position_embeddings": "max_position_embeddings",
        "rms_norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
    }
    architecture = changes.pop("architecture", "llama")
    metadata = gguf_files.sizes({n: raw[f] for f, n in names.items()}, architecture)
    metadata |= {"general.architecture": architecture} | changes.pop("metadata", {})
    metadata = {key: value for key, value in metadata.items() if value is not None}
    table = gguf_file.Tensor(pathlib.Path("x.gguf"), (90, 64), "F32", (1, 4), 0)
    tensors = {"token_embd.weight": table} | changes
    return gguf_file.GGUF(pathlib.Path("x.gguf"), metadata, tensors)


def test_scalings_of_rope():
    """Breaks when linear or yarn metadata are spelt otherwise than config.json's."""
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert gguf_config.config_json(header(metadata=linear))["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 4.0,
    }
    older = gguf_config.config_json(header(metadata={"llama.rope.scale_linear": 2.0}))
    assert older["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    del linear["llama.rope.scaling.type"]  # as in llama.cpp, a factor alone is linear
    alone = gguf_config.config_json(header(metadata=linear))
    assert alone["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
    }
    assert gguf_config.config_json(header(metadata=yarn))["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert "rope_scaling" not in gguf_config.config_json(header())


@pytest.mark.parametrize(
    ("theta", "head_dim", "factor", "low", "high", "original"),
    [(5e5, 128, 8.0, 1.0, 4.0, 8192), (5e5, 64, 32.0, 1.0, 4.0, 8192), (1e4, 64, 3.5, 1, 6, 500)],
)
def test_llama3s_scaling_is_found_from_its_factors(
    tmp_path, theta, head_dim, factor, low, high, original
):
    """Breaks when the fields of Llama 3.1's RoPE are not those whose factors are stored, or other
    factors pass for them."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    factors = np.float32(1 / ((1 - smooth) / factor + smooth))

    def read(values):
        (tmp_path / "f").write_bytes(np.float32(values).tobytes())
        tensor = gguf_file.Tensor(tmp_path / "f", (head_dim // 2,), "F32", (1, 4), 0)
        metadata = {"llama.attention.key_length": head_dim, "llama.rope.freq_base": theta}
        metadata |= {"llama.attention.value_length": head_dim}
        return gguf_config.config_json(header(metadata=metadata, **{gguf_tensors.FACTORS: tensor}))[
            "rope_scaling"
        ]

    assert read(factors) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    wrong = factors.copy()
    wrong[len(wrong) // 2] *= 1.001
    for values in (wrong, np.full_like(factors, 2), np.full_like(factors, np.nan), factors[::-1]):
        with pytest.raises(UserError, match=r"rope_freqs\.weight holds factors of RoPE"):
            read(values)


def test_gemmas_layers():
    """Breaks when windows, bases of RoPE, query scales or soft caps of Gemma are not those that
    llama.cpp computes, which partly no key tells."""
    window = {"gemma3.attention.sliding_window": 512, "gemma3.block_count": 8}
    raw = gguf_config.config_json(header(architecture="gemma3", metadata=window))
    assert (
        raw["layer_types"]
        == (["sliding_attention"] * 5 + ["full_attention"]) + ["sliding_attention"] * 2
    )
    assert raw["rope_local_base_freq"] == 10000.0 and raw["query_pre_attn_scalar"] == 16
    assert raw["architectures"] == ["Gemma3ForCausalLM"] and raw["model_type"] == "gemma3_text"
    caps = {"gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0}
    window = {"gemma2.attention.sliding_window": 4096, "gemma2.block_count": 46}
    raw = gguf_config.config_json(header(architecture="gemma2", metadata=window | caps))
    assert raw["layer_types"][:4] == ["sliding_attention", "full_attention"] * 2
    older = gguf_config.config_json(header(architecture="gemma2", metadata=window))
    for fields in (raw, older):  # early files do not state the caps
        assert fields["attn_logit_softcapping"] == 50 and fields["final_logit_softcapping"] == 30
    assert raw["query_pre_attn_scalar"] == 64 // 4  # the 27B model's is not the width of a head
    assert raw["hidden_activation"] == "gelu_pytorch_tanh"


def test_mistrals_window():
    """Breaks when a window is dropped."""
    raw = gguf_config.config_json(header(metadata={"llama.attention.sliding_window": 128}))
    assert raw["architectures"] == ["MistralForCausalLM"] and raw["sliding_window"] == 128


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba', which is not supported in GGUF"),
        ({"general.architecture": None}, "no general.architecture, supported: llama"),
        ({"general.type": "adapter"}, "it holds a adapter"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": "2"}, "llama.block_count is '2', which is not a whole number"),
        ({"llama.expert_count": 8}, "'llama.expert_count' is 8, which may change"),
        ({"llama.attention.scale": 0.1}, r"'llama.attention.scale' is 0\.1"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8, which is not the"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'"),
        (
            {"llama.attention.head_count_kv": np.asarray([2, 4])},
            r"head_count_kv differs from layer to layer \(\[2, 4\]\)",
        ),
    ],
)
def test_what_is_not_computed_is_refused(metadata, message):
    """Breaks when a model is read as one that it is not, or the message does not say which key."""
    with pytest.raises(UserError, match=message) as error:
        gguf_config.config_json(header(metadata=metadata))
    assert str(error.value).startswith("x.gguf: ")


# ------------------------------------------------------------------------------------------- names


def test_a_file_of_the_hub(llama_file, tmp_path, monkeypatch):
    """Breaks when a repository's GGUF file is not fetched alone, by its revision, with all parts,
    or not found again without a network."""
    content = llama_file.read_bytes()
    fingerprint = bases.load_base(llama_file).fingerprint
    with hub_server.serving(tmp_path / "hub", monkeypatch) as hub:
        first = hub.commit("org/name", {"q4/m.gguf": content, "other.gguf": b"x" * 999})
        hub.commit("org/name", {"q4/m.gguf": b"GGUF", "README.md": b"hi"})
        name = f"org/name@{first}:q4/m.gguf"
        assert locations.is_remote(name) and locations.hub_repository(name) == "org/name"
        assert bases.load_base(name).fingerprint == fingerprint
        assert not [request for request in hub.requests if "other.gguf" in request]
        with pytest.raises(UserError, match=r"m\.gguf: not a readable GGUF file"):
            bases.load_base("org/name:q4/m.gguf")
        with pytest.raises(UserError, match=r"base 'org/name:no\.gguf': of the hub id org/name"):
            bases.load_base("org/name:no.gguf")
        monkeypatch.setattr(hub_server.constants, "HF_HUB_OFFLINE", True)
        assert bases.identify(name)[1] == fingerprint
        with pytest.raises(UserError, match=r"org/name:no\.gguf': .*HF_HUB_OFFLINE is set"):
            bases.sizes("org/name:no.gguf")


def test_parts_of_the_hub(split, tmp_path, monkeypatch):
    """Breaks when only the part that is named is fetched."""
    with hub_server.serving(tmp_path / "hub", monkeypatch) as hub:
        hub.commit("org/name", {path.name: path.read_bytes() for path in split})
        base = bases.load_base(f"org/name:{split[0].name}")
        assert base.fingerprint == bases.load_base(split[0]).fingerprint


def test_a_file_of_a_bucket(llama_file, tmp_path, monkeypatch):
    """Breaks when a URL's file is not copied, or copied with its neighbours, or again."""
    from etils import epath

    remote, opened = tmp_path / "bucket", []
    remote.mkdir()
    (remote / "m.gguf").write_bytes(llama_file.read_bytes())
    (remote / "other.gguf").write_bytes(b"x")
    monkeypatch.setenv("ICAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        fetching, "url_path", lambda kind, url: epath.Path(url.replace("gs://bucket", str(remote)))
    )
    copy = fetching._copy
    monkeypatch.setattr(fetching, "_copy", lambda *a: (opened.append(a[0].name), copy(*a)))
    for _ in range(2):
        base = bases.load_base("gs://bucket/m.gguf")
        assert base.path == "gs://bucket/m.gguf"
    assert base.fingerprint == bases.load_base(llama_file).fingerprint and opened == ["m.gguf"]
    with pytest.raises(UserError, match=r"has no absent\.gguf"):
        bases.load_base("gs://bucket/absent.gguf")


def test_an_adapter_of_a_file(llama_file, tmp_path, monkeypatch):
    """Breaks when an adapter's own base is not found again by its name in icae.json's folder."""
    base = bases.load_base(llama_file)
    template = targets.make_template("plain", base.tokenizer)
    monkeypatch.chdir(llama_file.parent)
    made = adapters.Adapter(
        CompressionConfig(k=4, rate=4),
        lora.LoraConfig(4, 2.0, 0.0),
        template,
        random_trained(base.config, 4),
        llama_file.name,
        base_fingerprint=base.fingerprint,
        base_identity=base.identity,
    )
    adapters.save_adapter(tmp_path / "a", made)
    monkeypatch.chdir(tmp_path)
    compressor = icae_jax.load(tmp_path / "a")
    assert compressor.base.path == str(llama_file)
    named = json.loads((tmp_path / "a" / "encoder" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(llama_file)
    assert inspection.try_bases(
        tmp_path / "a", inspection.describe(tmp_path / "a"), [str(llama_file)]
    )[str(llama_file)][0]
    made = dataclasses.replace(made, base_path="org/name@rev:m.gguf")
    raw = adapters.peft_json(made)
    assert raw["base_model_name_or_path"] == "org/name@rev:m.gguf" and "revision" not in raw
    (tmp_path / "c").write_text(json.dumps(raw))
    assert peft_config.read(tmp_path / "c").base == "org/name@rev:m.gguf"
    llama_file = tmp_path / "gone.gguf"
    with pytest.raises(UserError, match=r"gone\.gguf, which is not a GGUF file that is here"):
        adapters.check_base(str(llama_file), "a")


def test_training_on_a_file(llama_file, tmp_path):
    """Breaks when a configuration's base cannot be a GGUF file, or plans do not know its sizes."""
    config = training(llama_file, tmp_path)
    assert CompressorTask(config).base.fingerprint == bases.load_base(llama_file).fingerprint
    assert subject.base_sizes(str(llama_file)) == bases.sizes(llama_file)


# ------------------------------------------------------------------------------------- conversions


def test_a_files_hub_folder(stories, tmp_path, capsys):
    """Breaks when transformers computes other logits or tokens from a converted file."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    out = tmp_path / "hub"
    assert main(["convert", "base", "--from", str(stories[1]), "--to", str(out)]) == 0
    assert "float32" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    base, text = bases.load_base(stories[1]), "Once upon a time, Lily saw a dog."
    ids = tokenizer(text)["input_ids"]
    assert ids == base.tokenizer(text)["input_ids"] and len(ids) > 8
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits.numpy()
    close(logits(base.config, base.params, np.asarray([ids])), want, 1e-5)
    assert bases.load_base(out).identity == base.identity
    assert not (out / gguf_folder.NOTE).exists()  # it is a base without the file too
    with pytest.raises(SystemExit) as status:
        main(["convert", "base", "--from", str(stories[1]), "--to", str(out)])
        raise SystemExit(2)
    assert status.value.code == 2


def test_a_quantised_file_is_written_in_float32(models, tmp_path):
    """Breaks when dequantised numbers are rounded by default."""
    path = tmp_path / "q.gguf"
    gguf_files.from_folder(path, models["llama"][0], "llama", TOKENIZER, default="Q8_0")
    converted = convert_base.convert(path, tmp_path / "hub")
    assert converted.dtype == "float32"
    same(bases.load_base(tmp_path / "hub").params, bases.load_base(path).params)
    half = gguf_files.from_folder(
        tmp_path / "h.gguf", models["llama"][0], "llama", TOKENIZER, default="BF16"
    )
    assert convert_base.convert(half, tmp_path / "h", "orbax").dtype == "bfloat16"
    assert bases.load_base(tmp_path / "h").fingerprint == bases.load_base(half).fingerprint


def test_a_description(llama_file, capsys):
    """Breaks when inspect does not tell what a file holds, given as the path or as the base."""
    for argv in ([str(llama_file)], ["--base", str(llama_file)]):
        assert main(["inspect", *argv, "--json"]) == 0
        about = json.loads(capsys.readouterr().out)
        assert about["what"] == "base model, LlamaForCausalLM" and about["blocks"] == {"F32": 21}
        assert about["tokenizer"] == "gpt2, gpt-2" and about["stop_ids"] == [2]
        assert about["fingerprint"] == bases.load_base(llama_file).fingerprint
        assert about["bytes"] == llama_file.stat().st_size
