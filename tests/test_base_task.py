"""Training a small base: stages, determinism, and that what is written is a base."""

import dataclasses

import numpy as np
import pytest
from conftest import ROOT

from icae_jax.data import synthetic
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.training import config_file, metrics
from icae_jax.training.base_task import BASE, BaseTask, parse_mixture
from icae_jax.training.config import BaseConfig
from icae_jax.training.config_file import from_dict
from icae_jax.training.train import DONE, train

RAW = {
    "steps": 6,
    "batch_size": 4,
    "log_every": 1,
    "eval_every": 3,
    "checkpoint_every": 3,
    "eval_examples": 4,
    "mixture": ["4 notes=1", "0 notes=1 repeat=1"],  # of one length: one step is compiled
    "model": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2},
    "optimizer": {"name": "muon", "learning_rate": 0.02, "warmup_steps": 1, "weight_decay": 0.0},
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    config = from_dict(BaseConfig, RAW)
    assert train(config, BaseTask(config), folder, log=lambda _: None) == DONE
    return folder


def test_it_learns_and_writes_a_base_that_loads(workdir):
    lines = metrics.read_lines(workdir / "metrics.jsonl")
    evals = [line["eval"] for line in lines if "eval" in line]
    assert (
        set(evals[0]) == {"notes", "repeat"}
        and evals[-1]["repeat"]["lm"] < evals[0]["repeat"]["lm"]
    )
    base = bases.load_base(workdir / BASE)
    assert base.config.hidden_size == 32 and base.config.tie_word_embeddings
    assert (
        base.stop_ids == (base.tokenizer.eos_token_id,)
        and tokenizers.bos_id(base.tokenizer) == base.tokenizer.bos_token_id
    )


def test_batches_follow_the_stages_and_the_seed():
    """Breaks when a resumed run would see other documents, or a stage is left out."""
    raw = RAW | {"mixture": ["4 pairs=1", "0 pairs=1 repeat=1"]}
    task, again = (BaseTask(from_dict(BaseConfig, raw)) for _ in range(2))
    for step in (0, 3, 5):
        for name, value in task.batch(step).items():
            np.testing.assert_array_equal(value, again.batch(step)[name])
    assert not np.array_equal(task.batch(0)["ids"], task.batch(1)["ids"])
    repeat = task.tokenizer.convert_tokens_to_ids(synthetic.REPEAT)
    assert not any((task.batch(step)["ids"] == repeat).any() for step in range(4))
    assert any((task.batch(step)["ids"] == repeat).any() for step in range(4, 12))
    other = BaseTask(from_dict(BaseConfig, raw | {"seed": 1}))
    assert not np.array_equal(task.batch(0)["ids"], other.batch(0)["ids"])


def test_labels_are_the_next_tokens_with_their_weights():
    task = BaseTask(from_dict(BaseConfig, RAW))
    batch = task._collate([[("Anna", 0.0), ("Paris", 1.0), (".", 0.5)]], 6)
    anna, paris, dot = task.tokenizer("Anna Paris.", add_special_tokens=False)["input_ids"]
    assert batch["ids"].tolist() == [[task.tokenizer.bos_token_id, anna, paris, dot, 0, 0]]
    assert batch["labels"].tolist() == [[anna, paris, dot, 0, 0, 0]]
    assert batch["weights"].tolist() == [[0.0, 1.0, 0.5, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "line", ["500", "x pairs=1", "500 pairs", "500 odd=1", "500 pairs=0", "500 pairs=many"]
)
def test_bad_mixtures_name_the_line(line):
    with pytest.raises(ValueError, match=f"mixture line '{line}'"):
        parse_mixture([line])
    with pytest.raises(ValueError, match="mixture is empty"):
        parse_mixture([])


def test_the_shipped_base_is_the_recipe_s():
    """Breaks when the shipped base and configs/tiny_base.py part ways."""
    config = config_file.load(BaseConfig, "tiny_base")
    folder = ROOT / "icae_jax" / "data" / "tiny_base"
    base = bases.load_base(folder)
    want = BaseTask(config).model_config
    assert dataclasses.asdict(base.config) == dataclasses.asdict(want)
    assert base.tokenizer.get_vocab() == synthetic.build_tokenizer().get_vocab()
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 3_000_000
