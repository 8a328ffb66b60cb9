"""What tests of the command line share: small data sets, and the flags of a small training."""

import numpy as np
from conftest import ROOT, WORDS, write_jsonl

CONFIG, X500 = str(ROOT / "configs" / "icae.py"), str(ROOT / "configs" / "x500.py")
SMALL = {
    "steps": 4,
    "batch_size": 4,
    "dtype": "float32",
    "remat": "none",
    "eval_every": 4,
    "log_every": 2,
    "eval_examples": 12,
    "compression.k": 4,
    "lora.rank": 4,
    "optimizer.warmup_steps": 1,
    "data.context_lengths": "(16,)",
    "data.context_weights": "(1.0,)",
}


def sentence(rng, size):
    """Words of the tiny tokenizer."""
    return " ".join(rng.choice(WORDS[8:], size=size))


def make_files(folder, base):
    """Writes texts, questions and contexts. Returns their paths, the folder and the base."""
    rng = np.random.default_rng(0)
    contexts = [sentence(rng, 12) for _ in range(6)]
    qa = [
        {"context": c, "question": sentence(rng, 4), "answers": [sentence(rng, 2)]}
        for c in contexts
        for _ in range(2)
    ]
    rows = [{"id": f"doc{i}", "text": c} for i, c in enumerate(contexts)]
    return {
        "folder": folder,
        "base": str(base),
        "text": write_jsonl(folder / "text.jsonl", [{"text": sentence(rng, 46)} for _ in range(8)]),
        "qa": write_jsonl(folder / "qa.jsonl", qa),
        "contexts": write_jsonl(folder / "in.jsonl", rows),
    }


def flags(phase, files, workdir, config=CONFIG, **changes):
    """The arguments of `icae` that train a phase on `make_files`' data."""
    data = files["text"] if phase.startswith("pretrain") else files["qa"]
    values = SMALL | {
        "base": files["base"],
        "data.train": data,
        "data.eval": data,
        "data.cache_dir": str(files["folder"] / "cache"),
    }
    fields = [f"--config.{name}={value}" for name, value in (values | changes).items()]
    return ["train", "--config", f"{config}:{phase}", "--workdir", str(workdir), *fields]


def compress(adapter, files, output, *more):
    """The arguments of `icae` that write a memory of `make_files`' contexts."""
    argv = ["compress", "--adapter", adapter, "--input", files["contexts"], "--output", output]
    return [str(argument) for argument in [*argv, *more]]
