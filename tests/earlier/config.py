"""The configuration of the small trainings and of the sweep whose files lie here, as a user's own
file has it.

Paths are relative to a copy of this folder. arg: "icae" (pretraining), "x500" (fine-tuning, of one
memory token or four) or "finetune" (of what "icae" gave).
"""

from ml_collections import ConfigDict


def get_config(arg="icae"):
    config = ConfigDict()
    config.phase = "pretrain" if arg == "icae" else "finetune"
    config.base = "base"
    config.init_from = {"icae": "", "x500": "adapters/clean", "finetune": "workdirs/icae"}[arg]
    config.seed = 3
    config.steps = 6 if arg == "finetune" else 4
    config.batch_size = 4
    config.accumulate = 1
    config.dtype = "float32"
    config.remat = "none"
    config.log_every = 1
    config.eval_every = 2 if arg == "icae" else 3
    config.eval_examples = 4
    config.checkpoint_every = 100

    config.compression = ConfigDict()
    config.compression.method = "x500" if arg == "x500" else "icae"
    config.compression.k = 4
    config.compression.rate = 3.0
    config.compression.k_choices = (1, 4) if arg == "x500" else ()
    config.compression.layout = "clean" if arg == "x500" else "servable"
    config.compression.memory_init = "embedding"
    config.compression.trigger = "bos" if arg == "x500" else "trained"

    config.lora = ConfigDict()
    config.lora.rank = 2
    config.lora.scale = 2.0
    config.lora.dropout = 0.05
    config.lora.targets = ("q_proj", "v_proj")

    config.objectives = ConfigDict()
    config.objectives.ae = 0.5
    config.objectives.lm = 0.5 if arg == "icae" else 0.0
    config.objectives.qa = 0.0 if arg == "icae" else 1.0
    config.objectives.template = "plain"

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 2
    config.optimizer.schedule = "constant"
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip = 2.0

    config.data = ConfigDict()
    config.data.train = config.data.eval = "text.jsonl" if arg == "icae" else "qa.jsonl"
    config.data.context_lengths = (12,)
    config.data.context_weights = ()
    config.data.questions_per_context = 2
    config.data.cache_dir = "cache"
    return config


def sweep_k(add):
    for k in (2, 4):
        add(**{"compression.k": k, "compression.rate": 12 / k})
