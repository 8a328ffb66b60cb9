"""ICAE (arXiv 2307.06945) on any Llama-family base.

    icae train --config configs/icae.py:pretrain --workdir runs/pretrain \\
        --config.base=BASE --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz
    icae train --config configs/icae.py:finetune --workdir runs/finetune --config.init_from=runs/pretrain \\
        --config.base=BASE --config.data.train=qa.jsonl.gz --config.data.eval=qa_valid.jsonl.gz

Sizes are those of the paper (k 128, four tokens a slot, LoRA rank 128 on q and v); optimizer, memory-table start, LoRA scale 2 and
AE + LM in every step follow the public recipe that is known to converge.
"""

from ml_collections import ConfigDict


def get_config(arg="pretrain"):
    """arg: the phase, pretrain (AE + LM) or finetune (QA)."""
    if arg not in ("pretrain", "finetune"):
        raise ValueError(f"configs/icae.py:{arg}: choose :pretrain or :finetune")
    finetune = arg == "finetune"
    config = ConfigDict()
    config.phase = arg
    config.base = ""
    config.init_from = ""
    config.draw_k = ("finetune",)  # phases that draw k from compression.k_choices
    config.seed = 0
    config.steps = 30_000 if finetune else 200_000
    config.batch_size = 32
    config.accumulate = 1
    config.dtype = "bfloat16"
    config.remat = "dots"
    config.unroll = 1
    config.loss_chunk = 128
    config.log_every = 10
    config.eval_every = 1000
    config.eval_examples = 256
    config.checkpoint_every = 1000

    config.compression = ConfigDict()
    config.compression.method = "icae"
    config.compression.k = 128
    config.compression.rate = 4.0
    config.compression.k_choices = ()  # such as (32, 64, 128): one model for several ratios
    config.compression.layout = "servable"
    config.compression.memory_init = "embedding"
    config.compression.trigger = "trained"
    config.compression.trigger_token = ""

    config.lora = ConfigDict()
    config.lora.rank = 128
    config.lora.scale = 2.0
    config.lora.dropout = 0.05
    config.lora.targets = ("q_proj", "v_proj")

    config.objectives = ConfigDict()
    config.objectives.ae = 0.0 if finetune else 0.5
    config.objectives.lm = 0.0 if finetune else 0.5
    config.objectives.qa = 1.0 if finetune else 0.0
    config.objectives.template = "plain"
    config.objectives.pad_labels = False

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-5 if finetune else 1e-4
    config.optimizer.warmup_steps = 300
    config.optimizer.schedule = "constant"
    config.optimizer.decay_steps = 0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip = 2.0

    config.data = ConfigDict()
    config.data.train = ""
    config.data.eval = ""
    config.data.train_weights = ()  # such as (3.0, 1.0): one share for each source of train
    config.data.context_lengths = (512, 1024, 2048)  # one, two and four segments
    config.data.context_weights = (0.5, 0.25, 0.25)
    config.data.questions_per_context = 4
    config.data.max_target_tokens = 256
    config.data.cache_dir = ""
    config.data.tfds_dir = ""
    return config
