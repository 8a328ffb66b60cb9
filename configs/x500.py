"""500xCompressor (arXiv 2408.03094) on any Llama-family base: up to 500 tokens in the K/V of 16, 4 or 1.

    icae train --config configs/x500.py:pretrain-16 --workdir runs/pretrain \\
        --config.base=BASE --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz
    icae train --config configs/x500.py:finetune-16 --workdir runs/finetune --config.init_from=runs/pretrain \\
        --config.base=BASE --config.data.train=qa.jsonl.gz --config.data.eval=qa_valid.jsonl.gz
    icae train --config configs/x500.py:pretrain-llama3_8b-16 --workdir runs/llama3 \\
        --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz
    icae sweep --config configs/x500.py:pretrain-llama3_8b --sweep k --workdir runs/sweep_k \\
        --config.data.train=train.jsonl.gz --config.data.eval=valid.jsonl.gz

One model for all three: --config.compression.k_choices="(1,4,16)" in both commands; fine-tuning then draws the number of tokens in every
step, and pretraining too with --config.draw_k="('pretrain','finetune')".

Sizes, learning rates, epochs and init are the paper's (LoRA rank 64, alpha 32 on q and v; N(0, 1) memory tokens; regeneration, then QA).
The layout is ours; --config.compression.layout=reference is the authors', --config.objectives.pad_labels=True their loss on padding.
"""

from ml_collections import ConfigDict

TEXT_TOKENS = 500
# A named base changes the hub id, and remat to full. The paper's is Llama-3-8B-Instruct.
BASES = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "llama2_70b": "meta-llama/Llama-2-70b-hf",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "mistral_7b": "mistralai/Mistral-7B-Instruct-v0.2",
    "qwen3_8b": "Qwen/Qwen3-8B",
}


def get_config(arg="pretrain-16"):
    """arg: words joined by "-": the phase, pretrain (regeneration; the default) or finetune (QA), the number of memory tokens, 16 (the
    default), 4 or 1, and a base of BASES, or none.
    """
    words = [word for word in arg.split("-") if word]
    phases, ks = (
        [w for w in words if w in ("pretrain", "finetune")],
        [w for w in words if w in ("16", "4", "1")],
    )
    bases = [w for w in words if w in BASES]
    if max(map(len, (phases, ks, bases))) > 1 or len(phases) + len(ks) + len(bases) < len(words):
        raise ValueError(
            f"configs/x500.py:{arg}: choose :pretrain-K or :finetune-K with K 16, 4 or 1, or with a base :pretrain-K-BASE, "
            f"of {', '.join(BASES)}"
        )
    finetune = phases == ["finetune"]
    config = ConfigDict()
    config.phase = "finetune" if finetune else "pretrain"
    config.base = BASES[bases[0]] if bases else ""
    config.init_from = ""
    config.draw_k = ("finetune",)
    config.seed = 0
    config.steps = (
        78_000 if finetune else 220_000
    )  # 10 epochs of 250,000 questions, 3 of 2.35 million abstracts
    config.batch_size = 32
    config.accumulate = 1
    config.dtype = "bfloat16"
    config.remat = "full" if bases else "frozen"
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
    config.compression.method = "x500"
    config.compression.k = int(ks[0]) if ks else 16
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
    config.data.max_row_bytes = 64 << 20  # that a line of a file may hold, unpacked
    config.data.cache_dir = ""
    config.data.tfds_dir = ""
    config.data.no_answer = (
        ""  # what questions without an answer are answered with; "" leaves them out, counted
    )
    config.data.strict = False  # an error in place of empty rows that are left out
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
    for rank in (16, 32, 64, 128):
        add(**{"lora.rank": rank})


def sweep_learning_rate(add):
    for rate in (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4):
        add(**{"optimizer.learning_rate": rate})


def sweep_method(add):
    """Both methods with all else equal, each with its own layout and trigger."""
    for method in ("icae", "x500"):
        add(**{"compression.method": method, "compression.layout": "", "compression.trigger": ""})
