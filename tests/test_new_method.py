"""A method defined in this file: it trains, compresses, asks, restores, saves, plans, exports.

The method: no memory tokens; the memory is the last hidden state of k text tokens of each segment,
spread evenly over it, read as embeddings. Nothing outside this file knows of it."""

import ast
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, WORDS, close, random_trained, write_jsonl

from icae_jax.compression import layout, method
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.encoder import encode
from icae_jax.compression.memory import Slots, place
from icae_jax.compression.segments import Contexts, segment_contexts
from icae_jax.errors import UserError
from icae_jax.inference.loading import load
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import peft_folder
from icae_jax.interop.export import hf_cache, prompt_embeds
from icae_jax.interop.export.reader import NamedMemory, Reader
from icae_jax.models import llama, lora
from icae_jax.models.llama import FrozenModel
from icae_jax.performance import flops, programs
from icae_jax.runtime import sharding
from icae_jax.training import train
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict


def write(base, trained, contexts, config, dropout_key=None):
    B, S, _ = contexts.ids.shape
    k, lengths = contexts.k, contexts.lengths.reshape(B * S, 1)
    at = jnp.arange(1, k + 1)[None] * lengths // k - 1  # the last token of each of k equal parts
    hidden, _ = encode(base, trained, contexts, config, dropout_key, memory_tokens=0, at=at)
    return place(Slots, {"slots": hidden.reshape(B, S * k, -1)}, contexts.lengths, config)


TOY = method.Method(
    name="every-rth",
    title="every r-th token",
    write=write,
    memory=Slots,
    layouts={"sequential": layout.SEQUENTIAL},
    bos_before_text=False,
    appends_memory_tokens=False,
    exports=(method.HF_CACHE,),
)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    method.register(TOY)
    yield
    del method.METHODS[TOY.name]


@pytest.fixture(scope="module")
def config(tiny_base, tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("toy"), np.random.default_rng(0)
    texts = [{"text": " ".join(rng.choice(WORDS[8:], size=30))} for _ in range(8)]
    raw = {
        "base": str(tiny_base),
        "steps": 3,
        "batch_size": 4,
        "compression": {"method": TOY.name, "k": 4, "rate": 4.0, "decoder_lora": True},
        "lora": {"rank": 2},
        "data": {
            "train": write_jsonl(folder / "text.jsonl", texts),
            "context_lengths": [24],
            "max_target_tokens": 12,
            "cache_dir": str(folder / "cache"),
        },
    }
    return from_dict(TrainConfig, raw)


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "workdir"
    assert train.train(config, CompressorTask(config, workdir=folder), folder) == 0
    return folder


@pytest.fixture(scope="module")
def compressor(workdir):
    return load(workdir)


TEXTS = [" ".join(WORDS[20:40]), " ".join(WORDS[30:37])]


def test_it_is_trained(config, workdir):
    """Breaks when training asks more than the contract, or one of the LoRAs does not learn."""
    start = CompressorTask(config).init()
    trained = load(workdir).trained
    moved = {
        name: max(
            float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, pair), strict=True)
        )
        for name, pair in {n: (start[n], trained[n]) for n in start}.items()
    }
    assert set(moved) == {"lora", "memory_table", "decoder_lora"} and min(moved.values()) > 0


def test_it_compresses_restores_and_asks(compressor):
    """Breaks when inference does not take what the method wrote: k slots for each segment."""
    memory = compressor.compress(TEXTS)
    assert type(memory) is Slots and memory.tokens.tolist() == [8, 4]
    assert memory.lengths.tolist() == [20, 7], "the text is read without <s>"
    alone = compressor.compress(TEXTS[1])
    np.testing.assert_allclose(memory.slots[1][:4], alone.slots[0], rtol=1e-4, atol=1e-5)
    assert len(compressor.restore(memory, 5)) == 2
    assert len(compressor.ask(memory, ["what ?", "who ?"], 5)) == 2
    assert all(score.log_prob < 0 for score in compressor.score(memory, TEXTS))


def test_its_memories_and_adapters_are_saved_and_loaded(compressor, tmp_path):
    """Breaks when a file's format knows its methods by name."""
    memory = compressor.compress(TEXTS)
    compressor.save(tmp_path / "m.safetensors", memory, ["a", "b"])
    loaded, ids = compressor.load_memory(tmp_path / "m.safetensors")
    assert ids == ["a", "b"]
    jax.tree.map(np.testing.assert_array_equal, loaded, memory)
    adapters.save_adapter(tmp_path / "adapter", compressor.adapter)
    again = load(tmp_path / "adapter")
    assert again.adapter.compression == compressor.adapter.compression
    jax.tree.map(np.testing.assert_array_equal, again.trained, compressor.trained)


def test_it_is_planned(config):
    """Breaks when planning counts another encoder than the method's."""
    config = dataclasses.replace(config, remat="none", remat_decoder="none")
    spec = programs.Spec("compress", config, TINY, contexts=4, length=16)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    counted = programs.lower(programs.few_layers(spec, 2), mesh, ("cpu",)).cost_analysis()["flops"]
    assert programs.least(spec) <= counted < 1.3 * programs.least(spec)
    icae = flops.compress(TINY, config.lora, (4, 1, 16), 4, CompressionConfig(k=4))
    toy = flops.compress(TINY, config.lora, (4, 1, 16), 4, config.compression)
    assert toy.total < icae.total, "it reads no memory tokens"
    for what in ("train", "decode"):
        spec = dataclasses.replace(spec, what=what)
        assert programs.positions_needed(spec) < TINY.max_position_embeddings
        assert programs.lower(spec, mesh, ("cpu",)) and programs.least(spec) > 0


def test_exports_that_it_lacks_are_refused(compressor, tmp_path):
    """Breaks when an export takes a method that does not have it, or does not name the method."""
    adapter = compressor.adapter
    named = NamedMemory(compressor.compress(TEXTS), ["a", "b"])
    reader = Reader(compressor.base, adapter, compressor.decoder)
    refused = "method every-rth .every r-th token. has no export "
    with pytest.raises(
        UserError, match=refused + "prompt_embeds; what it has: `icae export hf_cache`"
    ):
        prompt_embeds.save_prompt_embeds(tmp_path / "a", named, reader, prompt_embeds.Requests())
    with pytest.raises(UserError, match=refused + "peft"):
        peft_folder.save(tmp_path / "b", adapter, TINY)
    assert not list(tmp_path.iterdir())
    hf_cache.save_cache(tmp_path / "c", named, reader)
    assert (tmp_path / "c" / "decoder_lora" / "adapter_config.json").exists()


def test_nothing_else_knows_a_methods_name():
    """Breaks when another module compares names, so that a new method is not one file."""
    package = pathlib.Path(method.__file__).parents[1]
    names = {"icae", "x500"}
    knowing = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    }
    assert knowing == {
        "compression/methods/icae.py",
        "compression/methods/x500.py",
        "interop/adapters/formats.py",  # the other implementations' formats are of one method each
        "cli/main.py",  # the command's name, here and in sweep.py
        "evaluation/report.py",  # a salt of SVG's ids
        "workflows/sweep.py",
    }


def test_an_export_that_would_compute_something_else_cannot_be_declared():
    """Breaks when a PEFT folder would append memory tokens that the method never reads."""
    with pytest.raises(ValueError, match="leave PEFT out of its exports"):
        dataclasses.replace(TOY, exports=(method.PEFT,))


@pytest.mark.parametrize("causal", [True, False])
def test_a_method_may_mask_the_encoder(tiny_params, causal):
    """Breaks when `encode` ignores the mask, or gives it other tokens than the real ones."""
    config = CompressionConfig(k=3, rate=4)
    ids, lengths = segment_contexts([[5, 6, 7, 8, 9], [4] * 12], config)
    base, contexts = FrozenModel(llama.Llama(TINY), tiny_params), Contexts(ids, lengths, config.k)
    trained = random_trained(TINY, config.k)

    def mask(real):
        sees = jnp.broadcast_to(real[:, None], (*real.shape, real.shape[1]))
        return sees & llama.causal_mask(real.shape[1]) if causal else sees

    want, _ = encode(base, trained, contexts, config)
    got, _ = encode(base, trained, contexts, config, mask=mask)
    if causal:
        close(got, want)
    else:
        # In both texts the first memory token now sees those behind it.
        assert (jnp.abs(got - want).max((1, 2)) > 1e-3).all()


def test_a_method_may_count_flops_of_its_own(monkeypatch):
    """Breaks when what a method says that it computes beside the encoder's pass is not what plans
    and MFU count, or takes the pass's place.
    """

    def flops_of(model_config, shape, k):
        return {"encoder": shape[2] * k, "attention": 1}

    compression = CompressionConfig(TOY.name, k=4)
    asked = TINY, lora.LoraConfig(4), (4, 1, 16), 4, compression
    plain = flops.compress(*asked)
    monkeypatch.setitem(method.METHODS, TOY.name, dataclasses.replace(TOY, flops=flops_of))
    own = flops.compress(*asked)
    assert own.encoder - plain.encoder == 16 * 4 and own.attention - plain.attention == 1
