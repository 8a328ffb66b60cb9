"""A tiny Llama that reads and copies passages about people: the base that `icae quickstart` ships.

    icae train base --config tiny_base --workdir runs/tiny_base

Seed 0. The stages are a curriculum: find a word by the word before it, then facts by name and
kind, then questions and copies. Starting with the last stage, the base learns the kind of a fact
and never whose it is.
"""


def get_config():
    """The fields that differ from `BaseConfig`'s defaults."""
    return {
        "steps": 2500,
        "batch_size": 32,
        "unroll": 4,
        "log_every": 50,
        "eval_every": 250,
        "checkpoint_every": 250,
        "mixture": (
            "300 pairs=1",
            "700 mentions=1",
            "0 quiz=14 questions=8 repeat=5 notes=5",
        ),
        "model.hidden_size": 160,
        "model.intermediate_size": 320,
        "model.num_heads": 5,
        "model.num_kv_heads": 5,
        "model.rope_theta": 1e6,
        "model.embedding_std": 0.15,
        "optimizer.name": "muon",
        "optimizer.learning_rate": 0.01,
        "optimizer.warmup_steps": 100,
        "optimizer.schedule": "cosine",
        "optimizer.b2": 0.98,
        "optimizer.weight_decay": 0.05,
        "optimizer.clip": 1.0,
    }
