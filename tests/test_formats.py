"""The reference implementations' files: recognised by content, nothing but tensors read, every
fault listed, written as they were.
"""

import json
import pickle

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, random_trained, same

from icae_jax.interop.adapters import formats, tensor_files
from icae_jax.interop.hub import base as bases
from icae_jax.models.families import tensor_names
from icae_jax.objectives import targets

torch = pytest.importorskip("torch")

SPELLINGS = [
    ("icae-v1", "icae", "sequential"),
    ("icae-v2", "icae", "sequential"),
    ("x500", "x500", "reference"),
    ("x500", "icae", "padded"),
]


@pytest.fixture(scope="module")
def base(tiny_base):
    return bases.load_base(tiny_base)


def make(base, method="icae", layout="sequential", seed=0):
    """An adapter with random tensors, k 3, r 4; of a K/V memory only the memory tokens' rows are
    used, and so kept.
    """
    trained = random_trained(TINY, 3, seed)
    if method == "x500":
        trained["memory_table"] = trained["memory_table"].at[3:].set(0)
    if layout == "padded":
        trained["memory_table"] = trained["memory_table"].at[4:].set(0)
    template = targets.make_template("none", None, 2)
    return formats.make_adapter(
        trained, base, template, method=method, alpha=32, context_length=12, layout=layout
    )


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s[0]}-{s[1]}")
def test_what_is_written_is_recognised_and_read_back(spelling, base, tmp_path):
    """Breaks when a format's names, shapes or placeholders are written otherwise than they are
    read, or the file's name decides.
    """
    form, method, layout = spelling
    adapter = make(base, method, layout)
    path = formats.write(form, tmp_path / "out", adapter, TINY)
    path = path.rename(path.with_name("anything.bin"))
    tensors, _ = tensor_files.open_tensors(path)
    assert formats.recognise(tensors) == form
    assert method in formats.methods_of(form, tensors)
    same(formats.read_trained(form, tensors, base, path), adapter.trained)
    assert adapter.lora.scale == 8 and adapter.compression.segment_tokens == 12


def test_placeholders_of_the_first_version(base):
    """Breaks when icae-v1 lacks a placeholder: one for each tensor of the base and each layer's
    inv_freq (323 for Llama-2-7B).
    """
    tensors = formats.tensors_of("icae-v1", make(base), TINY)
    zeros = [name for name, value in tensors.items() if value.shape == ()]
    assert len(zeros) == 9 * TINY.num_layers + 3 + TINY.num_layers and not any(
        tensors[name] for name in zeros
    )
    assert 9 * 32 + 3 + 32 == 323


def test_what_shared_keys_may_be(base):
    """Breaks when a file that 500xCompressor and its ICAE save alike passes for one of them."""
    x500 = formats.tensors_of("x500", make(base, "x500", "reference"), TINY)
    assert formats.methods_of("x500", x500) == ("x500", "icae") and formats.methods_of(
        "x500", x500, "pretrain"
    ) == ("x500",)
    icae = formats.tensors_of("x500", make(base, "icae", "padded"), TINY)
    assert icae["ae_embedding"].shape == (1, 1, 32) and formats.methods_of("x500", icae) == (
        "icae",
    )


def test_other_tensors_are_not_recognised(base):
    lora = formats.tensors_of("icae-v2", make(base), TINY)
    del lora["memory_token_embed.weight"]
    assert formats.recognise(lora) is None
    assert formats.recognise({"memory_token_embed.weight": np.zeros((6, 32))}) is None


# --- pickles ---


class Trap:
    def __reduce__(self):
        return (print, ("code of a pickle was run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": Trap()}, "refused, a pickle with more in it than tensors"),
        ([torch.zeros(2)], "refused, it holds a list"),
        (
            {"a": torch.zeros(2), "b": {"c": torch.zeros(2)}},
            r"refused, a flat dict .* holds 'b': dict",
        ),
        ({"a": "text"}, "refused, a flat dict .* holds 'a': str"),
    ],
)
def test_pickles_with_anything_else_are_refused(content, message, tmp_path, capsys):
    """Breaks when code in a pickle is run, or something that is no tensor is passed over."""
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        tensor_files.open_tensors(tmp_path / "x.pt")
    assert capsys.readouterr().out == ""


def test_files_that_are_neither(tmp_path):
    """Breaks when a damaged download or another file ends in a traceback."""
    for name, content in {
        "text": b"not tensors, whatever the name",
        "short.safetensors": (1 << 40).to_bytes(8, "little") + b"{}",
        "old.pt": pickle.dumps({"a": 1}, 0),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="neither safetensors nor"):
            tensor_files.open_tensors(tmp_path / name)
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="or a damaged one"):
        tensor_files.open_tensors(tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        tensor_files.open_tensors(tmp_path / "absent")


def test_pickles_need_torch(monkeypatch, base, tmp_path):
    """Breaks when a missing PyTorch ends in a traceback, or is asked for where it is not needed."""
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    formats.write("icae-v2", tmp_path / "v2", make(base), TINY)
    with pytest.raises(
        ValueError, match=r"format icae-v1, a pickle, needs PyTorch.*pip install torch"
    ):
        formats.write("icae-v1", tmp_path / "v1", make(base), TINY)
    assert not (tmp_path / "v1").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_any_dtype_is_read(dtype, base, tmp_path):
    """Breaks when a file in half precision is refused, or read as other numbers."""
    adapter = make(base)
    rounded = jax.tree.map(
        lambda x: np.asarray(x).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype),
        adapter.trained,
    )
    for form in ("icae-v1", "icae-v2"):
        path = formats.write(form, tmp_path / form, adapter, TINY, dtype)
        tensors, _ = tensor_files.open_tensors(path)
        same(
            formats.read_trained(form, tensors, base, path),
            jax.tree.map(lambda x: x.astype(np.float32), rounded),
        )


# --- what does not fit ---


def full_save(base, adapter):
    """A complete training save: trained tensors, the base inside PEFT's wrapper, a `decoder.*`
    copy; embeddings with 4 rows more.
    """
    tensors = formats.tensors_of("icae-v2", adapter, TINY)
    for name, ((path, layer, transposed, _),) in tensor_names.tensor_names(TINY).items():
        value = base.params
        for key in path:
            value = value[key]
        value = np.asarray(value if layer is None else value[layer])
        value = np.ascontiguousarray(value.T if transposed else value)
        grown = (
            np.concatenate([value, np.ones((4, 32), np.float32)])
            if name in ("lm_head.weight", "model.embed_tokens.weight")
            else value
        )
        wrapped = name.replace("q_proj.", "q_proj.base_layer.").replace(
            "v_proj.", "v_proj.base_layer."
        )
        tensors |= {f"icae.base_model.model.{wrapped}": grown, f"decoder.{name}": value}
    return tensors


def test_a_full_training_save_is_held_against_the_base(base):
    """Breaks when a save that carries its base is refused, or passes with another base than its
    own.
    """
    adapter = make(base)
    tensors = full_save(base, adapter)
    assert formats.recognise(tensors) == "icae-v2"
    same(formats.read_trained("icae-v2", tensors, base, "x"), adapter.trained)
    for name in (
        "decoder.model.embed_tokens.weight",
        "icae.base_model.model.model.embed_tokens.weight",
    ):
        other = tensors | {name: tensors[name] + 0.5}
        with pytest.raises(
            ValueError,
            match=r"x carries a base with fingerprint \w{12}, but .* has \w{12}; give the",
        ):
            formats.read_trained("icae-v2", other, base, "x")


def test_every_fault_is_listed(base):
    """Breaks when only the first of several faults is named, or an unknown tensor ignored."""
    tensors = formats.tensors_of("icae-v1", make(base), TINY)
    before = "icae.base_model.model.model.layers"
    del tensors[f"{before}.1.self_attn.q_proj.lora_A.default.weight"]
    tensors |= {
        f"{before}.0.self_attn.v_proj.lora_B.default.weight": np.zeros((31, 4)),
        "memory_token_embed.weight": np.zeros((6, 33)),
        "optimizer.step": np.zeros(3),
        "icae.base_model.model.model.norm.weight": np.asarray(0.5),
        f"{before}.0.mlp.up_proj.weight": np.zeros((7, 32)),
    }
    with pytest.raises(ValueError, match="do not fit base") as error:
        formats.read_trained("icae-v1", tensors, base, "file.pt")
    for line in (
        f"missing {before}.1.self_attn.q_proj.lora_A.default.weight (4, 32)",
        f"mis-shaped {before}.0.self_attn.v_proj.lora_B.default.weight: (31, 4), with this base it "
        "is (16, 4)",
        "mis-shaped memory_token_embed.weight: (6, 33), with this base it is (6, 32)",
        "unexpected optimizer.step (3,)",
        "unexpected icae.base_model.model.model.norm.weight: the scalar 0.5",
        f"mis-shaped {before}.0.mlp.up_proj.weight: (7, 32), with this base it is (48, 32)",
    ):
        assert line in str(error.value)
    assert str(error.value).startswith("file.pt")
    x500 = formats.tensors_of("x500", make(base, "x500", "reference"), TINY) | {
        "memory_embeddings": np.zeros(32)
    }
    with pytest.raises(
        ValueError,
        match=r"mis-shaped memory_embeddings: \(32,\), with this base it is \(1, 0, 32\)",
    ):
        formats.read_trained("x500", x500, base, "file")


@pytest.mark.parametrize(
    ("form", "method", "layout", "name", "value", "message"),
    [
        (
            "icae-v2",
            "icae",
            "sequential",
            "memory_token_embed.weight",
            np.nan,
            "unreadable memory_token_embed.weight: it holds NaN",
        ),
        (
            "x500",
            "x500",
            "reference",
            "memory_embeddings",
            np.inf,
            "unreadable memory_embeddings: it holds NaN or infinity",
        ),
        ("x500", "icae", "padded", "ae_embedding", 1, "unreadable ae_embedding: of type int64"),
    ],
)
def test_tensors_that_are_no_numbers(form, method, layout, name, value, message, base):
    """Breaks when a table of NaN, infinities or whole numbers becomes an adapter."""
    tensors = formats.tensors_of(form, make(base, method, layout), TINY)
    tensors[name] = np.full(tensors[name].shape, value)
    with pytest.raises(ValueError, match=message):
        formats.read_trained(form, tensors, base, "file")


def test_what_an_implementation_would_misread(base):
    """Breaks when an adapter is written for an implementation that reads it with another layout, or
    holds what the format cannot.
    """
    assert (
        formats.misreadings("icae-v2", make(base))
        == []
        == formats.misreadings("x500", make(base, "x500", "reference"))
    )
    assert formats.misreadings("icae-v2", make(base, layout="servable")) == [
        "it reads layout sequential, the adapter was trained with servable"
    ]
    assert len(formats.misreadings("x500", make(base, "x500", "clean"))) == 1
    with pytest.raises(
        ValueError,
        match="--format icae-v1 cannot hold an adapter of method x500; choose from native, ",
    ):
        formats.misreadings("icae-v1", make(base, "x500", "reference"))


def test_a_file_says_beside_itself_how_it_is_read(base, tmp_path):
    """Breaks when alpha, context length, layout, the template or the base of an exported file are
    lost, or may be junk.
    """
    path = formats.write("icae-v2", tmp_path / "out", make(base), TINY)
    told = formats.read_reading(path)
    want = {
        "alpha": 32,
        "context_length": 12,
        "layout": "sequential",
        "method": "icae",
        "template": "none",
    }
    assert told == want | {
        "base": base.path,
        "base_fingerprint": base.fingerprint,
        "base_identity": base.identity,
        "template_ids": ["none", [], [], [], 2],
        "forced": False,
    }
    for field, junk in (("alpha", "32"), ("context_length", 1.5), ("template", None)):
        (path.parent / formats.READING).write_text(json.dumps(told | {field: junk}))
        with pytest.raises(ValueError, match=rf"reading\.json: {field} is .*, which is not"):
            formats.read_reading(path)
    (path.parent / formats.READING).write_text('{"alpha": 3}')
    with pytest.raises(
        ValueError,
        match=r"reading\.json: base, base_fingerprint, .* missing; move it away .* icae\.safeten",
    ):
        formats.read_reading(path)
    assert formats.read_reading(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", "x"),
        ("alpha", None),
        ("alpha", 0),
        ("alpha", float("nan")),
        ("context_length", "a"),
        ("context_length", 0),
        ("layout", 5),
        ("method", 3),
        ("base_fingerprint", 5),
        ("forced", "no"),
        ("base", 3),
    ],
)
def test_what_stands_beside_a_file_is_of_its_type(base, tmp_path, field, value):
    """Breaks when a value of another type beside a file of tensors ends in a traceback, or is taken
    as it is.
    """
    path = formats.write("icae-v2", tmp_path / "out", make(base), TINY)
    (path.parent / formats.READING).write_text(
        json.dumps(formats.read_reading(path) | {field: value})
    )
    with pytest.raises(ValueError, match=rf"reading\.json: {field} is .*, which is no"):
        formats.read_reading(path)


def test_tensors_are_read_when_asked_for(tmp_path, monkeypatch):
    """Breaks when opening a save with two copies of a base reads all of it."""
    safetensors.numpy.save_file(
        {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)}, tmp_path / "x"
    )
    monkeypatch.setattr(tensor_files, "_reader", lambda path, name: pytest.fail)
    tensors, _ = tensor_files.open_tensors(tmp_path / "x")
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        "a": ((2, 3), "F32"),
        "b": ((4,), "F16"),
    }
