"""ICAE (arXiv 2307.06945) on any Llama-family base: what differs from `TrainConfig`'s defaults.

    icae train --config icae:pretrain --workdir runs/pretrain --config.base=BASE \
        --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz
    icae train --config icae:finetune --workdir runs/finetune --config.base=BASE \
        --config.init_from=runs/pretrain \
        --config.data.train=qa.jsonl.gz --config.data.eval=qa_valid.jsonl.gz
    icae train --config icae:pretrain-llama2_7b --workdir runs/llama2 \
        --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz
    icae sweep --config icae:pretrain-llama2_7b --sweep k --workdir runs/sweep_k \
        --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz

The defaults have the paper's sizes (k 128, four text tokens per memory token, LoRA rank 128 on q
and v); optimizer, initial memory table, LoRA scale 2 and AE + LM in every step follow the public
recipe that is known to converge.
"""

from ml_collections import ConfigDict

# On any named base: the paper's batches and contexts.
NAMED_BASE = {
    "batch_size": 256,
    "remat": "full",
    "data": {"context_lengths": (512,), "context_weights": ()},
}
MISTRAL = {  # the second release, with at most ten segments
    "lora": {"rank": 512},
    "objectives": {"template": "mistral"},
    "data": {"context_lengths": (512, 1024, 2048, 5120)},
}


def get_config(arg="pretrain"):
    """The fields of a phase, by default on a base that is yet to be given.

    arg: words joined by "-": the phase, pretrain (AE + LM; the default) or finetune (QA), and
    perhaps the short name of a known base, such as llama2_7b.
    """
    words = [word for word in arg.split("-") if word]
    phase = next((word for word in words if word in ("pretrain", "finetune")), "pretrain")
    if phase in words:
        words.remove(phase)
    base = "-".join(words)
    config = ConfigDict()
    config.phase = phase
    config.base = base
    config.steps = 200_000
    config.batch_size = 32
    config.dtype = "bfloat16"
    config.remat = "frozen"
    config.eval_every = 1000
    config.eval_examples = 256
    config.checkpoint_every = 1000

    config.data = ConfigDict()
    config.data.context_lengths = (512, 1024, 2048)  # one, two and four segments
    config.data.context_weights = (0.5, 0.25, 0.25)

    if phase == "finetune":
        config.steps = 30_000
        config.objectives = ConfigDict({"ae": 0.0, "lm": 0.0, "qa": 1.0})
        config.optimizer = ConfigDict({"learning_rate": 5e-5})
    if base:
        config.update(NAMED_BASE)
    if base == "mistral_7b":
        config.update(MISTRAL)
    return config


def sweep_k(add):
    """Memory tokens of a segment of 512: 16x to 2x."""
    for k in (32, 64, 128, 256):
        add(**{"compression.k": k, "compression.rate": 512 / k})


def sweep_rate(add):
    """Ever longer segments, which are the whole context, in 128 memory tokens."""
    for rate in (2.0, 4.0, 8.0, 16.0):
        length = {"data.context_lengths": (round(128 * rate),), "data.context_weights": ()}
        add(**{"compression.k": 128, "compression.rate": rate, **length})


def sweep_rank(add):
    """LoRA ranks."""
    for rank in (32, 64, 128, 256):
        add(**{"lora.rank": rank})


def sweep_lambda(add):
    """The weight of AE against LM in pretraining (the paper: 0.4 to 0.6 is best)."""
    for weight in (0.2, 0.4, 0.5, 0.6, 0.8):
        add(**{"objectives.ae": weight, "objectives.lm": round(1 - weight, 1)})


def sweep_learning_rate(add):
    """Peak learning rates."""
    for rate in (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4):
        add(**{"optimizer.learning_rate": rate})


def sweep_method(add):
    """All methods with all else equal, each with its own layout, trigger and encoder mask."""
    for method in ("icae", "pooled", "sac", "x500"):
        add(**{"compression.method": method})
