"""Adapters of every method on disk: what each trains, how its encoder reads, a decoder's LoRA."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, edit, random_trained_of, same, training

from icae_jax.cli import main as cli
from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.inference.loading import load
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import formats, publishing
from icae_jax.interop.hub import base as bases
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.train import train
from icae_jax.workflows import inspection


@pytest.fixture(scope="module")
def base(tiny_base):
    return bases.load_base(tiny_base)


def make(base, method="icae", **fields):
    compression = CompressionConfig(method=method, k=3, rate=4, **fields)
    template = targets.make_template("plain", base.tokenizer)
    trained = random_trained_of(compression)
    return adapters.Adapter(
        compression, LoraConfig(4, 2.0), template, trained, str(base.path), base.fingerprint
    )


def save(folder, adapter):
    adapters.save_adapter(folder, adapter)
    return folder


KINDS = [
    {"method": "pooled"},
    {"method": "pooled", "encoder_mask": "causal", "encoder_layers": 1, "decoder_lora": True},
    {"method": "sac"},
    {"method": "sac", "anchor_vectors": "each", "encoder_mask": "slots"},
    {"method": "icae", "encoder_mask": "slots", "encoder_layers": TINY.num_layers},
    {"method": "x500", "encoder_mask": "all", "decoder_lora": True},
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_of_each(base, tmp_path, kind):
    """Breaks when a method's own tensors, or how its encoder reads, are lost on disk."""
    adapter = make(base, **kind)
    loaded = adapters.load_adapter(save(tmp_path / "a", adapter), base)
    assert loaded.compression == adapter.compression
    same(loaded.trained, adapter.trained)
    rows = len(loaded.trained["memory_table"]) - 3
    assert rows == {"pooled": 0, "sac": 1 if len(kind) == 1 else 3}.get(kind["method"], 3)


@pytest.mark.parametrize("method", ["icae", "x500"])
def test_files_that_mean_nothing_new_are_those_of_earlier_versions(base, tmp_path, method):
    """Breaks when earlier versions, which refuse unknown fields, can no longer read an adapter."""
    folder = save(tmp_path / "a", make(base, method))
    raw = json.loads((folder / "icae.json").read_text())
    assert list(raw["compression"]) == [
        *("method", "k", "rate", "k_choices", "layout", "memory_init", "trigger", "trigger_token"),
    ]
    assert "layers_to_transform" not in json.loads(
        (folder / "encoder" / "adapter_config.json").read_text()
    )
    assert list(safetensors.numpy.load_file(folder / "memory.safetensors")) == [
        "memory_token_embed.weight"
    ]
    # Of fields that they did not have, absence is what they did.
    loaded = adapters.load_adapter(folder, base).compression
    assert (loaded.encoder_mask, loaded.encoder_layers) == ("causal", 0)


def edit_compression(folder, **fields):
    raw = json.loads((folder / "icae.json").read_text())
    edit(folder / "icae.json", compression=raw["compression"] | fields)


def edit_projection(folder, change):
    tensors = safetensors.numpy.load_file(folder / "memory.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "memory.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: edit_projection(f, lambda t: t.pop("projection")),
            r"memory\.safetensors: projection is None, expected \(32, 32\)",
        ),
        (
            lambda f: edit_projection(f, lambda t: t.update(projection=t["projection"][:5])),
            r"memory\.safetensors: projection is \(5, 32\), expected \(32, 32\)",
        ),
        (
            lambda f: edit_projection(f, lambda t: t["projection"].fill(np.nan)),
            r"memory\.safetensors: unreadable projection: it holds NaN or infinity",
        ),
        (
            lambda f: edit_projection(f, lambda t: t.update(other=t["projection"])),
            r"memory\.safetensors: other would not be read",
        ),
        (
            lambda f: edit_compression(f, encoder_layers=3),
            r"icae\.json: compression\.encoder_layers is 3; the base has 2 layers",
        ),
        (
            lambda f: edit_compression(f, encoder_layers=-1),
            r"icae\.json: compression: compression\.encoder_layers is -1",
        ),
        (
            lambda f: edit_compression(f, encoder_mask="both"),
            r"icae\.json: compression: compression\.encoder_mask is 'both'; choose from causal",
        ),
        (
            lambda f: edit_compression(f, anchor_vectors="each"),
            r"icae\.json: compression: .*anchor_vectors is 'each', but method pooled has no such",
        ),
        (
            lambda f: edit(f / "encoder" / "adapter_config.json", layers_to_transform=[1]),
            "do not fit this base",
        ),
    ],
)
def test_spoilt_folders_are_named(base, tmp_path, spoil, message):
    """Breaks when a damaged folder loads, or its error does not say which file and field."""
    folder = save(tmp_path / "a", make(base, "pooled", encoder_layers=1))
    spoil(folder)
    with pytest.raises(UserError, match=message):
        adapters.load_adapter(folder, base)


def test_peft_reads_the_lora_of_the_first_layers(base, tiny_base, tmp_path):
    """Breaks when PEFT would make LoRA in layers that the encoder has not, or miss a tensor."""
    torch, transformers, peft = (pytest.importorskip(m) for m in ("torch", "transformers", "peft"))
    folder = save(tmp_path / "a", make(base, encoder_layers=1, decoder_lora=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, folder / "decoder")
    read = model.load_adapter(folder / "encoder", "encoder")
    assert not read.unexpected_keys
    assert not [name for name in read.missing_keys if "lora" in name]
    adapted = {
        (name.split(".layers.")[1].split(".")[0], adapter)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
        for adapter in module.lora_A
    }
    assert adapted == {("0", "encoder"), ("0", "default"), ("1", "default")}


def test_formats_of_others_refuse_what_they_would_misread(base, tmp_path):
    """Breaks when a causal implementation, or one that runs every layer, is given another's."""
    mask = make(base, encoder_mask="slots", layout="sequential")
    assert formats.misreadings("icae-v2", mask) == [
        "its encoder is causal, the adapter was trained with mask slots"
    ]
    layers = make(base, encoder_layers=1)
    with pytest.raises(UserError, match=r"cannot carry an encoder of fewer layers"):
        formats.write("icae-v2", tmp_path / "out", layers, TINY)
    with pytest.raises(UserError, match=r"of method pooled; choose from native, peft$"):
        formats.misreadings("icae-v2", make(base, "pooled"))


def test_inspecting_an_adapter(base, tmp_path):
    """Breaks when one cannot see how an encoder reads, or what is trained beside LoRA and table."""
    about = inspection.describe(save(tmp_path / "a", make(base, **KINDS[1])))
    assert (about["method"], about["encoder_mask"], about["encoder_layers"]) == (
        *("pooled", "causal", 1),
    )
    assert about["trained_tensors"] == {"projection": [32, 32]}
    # The base has as many layers as it likes behind those of the encoder.
    assert about["base_must_have"] == {"hidden_size": 32, "q_width": 32, "kv_width": 16}
    assert about["decoder_lora"] == f"{2 * 4 * (32 + 32 + 32 + 16)} parameters"
    about = inspection.describe(save(tmp_path / "b", make(base, **KINDS[3])))
    assert (about["encoder_mask"], about["anchor_vectors"]) == ("slots", "each")
    plain = inspection.describe(save(tmp_path / "c", make(base)))
    assert not {"encoder_mask", "trained_tensors", "decoder_lora"} & set(plain)


def test_a_model_card_says_how_memory_is_written_and_read(base):
    """Breaks when somebody who serves the memory cannot know of mask, layers or decoder LoRA."""
    adapter = dataclasses.replace(make(base, **KINDS[1]), base_path="org/base")
    card = publishing.card(adapter, TINY, "org/name", False, [], None)
    for row in (
        "| method | mean pooling |",
        "| encoder | mask causal, layers read: 1 |",
        "| decoder LoRA | the memory is read by the base with the LoRA in `decoder/`",
        "of up to 12 text tokens; any number |",
        "--lora-modules decoder=./decoder",
    ):
        assert row in card
    assert "decoder LoRA" not in publishing.card(
        dataclasses.replace(make(base), base_path="org/base"), TINY, "org/name", False, [], None
    )


@pytest.mark.nightly
def test_a_run_is_inspected_and_converted(tiny_base, tmp_path, capsys):
    """Breaks when a checkpoint loses a method's tensors, mask, layers or decoder LoRA."""
    fields = {"k": 4, "rate": 4} | KINDS[1]
    config = training(tiny_base, tmp_path, compression=fields, steps=1)
    run = tmp_path / "run"
    assert train(config, CompressorTask(config, workdir=run), run) == 0
    (checkpoint,) = (run / "checkpoints").iterdir()
    about = inspection.describe(checkpoint)
    assert (about["method"], about["encoder_mask"], about["encoder_layers"]) == (
        *("pooled", "causal", 1),
    )
    assert about["decoder_lora"] is True
    command = ["convert", "adapter", "--from", str(checkpoint), "--base", str(tiny_base)]
    for form in ("native", "peft"):
        to = tmp_path / form
        assert cli.main([*command, "--to", str(to), "--format", form, "--force"]) == 0
        got, want = load(to).adapter, load(run).adapter
        assert got.compression == want.compression
        same(got.trained, jax.device_get(want.trained))
