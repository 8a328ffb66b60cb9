"""ICAE (arXiv 2307.06945) on any Llama-family base.

    icae train --config configs/icae.py:pretrain --workdir runs/pretrain \\
        --config.base=BASE --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz
    icae train --config configs/icae.py:finetune --workdir runs/finetune --config.init_from=runs/pretrain \\
        --config.base=BASE --config.data.train=qa.jsonl.gz --config.data.eval=qa_valid.jsonl.gz
    icae train --config configs/icae.py:pretrain-llama2_7b --workdir runs/llama2 \\
        --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz
    icae sweep --config configs/icae.py:pretrain-llama2_7b --sweep k --workdir runs/sweep_k \\
        --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz

Sizes are those of the paper (k 128, four tokens a slot, LoRA rank 128 on q and v); optimizer, memory-table start, LoRA scale 2 and
AE + LM in every step follow the public recipe that is known to converge.
"""

from ml_collections import ConfigDict

# What a named base changes; all of them the batch to the paper's 256, the contexts to its 512 tokens, and remat to full.
BASES = {
    "llama2_7b": {"base": "meta-llama/Llama-2-7b-hf"},
    "llama2_70b": {"base": "meta-llama/Llama-2-70b-hf"},
    "llama3_8b": {"base": "meta-llama/Meta-Llama-3-8B"},
    "mistral_7b": {  # the released second version, with ten segments at most
        "base": "mistralai/Mistral-7B-Instruct-v0.2",
        "lora.rank": 512,
        "objectives.template": "mistral",
        "data.context_lengths": (512, 1024, 2048, 5120),
    },
    "qwen3_8b": {"base": "Qwen/Qwen3-8B"},
}


def get_config(arg="pretrain"):
    """arg: words joined by "-": the phase, pretrain (AE + LM; the default) or finetune (QA), and a base of BASES, or none."""
    words = [word for word in arg.split("-") if word]
    phases, bases = (
        [w for w in words if w in ("pretrain", "finetune")],
        [w for w in words if w in BASES],
    )
    if len(phases) > 1 or len(bases) > 1 or len(phases) + len(bases) < len(words):
        raise ValueError(
            f"configs/icae.py:{arg}: choose :pretrain or :finetune, or with a base :pretrain-BASE, of {', '.join(BASES)}"
        )
    finetune = phases == ["finetune"]
    config = ConfigDict()
    config.phase = "finetune" if finetune else "pretrain"
    config.base = ""
    config.init_from = ""
    config.draw_k = ("finetune",)  # phases that draw k from compression.k_choices
    config.seed = 0
    config.steps = 30_000 if finetune else 200_000
    config.batch_size = 32
    config.accumulate = 1
    config.dtype = "bfloat16"
    config.remat = "frozen"
    config.remat_decoder = ""  # the same as remat
    config.attention = "auto"  # the fastest of xla, cudnn (GPUs), splash (TPUs)
    config.unroll = 1
    config.loss_chunk = 128
    config.log_every = 10
    config.eval_every = 1000
    config.eval_examples = 256
    config.checkpoint_every = 1000

    config.mesh = ConfigDict()  # the axes' sizes, -1: whatever is left
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1

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
    config.data.max_row_bytes = 64 << 20  # that a line of a file may hold, unpacked
    config.data.cache_dir = ""
    config.data.tfds_dir = ""
    config.data.no_answer = (
        ""  # what questions without an answer are answered with; "" leaves them out, counted
    )
    config.data.strict = False  # an error in place of empty rows that are left out

    if bases:
        config.batch_size = 256
        config.remat = "full"
        config.data.context_lengths = (512,)
        config.data.context_weights = ()
        config.update_from_flattened_dict(BASES[bases[0]])
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
    for rank in (32, 64, 128, 256):
        add(**{"lora.rank": rank})


def sweep_lambda(add):
    """What AE weighs against LM in pretraining (the paper: 0.4 to 0.6 is best)."""
    for weight in (0.2, 0.4, 0.5, 0.6, 0.8):
        add(**{"objectives.ae": weight, "objectives.lm": round(1 - weight, 1)})


def sweep_learning_rate(add):
    for rate in (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4):
        add(**{"optimizer.learning_rate": rate})


def sweep_method(add):
    """Both methods with all else equal, each with its own layout and trigger."""
    for method in ("icae", "x500"):
        add(**{"compression.method": method, "compression.layout": "", "compression.trigger": ""})
