"""What came out best of the comparison of methods, on any Llama-family base; no paper's sizes.

    icae train --config best:pretrain --workdir runs/pretrain --config.base=BASE \
        --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz
    icae train --config best:finetune --workdir runs/finetune --config.base=BASE \
        --config.init_from=runs/pretrain \
        --config.data.train=qa.jsonl.gz --config.data.eval=qa_valid.jsonl.gz
    icae sweep --config best:pretrain --sweep method --workdir runs/sweep_method \
        --config.base=BASE --config.data.train=train.jsonl.gz \
        --config.data.eval=valid.jsonl.gz

The choice rests on launch/experiments/README.md, "Which method": on a tiny base, mean pooling by an
encoder whose text sees itself both ways answers best at 4x, 15x and 46x, in the fewest bytes, after
equal steps, with LoRA of rank 32 on all projections. Autoencoding beside the questions won nothing
there at 4x and 15x and lost four points at 46x, so fine-tuning is on answers alone. The base says
nothing of steps, batches and learning rates, which are those of `icae`, nor of continuing, which
pretraining keeps beside autoencoding, as `icae` does. Where texts must come back word for word, K/V
restore better: --config.compression.method=sac with --config.objectives.ae=0.5 in both phases.
"""

from ml_collections import ConfigDict


def get_config(arg="pretrain"):
    """The fields of a phase, by default on a base that is yet to be given.

    arg: words joined by "-": the phase, pretrain (AE + LM; the default) or finetune (QA), and
    perhaps the short name of a known base, such as llama3_8b.
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
    config.remat = "full" if base else "frozen"
    config.eval_every = 1000
    config.eval_examples = 256
    config.checkpoint_every = 1000
    config.draw_k = ("pretrain", "finetune")

    config.compression = ConfigDict()
    config.compression.method = "pooled"  # its encoder mask is "all"
    config.compression.k = 128  # of 512 tokens
    config.compression.k_choices = (8, 32, 128)  # 64x, 16x and 4x

    config.lora = ConfigDict()
    config.lora.rank = 32
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    config.lora.targets = attention + mlp

    config.data = ConfigDict({"context_lengths": (512,)})

    if phase == "finetune":
        config.steps = 30_000
        config.objectives = ConfigDict({"ae": 0.0, "lm": 0.0, "qa": 1.0})
        config.optimizer = ConfigDict({"learning_rate": 5e-5})
    return config


def sweep_method(add):
    """All methods, each with its own layout, trigger and encoder mask."""
    for method in ("icae", "pooled", "sac", "x500"):
        add(**{"compression.method": method})


def sweep_mask(add):
    """What a token of the encoder sees."""
    for mask in ("causal", "all"):
        add(**{"compression.encoder_mask": mask})


def sweep_learning_rate(add):
    """Peak learning rates."""
    for rate in (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4):
        add(**{"optimizer.learning_rate": rate})
