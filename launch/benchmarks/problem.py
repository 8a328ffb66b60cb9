"""What the sides of `compare.py` train on: a random base and random tokens."""

import numpy as np
import safetensors.numpy
from sides import EOS

from icae_jax import files
from icae_jax.errors import UserError

# Flags that change neither the base nor the tokens.
FREE = ("batch", "one_by_one", "rounds", "threads", "lora_rank", "device", "cases", "sides")


def prepare(workdir, sizes):
    """Writes a random base (hub format), the tokens, the memory table, and last their sizes.

    Does nothing if they are there with the same sizes. UserError if the folder holds anything else.
    """
    sizes_file = workdir / "sizes.json"
    fixed = {name: size for name, size in sizes.items() if name not in FREE}
    if sizes_file.exists():
        differences = [
            f"{name} {old} (now {fixed.get(name)})"
            for name, old in files.read_json(sizes_file, "sizes").items()
            if old != fixed.get(name)
        ]
        if differences:
            raise UserError(
                f"--workdir {workdir} was made with {', '.join(differences)}; "
                "give these, or another folder"
            )
        return
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"--workdir {workdir} is not empty; give a new folder")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    s = sizes
    target = max(s["tokens"], s["prompt"] + s["answer"]) + 2
    config = transformers.LlamaConfig(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        intermediate_size=s["intermediate"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["heads"],
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS,
        max_position_embeddings=s["tokens"] + s["memory"] + target,
    )
    torch.manual_seed(s["seed"])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, s["dtype"]))
    model.save_pretrained(workdir / "base")
    rng = np.random.default_rng(s["seed"])
    shapes = {
        "context": (s["contexts"], s["tokens"]),
        "continuation": (s["contexts"], s["continuation"]),
        "prompt": (s["contexts"], s["questions"], s["prompt"]),
        "answer": (s["contexts"], s["questions"], s["answer"]),
    }
    arrays = {
        name: rng.integers(EOS + 1, s["vocab"], shape, np.int32) for name, shape in shapes.items()
    }
    scale = np.float32(model.get_input_embeddings().weight.float().std().item())
    arrays["memory_table"] = scale * rng.standard_normal((s["memory"] + 3, s["hidden"]), np.float32)
    safetensors.numpy.save_file(arrays, workdir / "problem.safetensors")
    files.write_json(sizes_file, fixed)
