"""500xCompressor (arXiv 2408.03094) on any Llama-family base: up to 500 tokens in the K/V of 16, 4 or 1.

    icae train --config configs/x500.py:pretrain-16 --workdir runs/pretrain \\
        --config.base=BASE --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz
    icae train --config configs/x500.py:finetune-16 --workdir runs/finetune --config.init_from=runs/pretrain \\
        --config.base=BASE --config.data.train=qa.jsonl.gz --config.data.eval=qa_valid.jsonl.gz

One model for all three: --config.compression.k_choices="(1,4,16)" in both commands; fine-tuning then draws the number of tokens in every
step, and pretraining too with --config.draw_k="('pretrain','finetune')".

Sizes, learning rates, epochs and init are the paper's (LoRA rank 64, alpha 32 on q and v; N(0, 1) memory tokens; regeneration, then QA).
The layout is ours; --config.compression.layout=reference is the authors', --config.objectives.pad_labels=True their loss on padding.
"""

from ml_collections import ConfigDict

TEXT_TOKENS = 500


def get_config(arg="pretrain-16"):
    """arg: the phase, pretrain (regeneration) or finetune (QA), and the number of memory tokens, 16 (the default), 4 or 1."""
    phase, _, k = arg.partition("-")
    if phase not in ("pretrain", "finetune") or k not in ("", "16", "4", "1"):
        raise ValueError(f"configs/x500.py:{arg}: choose :pretrain-K or :finetune-K with K 16, 4 or 1")
    finetune = phase == "finetune"
    config = ConfigDict()
    config.phase = phase
    config.base = ""
    config.init_from = ""
    config.draw_k = ("finetune",)
    config.seed = 0
    config.steps = 78_000 if finetune else 220_000  # 10 epochs of 250,000 questions, 3 of 2.35 million abstracts
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
    config.compression.method = "x500"
    config.compression.k = int(k or 16)
    config.compression.rate = TEXT_TOKENS / config.compression.k
    config.compression.k_choices = ()
    config.compression.layout = "clean"
    config.compression.memory_init = "normal"
    config.compression.trigger = "bos"
    config.compression.trigger_token = ""

    config.lora = ConfigDict()
    config.lora.rank = 64
    config.lora.scale = 0.5
    config.lora.dropout = 0.05
    config.lora.targets = ("q_proj", "v_proj")

    config.objectives = ConfigDict()
    config.objectives.ae = 0.0 if finetune else 1.0
    config.objectives.lm = 0.0
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
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip = 2.0

    config.data = ConfigDict()
    config.data.train = ""
    config.data.eval = ""
    config.data.train_weights = ()
    config.data.context_lengths = (TEXT_TOKENS,)
    config.data.context_weights = ()
    config.data.questions_per_context = 4
    config.data.max_target_tokens = 256
    config.data.cache_dir = ""
    config.data.tfds_dir = ""
    return config
