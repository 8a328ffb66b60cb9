"""The adapter folder: round trip, PEFT's own reading of it, and refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, close, random_lora, random_params, random_trained

from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import formats, lora_tensors
from icae_jax.interop.hub import base as bases
from icae_jax.models import lora
from icae_jax.objectives.targets import Template


@pytest.fixture(scope="module")
def base(tiny_base):
    return bases.load_base(tiny_base)


@pytest.fixture(scope="module")
def adapter(base):
    trained = random_trained(TINY, 3) | {"lora": random_lora(TINY, 4, lora.PROJECTIONS)}
    config = lora.LoraConfig(rank=4, scale=1.5, dropout=0.1, targets=lora.PROJECTIONS)
    template = Template("mistral", (1, 3), (-1,), (4,), 2)
    compression = CompressionConfig(k=3, rate=5, layout="uniform")
    return adapters.Adapter(compression, config, template, trained, base.path, base.fingerprint)


@pytest.fixture
def folder(adapter, tmp_path):
    adapters.save_adapter(tmp_path / "adapter", adapter)
    return tmp_path / "adapter"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_within(path, group, **changes):
    edit(path, **{group: json.loads(path.read_text())[group] | changes})


def edit_tensors(path, change):
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_round_trip(folder, adapter, base):
    """Breaks when anything of an adapter is lost, transposed or rounded on disk."""
    loaded = adapters.load_adapter(folder, base)
    jax.tree.map(np.testing.assert_array_equal, loaded.trained, adapter.trained)
    assert dataclasses.replace(loaded, trained={}) == dataclasses.replace(adapter, trained={})
    assert loaded.fingerprint == adapter.fingerprint
    table = adapter.trained["memory_table"].at[0, 0].add(1)
    assert (
        dataclasses.replace(adapter, trained=adapter.trained | {"memory_table": table}).fingerprint
        != adapter.fingerprint
    )


def test_workdir_stands_for_its_adapter(folder):
    """Breaks when a training workdir cannot be given in the adapter's place."""
    assert adapters.locate(folder.parent).folder == folder == adapters.locate(folder).folder


def test_peft_merges_what_we_compute(folder, adapter, tiny_base):
    """Breaks when PEFT would read other names, another scale (its silent alpha = r = 8) or
    transposed kernels.
    """
    torch, transformers, peft = (pytest.importorskip(m) for m in ("torch", "transformers", "peft"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    before = {name: value.clone().numpy() for name, value in model.state_dict().items()}
    merged = (
        peft.PeftModel.from_pretrained(model, folder / "encoder").merge_and_unload().state_dict()
    )
    assert merged.keys() == before.keys()
    changed = 0
    for module, projections in adapter.trained["lora"]["layers"].items():
        for name, pair in projections.items():
            for i in range(TINY.num_layers):
                key = f"model.layers.{i}.{module}.{name}.weight"
                close(
                    merged[key].numpy(),
                    before[key] + 1.5 * np.asarray(pair["a"][i] @ pair["b"][i]).T,
                    1e-6,
                )
                assert np.abs(merged[key].numpy() - before[key]).max() > 0.01
                changed += 1
    assert changed == 7 * TINY.num_layers
    np.testing.assert_array_equal(merged["lm_head.weight"], before["lm_head.weight"])


def test_wrong_base_is_refused_with_both_named(folder, base):
    """Breaks when a compressor runs on a base that it was not trained on."""
    other = dataclasses.replace(
        base, fingerprint=bases.fingerprint(TINY, random_params(TINY, 1)), path="somewhere/else"
    )
    with pytest.raises(ValueError, match="give the right base") as error:
        adapters.load_adapter(folder, other)
    for part in (base.fingerprint[:12], other.fingerprint[:12], base.path, other.path, str(folder)):
        assert part in str(error.value)


def test_names_of_the_reference_are_read():
    """Breaks when tensors of the released checkpoints, with `icae.` in front and `.default` inside,
    are not found.
    """
    tree = random_lora(TINY)
    tensors = lora_tensors.lora_to_hub(tree, prefix="icae.base_model.model.", infix=".default")
    assert tensors[
        "icae.base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    ].shape == (4, 32)
    jax.tree.map(
        np.testing.assert_array_equal,
        lora_tensors.lora_from_hub(tensors | {"other.weight": np.zeros(3)}, TINY),
        tree,
    )


Q_A, Q_B = (f"base_model.model.model.layers.1.self_attn.q_proj.lora_{x}.weight" for x in "AB")


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda t: t.clear(), ["no LoRA tensors"]),
        (lambda t: [t.pop(Q_A), t.pop(Q_B)], [f"missing {Q_A} (4, 32)", f"missing {Q_B} (32, 4)"]),
        (
            lambda t: t.update({Q_A.replace("layers.1", "layers.2"): t[Q_A]}),
            ["unexpected", "layers.2", "the base has 2 layers"],
        ),
        (
            lambda t: t.update({Q_A: np.zeros((4, 31), np.float32)}),
            [f"mis-shaped {Q_A}: (4, 31), with this base it is (4, 32)"],
        ),
        (
            lambda t: t.update({Q_B: t[Q_B][:, :3]}),
            [f"mis-shaped {Q_B}: (32, 3), with this base it is (32, 4)"],
        ),
        (
            lambda t: t.update({Q_A.replace("q_proj", "qkv"): t[Q_A]}),
            ["unexpected", "self_attn.qkv is not a projection"],
        ),
        (
            lambda t: t.update({Q_B: t[Q_B][:3], Q_A.replace("layers.1", "layers.7"): t.pop(Q_A)}),
            [f"missing {Q_A}", f"mis-shaped {Q_B}", "unexpected base_model.model.model.layers.7"],
        ),
    ],
)
def test_every_tensor_that_does_not_fit_is_listed(change, messages):
    """Breaks when an adapter of another base, or half an adapter, gets as far as a shape error or
    runs, or only one fault is named.
    """
    tensors = lora_tensors.lora_to_hub(random_lora(TINY))
    lora_tensors.lora_from_hub(tensors, TINY)
    change(tensors)
    with pytest.raises(ValueError, match="do not fit this base") as error:
        lora_tensors.lora_from_hub(tensors, TINY)
    assert all(message in str(error.value) for message in messages), error.value


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: edit(f / "icae.json", format_version=99),
            "format_version is 99, this version reads 1",
        ),
        (
            lambda f: edit(f / "icae.json", compression={"k": 3}),
            "compression: fields layout, .* unknown or missing",
        ),
        (
            lambda f: edit(f / "icae.json", compression={"k": 3, "size": 1}),
            "compression: fields layout, .*size, .* unknown or missing",
        ),
        (
            lambda f: (f / "encoder" / "adapter_config.json").write_text("{}"),
            "r, lora_alpha, .* missing",
        ),
        (
            lambda f: edit(f / "icae.json", compression=[]),
            r"icae\.json: compression is \[\], which is not an object",
        ),
        (
            lambda f: edit_within(f / "icae.json", "compression", k="3"),
            "compression: k is '3', which is not a whole number",
        ),
        (
            lambda f: edit_within(f / "icae.json", "compression", k_choices=["a"]),
            r"k_choices is \['a'\], which are not whole numbers",
        ),
        (
            lambda f: edit_within(f / "icae.json", "template", stop=None),
            "template: stop is None, which is not a whole number",
        ),
        (
            lambda f: edit(f / "icae.json", format_version=True),
            "format_version is True, this version reads 1",
        ),
        (
            lambda f: edit_within(f / "icae.json", "compression", rate=float("nan")),
            "compression: rate is nan, which is not a number of",
        ),
        (
            lambda f: edit_within(f / "icae.json", "compression", rate=10**400),
            r"compression: rate is 10+, which is not a number of",
        ),
        (
            lambda f: edit_within(f / "icae.json", "compression", k=-3),
            r"icae\.json: compression: compression\.k is -3; it must be positive",
        ),
        (
            lambda f: edit_within(f / "icae.json", "compression", method=["icae"]),
            r"method is \['icae'\], which is not a text",
        ),
        (
            lambda f: edit_within(f / "icae.json", "template", head=[[1]]),
            r"template: head is \[\[1\]\], which are not whole numbers",
        ),
        (
            lambda f: edit_within(f / "icae.json", "template", before=[64]),
            "template before: id 64, but the base's embedding table has 64 rows",
        ),
        (
            lambda f: edit_within(f / "icae.json", "template", after=[-4]),
            "template after: id -4, but the base's embedding table has 64 rows",
        ),
        (
            lambda f: edit_within(f / "icae.json", "template", stop=-1),
            "template stop: id -1, but the base's embedding table has 64 rows",
        ),
        (lambda f: edit(f / "icae.json", origin="x"), "origin is 'x', which is not an object"),
        (lambda f: edit(f / "icae.json", origin=[]), r"origin is \[\], which is not an object"),
        (
            lambda f: (f / "icae.json").write_text('{"format_version": 1}'),
            r"icae\.json: base_fingerprint, compression, .* missing",
        ),
        (lambda f: (f / "icae.json").write_text("[]"), r"icae\.json: not an object"),
        (
            lambda f: edit(f / "encoder" / "adapter_config.json", lora_alpha="x"),
            "lora_alpha is 'x', which is not a number",
        ),
        (
            lambda f: edit(f / "encoder" / "adapter_config.json", r=0),
            r"adapter_config\.json: r is 0",
        ),
        (
            lambda f: edit(f / "encoder" / "adapter_config.json", target_modules=[[]]),
            "which is neither a text nor a list of texts",
        ),
        (lambda f: (f / "icae.json").unlink(), r"has no icae\.json, so it is no adapter"),
        (lambda f: (f / "memory.safetensors").unlink(), r"memory\.safetensors: no such file"),
        (
            lambda f: (f / "memory.safetensors").write_bytes(b"x" * 20),
            "not a readable safetensors file",
        ),
        (
            lambda f: edit_tensors(
                f / "memory.safetensors",
                lambda t: t.update({adapters.MEMORY_TABLE: np.zeros((5, 32), np.float32)}),
            ),
            r"memory_token_embed.weight is \(5, 32\), expected \(6, 32\)",
        ),
        (
            lambda f: edit_tensors(
                f / "memory.safetensors", lambda t: t.update(other=t.pop(adapters.MEMORY_TABLE))
            ),
            r"memory_token_embed.weight is None, expected \(6, 32\)",
        ),
    ],
)
def test_spoilt_folders_are_named(spoil, message, folder, base):
    """Breaks when a damaged folder loads, or its error does not say which file."""
    spoil(folder)
    with pytest.raises(UserError, match=message):
        adapters.load_adapter(folder, base)


def test_not_a_folder(base, tmp_path):
    """Breaks when a wrong path ends in a traceback."""
    with pytest.raises(ValueError, match="is not a folder; give the folder that training wrote"):
        adapters.load_adapter(tmp_path / "absent", base)


# --- A decoder's LoRA ---


@pytest.fixture
def with_decoder(adapter):
    compression = dataclasses.replace(adapter.compression, decoder_lora=True)
    trained = adapter.trained | {"decoder_lora": random_lora(TINY, 4, lora.PROJECTIONS, seed=9)}
    return dataclasses.replace(adapter, compression=compression, trained=trained)


def test_a_decoders_lora_travels_with_the_adapter(with_decoder, adapter, base, tmp_path):
    """Breaks when the decoder's LoRA is lost, is the encoder's, or is not in the fingerprint."""
    adapters.save_adapter(tmp_path / "a", with_decoder)
    loaded = adapters.load_adapter(tmp_path / "a", base)
    assert loaded.compression.decoder_lora and loaded.has_decoder_lora
    jax.tree.map(np.testing.assert_array_equal, loaded.trained, with_decoder.trained)
    assert loaded.fingerprint == with_decoder.fingerprint != adapter.fingerprint
    read = {name: x.shape for name, x in _decoder_tensors(tmp_path / "a").items()}
    assert read == {name: x.shape for name, x in _encoder_tensors(tmp_path / "a").items()}


def _encoder_tensors(folder):
    return safetensors.numpy.load_file(folder / "encoder" / "adapter_model.safetensors")


def _decoder_tensors(folder):
    return safetensors.numpy.load_file(folder / "decoder" / "adapter_model.safetensors")


def test_an_adapter_without_one_is_written_as_before(folder):
    """Breaks when earlier versions, which refuse unknown fields, can no longer read an adapter."""
    assert "decoder_lora" not in json.loads((folder / "icae.json").read_text())["compression"]
    assert not (folder / "decoder").exists()


def test_half_a_decoders_lora_is_refused(with_decoder, base, tmp_path):
    """Breaks when a decoder reads without the LoRA that it was trained with, or with another's."""
    folder = tmp_path / "a"
    adapters.save_adapter(folder, with_decoder)
    edit(folder / "decoder" / "adapter_config.json", lora_alpha=1.0)
    with pytest.raises(UserError, match=r"lora_alpha / r is 0\.25, the encoder's 1\.5"):
        adapters.load_adapter(folder, base)
    edit_within(folder / "icae.json", "compression", decoder_lora=False)
    with pytest.raises(UserError, match=r"icae\.json says nothing of a decoder LoRA"):
        adapters.load_adapter(folder, base)
    edit_within(folder / "icae.json", "compression", decoder_lora=True)
    (folder / "decoder" / "adapter_model.safetensors").unlink()
    edit(folder / "decoder" / "adapter_config.json", lora_alpha=6.0)
    with pytest.raises(UserError, match=r"decoder/adapter_model\.safetensors: no such file"):
        adapters.load_adapter(folder, base)


@pytest.mark.parametrize("form", formats.FORMATS)
def test_formats_that_cannot_carry_it_refuse_it(with_decoder, tmp_path, form):
    """Breaks when a file is written that is read without the LoRA that its decoder needs."""
    with pytest.raises(UserError, match=f"--format {form} cannot carry a decoder LoRA"):
        formats.write(form, tmp_path / "out", with_decoder, TINY)
    assert not (tmp_path / "out").exists()
