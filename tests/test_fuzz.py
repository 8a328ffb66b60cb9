"""Whatever a file of a base, adapter or memory holds: no NaN and no error but a `UserError`."""

import json
import shutil
import struct

import numpy as np
import pytest
from conftest import TINY, write_adapter
from fuzzing import ODD_NUMBERS, ODD_TEXTS, READ, VALUES, changed, examples, finite
from hypothesis import strategies as st

from icae_jax.compression import memory as memories
from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.inference import memory_file
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.text import user_ids
from icae_jax.models import llama
from icae_jax.models.families import config_json

# ----------------------------------------------------------------------------------- configurations

CONFIG = config_json.hub_config(TINY, "float32", {"bos_token_id": 1, "eos_token_id": 2})
ROPES = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "dynamic"]) | VALUES,
        "type": st.sampled_from(["linear", "yarn"]) | VALUES,
        **{
            name: st.sampled_from(ODD_NUMBERS) | VALUES
            for name in ("factor", "low_freq_factor", "high_freq_factor", "rope_theta")
        },
        **{
            name: st.sampled_from(ODD_NUMBERS) | VALUES
            for name in ("original_max_position_embeddings", "attention_factor", "beta_fast")
        },
    },
)


@examples(
    raw=changed(
        CONFIG,
        (
            "sliding_window",
            "layer_types",
            "attention_bias",
            "quantization_config",
            "num_experts",
            "rope_scaling",
            "auto_map",
        ),
    ),
    architecture=st.sampled_from([*config_json.FAMILIES, ""]) | VALUES,
    rope=st.none() | ROPES,
)
def test_any_config_json(fixture, raw, architecture, rope):
    """Breaks when some config.json gives a traceback, or sizes that are not numbers."""
    raw = (
        raw
        | ({"architectures": [architecture]} if architecture != "" else {})
        | ({"rope_parameters": rope} if rope is not None else {})
    )
    try:
        config = config_json.parse_config(raw)
    except UserError as error:
        assert (
            str(error).startswith("config.json: ")
            or "of the model" in str(error)
            or "num_heads" in str(error)
        )
        return
    READ.append(1)
    assert all(
        type(n) is int and n > 0
        for n in (config.vocab_size, config.num_layers, config.head_dim, config.hidden_size)
    )
    scaling = vars(config.rope_scaling).values() if config.rope_scaling else ()
    assert finite([config.rms_norm_eps, config.rope_theta, *scaling])
    if config.num_layers < 100:
        llama.param_shapes(config)


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    """(adapter folder, its base)."""
    base = bases.load_base(tiny_base)
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a", base), base


@pytest.fixture(scope="module")
def spoiled(adapter, tmp_path_factory):
    """A copy of the adapter's folder, in which an example changes one file and restores it."""
    return shutil.copytree(adapter[0], tmp_path_factory.mktemp("spoiled") / "a")


def load_with(fixture, name, raw):
    """Loads the adapter with other content of a JSON file; None if that is refused."""
    (good, base), folder = fixture("adapter"), fixture("spoiled")
    (folder / name).write_text(json.dumps(raw))
    try:
        return adapters.load_adapter(folder, base)
    except UserError as error:
        assert "\n" not in str(error).split(":\n  ")[0]
        return None
    finally:
        shutil.copyfile(good / name, folder / name)


PEFT = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": 4,
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "inference_mode": True,
}
PEFT_MORE = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "exclude_modules",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "megatron_config",
    "revision",
)


@examples(raw=changed(PEFT, PEFT_MORE) | VALUES)
def test_any_adapter_config_json(fixture, raw):
    """Breaks when some adapter_config.json gives a traceback, or a LoRA of NaN."""
    loaded = load_with(fixture, "encoder/adapter_config.json", raw)
    if loaded is not None:
        READ.append(1)
        assert finite([loaded.lora.scale, loaded.lora.dropout]) and loaded.lora.rank >= 1
        for of in loaded.trained["lora"]["layers"].values():
            assert all(
                np.isfinite(np.asarray(x)).all() for pair in of.values() for x in pair.values()
            )


@examples(data=st.data())
def test_any_icae_json(fixture, data):
    """Breaks when some icae.json gives a traceback."""
    valid = json.loads((fixture("adapter")[0] / "icae.json").read_text())
    group = data.draw(st.sampled_from([None, "compression", "template"]))
    raw = (
        data.draw(changed(valid, ("origin",)))
        if group is None
        else valid | {group: data.draw(changed(valid[group]) | VALUES)}
    )
    loaded = load_with(fixture, "icae.json", raw)
    if loaded is not None:
        READ.append(1)
        assert finite([loaded.compression.rate]) and loaded.compression.k == 4


TOKENIZER = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 512,
}
TOKENIZER_MORE = (
    "added_tokens_decoder",
    "add_bos_token",
    "chat_template",
    "extra_special_tokens",
    "auto_map",
    "pad_token",
    "split_special_tokens",
)


@pytest.fixture(scope="module")
def tokenizer_folder(tiny_base, tmp_path_factory):
    return shutil.copytree(
        tiny_base,
        tmp_path_factory.mktemp("tokenizer") / "base",
        ignore=shutil.ignore_patterns("*.safetensors"),
    )


@examples(raw=changed(TOKENIZER, TOKENIZER_MORE) | VALUES)
def test_any_tokenizer_config_json(fixture, raw):
    """Breaks when some tokenizer_config.json gives a traceback, or changes ids."""
    folder = fixture("tokenizer_folder")
    (folder / "tokenizer_config.json").write_text(json.dumps(raw))
    try:
        tokenizer = tokenizers.load_tokenizer(folder)
    except UserError as error:
        assert str(folder) in str(error)
        return
    READ.append(1)
    assert user_ids(tokenizer, "the cat saw 2024") == [8, 9, 17, 0] and tokenizers.fingerprint(
        tokenizer
    )


# ------------------------------------------------------------------------------------- memory files

SMALL = CompressionConfig(k=2, rate=4)


@pytest.fixture(scope="module")
def memory_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "m.safetensors"
    slots = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)
    memory = memories.place(memories.Slots, {"slots": slots}, np.asarray([[8, 3], [5, 0]]), SMALL)
    origin = memory_file.Origin(SMALL, "b" * 64, "a" * 64, path.parent)
    memory_file.save(path, memory, ["a", "b"], origin)
    return path.read_bytes()


def rebuilt(content, header):
    length = int.from_bytes(content[:8], "little")
    data = json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + content[8 + length :]


@examples(data=st.data())
def test_any_memory_file(fixture, data):
    """Breaks when a memory file with changed bytes gives a traceback, or is read as NaN."""
    content = fixture("memory_bytes")
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    kind = data.draw(st.sampled_from(["metadata", "tensor", "header", "bytes", "cut"]))
    if kind == "metadata":
        texts = st.sampled_from(ODD_TEXTS[:10]) | st.text(max_size=8) | VALUES.map(json.dumps)
        fields = data.draw(
            st.dictionaries(st.sampled_from(list(header["__metadata__"])), texts, max_size=2)
        )
        content = rebuilt(content, header | {"__metadata__": header["__metadata__"] | fields})
    elif kind == "tensor":
        name = data.draw(st.sampled_from(["slots", "lengths"]))
        content = rebuilt(content, header | {name: data.draw(changed(header[name]))})
    elif kind == "header":
        content = rebuilt(content, data.draw(changed(header, ("k", "v"))))
    elif kind == "bytes":
        changes = data.draw(
            st.dictionaries(
                st.integers(0, len(content) - 1), st.integers(0, 255), min_size=1, max_size=6
            )
        )
        content = bytes(changes.get(i, byte) for i, byte in enumerate(content))
    else:
        content = content[: data.draw(st.integers(0, len(content)))]
    path = fixture("tmp_path_factory").getbasetemp() / "m.safetensors"
    path.write_bytes(content)
    try:
        memory, ids = memory_file.load(path, memory_file.Origin(SMALL, "b" * 64, "a" * 64))
    except UserError as error:
        assert str(path) in str(error)
        return
    READ.append(1)
    assert len(ids) == len(memory) and all(np.isfinite(x).all() for x in memory.contents.values())
