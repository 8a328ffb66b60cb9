"""The sides of `compare.py`: our step, and the recipes of `torch_icae`, on the same problem.

A side has these methods:

  losses(case, contexts): `{objective: mean nats per label}` of the first contexts, as it stands.
  train(case, contexts): the same, of training on that many contexts; done when it returns.
  flops(case): `{"flops"}` of one context, ours with `"least"`.
  peak_bytes(): the most memory that it took.
"""

import resource
import time

import numpy as np
import safetensors.numpy

from icae_jax.errors import UserError

CASES = {"ae": ("ae",), "ae+lm": ("ae", "lm"), "qa": ("qa",)}
SIDES = ("ours", "ours-1", "reference", "stronger")
ALPHA, DROPOUT = 32.0, 0.05  # of the reference
EOS = 2


def make(side, workdir, sizes):
    """A side on what `problem.prepare` wrote into `workdir`. sizes: the command's flags by name."""
    arrays = safetensors.numpy.load_file(workdir / "problem.safetensors")
    if side.startswith("ours"):
        return Ours(workdir / "base", arrays, sizes, 1 if side == "ours-1" else sizes["batch"])
    return Torch(side, workdir / "base", arrays, sizes)


def timed(train):
    """What `train()` returns, its wall seconds, and its CPU-seconds over all threads."""

    def cpu():
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    wall, used = time.perf_counter(), cpu()
    result = train()
    return result, time.perf_counter() - wall, cpu() - used


class Ours:
    """icae_jax's training step with all objectives of a case at once.

    Every step trains on the same `batch` contexts.
    """

    def __init__(self, folder, arrays, sizes, batch):
        from icae_jax.interop.hub import base as bases

        self.arrays, self.sizes, self.batch = arrays, sizes, batch
        self.base = bases.load_base(folder, sizes["dtype"], need_tokenizer=False)
        self.steps = {case: self._step(case) for case in sizes["cases"]}

    def _step(self, case):
        import jax

        from icae_jax.models import lora
        from icae_jax.performance import programs, steps

        config, s = train_config(case, self.sizes, self.batch), self.sizes
        qa = (s["prompt"] + s["answer"], s["answer"] + 1)
        spec = programs.Spec("train", config, self.base.config, self.batch, s["tokens"], qa=qa)
        trained = {
            "lora": lora.init_lora(jax.random.key(s["seed"]), self.base.config, config.lora),
            "memory_table": self.arrays["memory_table"],
        }
        batch = training_batch(config, self.arrays, self.batch)
        return steps.TrainingStep(spec, self.base.params, batch, trained)

    def losses(self, case, contexts):
        if contexts != self.batch:
            raise UserError(f"contexts is {contexts}; the step takes {self.batch}")
        return self.steps[case].run(1).losses

    def train(self, case, contexts):
        return self.steps[case].run(contexts // self.batch).losses

    def flops(self, case):
        step = self.steps[case]
        counted = step.xla_flops()
        return {"flops": counted and counted / self.batch, "least": step.least_flops / self.batch}

    def peak_bytes(self):
        memory = next(iter(self.steps.values())).memory()
        return memory["device_peak_bytes"] or memory["process_peak_bytes"]


def train_config(case, sizes, batch):
    """The `TrainConfig` of a case on our side."""
    from icae_jax.training import config_file
    from icae_jax.training.config import SCRATCH, TrainConfig

    s, qa = sizes, case == "qa"
    weights = {o: 1.0 / len(CASES[case]) if o in CASES[case] else 0.0 for o in ("ae", "lm", "qa")}
    compression = {
        "method": "icae",
        "k": s["memory"],
        "rate": s["tokens"] / s["memory"],
        "layout": "sequential",
        "trigger": "trained",
    }
    fields = {
        "phase": "finetune" if qa else "pretrain",
        "init_from": SCRATCH if qa else "",
        "base": "-",
        "seed": s["seed"],
        "batch_size": batch,
        "dtype": s["dtype"],
        "remat": "frozen",  # no matmul is computed twice
        "loss_chunk": max(128, 1024 // batch),
        "compression": compression,
        "lora": {"rank": s["lora_rank"], "scale": ALPHA / s["lora_rank"], "dropout": DROPOUT},
        "objectives": {**weights, "template": "none"},
        "data": {
            "train": "-",
            "context_lengths": (s["tokens"],),
            "questions_per_context": s["questions"],
            "max_target_tokens": s["prompt"] + s["answer"],
        },
    }
    return config_file.from_dict(TrainConfig, fields)


def training_batch(config, arrays, batch):
    """The first `batch` contexts as training has them (`icae_jax.data.collate`)."""
    from icae_jax.compression.segments import segment_contexts
    from icae_jax.data.collate import target_shapes
    from icae_jax.data.drawing import StaticInt
    from icae_jax.objectives import targets
    from icae_jax.objectives.packing import pack

    framing = targets.Framing((), targets.AE, EOS)
    template = targets.make_template("none", None, eos=EOS)

    def targets_of(objective, b):
        if objective == "ae":
            return [targets.ae_target(arrays["context"][b].tolist(), framing)]
        if objective == "lm":
            return [targets.lm_target(arrays["continuation"][b].tolist())]
        questions = zip(arrays["prompt"][b].tolist(), arrays["answer"][b].tolist(), strict=True)
        return [template.target(prompt, answer) for prompt, answer in questions]

    objectives = tuple(config.objectives.weights)
    qa = (config.data.max_target_tokens, arrays["answer"].shape[-1] + 1)
    length = arrays["context"].shape[1]
    shapes = target_shapes(config.data, config.compression, objectives, length, qa, False)
    ids, lengths = segment_contexts(arrays["context"][:batch].tolist(), config.compression)
    packed = {
        objective: pack([targets_of(objective, b) for b in range(batch)], *shape)
        for objective, shape in shapes.items()
    }
    k = StaticInt(config.compression.k)
    return {"context": ids, "lengths": lengths, "targets": packed, "k": k}


class Torch:
    """A recipe of `torch_icae`: one step for each pass, and one pass for each objective.

    `reference` takes one row per pass, `stronger` as many as we take contexts.
    """

    def __init__(self, recipe, folder, arrays, sizes):
        import torch
        import torch_icae
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(sizes["threads"])
        torch.manual_seed(sizes["seed"])
        self.torch, self.sizes, self.device = torch, sizes, sizes["device"]
        self.model = torch_icae.TorchICAE(
            folder,
            recipe,
            sizes["memory"],
            sizes["lora_rank"],
            ALPHA,
            DROPOUT,
            sizes["dtype"],
            self.device,
        )
        with torch.no_grad():
            self.model.table.weight.copy_(torch.from_numpy(arrays["memory_table"]))
        self.arrays = {**arrays, "eos": EOS}
        self.rows = 1 if recipe == "reference" else sizes["batch"]

    def _passes(self, objective, contexts):
        import torch_icae

        first = {name: x[:contexts] if np.ndim(x) else x for name, x in self.arrays.items()}
        return torch_icae.passes(first, objective, self.rows, self.device)

    def losses(self, case, contexts):
        def mean(objective):
            passes = self._passes(objective, contexts)
            total = sum(self.model.loss(*rows).item() * len(rows[0]) for rows in passes)
            return total / sum(len(rows[0]) for rows in passes)

        with self.torch.no_grad():
            return {objective: mean(objective) for objective in CASES[case]}

    def train(self, case, contexts):
        losses = {
            o: self.torch.stack([self.model.step(*rows) for rows in self._passes(o, contexts)])
            for o in CASES[case]
        }
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return {o: values.mean().item() for o, values in losses.items()}

    def flops(self, case):
        rows = [self._passes(objective, self.rows)[0] for objective in CASES[case]]
        passes = self.sizes["questions"] if case == "qa" else 1
        total = passes * sum(self.model.flops(*arguments) for arguments in rows)
        return {"flops": total / len(rows[0][0])}

    def peak_bytes(self):
        if self.device == "cuda":
            return self.torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
