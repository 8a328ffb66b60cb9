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


def get_config(arg="pretrain-icae"):
    """The fields of a phase of a method.

    arg: PHASE-METHOD[-4x]: pretrain (AE) or finetune (AE + QA); icae (the default) or x500; 4x for
    that ratio alone.
    """
    phase, method, only = (*arg.split("-"), "", "")[:3]
    method = method or "icae"
    known = phase in ("pretrain", "finetune") and method in ("icae", "x500") and only in ("", "4x")
    if not known or arg.count("-") > 2:
        raise ValueError(
            f"quickstart:{arg}: choose :pretrain-METHOD[-4x] or :finetune-METHOD[-4x] "
            "with METHOD icae or x500"
        )
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config = {
        "phase": phase,
        "steps": 120 if method == "x500" else 340,  # K/V learn to restore much sooner
        "batch_size": 32,
        "eval_every": 100,
        "checkpoint_every": 100,
        "compression.method": method,
        "compression.k": 11,  # a passage has 45 to 47 tokens with <s>: 4.2x
        "compression.rate": 5.0,  # room for 55 tokens, so that a passage is one segment
        "compression.k_choices": (2, 11),  # 23x and 4.2x
        "compression.trigger": "trained",
        "compression.trigger_token": "<repeat>",  # the base was trained to copy after it
        "lora.rank": 32,
        "lora.dropout": 0.0,
        "lora.targets": projections,
        "objectives.ae": 1.0,
        "objectives.lm": 0.0,  # passages have no continuation
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup_steps": 20,
        "optimizer.b2": 0.98,
        "optimizer.weight_decay": 0.0,
        "data.context_lengths": (48,),
        "data.max_target_tokens": 32,
    }
    if phase == "finetune":
        config |= {
            "steps": 180,
            "objectives.ae": 0.6,
            "objectives.qa": 0.4,
            "optimizer.learning_rate": 1.5e-3,
            "optimizer.schedule": "cosine",
        }
    return config | (one_ratio(method, phase) if only else {})


def one_ratio(method, phase):
    """The fields of the fastest run: one number of memory tokens, small batches, few steps.

    No held-out losses, since the quickstart measures at the end. Muon suits K/V; slots restored and
    answered worse with it, at the same number of steps, than with AdamW.
    """
    fields = {
        "batch_size": 16,
        "eval_examples": 0,
        "checkpoint_every": 50,
        "compression.k_choices": (),
    }
    if method == "x500":
        muon = {
            "optimizer.name": "muon",
            "optimizer.learning_rate": 0.01,
            "optimizer.warmup_steps": 5,
        }
        return fields | muon | {"steps": 60 if phase == "finetune" else 120}
    return fields | {
        "optimizer.warmup_steps": 10,
        "steps": 160 if phase == "finetune" else 280,
    }


def sweep_k(add):
    """Memory tokens of a segment of 55, one model for each."""
    for k in (2, 4, 8, 11):
        add(**{"compression.k": k, "compression.rate": 55 / k, "compression.k_choices": ()})


def sweep_method(add):
    for method in ("icae", "x500"):
        add(**{"compression.method": method})


def sweep_learning_rate(add):
    for rate in (3e-4, 1e-3, 3e-3, 1e-2):
        add(**{"optimizer.learning_rate": rate})
