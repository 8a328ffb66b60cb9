"""Which files of a base hold its tensors, and contradictions between them and config.json."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, same

from icae_jax import errors
from icae_jax.interop.hub import orbax_copy, remote_rows, stored, weights


def shards(folder, tensors, **moved):
    """Splits the tensors over two files with an index. moved: `{file: {name: value}}`, further
    tensors of these files.
    """
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, held in parts.items():
        more = moved.get(file.partition(".")[0], {})
        safetensors.numpy.save_file({name: tensors[name] for name in held} | more, folder / file)
    (folder / "model.safetensors").unlink(missing_ok=True)
    held = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
    return held


def said(capsys):
    """Returns stderr since the last call, and lets notes be printed again."""
    errors.say.cache_clear()
    return capsys.readouterr().err


TIED = dataclasses.replace(TINY, tie_word_embeddings=True)


def test_a_tied_head_is_the_embeddings(folder, tensors, tiny_params, capsys):
    """Breaks when a tied base whose file also holds the same head is refused, one with another head
    is read without it, or one whose file has the head alone is refused.
    """
    tied = {k: v for k, v in tiny_params.items() if k != "lm_head"}
    table, path = tensors["model.embed_tokens.weight"], folder / "model.safetensors"
    said(capsys)
    for head in (table, table.astype(np.float64)):
        safetensors.numpy.save_file(tensors | {"lm_head.weight": head}, path)
        same(weights.load_params(folder, TIED), tied)
    assert not said(capsys)
    last = table.copy()
    last[-1, -1] += 1e-3
    for head in (last, np.pad(table, ((0, 8), (0, 0))), table.astype(np.int8)):
        safetensors.numpy.save_file(tensors | {"lm_head.weight": head}, path)
        for only in ((), (("norm", "scale"),)):
            with pytest.raises(
                errors.UserError,
                match=r"lm_head\.weight differs from .*; "
                r"set tie_word_embeddings to false in config\.json",
            ):
                weights.load_params(folder, TIED, only=only)
    rest = {k: v for k, v in tensors.items() if k != "model.embed_tokens.weight"}
    safetensors.numpy.save_file(rest | {"lm_head.weight": table}, path)
    same(weights.load_params(folder, TIED), tied)
    assert "lm_head.weight is read for it" in said(capsys)


def test_large_tables_are_compared_to_their_end(folder, tensors, monkeypatch):
    """Breaks when comparing head and embeddings omits the rows of a last, shorter block."""
    monkeypatch.setattr(stored, "COMPARED_NUMBERS", 5 * TINY.hidden_size)
    for row in (63, 60, 0):
        head = tensors["model.embed_tokens.weight"].copy()
        head[row, 0] += 1
        safetensors.numpy.save_file(
            tensors | {"lm_head.weight": head}, folder / "model.safetensors"
        )
        with pytest.raises(errors.UserError, match="differs from"):
            weights.load_params(folder, TIED)


LAYER, VECTOR = "model.layers.0.", np.zeros(8, np.float32)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (
            LAYER + "self_attn.q_proj.bias",
            "attention_bias and mlp_bias of config.json say which projections have biases",
        ),
        (LAYER + "mlp.down_proj.bias", "attention_bias and mlp_bias of config.json"),
        (LAYER + "self_attn.q_norm.weight", ""),
        (LAYER + "pre_feedforward_layernorm.weight", ""),
        ("model.layers.2.mlp.up_proj.weight", "num_hidden_layers is 2"),
        ("model.norm.bias", ""),
        ("lm_head.bias", ""),
        ("model.embed_tokens.lora_embedding_A", "merge LoRA into its base"),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
            "merge LoRA into its base",
        ),
        ("lm_head.weight_scale", "take weights that are not quantised"),
        (LAYER + "mlp.up_proj.SCB", "take weights that are not quantised"),
        (LAYER + "mlp.up_proj.qweight", "take weights that are not quantised"),
        (
            LAYER + "mlp.up_proj.weight.quant_state.bitsandbytes__nf4",
            "take weights that are not quantised",
        ),
        ("somewhere.input_scale", "take weights that are not quantised"),
    ],
)
def test_tensors_that_config_json_does_not_announce_are_refused(
    folder, tensors, monkeypatch, name, remedy
):
    """Breaks when a base is loaded without one of its parts: it would be another model."""
    monkeypatch.setattr(weights, "_read_shard", lambda *args: pytest.fail("read"))
    safetensors.numpy.save_file(tensors | {name: VECTOR}, folder / "model.safetensors")
    with pytest.raises(errors.UserError) as caught:
        weights.load_params(folder, TINY)
    before, _, after = str(caught.value).partition(
        f"{folder}: 1 tensor not in the model of config.json: {name}"
    )
    assert not before and remedy in after and bool(after) == bool(remedy)


def test_tensors_beside_the_model_are_named(folder, tensors, tiny_params, capsys):
    """Breaks when further tensors (another task's head, a vision tower) are dropped silently or
    refused, or buffers that everybody recomputes are named.
    """
    said(capsys)
    harmless = {
        LAYER + "self_attn.rotary_emb.inv_freq": VECTOR,
        "model.rotary_emb.inv_freq": VECTOR,
    }
    safetensors.numpy.save_file(tensors | harmless, folder / "model.safetensors")
    same(weights.load_params(folder, TINY), tiny_params)
    assert not said(capsys)
    others = [
        "ema.model.layers.0.x",
        "model.vision_tower.layers.0.weight",
        "mtp.layers.0.weight",
        "score.weight",
        "step",
        "v_head.weight",
    ]
    safetensors.numpy.save_file(
        tensors | dict.fromkeys(others, VECTOR), folder / "model.safetensors"
    )
    same(weights.load_params(folder, TINY), tiny_params)
    told = said(capsys)
    assert (
        f"not of this model and not read: 6 tensors ({', '.join(others[:5])}, …)" in told
        and told.count("\n") == 1
    )


def test_what_config_json_announces_is_there(folder, tensors):
    """Breaks when a missing head or bias is made up, or the message does not name the field that
    announced it.
    """
    safetensors.numpy.save_file(
        {k: v for k, v in tensors.items() if k != "lm_head.weight"}, folder / "model.safetensors"
    )
    with pytest.raises(
        errors.UserError,
        match=r"1 tensor missing: lm_head\.weight; where the head is .* "
        "set tie_word_embeddings to true",
    ):
        weights.load_params(folder, TINY)
    with pytest.raises(
        errors.UserError,
        match=r"6 tensors missing: model\.layers\.0\.mlp\.down_proj\.bias.*; "
        "attention_bias and mlp_bias",
    ):
        weights.load_params(folder, dataclasses.replace(TIED, mlp_bias=True))
    safetensors.numpy.save_file(
        {f"module.{name}": value for name, value in tensors.items()}, folder / "model.safetensors"
    )
    with pytest.raises(
        errors.UserError,
        match=r"21 tensors missing: .*; 21 tensors not in the model of config\.json: "
        r"module\.lm_head",
    ):
        weights.load_params(folder, TINY)


def test_a_table_of_fewer_rows_is_named(folder):
    """Breaks when a remote base's identity is read from beyond a table that is shorter than
    config.json says.
    """
    with pytest.raises(
        errors.UserError,
        match=r"model\.embed_tokens\.weight has 64 rows, config\.json implies 80 or more",
    ):
        remote_rows.read_rows(
            folder, lambda name: io.FileIO(folder / name), "model.embed_tokens.weight", [0, 79]
        )


# -------------------------------------------------------------------------- two copies of one thing


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors",
        "/x/m.safetensors",
        "sub/m.safetensors",
        "C:\\m.safetensors",
        "x\0.safetensors",
        "..",
        "",
        3,
        "a.bin",
    ],
)
def test_an_index_names_files_of_its_folder_alone(folder, tensors, name):
    """Breaks when a downloaded index makes other files of this machine be read."""
    (folder.parent / "other").mkdir()
    shutil.copyfile(folder / "model.safetensors", folder.parent / "other" / "model.safetensors")
    held = dict.fromkeys(tensors, "model.safetensors") | {"model.norm.weight": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
    for read in (
        stored.weight_files,
        weights.has_weights,
        lambda folder: weights.load_params(folder, TINY),
    ):
        with pytest.raises(
            errors.UserError,
            match=r"weight_map has model\.norm\.weight in .*; only .* of the folder itself",
        ):
            read(folder)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}']
)
def test_an_index_without_a_map_is_named(folder, content):
    """Breaks when a truncated index gives a traceback, or counts as a base without weights."""
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(
        errors.UserError, match=r"model\.safetensors\.index\.json: (no weight_map|not an object)"
    ):
        weights.load_params(folder, TINY)


def test_one_file_comes_before_shards(folder, tensors, tiny_params, capsys):
    """Breaks when an old index leads to old shards beside the file that transformers reads, or the
    unread ones are not named, wherever weights are looked at.
    """
    said(capsys)
    shards(folder, {name: -value for name, value in tensors.items()})
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert stored.weight_files(folder) == [folder / "model.safetensors"] and weights.has_weights(
        folder
    )
    same(weights.load_params(folder, TINY), tiny_params)
    told = said(capsys)
    assert (
        f"{folder / 'model.safetensors'} is read, as by transformers; "
        "model.safetensors.index.json and the 2 files" in told
    )
    assert told.count("\n") == 1
    opened = []

    def open_file(name):
        opened.append(name)
        return io.FileIO(folder / name)

    (folder / "elsewhere").mkdir()  # holds only the index
    shutil.copy(folder / "model.safetensors.index.json", folder / "elsewhere")
    rows = remote_rows.read_rows(folder / "elsewhere", open_file, "model.embed_tokens.weight", [5])
    assert (rows == tensors["model.embed_tokens.weight"][[5]]).all() and set(opened) == {
        "model.safetensors"
    }
    (folder / "model.safetensors").unlink()
    rows = remote_rows.read_rows(folder / "elsewhere", open_file, "model.embed_tokens.weight", [5])
    assert (rows == -tensors["model.embed_tokens.weight"][[5]]).all()
    same(weights.load_params(folder, TINY), jax.tree.map(lambda x: -x, tiny_params))


def test_an_index_may_name_the_one_file(folder, tensors, tiny_params, capsys):
    """Breaks when a base of one file that has an index too, or with a shard of that name, is
    misread.
    """
    said(capsys)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")})
    )
    same(weights.load_params(folder, TINY), tiny_params)
    assert not said(capsys)


def test_the_index_says_which_file_holds_a_tensor(folder, tensors, tiny_params, capsys):
    """Breaks when a tensor is not read from the file that the index names, or one that is missing
    there is looked for elsewhere.
    """
    said(capsys)
    names = sorted(tensors)
    wrong = {"two": {names[0]: -tensors[names[0]]}, "one": {names[1]: -tensors[names[1]]}}
    held = shards(folder, tensors, **wrong)
    same(weights.load_params(folder, TINY), tiny_params)
    assert (
        "read from the one that model.safetensors.index.json names: "
        f"2 tensors ({names[0]}, {names[1]})" in said(capsys)
    )
    shards(folder, tensors)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": held | {names[0]: "two.safetensors"}})
    )
    with pytest.raises(
        errors.UserError,
        match=rf"1 tensor not where model\.safetensors\.index\.json has them: "
        rf"{names[0]} .in two\.safe",
    ):
        weights.load_params(folder, TINY)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {k: v for k, v in held.items() if k != names[0]}})
    )
    same(weights.load_params(folder, TINY), tiny_params)
    with pytest.raises(
        errors.UserError, match=rf"index\.json: weight_map does not have {names[0]}"
    ):
        remote_rows.read_rows(folder, lambda name: io.FileIO(folder / name), names[0])


def test_other_copies_are_named(folder, tiny_params, capsys):
    """Breaks when a folder holds the weights twice and no note says which are read."""
    said(capsys)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    orbax_copy.save_orbax(folder, tiny_params)
    same(weights.load_params(folder, TINY), tiny_params)
    assert f"{folder}: safetensors is read, not params/ and pytorch_model.bin" in said(capsys)
    (folder / "model.safetensors").rename(
        folder / "consolidated.safetensors"
    )  # in a format that is not read, so not a second copy
    assert orbax_copy.is_orbax(folder)
    same(weights.load_params(folder, TINY), tiny_params)
    (folder / "adapter_config.json").write_text("{}")
    assert f"{folder}: the Orbax copy in params/ is read, not pytorch_model.bin" in said(capsys)
    weights.load_params(folder, TINY)
    assert f"{folder}: the LoRA adapter beside the weights is not applied" in said(capsys)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (POINTER, "a Git LFS pointer"),
        ("", "the file is empty"),
        ("<!doctype html><html>", "a page of HTML"),
    ],
)
def test_what_stands_in_a_files_place_is_named(folder, tensors, text, message):
    """Breaks when a clone without its large files, or a server's error page, counts as a damaged
    file.
    """
    shards(folder, tensors)
    (folder / "two.safetensors").write_text(text)
    with pytest.raises(errors.UserError, match=rf"two\.safetensors: {message}"):
        weights.load_params(folder, TINY)
    with pytest.raises(errors.UserError, match=rf"two\.safetensors: {message}"):
        remote_rows.read_rows(
            folder, lambda name: io.FileIO(folder / name), "model.embed_tokens.weight"
        )
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(errors.UserError, match=rf"index\.json: {message}"):
        weights.load_params(folder, TINY)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "pytorch_model-00001-of-00002.bin",
            r"pytorch_model-00001-of-00002\.bin: pickled weights .* are not read; "
            "transformers loads them",
        ),
        ("consolidated.00.pth", r"consolidated\.00\.pth: pickled weights"),
        ("consolidated.safetensors", "in their maker's own format"),
        ("model.gguf", r"model\.gguf: a GGUF file, which is a base by itself; give the file's own"),
        (
            "adapter_model.safetensors",
            r"a LoRA adapter and not a base; merge it into its base first",
        ),
        (
            "model-00001-of-00001.safetensors",
            r"model\.safetensors\.index\.json, which says which .* is missing",
        ),
        ("notes.md", "no Orbax copy$"),
    ],
)
def test_other_forms_of_weights_are_named(folder, name, message):
    """Breaks when a folder with weights in another format is only said to have none."""
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(errors.UserError, match=message):
        weights.load_params(folder, TINY)
