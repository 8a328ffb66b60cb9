"""500xCompressor (arXiv 2408.03094) on any Llama-family base: 500 tokens in the K/V of 16, 4 or 1.

    icae train --config x500:pretrain-16 --workdir runs/pretrain --config.base=BASE \
        --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz
    icae train --config x500:finetune-16 --workdir runs/finetune --config.base=BASE \
        --config.init_from=runs/pretrain \
        --config.data.train=qa.jsonl.gz --config.data.eval=qa_valid.jsonl.gz
    icae train --config x500:pretrain-llama3_8b-16 --workdir runs/llama3 \
        --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz
    icae sweep --config x500:pretrain-llama3_8b --sweep k --workdir runs/sweep_k \
        --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz

One model for all three: --config.compression.k_choices="(1,4,16)" in both phases. Fine-tuning then
draws the number of memory tokens in every step, and so does pretraining with
--config.draw_k="('pretrain','finetune')".

Sizes, learning rates, epochs and initialisation are the paper's (LoRA rank 64, alpha 32 on q and
v; N(0, 1) memory tokens; regeneration, then QA). The layout is ours; the authors' is
--config.compression.layout=reference, their loss on padding --config.objectives.pad_labels=True.
"""

from ml_collections import ConfigDict

TEXT_TOKENS = 500


def get_config(arg="pretrain-16"):
    """The fields of a phase, by default on a base that is yet to be given.

    arg: words joined by "-": the phase, pretrain (regeneration; the default) or finetune (QA); the
    number of memory tokens, 16 (the default), 4 or 1; and perhaps the short name of a known base,
    where llama3_8b is the paper's, Llama-3-8B-Instruct.
    """
    words = [word for word in arg.split("-") if word]
    phase = next((word for word in words if word in ("pretrain", "finetune")), "pretrain")
    k = next((word for word in words if word in ("16", "4", "1")), "16")
    for word in (phase, k):
        if word in words:
            words.remove(word)
    base = "-".join(words)
    config = ConfigDict()
    config.phase = phase
    config.base = "llama3_8b_instruct" if base == "llama3_8b" else base
    config.steps = 220_000  # 3 epochs of 2.35 million abstracts
    config.batch_size = 32
    config.dtype = "bfloat16"
    config.remat = "full" if base else "frozen"
    config.eval_every = 1000
    config.eval_examples = 256
    config.checkpoint_every = 1000

    config.compression = ConfigDict()
    config.compression.method = "x500"
    config.compression.k = int(k)
    config.compression.rate = TEXT_TOKENS / int(k)
    config.compression.memory_init = "normal"

    config.lora = ConfigDict({"rank": 64, "scale": 0.5})
    config.objectives = ConfigDict({"ae": 1.0, "lm": 0.0})
    config.optimizer = ConfigDict({"b2": 0.999, "weight_decay": 0.01})
    config.data = ConfigDict({"context_lengths": (TEXT_TOKENS,)})

    if phase == "finetune":
        config.steps = 78_000  # 10 epochs of 250,000 questions
        config.objectives.ae = 0.0
        config.objectives.qa = 1.0
        config.optimizer.learning_rate = 5e-5
    return config


def sweep_k(add):
    """Memory tokens of 500 of text: 31x to 500x."""
    for k in (1, 2, 4, 8, 16):
        add(**{"compression.k": k, "compression.rate": TEXT_TOKENS / k})


def sweep_rate(add):
    """Ever longer texts in 16 memory tokens."""
    for length in (125, 250, 500, 1000):
        add(
            **{
                "compression.k": 16,
                "compression.rate": length / 16,
                "data.context_lengths": (length,),
            }
        )


def sweep_rank(add):
    """LoRA ranks."""
    for rank in (16, 32, 64, 128):
        add(**{"lora.rank": rank})


def sweep_learning_rate(add):
    """Peak learning rates."""
    for rate in (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4):
        add(**{"optimizer.learning_rate": rate})


def sweep_method(add):
    """All methods with all else equal, each with its own layout, trigger and encoder mask."""
    for method in ("icae", "pooled", "sac", "x500"):
        add(**{"compression.method": method})
