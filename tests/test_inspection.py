"""`icae inspect`: every kind of file and folder says what it is, and which bases fit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, random_params, random_trained

from icae_jax.cli import main as cli
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.memory import KV, place
from icae_jax.inference import memory_file
from icae_jax.inference.loading import load
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import formats, peft_folder
from icae_jax.interop.hub import base as bases
from icae_jax.models import lora
from icae_jax.objectives import targets
from icae_jax.workflows import inspection


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """{kind: path} of everything that can be looked at."""
    folder = tmp_path_factory.mktemp("inspect")
    base = bases.load_base(tiny_base)
    template = targets.make_template("plain", base.tokenizer)
    compression = CompressionConfig(k=3, rate=4, layout="sequential")
    config = lora.LoraConfig(4, 2.0, targets=("q_proj", "v_proj"))
    adapter = adapters.Adapter(
        compression, config, template, random_trained(TINY, 3), base.path, base.fingerprint
    )
    adapters.save_adapter(folder / "adapter", adapter)
    peft_folder.save(folder / "peft", adapter, TINY)
    paths = {
        "adapter": folder / "adapter",
        "peft": folder / "peft",
        "base": tiny_base,
        "weights": tiny_base / "model.safetensors",
    }
    paths["icae-v2"] = formats.write("icae-v2", folder / "v2", adapter, TINY)
    compressor = load(folder / "adapter")
    paths["memory"] = folder / "m.safetensors"
    compressor.save(
        paths["memory"],
        compressor.compress(["the cat sat", "a dog ran on the big red mat over the sea"]),
        ["a", "b"],
    )
    return paths


def inspect(path, capsys, *flags):
    code = cli.main(["inspect", str(path), *flags])
    return code, capsys.readouterr()


def test_what_each_is(made, capsys):
    """Breaks when a kind is taken for another, or its method, sizes or identity are left out."""
    told = {kind: json.loads(inspect(path, capsys, "--json")[1].out) for kind, path in made.items()}
    assert {kind: about["what"] for kind, about in told.items()} == {
        "adapter": "adapter folder",
        "peft": "adapter folder in PEFT's form",
        "base": "base model, LlamaForCausalLM",
        "weights": "weights of a base model; give the folder that holds them",
        "icae-v2": "trained compressor, format icae-v2",
        "memory": "memory file",
    }
    must_have = {"num_hidden_layers": 2, "hidden_size": 32, "q_width": 32, "kv_width": 16}
    for kind in ("adapter", "peft", "icae-v2"):
        about = told[kind]
        assert (about["method"], about["k"], about["rank"], about["lora_targets"]) == (
            "icae",
            3,
            [4],
            ["q_proj", "v_proj"],
        )
        assert about["base_must_have"] == must_have and about[
            "trained_parameters"
        ] == 6 * 32 + 2 * 4 * (32 + 32 + 32 + 16)
    assert (
        told["adapter"]["base_fingerprint"]
        == told["memory"]["base_fingerprint"]
        == bases.load_base(made["base"]).fingerprint
    )
    assert told["icae-v2"]["reading"]["alpha"] == 8 and told["icae-v2"]["sizes_of"] == [
        "no base known here"
    ]
    assert told["base"]["parameters"] == sum(
        x.size for x in jax.tree.leaves(bases.load_base(made["base"]).params)
    )
    assert told["memory"]["texts"] == 2 and told["memory"]["slots"] == [2, 3, 32]
    for path in made.values():
        assert "what " in inspect(path, capsys)[1].out


def test_a_memory_of_keys_and_values(tmp_path, capsys):
    """Breaks when the tensor named k stands in the place of the number of memory tokens."""
    config = CompressionConfig("x500", k=3, rate=4)
    shape = (2, 1, 3, 2, 8)
    contents = {name: np.zeros(shape, np.float32) for name in ("k", "v")}
    memory = place(KV, contents, np.ones((1, 1), np.int32), config)
    origin = memory_file.Origin(config, "b" * 64, "a" * 64, tmp_path)
    memory_file.save(tmp_path / "m.safetensors", memory, ["a"], origin)
    about = json.loads(inspect(tmp_path / "m.safetensors", capsys, "--json")[1].out)
    assert about["k"] == 3 and about["v"] == list(shape)


def test_a_base_with_biases(tmp_path, tiny_tokenizer, capsys):
    """Breaks when biases are left out, `architectures` must be stated, or columns run together."""
    config = dataclasses.replace(TINY, qkv_bias=True, o_bias=True)
    bases.save_base(tmp_path / "base", config, random_params(config), tiny_tokenizer)
    path = tmp_path / "base" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            {name: value for name, value in raw.items() if name != "architectures"}
            | {"dtype": None, "torch_dtype": "x"}
        )
    )
    about = json.loads(inspect(tmp_path / "base", capsys, "--json")[1].out)
    assert (about["what"], about["dtype"]) == ("base model, LlamaForCausalLM", "x")
    assert (
        about["biases"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
        and about["tensors"] == 21 + 2 * 4
    )
    lines = inspect(tmp_path / "base", capsys)[1].out.splitlines()
    (biases,) = [line for line in lines if line.startswith("biases ")]
    assert biases.split(maxsplit=1)[1] == "q_proj, k_proj, v_proj, o_proj"
    (positions,) = [line for line in lines if line.startswith("max position embeddings ")]
    column = biases.index("q_proj")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)
    assert int(positions[column:]) == about["max_position_embeddings"]


def test_known_bases_by_their_sizes(tmp_path, capsys):
    """Breaks when released weights do not lead to their base by hidden size and width of v."""
    tensors = {"memory_token_embed.weight": np.zeros((131, 4096), np.float16)}
    shapes = {
        "q_proj.lora_A": (2, 4096),
        "q_proj.lora_B": (4096, 2),
        "v_proj.lora_A": (2, 4096),
        "v_proj.lora_B": (1024, 2),
    }
    for i in range(32):
        for name, shape in shapes.items():
            tensors[f"icae.base_model.model.model.layers.{i}.self_attn.{name}.default.weight"] = (
                np.zeros(shape, np.float16)
            )
    safetensors.numpy.save_file(tensors, tmp_path / "x")
    about = json.loads(inspect(tmp_path / "x", capsys, "--json")[1].out)
    assert (
        about["k"] == 128
        and any("Mistral-7B" in n for n in about["sizes_of"])
        and any("Llama-3-8B" in n for n in about["sizes_of"])
    )
    assert not any("Llama-2" in n for n in about["sizes_of"])
    assert len(set(inspection.KNOWN.values())) > 15


@pytest.mark.parametrize("shape", [(), (32,)])
def test_a_table_without_rows(made, capsys, tmp_path, shape):
    """Breaks when an embedding table with too few axes ends in a traceback, here or in convert."""
    tensors = safetensors.numpy.load_file(made["icae-v2"]) | {
        "memory_token_embed.weight": np.ones(shape, np.float32)
    }
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    code, printed = inspect(tmp_path / "x.safetensors", capsys, "--json")
    assert code == 0 and json.loads(printed.out)["k"] == 0
    argv = [
        "convert",
        "adapter",
        "--from",
        tmp_path / "x.safetensors",
        "--base",
        made["base"],
        "--to",
        tmp_path / "out",
    ]
    assert cli.main(list(map(str, argv))) == 2
    told = capsys.readouterr().err.strip()
    assert "mis-shaped memory_token_embed.weight" in told and "\n" not in told


def test_which_bases_fit(made, capsys, tmp_path, tiny_tokenizer):
    """Breaks when a base of other sizes or another fingerprint is said to fit."""
    for kind in ("adapter", "peft", "icae-v2", "memory"):
        code, printed = inspect(made[kind], capsys, "--base", str(made["base"]))
        assert code == 0 and "fits " in printed.out
    wide = dataclasses.replace(TINY, num_kv_heads=4)
    bases.save_base(tmp_path / "wide", wide, random_params(wide), tiny_tokenizer)
    bases.save_base(tmp_path / "other", TINY, random_params(TINY, 1), tiny_tokenizer)
    code, printed = inspect(
        made["icae-v2"], capsys, "--base", str(tmp_path / "wide"), "--base", str(made["base"])
    )
    assert (
        code == 2
        and "kv_width 32, not 16" in printed.out
        and printed.out.count("does not fit") == 1
    )
    code, printed = inspect(made["adapter"], capsys, "--base", str(tmp_path / "other"), "--json")
    assert code == 2 and json.loads(printed.out)["fits"] == {str(tmp_path / "other"): False}


def test_unknown_things_are_named(made, capsys, tmp_path):
    """Breaks when a path that is nothing ends in a traceback."""
    (tmp_path / "text").write_text("words, nothing else")
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "tensors")
    assert "tensors of no known kind" in inspect(tmp_path / "tensors", capsys)[1].out
    for path, message in (
        (tmp_path / "text", "neither safetensors nor"),
        (tmp_path / "absent", "no such file or folder"),
        (tmp_path, "holds no trained compressor"),
    ):
        code, printed = inspect(path, capsys)
        assert code == 2 and message in printed.err
    code, printed = inspect(made["base"], capsys, "--base", str(made["base"]))
    assert code == 2 and "which needs no base" in printed.err
