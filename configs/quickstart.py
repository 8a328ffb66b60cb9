"""The two phases of `icae quickstart`: restore (AE), then answer (AE + QA), on the tiny base: in 11 tokens, in fewer steps (`…-4x`), or in
11 and in 2 tokens (`icae quickstart --full`). Run by hand:

    icae train --config configs/quickstart.py:pretrain-x500 --workdir W --config.base=icae_jax/data/tiny_base \\
        --config.data.train=quickstart/data/train.jsonl --config.data.eval=quickstart/data/held_out.jsonl
    icae sweep --config configs/quickstart.py:pretrain-x500 --sweep k --workdir W --config.base=icae_jax/data/tiny_base \\
        --config.data.train=quickstart/data/train.jsonl --config.data.eval=quickstart/data/held_out.jsonl
"""

from ml_collections import ConfigDict


def get_config(arg="pretrain-icae"):
    """arg: the phase, pretrain (AE) or finetune (AE + QA), the method, icae (the default) or x500, and perhaps 4x: that ratio alone."""
    phase, method, only = (*arg.split("-"), "", "")[:3]
    if (
        phase not in ("pretrain", "finetune")
        or method not in ("", "icae", "x500")
        or only not in ("", "4x")
        or arg.count("-") > 2
    ):
        raise ValueError(
            f"configs/quickstart.py:{arg}: choose :pretrain-METHOD[-4x] or :finetune-METHOD[-4x] with METHOD icae or x500"
        )
    finetune = phase == "finetune"
    config = ConfigDict()
    config.phase = phase
    config.base = ""
    config.init_from = ""
    config.draw_k = ("finetune",)  # phases that draw k from compression.k_choices
    config.seed = 0
    config.steps = (
        180 if finetune else 120 if method == "x500" else 340
    )  # K/V learn to restore much sooner
    config.batch_size = 32
    config.accumulate = 1
    config.dtype = "float32"
    config.remat = "none"
    config.remat_decoder = ""  # the same as remat
    config.attention = "auto"  # the fastest of xla, cudnn (GPUs), splash (TPUs)
    config.unroll = 1
    config.loss_chunk = 128
    config.log_every = 10
    config.eval_every = 100
    config.eval_examples = 64
    config.checkpoint_every = 100

    config.mesh = ConfigDict()  # the axes' sizes, -1: whatever is left
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1

    config.compression = ConfigDict()
    config.compression.method = method or "icae"
    config.compression.k = 11  # a passage has 45 to 47 tokens, <s> included: 4.2x
    config.compression.rate = 5.0  # room for 55 tokens, so that a passage is one segment
    config.compression.k_choices = (2, 11)  # 23x and 4.2x
    config.compression.layout = ""  # the method's default
    config.compression.memory_init = "embedding"
    config.compression.trigger = "trained"
    config.compression.trigger_token = "<repeat>"  # the base was trained to copy after it

    config.lora = ConfigDict()
    config.lora.rank = 32
    config.lora.scale = 2.0
    config.lora.dropout = 0.0
    config.lora.targets = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    config.objectives = ConfigDict()
    config.objectives.ae = 0.6 if finetune else 1.0
    config.objectives.lm = 0.0  # passages have no continuation
    config.objectives.qa = 0.4 if finetune else 0.0
    config.objectives.template = "plain"
    config.objectives.pad_labels = False

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1.5e-3 if finetune else 3e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.schedule = "cosine" if finetune else "constant"
    config.optimizer.decay_steps = 0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip = 2.0

    config.data = ConfigDict()
    config.data.train = ""
    config.data.eval = ""
    config.data.train_weights = ()
    config.data.context_lengths = (48,)
    config.data.context_weights = ()
    config.data.questions_per_context = 4
    config.data.max_target_tokens = 32
    config.data.max_row_bytes = 64 << 20  # that a line of a file may hold, unpacked
    config.data.cache_dir = ""
    config.data.tfds_dir = ""
    config.data.no_answer = (
        ""  # what questions without an answer are answered with; "" leaves them out, counted
    )
    config.data.strict = False  # an error in place of empty rows that are left out
    if only:
        one_ratio(config, finetune)
    return config


def one_ratio(config, finetune):
    """As fast as it goes: one number of memory tokens, small batches, no more steps than it takes, and no held-out losses (the quickstart
    measures at the end). Muon suits K/V; slots restored and answered worse by it, for the same steps, than by AdamW.
    """
    config.compression.k_choices = ()
    config.batch_size = 16
    if config.compression.method == "x500":
        config.optimizer.name = "muon"
        config.optimizer.learning_rate = 0.01
        config.optimizer.warmup_steps = 5
        config.steps = 60 if finetune else 120
    else:
        config.optimizer.warmup_steps = 10
        config.steps = 160 if finetune else 280
    config.eval_examples = 0
    config.checkpoint_every = 50


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
