"""Quantised bases in use: training, adapters, memories, answers, exports."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from conftest import TINY, close, random_params, random_trained, write_jsonl

from icae_jax.cli import main as cli
from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.inference.compressor import Compressor
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.export import hf_cache, prompt_embeds
from icae_jax.interop.export.reader import Reader
from icae_jax.interop.hub import base as bases
from icae_jax.models import quantize
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets
from icae_jax.training import trained as trained_compressors

WIDE = dataclasses.replace(TINY, hidden_size=64, intermediate_size=128, head_dim=16)
TIED = dataclasses.replace(WIDE, tie_word_embeddings=True)
TEXT, QUESTION = "the cat sat on the mat", "who sat ?"


@pytest.fixture(scope="module")
def folders(tiny_tokenizer, tmp_path_factory):
    """Bases in float32, by the config's name."""
    made = {}
    for name, config in (("untied", WIDE), ("tied", TIED)):
        made[name] = tmp_path_factory.mktemp("bases") / name
        bases.save_base(made[name], config, random_params(config), tiny_tokenizer, "float32")
    return made


@pytest.fixture(scope="module")
def folder(folders):
    return folders["untied"]


@pytest.fixture(scope="module")
def whole(folder):
    return bases.load_base(folder)


def adapter_on(base):
    """A random adapter that was made on a loaded base."""
    return adapters.Adapter(
        CompressionConfig("icae", k=3, rate=4, layout="servable"),
        LoraConfig(4, 0.5),
        targets.make_template("plain", base.tokenizer),
        random_trained(WIDE, 3),
        base.path,
        base.fingerprint,
        base_identity=base.identity,
        base_quantize=base.quantize,
    )


# ---------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def train(folder, tmp_path_factory):
    """(runs `icae train` with more flags, its workdir), after two steps on the base in int8."""
    place = tmp_path_factory.mktemp("run")
    raw = {
        "base": str(folder),
        "steps": 2,
        "batch_size": 2,
        "log_every": 1,
        "objectives": {"ae": 1.0, "lm": 0.0},
        "compression": {"k": 3, "rate": 4},
        "lora": {"rank": 4},
        "optimizer": {"warmup_steps": 0, "learning_rate": 1e-2},
        "data": {
            "train": write_jsonl(place / "train.jsonl", [{"text": f"{TEXT} " * 3}] * 4),
            "context_lengths": [16],
            "cache_dir": str(place / "cache"),
        },
    }
    (place / "config.py").write_text(f"def get_config():\n    return {raw!r}\n")

    def run(*flags, workdir=place / "run"):
        return cli.main(
            ["train", "--config", str(place / "config.py"), "--workdir", str(workdir), *flags]
        )

    assert run("--config.quantize=int8") == 0
    return run, place / "run"


def test_a_run_says_what_base_it_trained_on(train, whole, capsys):
    """Breaks when training fails on a quantised base, or adapter or checkpoint hide the scheme."""
    workdir = train[1]
    first, last = (
        line["train"]["ae"]
        for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        if line["step"]
    )
    assert last < first  # the same batch twice
    assert json.loads((workdir / "adapter" / "icae.json").read_text())["base_quantize"] == "int8"
    (step,) = (workdir / "checkpoints").glob("step_*")
    _, adapter = trained_compressors.read_checkpoint(trained_compressors.find(str(step)), whole)
    assert adapter.base_quantize == "int8"
    assert "made on the base in int8, and this base is in full precision" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--config.steps=3"]])
def test_a_run_goes_on_in_its_own_scheme(train, more, capsys):
    """Breaks when a finished or an unfinished run goes on with another base than it began with."""
    run, workdir = train
    before = (workdir / "config.json").read_bytes()
    assert run("--config.quantize=nf4", *more) == 2
    assert "quantize: 'int8' -> 'nf4'" in capsys.readouterr().err
    assert (workdir / "config.json").read_bytes() == before


def test_a_width_that_blocks_do_not_divide(train, whole, tiny_base, tmp_path, capsys):
    """Breaks when nf4 of such a base ends in a traceback, or leaves something behind."""
    new = tmp_path / "new"
    assert train[0]("--config.quantize=nf4", f"--config.base={tiny_base}", workdir=new) == 2
    message = "nf4 has blocks of 64, which do not divide the width"
    assert message in capsys.readouterr().err and not new.exists()
    adapters.save_adapter(tmp_path / "adapter", adapter_on(whole))
    (tmp_path / "t.txt").write_text(TEXT)
    files = ["--input", str(tmp_path / "t.txt"), "--output", str(new)]
    model = ["--adapter", str(tmp_path / "adapter"), "--base", str(tiny_base)]
    assert cli.main(["compress", *files, *model, "--base_dtype", "nf4"]) == 2
    err = capsys.readouterr().err
    assert message in err and "use int8" in err and not new.exists()


# ------------------------------------------------------------------------------ adapters, memories


def test_adapters_know_the_quantisation_they_were_trained_with(
    folder, whole, tmp_path, capsys, tiny_base
):
    """Breaks when another quantisation is refused or goes unsaid, or another base is taken."""
    base = bases.load_base(folder, quantize="int8")
    for name, own in (("plain", whole), ("int8", base)):
        adapters.save_adapter(tmp_path / name, adapter_on(own))
    assert "base_quantize" not in json.loads((tmp_path / "plain" / "icae.json").read_text())
    assert json.loads((tmp_path / "int8" / "icae.json").read_text())["base_quantize"] == "int8"
    assert adapters.load_adapter(tmp_path / "int8", base).base_quantize == "int8"
    assert adapters.load_adapter(tmp_path / "plain", whole).base_quantize == ""
    assert capsys.readouterr().err == ""
    adapters.load_adapter(tmp_path / "int8", whole)
    adapters.load_adapter(tmp_path / "plain", base)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "made on the base in int8, and this base is in full precision" in lines[0]
    assert "made on the base in full precision, and this base is in int8" in lines[1]
    with pytest.raises(UserError, match="give the right base"):
        adapters.load_adapter(tmp_path / "int8", bases.load_base(tiny_base))


def test_from_compressing_to_asking(train, folder, tmp_path, capsys):
    """Breaks when a verb takes no quantised base, or a memory does not say what wrote it."""
    adapter, memory = train[1] / "adapter", tmp_path / "m.safetensors"
    (tmp_path / "t.txt").write_text(TEXT)
    common, flag = ["--adapter", str(adapter), "--base", str(folder)], ["--base_dtype", "int8"]
    files = ["--input", str(tmp_path / "t.txt"), "--output", str(memory)]
    assert cli.main(["compress", *files, *common, *flag]) == 0
    read = ["--memory", str(memory), *common]
    ask = ["ask", *read, "--question", QUESTION, "--max_new_tokens", "2"]
    assert cli.main([*ask, *flag]) == 0
    assert "precision" not in capsys.readouterr().err
    assert cli.main(ask) == 0
    err = capsys.readouterr().err
    for made in (f"adapter {adapter}", f"--memory {memory}"):
        assert f"{made} was made on the base in int8, and this base is in full precision" in err
    assert cli.main(["export", "hf_cache", *read, *flag, "--to", str(tmp_path / "cache")]) == 0
    with safetensors.safe_open(tmp_path / "cache" / "cache.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["base_quantize"]) == "int8"


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_all_that_reads_a_base_reads_its_numbers(folders, head):
    """Breaks when writing, asking or exporting uses codes as numbers, or another table or head."""
    base = bases.load_base(folders[head], quantize="int8+ends")
    assert quantize.is_quantized(base.params["embed"])
    assert ("lm_head" in base.params) == (head == "untied")
    same = jax.tree.map(
        lambda w: w.dequantize(jnp.float32) if quantize.is_quantized(w) else w,
        base.params,
        is_leaf=quantize.is_quantized,
    )
    adapter = adapter_on(base)
    results = []
    for own in (base, dataclasses.replace(base, params=same)):
        compressor = Compressor(own, adapter, "adapter")
        memory = compressor.compress([TEXT])
        (answer,) = compressor.ask(memory, [QUESTION], 5, details=True)
        reader = Reader(own, adapter, compressor.decoder)
        slots = prompt_embeds.slots_of(memory, 0)
        prompt = prompt_embeds.prompt_embeddings(reader, slots, QUESTION)
        results.append((answer.ids, slots, prompt, hf_cache.filled_cache(memory, reader)))
    (ids, *arrays, cache), (want_ids, *want_arrays, want_cache) = results
    assert ids == want_ids and len(ids) > 1
    for got, want in zip([*arrays, *cache[:2]], [*want_arrays, *want_cache[:2]], strict=True):
        close(got, want)
    np.testing.assert_array_equal(cache.mask, want_cache.mask)
