"""A tiny Llama that reads and copies passages about people: the base that `icae quickstart` ships.

    icae train-base --config configs/tiny_base.py --workdir runs/tiny_base

Seed 0. The stages are a curriculum: looking a word up by the word before it, then facts by name and kind, then questions and copies.
Starting with the last stage, the base keeps to the kind of fact and never learns whose it is.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.steps = 2500
    config.batch_size = 32
    config.accumulate = 1
    config.dtype = "float32"
    config.remat = "none"
    config.attention = "auto"  # the fastest of xla, cudnn (GPUs), splash (TPUs)
    config.unroll = 4
    config.loss_chunk = 128
    config.log_every = 50
    config.eval_every = 250
    config.eval_examples = 64
    config.checkpoint_every = 250
    config.mixture = (
        "300 pairs=1",
        "700 mentions=1",
        "0 quiz=14 questions=8 repeat=5 notes=5",
    )

    config.mesh = ConfigDict()  # the axes' sizes, -1: whatever is left
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1

    config.model = ConfigDict()
    config.model.hidden_size = 160
    config.model.intermediate_size = 320
    config.model.num_layers = 4
    config.model.num_heads = 5
    config.model.num_kv_heads = 5
    config.model.max_position_embeddings = 512
    config.model.rope_theta = 1e6
    config.model.embedding_std = 0.15

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.01
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.optimizer.decay_steps = 0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip = 1.0
    return config
