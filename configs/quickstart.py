"""The two phases of `icae quickstart` on the tiny base: restore (AE), then answer (AE + QA).

A passage goes into 11 memory tokens, in fewer steps (`…-4x`), or into 11 and 2 (`--full`). By hand:

    icae train --config quickstart:pretrain-x500 --workdir W \
        --config.base=icae_jax/data/tiny_base \
        --config.data.train=quickstart/data/train.jsonl \
        --config.data.eval=quickstart/data/held_out.jsonl
    icae sweep --config quickstart:pretrain-x500 --sweep k --workdir W \
        --config.base=icae_jax/data/tiny_base \
        --config.data.train=quickstart/data/train.jsonl \
        --config.data.eval=quickstart/data/held_out.jsonl
"""

from ml_collections import ConfigDict

METHODS = ("x500", "icae")  # the sooner trained first


def get_config(arg="pretrain-icae"):
    """The fields of a phase of a method.

    arg: PHASE-METHOD[-4x]: pretrain (AE) or finetune (AE + QA); icae (the default) or x500; 4x for
    that ratio alone.
    """
    phase, method, only = (*arg.split("-"), "", "")[:3]
    method = method or "icae"
    known = phase in ("pretrain", "finetune") and method in METHODS and only in ("", "4x")
    if not known or arg.count("-") > 2:
        raise ValueError(
            f"quickstart:{arg}: choose :pretrain-METHOD[-4x] or :finetune-METHOD[-4x] "
            "with METHOD icae or x500"
        )
    config = ConfigDict()
    config.phase = phase
    config.steps = 120 if method == "x500" else 340  # K/V learn to restore much sooner
    config.batch_size = 32
    config.eval_every = 100
    config.checkpoint_every = 100

    config.compression = ConfigDict()
    config.compression.method = method
    config.compression.k = 11  # a passage has 45 to 47 tokens with <s>: 4.2x
    config.compression.rate = 5.0  # room for 55 tokens, so that a passage is one segment
    config.compression.k_choices = (2, 11)  # 23x and 4.2x
    config.compression.trigger = "trained"
    config.compression.trigger_token = "<repeat>"  # the base was trained to copy after it

    config.lora = ConfigDict()
    config.lora.rank = 32
    config.lora.dropout = 0.0
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    config.lora.targets = attention + mlp

    config.objectives = ConfigDict()
    config.objectives.ae = 1.0
    config.objectives.lm = 0.0  # passages have no continuation

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.0

    config.data = ConfigDict()
    config.data.context_lengths = (48,)
    config.data.max_target_tokens = 32

    if phase == "finetune":
        config.steps = 180
        config.objectives.ae = 0.6
        config.objectives.qa = 0.4
        config.optimizer.learning_rate = 1.5e-3
        config.optimizer.schedule = "cosine"
    if only:
        one_ratio(config)
    return config


def one_ratio(config):
    """Makes it the fastest run: one number of memory tokens, small batches, few steps.

    No held-out losses, since the quickstart measures at the end. Muon suits K/V; slots restored and
    answered worse with it, at the same number of steps, than with AdamW.
    """
    finetune = config.phase == "finetune"
    config.batch_size = 16
    config.eval_examples = 0
    config.checkpoint_every = 50
    config.compression.k_choices = ()
    if config.compression.method == "x500":
        config.steps = 60 if finetune else 120
        config.optimizer.name = "muon"
        config.optimizer.learning_rate = 0.01
        config.optimizer.warmup_steps = 5
    else:
        config.steps = 160 if finetune else 280
        config.optimizer.warmup_steps = 10


def sweep_k(add):
    """Memory tokens of a segment of 55, one model for each number."""
    for k in (2, 4, 8, 11):
        add(**{"compression.k": k, "compression.rate": 55 / k, "compression.k_choices": ()})


def sweep_method(add):
    """All methods, each with its own layout and encoder mask."""
    for method in ("icae", "pooled", "sac", "x500"):
        add(**{"compression.method": method})


def sweep_learning_rate(add):
    """Peak learning rates."""
    for rate in (3e-4, 1e-3, 3e-3, 1e-2):
        add(**{"optimizer.learning_rate": rate})
