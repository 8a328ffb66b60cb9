"""`icae convert adapter`: what is recognised, the check by restoring, every way there and back."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
import restoring
from conftest import TINY, random_params, write_jsonl
from restoring import CONTEXT, K

from icae_jax.cli import main as cli
from icae_jax.inference.loading import load
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import formats, tensor_files
from icae_jax.interop.hub import base as bases
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict
from icae_jax.training.train import train
from icae_jax.workflows import restoring as check

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, two sentences, and the workdir of each method, whose compressor restores them."""
    folder = tmp_path_factory.mktemp("convert")
    restoring.make_world(folder)
    return folder


@pytest.fixture
def convert(world, tmp_path, capsys):
    """Runs the verb on the world's base and texts by default: (exit code, stdout, stderr)."""

    def run(source, to, *flags, base=world / "base", texts=world / "texts.jsonl"):
        capsys.readouterr()
        text = ["--text", str(texts)] if texts else []
        code = cli.main(
            [
                "convert",
                "adapter",
                "--from",
                str(source),
                "--base",
                str(base),
                "--to",
                str(to),
                *text,
                *flags,
            ]
        )
        return (code, *capsys.readouterr())

    return run


def tensors_of(path):
    return {name: np.asarray(t) for name, t in tensor_files.open_tensors(path)[0].items()}


def assert_same(got, want):
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)


def assert_equal_adapters(folder, want, base):
    """The same tensors, method, layout, scale and template; of a memory only its tokens' rows."""
    got, want = adapters.load_adapter(folder, base), adapters.load_adapter(want, base)
    jax.tree.map(np.testing.assert_array_equal, got.trained["lora"], want.trained["lora"])
    rows = K if got.compression.method == "x500" else K + 3
    np.testing.assert_array_equal(
        got.trained["memory_table"][:rows], want.trained["memory_table"][:rows]
    )
    assert (got.lora.scale, got.lora.targets) == (want.lora.scale, want.lora.targets)
    fields = ("method", "k", "segment_tokens", "layout", "trigger")
    assert [getattr(got.compression, f) for f in fields] == [
        getattr(want.compression, f) for f in fields
    ]


# ----------------------------------------------------------------------------------- there and back


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "form"), [("icae", "icae-v1"), ("icae", "icae-v2"), ("x500", "x500")]
)
def test_out_and_in_again(world, convert, tmp_path, method, form):
    """Breaks when anything is lost on the way out and back, with the reading or with flags.

    The wrong alpha, which a file does not say, is found by restoring, and nothing is written then.
    """
    base = bases.load_base(world / "base")
    code, out, err = convert(world / method, tmp_path / "out", "--format", form)
    assert code == 0, err
    assert "restores: AE loss" in out and f"({form})" in out
    file = tmp_path / "out" / formats.FORMATS[form].file_name

    code, out, err = convert(tmp_path / "out", tmp_path / "told")
    assert code == 0 and "alpha 32 (recorded)" in out, err
    assert_equal_adapters(tmp_path / "told", world / method / "adapter", base)

    alone = shutil.copy(file, tmp_path / "renamed")  # without its neighbour, under another name
    flags = ["--context_length", str(CONTEXT), "--method", method]
    code, out, err = convert(alone, tmp_path / "plain", *flags)
    assert (
        code == 0 and f"alpha 32 (default of {form})" in out and f"context_length {CONTEXT}," in out
    ), err
    assert_equal_adapters(tmp_path / "plain", world / method / "adapter", base)
    origin = json.loads((tmp_path / "plain" / "icae.json").read_text())["origin"]
    assert origin["format"] == form and not origin["forced"] and origin["restoring"]["bleu"] > 99
    assert convert(tmp_path / "plain", tmp_path / "again", "--format", form)[0] == 0
    assert_same(tensors_of(tmp_path / "again" / formats.FORMATS[form].file_name), tensors_of(file))

    code, out, err = convert(alone, tmp_path / "wrong", *flags, "--alpha", "3")
    assert (
        code == 2
        and "far from restoring" in err
        and "is the" not in out
        and not (tmp_path / "wrong").exists()
    )


def test_the_wrong_base_is_found_by_restoring(world, convert, tmp_path, tiny_tokenizer):
    """Breaks when another base of the same shape gets an adapter with its fingerprint in it."""
    assert convert(world / "icae", tmp_path / "out", "--format", "icae-v2")[0] == 0
    file = shutil.copy(tmp_path / "out" / "icae.safetensors", tmp_path / "alone")
    bases.save_base(
        tmp_path / "other", TINY, random_params(TINY, seed=1), tiny_tokenizer, dtype="float32"
    )
    flags = ["--context_length", str(CONTEXT)]
    code, out, err = convert(file, tmp_path / "to", *flags, base=tmp_path / "other")
    assert code == 2 and not (tmp_path / "to").exists()
    assert "restores: AE loss" in out and "is the base" not in out
    assert (
        "far from restoring" in err
        and "the base it was trained on" in err
        and "nothing was written; --force" in err
    )
    code, _, err = convert(file, tmp_path / "to", *flags, "--force", base=tmp_path / "other")
    assert code == 0 and "far from restoring" in err
    assert json.loads((tmp_path / "to" / "icae.json").read_text())["origin"]["forced"]
    # What was forced stays so: neither its folder nor its exports count as known to fit.
    other = [
        "--from",
        str(tmp_path / "to"),
        "--base",
        str(tmp_path / "other"),
        "--text",
        str(world / "texts.jsonl"),
    ]
    assert (
        cli.main(["convert", "adapter", *other, "--to", str(tmp_path / "to3")]) == 2
        and not (tmp_path / "to3").exists()
    )
    assert (
        cli.main(
            [
                "convert",
                "adapter",
                *other,
                "--to",
                str(tmp_path / "to3"),
                "--format",
                "icae-v2",
                "--force",
            ]
        )
        == 0
    )
    code, _, err = convert(tmp_path / "to3", tmp_path / "to4", base=tmp_path / "other")
    assert code == 2 and "far from restoring" in err and not (tmp_path / "to4").exists()
    # Told beside the file what it was trained on, it is refused before anything is run.
    code, _, err = convert(tmp_path / "out", tmp_path / "to2", "--force", base=tmp_path / "other")
    assert code == 2 and "give the right base" in err
    code, _, err = convert(
        world / "icae" / "adapter", tmp_path / "to2", "--force", base=tmp_path / "other"
    )
    assert code == 2 and "give the right base" in err
    code, _, err = convert(
        world / "icae" / "checkpoints", tmp_path / "to2", "--force", base=tmp_path / "other"
    )
    assert code == 2 and "give the right base" in err and not (tmp_path / "to2").exists()


def test_a_decoder_lora_is_refused_before_anything_is_measured(world, convert, tmp_path):
    """Breaks when a text is restored, which takes minutes, before the format is refused."""
    adapter = adapters.load_adapter(world / "icae" / "adapter", bases.load_base(world / "base"))
    trained = adapter.trained | {"decoder_lora": adapter.trained["lora"]}
    compression = dataclasses.replace(adapter.compression, decoder_lora=True)
    both = dataclasses.replace(adapter, compression=compression, trained=trained)
    adapters.save_adapter(tmp_path / "both", both)
    code, out, err = convert(tmp_path / "both", tmp_path / "to", "--format", "icae-v1")
    assert code == 2 and "--format icae-v1 cannot carry a decoder LoRA" in err
    assert "restores" not in out and not (tmp_path / "to").exists()


def test_native_forms(world, convert, tmp_path):
    """Breaks when a workdir, its checkpoints, adapter or PEFT folder are not one adapter."""
    base = bases.load_base(world / "base")
    work = world / "x500"
    step = next((work / "checkpoints").glob("step_*"))
    for i, source in enumerate((work, work / "checkpoints", step, work / "adapter")):
        code, out, err = convert(source, tmp_path / f"{i}")
        assert code == 0 and "restores: AE loss" in out, err
        assert_equal_adapters(tmp_path / f"{i}", work / "adapter", base)
        assert (
            adapters.load_adapter(tmp_path / f"{i}", base).fingerprint
            == adapters.load_adapter(work / "adapter", base).fingerprint
        )
    assert "checkpoint step_1" in convert(work / "checkpoints", tmp_path / "c")[1]
    assert convert(work, tmp_path / "peft", "--format", "peft")[0] == 0
    assert (tmp_path / "peft" / "adapter_config.json").exists()
    code, out, err = convert(tmp_path / "peft", tmp_path / "back")
    assert code == 0 and ": peft," in out, err
    assert_equal_adapters(tmp_path / "back", work / "adapter", base)


def test_an_adapter_of_known_base_need_not_restore(world, convert, tmp_path):
    """Breaks when an adapter of the right base is refused because it restores only other texts."""
    code, out, err = convert(world / "icae", tmp_path / "a", "--format", "icae-v2", texts=None)
    assert code == 0 and "restores" in out and "perhaps it was trained on other texts" in err


@pytest.mark.nightly
def test_a_converted_adapter_is_trained_on(world, convert, tmp_path):
    """Breaks when released weights, once converted, cannot be fine-tuned on one's own questions."""
    assert convert(world / "icae", tmp_path / "out", "--format", "icae-v2")[0] == 0
    assert convert(tmp_path / "out", tmp_path / "in")[0] == 0
    rows = [
        {"context": "the cat sat on a mat", "question": "who sat ?", "answers": ["the cat"]}
    ] * 2
    raw = {
        "phase": "finetune",
        "init_from": str(tmp_path / "in"),
        "base": str(world / "base"),
        "steps": 2,
        "batch_size": 1,
        "compression": {"k": K, "rate": CONTEXT / K, "layout": "sequential"},
        "lora": {"rank": 16},
        "objectives": {"ae": 0.0, "lm": 0.0, "qa": 1.0},
        "data": {
            "train": write_jsonl(tmp_path / "qa.jsonl", rows),
            "context_lengths": [CONTEXT],
            "cache_dir": str(tmp_path / "cache"),
        },
    }
    config = from_dict(TrainConfig, raw)
    task = CompressorTask(config)
    jax.tree.map(
        np.testing.assert_array_equal,
        task.init(),
        adapters.load_adapter(world / "icae" / "adapter", task.base).trained,
    )
    assert train(config, task, tmp_path / "w") == 0


# ---------------------------------------------------------------------------------------- bad input


@pytest.fixture
def exported(world, convert, tmp_path):
    """A file of each method, without its neighbour."""
    made = {}
    for method, form in (("icae", "icae-v2"), ("x500", "x500")):
        assert convert(world / method, tmp_path / form, "--format", form)[0] == 0
        made[method] = shutil.copy(
            tmp_path / form / formats.FORMATS[form].file_name, tmp_path / f"{method}_file"
        )
    return made


def test_bad_input_is_named(world, convert, tmp_path, exported):
    """Breaks when a mistake ends in a traceback, in a guess, or in something written."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("keep")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        shutil.copy(exported["icae"], tmp_path / "two" / name)
    memory = tmp_path / "memory.safetensors"
    adapter = str(world / "icae" / "adapter")
    assert (
        cli.main(
            [
                "compress",
                "--adapter",
                adapter,
                "--input",
                str(world / "texts.jsonl"),
                "--output",
                str(memory),
            ]
        )
        == 0
    )
    for source, flags, message in (
        (
            exported["x500"],
            [],
            "500xCompressor and the ICAE of its repository save the same tensors; say which",
        ),
        (
            exported["x500"],
            ["--method", "x500", "--rate", "4", "--context_length", "17"],
            "--rate 4.0 with k 4 is --context_length 16",
        ),
        (
            exported["icae"],
            ["--method", "x500"],
            "--method is x500, but .* is of format icae-v2, method icae",
        ),
        (exported["icae"], ["--alpha", "0"], "--alpha is 0.0; it must be positive"),
        (
            exported["icae"],
            ["--layout", "clean", "--context_length", "16"],
            "layout is 'clean', not one of method icae",
        ),
        (
            world / "icae",
            ["--alpha", "3", "--phase", "pretrain"],
            "--alpha, --phase: .* says that itself",
        ),
        (
            world / "icae",
            ["--format", "x500"],
            "--format x500: its implementation would misread this: it reads layout padded",
        ),
        (world / "x500", ["--format", "icae-v1"], "cannot hold an adapter of method x500"),
        (memory, [], "not a trained compressor; its 2 tensors are lengths, slots"),
        (tmp_path / "two", [], "holds several trained compressors: a, b; name one"),
        (world / "base", [], "holds no trained compressor"),
        (tmp_path / "absent", [], "no such file or folder"),
    ):
        code, _, err = convert(source, tmp_path / "to", *flags)
        assert code == 2 and re.search(message, err), (message, err)
        assert not (tmp_path / "to").exists()
    code, _, err = convert(world / "icae", tmp_path / "taken")
    assert (
        code == 2
        and "is not an empty folder" in err
        and (tmp_path / "taken" / "mine").read_text() == "keep"
    )


def test_bases_without_a_tokenizer(world, convert, tmp_path, exported):
    """Breaks when a missing tokenizer goes unmentioned, or a template is made up without one."""
    bare = shutil.copytree(world / "base", tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    flags = ["--context_length", str(CONTEXT)]
    code, _, err = convert(exported["icae"], tmp_path / "to", *flags, base=bare)
    assert code == 2 and "no tokenizer, which template mistral needs" in err
    code, out, err = convert(
        exported["icae"], tmp_path / "to", *flags, "--phase", "pretrain", base=bare
    )
    assert code == 2 and "has no tokenizer, so no text can be restored" in err
    code, out, err = convert(exported["icae"], tmp_path / "to", *flags, "--force", base=bare)
    assert (
        code == 0
        and "template none in place of mistral" in out
        and "no text can be restored" in err
    )
    code, out, err = convert(
        exported["icae"], tmp_path / "v1", *flags, "--template", "v1", "--force", base=bare
    )
    template = json.loads((tmp_path / "v1" / "icae.json").read_text())["template"]
    assert code == 0 and template == {
        "name": "v1",
        "head": [],
        "before": [-1],
        "after": [-1],
        "stop": 1,
    }


# ---------------------------------------------------------------------------------------- the check


@pytest.mark.parametrize(
    ("values", "far"),
    [
        ((0.01, 4.0, 99.0, 4.0), False),
        ((0.1, 4.0, 65.0, 4.0), True),  # at 4x the text must come back
        (
            (1.5, 4.0, 30.0, 120.0),
            False,
        ),  # in one token of 120 it need not, but the memory tells much
        ((2.5, 4.0, 30.0, 120.0), True),
        ((3.9, 4.0, 0.1, 4.0), True),
        ((float("nan"), 4.0, 99.0, 4.0), True),
    ],
)
def test_far_from_restoring(values, far):
    """Breaks when a memory that tells nothing passes, or a useful one at a high ratio does not."""
    assert check.Restoring(*values).failed is far


def test_built_in_paragraphs():
    """Breaks when the texts of the check are unlike what compressors are trained on, or alike."""
    texts = (check.PARAGRAPH, check.CONTROL)
    one, other = (set(text.lower().split()) for text in texts)
    assert (
        all(90 <= len(text.split()) <= 120 for text in texts)
        and len(one & other) / len(one | other) < 0.25
    )


def test_a_single_text_is_held_against_the_built_in_one(world):
    """Breaks when one text has no control, or is its own."""
    compressor = load(world / "icae")
    text = json.loads((world / "texts.jsonl").read_text().splitlines()[0])["text"]
    measured = check.measure(compressor, [text])
    assert measured.bleu > 99 and measured.control > 2 * measured.ae_loss and not measured.failed
