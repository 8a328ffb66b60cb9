"""A tiny Llama that reads and copies passages about people: the base that `icae quickstart` ships.

    icae train base --config tiny_base --workdir runs/tiny_base

Seed 0. The stages are a curriculum: find a word by the word before it, then facts by name and
kind, then questions and copies. Starting with the last stage, the base learns the kind of a fact
and never whose it is.
"""

from ml_collections import ConfigDict


def get_config():
    """The fields that differ from `BaseConfig`'s defaults."""
    config = ConfigDict()
    config.steps = 2500
    config.batch_size = 32
    config.unroll = 4
    config.log_every = 50
    config.eval_every = 250
    config.checkpoint_every = 250
    config.mixture = (
        "300 pairs=1",
        "700 mentions=1",
        "0 quiz=14 questions=8 repeat=5 notes=5",
    )

    config.model = ConfigDict()
    config.model.hidden_size = 160
    config.model.intermediate_size = 320
    config.model.num_heads = 5
    config.model.num_kv_heads = 5
    config.model.rope_theta = 1e6
    config.model.embedding_std = 0.15

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.01
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip = 1.0
    return config
