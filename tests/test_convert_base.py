"""`icae convert base`: what is written loads in transformers and here as what it was made of."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import TINY, same

from icae_jax.cli import convert as cli
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import weights
from icae_jax.workflows import convert_base


def convert(*argv):
    return cli.run(["base", *map(str, argv)])


@pytest.fixture
def folder(tiny_base, tmp_path):
    """The tiny base as hub folders are: with a licence, a chat template, more copies of weights."""
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    for name in (
        "LICENSE.txt",
        "chat_template.jinja",
        "tokenizer.model",
        "merges.txt",
        "README.md",
        ".gitattributes",
        "model.gguf",
    ):
        (folder / name).write_text(name)
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            {k: v for k, v in raw.items() if k != "dtype"} | {"torch_dtype": "float32", "note": 1}
        )
    )
    return folder


def test_transformers_computes_the_same(tmp_path):
    """Breaks when a base goes through Orbax and back and a bit of transformers' logits changes."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=5e5,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "original")
    assert (
        convert("--from", tmp_path / "original", "--to", tmp_path / "orbax", "--format", "orbax")
        == 0
    )
    assert convert("--from", tmp_path / "orbax", "--to", tmp_path / "back") == 0
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (2, 12)))
    logits = []
    for name in ("original", "back"):
        with torch.no_grad():
            logits.append(
                transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits
            )
    assert logits[0].dtype == torch.float32 and torch.equal(*logits) and logits[0].std() > 0.1


@pytest.mark.parametrize("form", convert_base.FORMATS)
def test_what_is_carried_over(folder, tmp_path, tiny_params, form, capsys):
    """Breaks when a tokenizer file or a config.json field is lost, or other weights come along."""
    assert (
        convert("--from", folder, "--to", tmp_path / "new", "--format", form, "--dtype", "bfloat16")
        == 0
    )
    base = bases.load_base(tmp_path / "new", jnp.bfloat16)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    tensors, size = (
        {"hub": 21, "orbax": 12}[form],
        sum(x.nbytes for x in jax.tree.leaves(base.params)),
    )
    fingerprint = bases.load_base(folder).fingerprint[:12]
    assert line == (
        f"{tmp_path / 'new'}: {form} format, {tensors} tensors in bfloat16, {size:,} bytes, "
        f"fingerprint {fingerprint}"
    )
    same(base.params, jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), tiny_params))
    kept = {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "LICENSE.txt",
        "chat_template.jinja",
        "tokenizer.model",
    }
    kept |= {"merges.txt"}
    written = {p.name for p in (tmp_path / "new").iterdir()}
    assert written == kept | {"config.json", "params" if form == "orbax" else "model.safetensors"}
    assert all(
        (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes() for name in kept
    )
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "new")
    )
    assert after == before | {"torch_dtype": "bfloat16"}


def test_the_result_as_json(folder, tmp_path, capsys):
    """Breaks when --json prints anything but one object, or describes another base."""
    assert convert("--from", folder, "--to", tmp_path / "new", "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["path"], written["format"], written["tensors"], written["dtype"]) == (
        str(tmp_path / "new"),
        "hub",
        21,
        "float32",
    )
    assert written["fingerprint"] == bases.load_base(folder).fingerprint


def test_dtype_is_the_sources_own(folder, tmp_path):
    """Breaks when weights are rounded unasked, or a missing dtype stops the conversion."""
    convert("--from", folder, "--to", tmp_path / "same")
    assert (tmp_path / "same" / "model.safetensors").stat().st_size == (
        folder / "model.safetensors"
    ).stat().st_size
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if k != "torch_dtype"})
    )
    convert("--from", folder, "--to", tmp_path / "stated")
    assert json.loads((tmp_path / "stated" / "config.json").read_text())["dtype"] == "bfloat16"
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float64"}))
    with pytest.raises(
        ValueError,
        match=r"config\.json: dtype is 'float64'; choose one with --dtype: bfloat16, float32",
    ):
        convert("--from", folder, "--to", tmp_path / "other")


def test_nothing_is_overwritten(folder, tmp_path):
    """Breaks when a conversion overwrites, writes into its own source, or leaves half a folder."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "work.txt").write_text("dear")
    refused = {
        tmp_path / "full": "--to .*full .*give a new",
        folder: "--to .*base .*give a new",
        folder / "new": "is inside --from",
    }
    for to, message in refused.items():
        with pytest.raises(ValueError, match=message):
            convert("--from", folder, "--to", to)
    (folder / "model.safetensors").write_bytes(b"spoilt")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        convert("--from", folder, "--to", tmp_path / "new")
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["base", "full"]
        and not (folder / "new").exists()
    )
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["work.txt"]


def test_an_empty_folder_is_filled(folder, tmp_path, tiny_params):
    """Breaks when a folder that was made for the result is refused."""
    (tmp_path / "empty").mkdir()
    convert("--from", folder, "--to", tmp_path / "empty")
    same(weights.load_params(tmp_path / "empty", TINY), tiny_params)
