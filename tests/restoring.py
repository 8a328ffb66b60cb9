"""Two small compressors that restore two sentences, so that what checks an adapter by restoring has
something to find.

They lie trained in tests/restoring/; `python tests/restoring.py` trains them anew, in a minute,
which is needed only where the format of adapters changes.
"""

import json
import pathlib
import shutil
import sys
import tempfile
import unittest.mock

import numpy as np
from conftest import TINY, WORDS, make_tokenizer, random_params, seen_devices, write_jsonl

from icae_jax.interop.hub import base as bases
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict
from icae_jax.training.train import train

TRAINED = pathlib.Path(__file__).with_name("restoring")
# method: (layout, steps). The layouts are those of the reference implementations, so that their
# formats can hold the result.
RECIPES = {"icae": ("sequential", 1000), "x500": ("reference", 300)}
K, CONTEXT = 4, 16


def make_base(folder):
    """The base and the sentences, in a folder."""
    bases.save_base(folder / "base", TINY, random_params(TINY), make_tokenizer(), dtype="float32")
    rng = np.random.default_rng(0)
    write_jsonl(
        folder / "texts.jsonl",
        [{"text": " ".join(rng.choice(WORDS[8:], size=8))} for _ in range(2)],
    )


def run(folder, method, **changes):
    """Trains a method in the folder's workdir of its name."""
    layout, steps = RECIPES[method]
    source, steps = str(folder / "texts.jsonl"), changes.get("steps", steps)
    raw = {
        "base": str(folder / "base"),
        "steps": steps,
        "batch_size": 2,
        "eval_every": steps,
        "checkpoint_every": steps,
        "log_every": 100,
        "compression": {"method": method, "k": K, "rate": CONTEXT / K, "layout": layout},
        "lora": {"rank": 16, "dropout": 0.0},
        "objectives": {"ae": 1.0, "lm": 0.0},
        "optimizer": {
            "learning_rate": 0.02,
            "warmup_steps": 5,
            "weight_decay": 0.0,
            "schedule": "cosine",
        },
        "data": {
            "train": source,
            "eval": source,
            "context_lengths": [CONTEXT],
            "cache_dir": str(folder / "cache"),
        },
    }
    config = from_dict(TrainConfig, raw | changes)
    assert train(config, CompressorTask(config), folder / method) == 0


def idle_step(task, *_):
    """A training step that leaves everything as it was: nothing to compile."""

    def step(state, frozen, batch):
        of_batch = {"counts": task.counts(batch), "tokens": task.tokens(batch)}
        return state | {"step": state["step"] + 1}, of_batch | {
            "sums": of_batch["counts"],
            "grad_norm": 0.0,
            "param_norm": 0.0,
        }

    return step


def make_world(folder):
    """The base, the sentences, and each method's workdir, after a step that leaves the trained
    adapter as it was.
    """
    make_base(folder)
    data = {
        "train": str(folder / "texts.jsonl"),
        "context_lengths": [CONTEXT],
        "cache_dir": str(folder / "cache"),
    }
    with unittest.mock.patch("icae_jax.training.step.make_train_step", idle_step):
        for method in RECIPES:
            run(folder, method, steps=1, init_from=str(TRAINED / method), data=data)


def main():
    with tempfile.TemporaryDirectory() as name, seen_devices(1):
        folder = pathlib.Path(name)
        make_base(folder)
        for method in RECIPES:
            run(folder, method)
            shutil.rmtree(TRAINED / method, ignore_errors=True)
            shutil.copytree(folder / method / "adapter", TRAINED / method)
            config = TRAINED / method / "encoder" / "adapter_config.json"
            config.write_text(
                json.dumps(
                    json.loads(config.read_text()) | {"base_model_name_or_path": "restoring"},
                    indent=2,
                )
                + "\n"
            )


if __name__ == "__main__":
    sys.exit(main())
