"""What an adapter, a memory and a run are known by: weights, tokenizer, template, scale; and what
is done where they do not say.
"""

import dataclasses
import datetime
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    TINY,
    WORDS,
    edit,
    eight_devices,
    make_tokenizer,
    random_trained,
    same,
    training,
    with_tokenizer,
    write_adapter,
    write_jsonl,
)
from tokenizers import AddedToken, processors
from transformers.utils import chat_template_utils

import icae_jax
from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import formats
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import identity
from icae_jax.interop.hub import tokenizer as reading
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets
from icae_jax.runtime import sharding
from icae_jax.training import compressor_task, trained
from icae_jax.training.workdir import check_workdir
from icae_jax.workflows import released

# --- identity ---


def swapped():
    """The tiny tokenizer with the ids of two words exchanged."""
    words = list(WORDS)
    cat, dog = words.index("cat"), words.index("dog")
    words[cat], words[dog] = "dog", "cat"
    return make_tokenizer(words)


def test_fingerprint(tiny_tokenizer):
    """Breaks when a tokenizer that makes other ids has the same fingerprint, or one that makes the
    same has another.
    """
    own = reading.fingerprint(tiny_tokenizer)
    assert reading.fingerprint(make_tokenizer()) == own
    padded = make_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert reading.fingerprint(padded) == own
    worded, cut = (
        make_tokenizer(),
        make_tokenizer(),
    )  # that texts are read with, though no probe holds them
    worded.add_tokens(["catfish"])
    cut.add_tokens([AddedToken("catfish", single_word=True)])
    assert len({own, reading.fingerprint(worded), reading.fingerprint(cut)}) == 3
    other_end, no_start = make_tokenizer(), make_tokenizer()
    other_end.eos_token = "mat"
    no_start.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    assert len({own, *map(reading.fingerprint, (swapped(), other_end, no_start))}) == 4
    assert own.startswith("cfd4b85359fc"), (
        "adapters and memories that were written hold it: it must stay as it is"
    )


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    """An adapter folder that says with which tokenizer it was made."""
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a", bases.load_base(tiny_base))


def test_adapters_and_memories_know_their_tokenizer(folder, adapter, tmp_path, capsys):
    """Breaks when a base's tokenizer is exchanged for another unseen, or what earlier versions
    wrote is refused or read in silence.
    """
    own = icae_jax.load(adapter)
    path = tmp_path / "m.safetensors"
    own.save(path, own.compress(["the cat saw the dog"]))
    assert "does not say" not in capsys.readouterr().err
    with_tokenizer(folder, swapped())
    with pytest.raises(
        UserError, match=r"adapter .* was made with tokenizer \w{12}, but the base's is"
    ):
        icae_jax.load(adapter, base=folder)
    unsaid = shutil.copytree(adapter, tmp_path / "unsaid")
    edit(unsaid / "icae.json", base_identity={})
    other = icae_jax.load(unsaid, base=folder)
    assert "does not say with which weights and tokenizer it was made" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--memory .* was made with tokenizer"):
        other.load_memory(path)


def test_a_fine_tune_of_the_base_is_another_base(tiny_params, tiny_tokenizer, adapter, tmp_path):
    """Breaks when a base whose LoRA was merged, which has the embeddings and the norm of the one
    before it, is taken for that one.
    """
    layers = dict(tiny_params["layers"]) | {"mlp": dict(tiny_params["layers"]["mlp"])}
    kernel = layers["mlp"]["up_proj"]["kernel"]
    layers["mlp"]["up_proj"] = {
        "kernel": kernel.at[1].add(
            0.1 * np.outer(np.ones(kernel.shape[1]), np.ones(kernel.shape[2]))
        )
    }
    bases.save_base(
        tmp_path / "merged", TINY, tiny_params | {"layers": layers}, tiny_tokenizer, dtype="float32"
    )
    assert (
        bases.load_base(tmp_path / "merged").fingerprint == icae_jax.load(adapter).base.fingerprint
    ), "else this shows nothing"
    with pytest.raises(
        UserError,
        match=r"adapter .* was made with weights \w{12}, but the base's is \w{12}: it has other",
    ):
        icae_jax.load(adapter, base=tmp_path / "merged")


@pytest.mark.parametrize(
    "name", ["embed", "lm_head", "layers.self_attn.v_proj.kernel", "norm.scale"]
)
def test_any_weight_is_part_of_the_identity(tiny_params, name):
    """Breaks when a base with one other value anywhere, as in the row of a rare token or in its
    head, is the same base.
    """
    own = bases.weights_fingerprint(tiny_params)
    *groups, last = name.split(".")
    changed = jax.tree.map(lambda x: x, tiny_params)
    leaf = functools.reduce(lambda tree, group: tree[group], groups, changed)
    at = tuple(n - 2 for n in leaf[last].shape)
    leaf[last] = leaf[last].at[at].multiply(1.1)
    assert bases.weights_fingerprint(changed) != own
    if leaf[last].ndim > 1:  # the same values in another order
        leaf[last] = leaf[last].at[..., [3, 4]].set(tiny_leaf(tiny_params, name)[..., [4, 3]])
        assert bases.weights_fingerprint(changed) != own
    leaf[last] = leaf[last].at[at].set(np.nan)
    with pytest.raises(UserError, match=rf"base b: {name} holds numbers that are not finite"):
        bases.weights_fingerprint(changed, "b")


def tiny_leaf(tree, name):
    return functools.reduce(lambda node, key: node[key], name.split("."), tree)


def test_identity_does_not_hang_on_the_devices(tiny_params):
    """Breaks when weights that are split over devices have another identity than on one."""
    with eight_devices():
        placement = sharding.Placement(
            sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2)), TINY
        )
        split = jax.device_put(tiny_params, placement.tree(tiny_params))
        assert bases.weights_fingerprint(split) == bases.weights_fingerprint(
            jax.device_get(tiny_params)
        )


@pytest.mark.parametrize("piece", [40, 64, 100])
def test_a_large_matrix_is_summed_in_pieces(tiny_params, monkeypatch, piece):
    """Breaks when a piece is left out, counts twice or at another place, or is as large as the
    matrix, of which XLA on CPUs makes several temporary arrays.
    """
    axes = tuple(map(identity._unsplit_axis, jax.tree.leaves(tiny_params)))
    want = jax.device_get(identity.checksums(tiny_params))
    sums = identity._checksums.__wrapped__  # not the compiled one, whose pieces are large
    monkeypatch.setattr(identity, "_PIECE", piece)
    cut = jax.jit(functools.partial(sums, axes=axes)).lower(tiny_params).compile()
    same(jax.device_get(cut(tiny_params)), want)
    tall = {"layers": {}, "embed": jax.ShapeDtypeStruct((1 << 12, 32), jnp.float32)}
    compiled = jax.jit(functools.partial(sums, axes=(-2,))).lower(tall).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * tall["embed"].size / 2


def test_identity_does_not_hang_on_the_dtype(tiny_params):
    """Breaks when a copy of a base in bfloat16 is called another base."""
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params)
    assert bases.weights_fingerprint(rounded) == bases.weights_fingerprint(tiny_params)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [("encoder/adapter_config.json", "lora_alpha", 16.0), ("icae.json", "rate", 8)],
)
def test_a_memory_is_that_of_the_adapter_as_it_is(adapter, tmp_path, file, field, value):
    """Breaks when a number that makes other memories is changed in an adapter's files, and its
    memories of before are read as its own.
    """
    compressor = icae_jax.load(adapter)
    compressor.save(tmp_path / "m.safetensors", compressor.compress(["the cat saw the dog"]))
    other = shutil.copytree(adapter, tmp_path / "other")
    raw = json.loads((other / file).read_text())
    edit(
        other / file,
        **(
            {"compression": raw["compression"] | {field: value}}
            if file == "icae.json"
            else {field: value}
        ),
    )
    with pytest.raises(
        UserError, match=r"--memory .* has (lora_scale|segment_tokens) \S+, the adapter"
    ):
        icae_jax.load(other).load_memory(tmp_path / "m.safetensors")


# --- templates ---

CLOCK = (
    "{{ bos_token }}{% if strftime_now('%d') == '28' %}cat{% else %}dog{% endif %} "
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
)


def on_day(monkeypatch, day):
    """Has chat templates see a day of November 2026."""

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 11, day)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)


def test_a_run_keeps_the_words_that_it_began_with(folder, tmp_path, monkeypatch):
    """Breaks when a chat template that writes the date asks otherwise on the day that a run is
    continued, or its checkpoint opened.
    """
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CLOCK
    with_tokenizer(folder, tokenizer)
    source = write_jsonl(
        tmp_path / "qa.jsonl",
        [{"context": "the cat saw", "question": "who ?", "answers": ["the cat"]}] * 2,
    )
    changes = {
        "phase": "finetune",
        "init_from": "scratch",
        "objectives": {"ae": 0.0, "lm": 0.0, "qa": 1.0, "template": "chat"},
    }
    config = training(folder, tmp_path, **changes)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=source))
    workdir = tmp_path / "run"
    workdir.mkdir()
    on_day(monkeypatch, 28)
    first = compressor_task.CompressorTask(config, workdir=workdir)
    check_workdir(workdir, config, first.identity)
    on_day(monkeypatch, 29)
    assert targets.make_template("chat", first.base.tokenizer) != first.template, (
        "else this shows nothing"
    )
    again = compressor_task.CompressorTask(config, first.base, workdir)
    assert again.template == first.template and any(
        "goes on with the words that it began with" in note for note in again.notes()
    )
    assert not check_workdir(workdir, config, again.identity)

    step = workdir / "checkpoints" / "step_1"
    monkeypatch.setattr(
        trained.checkpoint_files, "read_selected", lambda path: (step, first.init())
    )
    _, opened = trained.read_checkpoint(trained.Trained("orbax", step, given=step), first.base)
    assert opened.template == first.template and opened.base_identity == first.base.identity


def test_a_file_of_tensors_keeps_its_template(tiny_base, tmp_path, monkeypatch):
    """Breaks when the template of an exported file, whose ids stand beside it, is made anew on
    another day.
    """
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CLOCK
    base = dataclasses.replace(bases.load_base(tiny_base), tokenizer=tokenizer)
    on_day(monkeypatch, 28)
    template = targets.make_template("chat", tokenizer)
    compression, lora = (
        CompressionConfig(k=4, rate=4, layout="sequential"),
        LoraConfig(4, 8.0, 0.05),
    )
    made = adapters.Adapter(
        compression, lora, template, random_trained(TINY, 4), base.path, base.fingerprint
    )
    path = formats.write("icae-v2", tmp_path / "out", made, TINY)
    on_day(monkeypatch, 29)
    assert targets.make_template("chat", tokenizer) != template, "else this shows nothing"
    adapter, _ = released.read_released(trained.find(path), base, released.Unstated())
    assert adapter.template == template


def test_a_run_is_bound_to_its_tokenizer(folder, tmp_path):
    """Breaks when a workdir goes on with another tokenizer; or one that was begun before this was
    recorded cannot go on, or in silence.
    """
    config = training(folder, tmp_path)
    identity = {
        "base": "b",
        "data.train": "d",
        "tokenizer": "t1",
        "template": ["plain", [], [5], [6], 2],
    }
    check_workdir(tmp_path / "run", config, identity)
    with pytest.raises(UserError, match=r"identity\.tokenizer: 't1' -> 't2'"):
        check_workdir(tmp_path / "run", config, identity | {"tokenizer": "t2"})
    old = {name: value for name, value in identity.items() if name in ("base", "data.train")}
    check_workdir(tmp_path / "old", config, old)
    assert [
        line.partition(":")[0] for line in check_workdir(tmp_path / "old", config, identity)
    ] == [
        "identity.template",
        "identity.tokenizer",
    ]
    assert not check_workdir(tmp_path / "old", config, identity)
