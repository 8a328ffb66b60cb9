"""Every verb opens whatever holds a trained compressor, by one opener."""

import json

import jax
import pytest
from conftest import TINY, random_lora, random_trained, training, write_jsonl

import icae_jax
from icae_jax.cli import main as cli
from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.evaluation import evaluate
from icae_jax.inference import loading
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets
from icae_jax.training import trained
from icae_jax.training.checkpoint import Checkpoints
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.workdir import check_workdir
from icae_jax.workflows import distil

PLACES = {
    "folder": "done/adapter",
    "workdir": "done",
    "workdir without adapter/": "running",
    "checkpoint": "running/checkpoints/step_2",
}
COMPRESSION = CompressionConfig(k=4, rate=4, decoder_lora=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_base):
    """A folder with two runs of one trained tree: one that ended, and one that goes on, whose
    latest checkpoint is not its best. Gives (folder, loaded base, fingerprint of the adapter).
    """
    folder = tmp_path_factory.mktemp("opener")
    base = bases.load_base(tiny_base)
    tree = random_trained(TINY, 4) | {"decoder_lora": random_lora(TINY, seed=5)}
    template = targets.make_template("plain", base.tokenizer)
    adapter = adapters.Adapter(
        COMPRESSION, LoraConfig(4), template, tree, str(tiny_base), base.fingerprint
    )
    adapters.save_adapter(folder / "done" / "adapter", adapter)
    changes = {"compression": {"k": 4, "rate": 4, "decoder_lora": True}}
    config = training(tiny_base, folder, **changes)
    check_workdir(folder / "running", config, {"base": base.fingerprint, "trigger": "bos"})
    with Checkpoints(folder / "running") as kept:
        kept.save(2, {"trained": tree}, 1.0)
        kept.save(3, {"trained": jax.tree.map(lambda x: x + 1, tree)}, 2.0)
    return folder, base, adapter.fingerprint


def by_load(place, tmp_path, base):
    return icae_jax.load(place, dtype="float32").adapter.fingerprint


def by_memory(place, tmp_path, base):
    """`compress`; then `ask`, `restore` and `export` open what the memory file names."""
    source = write_jsonl(tmp_path / "texts.jsonl", [{"text": "the cat sat on a mat"}])
    output = str(tmp_path / "m.safetensors")
    compress = ["compress", "--adapter", place, "--input", source, "--output", output]
    assert cli.main(compress) == 0
    return loading.load_with_memory(output)[0].adapter.fingerprint


def by_evaluate(place, tmp_path, base):
    (compressor,) = evaluate.load(evaluate.find({"a": place}), None, None, None).values()
    return compressor.adapter.fingerprint


def by_convert(place, tmp_path, base):
    to = tmp_path / "converted"
    argv = ["convert", "adapter", "--from", place, "--base", str(base.path), "--to", str(to)]
    assert cli.main([*argv, "--force"]) == 0
    return adapters.load_adapter(to, base).fingerprint


def by_distil(place, tmp_path, base):
    return distil.load_teacher(distil.Request("s", "o.jsonl", adapter=place)).adapter


def by_init_from(place, tmp_path, base):
    changes = {"compression": {"k": 4, "rate": 4, "decoder_lora": True}, "init_from": place}
    config = training(base.path, tmp_path, **changes)
    return CompressorTask(config, base).start_from.fingerprint


OPENERS = [by_load, by_memory, by_evaluate, by_convert, by_distil, by_init_from]


@pytest.mark.parametrize("opener", OPENERS, ids=lambda opener: opener.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_every_verb_opens_every_place(world, place, opener, tmp_path):
    """Breaks when a verb finds compressors in a way of its own that does not know one of these
    places, or takes the latest checkpoint although another one is better.
    """
    folder, base, fingerprint = world
    assert opener(str(folder / PLACES[place]), tmp_path, base) == fingerprint


@pytest.mark.parametrize("place", PLACES)
def test_inspect_knows_every_place(world, place, capsys):
    """Breaks when `inspect` does not say what one of these places holds."""
    folder, base, _ = world
    assert cli.main(["inspect", str(folder / PLACES[place]), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["k"] == 4 and about["base_fingerprint"] == base.fingerprint


def test_a_memory_names_the_checkpoint_that_wrote_it(world, tmp_path):
    """Breaks when a memory of a running training names the workdir, whose best checkpoint will be
    another one when the memory is read.
    """
    folder, _, _ = world
    for place in ("running", PLACES["checkpoint"]):
        compressor = loading.load(folder / place)
        assert compressor.path == str(folder / PLACES["checkpoint"])
    assert loading.load(folder / "done").path == str(folder / "done" / "adapter")


def test_a_run_without_a_checkpoint_is_told(tmp_path):
    """Breaks when a training that has just begun is called a folder of nothing known."""
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="a training's workdir without a whole checkpoint yet"):
        trained.find(tmp_path)
