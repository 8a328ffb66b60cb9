"""The files in configs/: every argument gives a valid configuration with the papers' sizes.

Named bases also take a training step, in shapes alone.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icae_jax.compression import trained as trained_tree
from icae_jax.compression.segments import position_budget, segment_contexts
from icae_jax.compression.trained import SPECIAL_ROWS
from icae_jax.data.drawing import StaticInt
from icae_jax.errors import UserError
from icae_jax.models import llama
from icae_jax.models.families import sizes
from icae_jax.objectives import targets
from icae_jax.objectives.packing import pack
from icae_jax.runtime import sharding
from icae_jax.training import config_file
from icae_jax.training.compressor_task import CompressorLosses
from icae_jax.training.config import BaseConfig, TinyModelConfig, TrainConfig

PHASES = ("pretrain", "finetune")
BASES = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "llama2_70b": "meta-llama/Llama-2-70b-hf",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B",
    "mistral_7b": "mistralai/Mistral-7B-Instruct-v0.2",
    "qwen3_8b": "Qwen/Qwen3-8B",
}
PHASES_BASES = [f"{phase}-{base}" for phase in PHASES for base in BASES]
PHASES_KS = [f"{phase}-{k}" for phase in PHASES for k in (16, 4, 1)]
RECIPES = ("-icae", "-x500")
ARGS = {
    "icae": [*PHASES, *BASES, *PHASES_BASES, "llama2_7b-finetune"],
    "x500": [*PHASES, "4", *PHASES_KS, *BASES, *PHASES_BASES, "1-qwen3_8b-finetune"],
    "best": [*PHASES, *BASES, *PHASES_BASES],
    "quickstart": [*PHASES, *map("".join, itertools.product(PHASES, RECIPES, ("", "-4x")))],
}


UNSET = {"base": "base", "init_from": "before", "data.train": "train.jsonl"}


def filled(name, arg):
    """A shipped configuration, with what is left to the user."""
    return config_file.load(TrainConfig, f"{name}:{arg}", {}, UNSET)


@pytest.mark.parametrize(
    ("name", "arg"), [(name, arg) for name, args in ARGS.items() for arg in args]
)
def test_every_argument_gives_a_configuration(name, arg):
    """Breaks when a file misspells a field, or both phases get the same objectives."""
    config = filled(name, arg)
    phase = "finetune" if "finetune" in arg else "pretrain"
    assert config.phase == phase and ("qa" in config.objectives.weights) == (phase == "finetune")
    assert config.mesh == sharding.MeshConfig(1, -1, 1) and config.remat_decoder == ""


# What follows from defaults and files together: as it was while the files set every field.
RESOLVED = {
    "icae:pretrain": {
        "seed": 0,
        "steps": 200_000,
        "batch_size": 32,
        "accumulate": 1,
        "dtype": "bfloat16",
        "remat": "frozen",
        "attention": "auto",
        "unroll": 1,
        "loss_chunk": 128,
        "log_every": 10,
        "eval_every": 1000,
        "eval_examples": 256,
        "checkpoint_every": 1000,
        "draw_k": ("finetune",),
        "compression.method": "icae",
        "compression.rate": 4.0,
        "compression.k_choices": (),
        "compression.layout": "servable",
        "compression.memory_init": "embedding",
        "compression.trigger": "trained",
        "lora.scale": 2.0,
        "lora.dropout": 0.05,
        "objectives.ae": 0.5,
        "objectives.lm": 0.5,
        "objectives.pad_labels": False,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 1e-4,
        "optimizer.warmup_steps": 300,
        "optimizer.b1": 0.9,
        "optimizer.b2": 0.95,
        "optimizer.weight_decay": 0.1,
        "optimizer.clip": 2.0,
        "data.context_weights": (0.5, 0.25, 0.25),
        "data.questions_per_context": 4,
        "data.max_target_tokens": 256,
        "data.max_row_bytes": 64 << 20,
        "data.strict": False,
    },
    "x500:finetune-4": {
        "steps": 78_000,
        "batch_size": 32,
        "compression.rate": 125.0,
        "optimizer.b1": 0.9,
        "optimizer.b2": 0.999,
        "optimizer.weight_decay": 0.01,
        "objectives.ae": 0.0,
        "objectives.qa": 1.0,
        "data.max_target_tokens": 256,
    },
    "best:finetune": {
        "draw_k": ("pretrain", "finetune"),
        "sum_k": True,
        "compression.method": "pooled",
        "compression.encoder_mask": "all",
        "compression.layout": "servable",
        "compression.trigger": "trained",
        "compression.k": 128,
        "compression.rate": 4.0,
        "compression.k_choices": (8, 32, 128),
        "compression.decoder_lora": False,
        "lora.rank": 32,
        "objectives.ae": 0.0,
        "objectives.qa": 1.0,
        "optimizer.learning_rate": 5e-5,
        "data.context_lengths": (512,),
    },
    "quickstart:finetune-icae": {
        "steps": 180,
        "batch_size": 32,
        "dtype": "float32",
        "remat": "none",
        "log_every": 10,
        "eval_every": 100,
        "eval_examples": 64,
        "compression.k_choices": (2, 11),
        "compression.layout": "servable",
        "compression.trigger_token": "<repeat>",
        "objectives.ae": 0.6,
        "objectives.qa": 0.4,
        "optimizer.schedule": "cosine",
        "optimizer.learning_rate": 1.5e-3,
    },
    "quickstart:pretrain-x500-4x": {
        "steps": 120,
        "batch_size": 16,
        "compression.k_choices": (),
        "compression.layout": "clean",
        "compression.trigger": "trained",
        "optimizer.name": "muon",
        "optimizer.learning_rate": 0.01,
        "optimizer.warmup_steps": 5,
        "eval_examples": 0,
    },
}


@pytest.mark.parametrize("name", RESOLVED)
def test_what_the_files_leave_to_the_defaults(name):
    """Breaks when a default changes under a configuration, or a file loses a field."""
    flat = config_file.flatten(dataclasses.asdict(filled(*name.split(":"))))
    assert {field: flat[field] for field in RESOLVED[name]} == RESOLVED[name]


@pytest.mark.parametrize("name", ["icae", "x500"])
def test_another_method_brings_its_own_layout(name):
    """Breaks when a file sets what the method has by default, so that another method is refused."""
    for method in ("icae", "x500"):
        own = config_file.load(TrainConfig, method, {}, UNSET).compression
        asked = {"compression.method": method}
        changed = config_file.load(TrainConfig, name, asked, UNSET).compression
        assert (changed.layout, changed.trigger) == (own.layout, own.trigger)


def test_papers_sizes():
    """Breaks when a configuration strays from the published sizes.

    arXiv 2307.06945, section 3; arXiv 2408.03094, section 4.
    """
    icae = filled("icae", "pretrain")
    assert (
        icae.compression.k,
        icae.compression.segment_tokens,
        icae.lora.rank,
        icae.lora.targets,
    ) == (128, 512, 128, ("q_proj", "v_proj"))
    assert (icae.batch_size, icae.remat, icae.data.context_lengths) == (
        32,
        "frozen",
        (512, 1024, 2048),
    )
    for k in (16, 4, 1):
        for phase, rate in (("pretrain", 1e-4), ("finetune", 5e-5)):
            x500 = filled("x500", f"{phase}-{k}")
            c = x500.compression
            assert (c.method, c.k, c.segment_tokens, c.layout, c.trigger, c.memory_init) == (
                "x500",
                k,
                500,
                "clean",
                "bos",
                "normal",
            )
            assert (x500.lora.rank, x500.lora.scale, x500.lora.dropout, x500.lora.targets) == (
                64,
                0.5,
                0.05,
                ("q_proj", "v_proj"),
            )
            assert (
                x500.optimizer.learning_rate,
                x500.optimizer.warmup_steps,
                x500.optimizer.schedule,
            ) == (rate, 300, "constant")
            assert x500.objectives.template == "plain" and x500.data.context_lengths == (500,)
    assert filled("x500", "pretrain") == filled("x500", "pretrain-16") == filled("x500", "16")


@pytest.mark.parametrize(("base", "phase"), itertools.product(BASES, PHASES))
def test_papers_recipes_on_named_bases(base, phase):
    """Breaks when a named base is another model, or is not trained as the papers train."""
    icae, x500 = filled("icae", f"{phase}-{base}"), filled("x500", f"{phase}-{base}")
    assert icae.base == BASES[base] and x500.base == BASES[base].replace(
        "Llama-3-8B", "Llama-3-8B-Instruct"
    )
    assert icae.remat == x500.remat == "full" and icae.dtype == x500.dtype == "bfloat16"
    o = icae.optimizer
    assert (icae.batch_size, o.name, o.warmup_steps, o.clip) == (256, "adamw", 300, 2.0)
    assert (icae.steps, o.learning_rate) == (
        (200_000, 1e-4) if phase == "pretrain" else (30_000, 5e-5)
    )
    assert (icae.compression.k, icae.compression.segment_tokens) == (128, 512)
    if phase == "pretrain":
        assert icae.objectives.weights == {"ae": 0.5, "lm": 0.5} and x500.objectives.weights == {
            "ae": 1.0
        }
    if base == "mistral_7b":  # the second version: ten segments at most
        assert (
            icae.lora.rank == 512
            and icae.data.context_lengths == (512, 1024, 2048, 5120)
            and icae.objectives.template == "mistral"
        )
    else:
        assert (
            icae.lora.rank == 128
            and icae.data.context_lengths == (512,)
            and icae.objectives.template == "plain"
        )
    named = {"base": x500.base, "remat": "full"}
    assert x500 == config_file.load(TrainConfig, f"x500:{phase}", named, UNSET)


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        ("icae", "tune"),
        ("icae", "pretrain-finetune"),
        ("icae", "pretrain-llama2_7b-qwen3_8b"),
        ("icae", "pretrain-16"),
        ("best", "finetune-pretrain"),
        ("best", "pretrain-16"),
        ("x500", "pretrain-2"),
        ("x500", "pretrain-16-4"),
        ("x500", "pretrain-4-4"),
        ("x500", "llama9"),
        ("quickstart", "other"),
        ("quickstart", "pretrain-icae-22x"),
        ("quickstart", "pretrain-icae-4x-4x"),
    ],
)
def test_an_unknown_argument_is_named(name, arg):
    """Breaks when a word is ignored, or one of two that exclude each other."""
    with pytest.raises(UserError, match=rf"{name}:{arg}: ('\S+' is not known|choose :pretrain)"):
        filled(name, arg)


def test_the_base_of_the_quickstart():
    """Breaks when the shipped base would be trained otherwise than it was."""
    config = config_file.load(BaseConfig, "tiny_base")
    assert (config.steps, config.batch_size, config.log_every, len(config.mixture)) == (
        2500,
        32,
        50,
        3,
    )
    assert config.model == TinyModelConfig(160, 320, 4, 5, 5, 512, 1e6, 0.15)
    o = config.optimizer
    assert (o.name, o.learning_rate, o.warmup_steps, o.schedule) == ("muon", 0.01, 100, "cosine")
    assert (o.b1, o.b2, o.weight_decay, o.clip) == (0.9, 0.98, 0.05, 1.0)


# ----------------------------------------------------------------- named bases, without weights

TEMPLATE = targets.Template(
    "plain", (1, 3), (4,), (5,), 2
)  # with a head before the memory, as the longest templates have


def longest_batch(config):
    """Two examples of the longest contexts, with all the targets that the phase has."""
    start = (1,) if config.compression.bos_before_text else ()
    trigger = 1 if config.compression.trigger == "bos" else targets.AE
    framing, rows = targets.Framing(start, trigger, 2), {}
    length = max(config.data.context_lengths)
    contexts = [
        [*framing.start, *range(10, 10 + length - len(framing.start) - short)] for short in (0, 7)
    ]
    ids, lengths = segment_contexts(contexts, config.compression)
    if "ae" in config.objectives.weights:
        rows["ae"] = [[targets.ae_target(context, framing)] for context in contexts]
    if "lm" in config.objectives.weights:
        rows["lm"] = [[targets.lm_target(context)] for context in contexts]
    if "qa" in config.objectives.weights:
        answer = [6] * (config.data.max_target_tokens - 5)
        rows["qa"] = [
            [TEMPLATE.target([7, 8, 9], answer)] * config.data.questions_per_context
            for _ in contexts
        ]
    T = max(len(t.ids) for row in rows.values() for ts in row for t in ts) - 1
    packed = {o: pack(row, len(row[0]), T, T) for o, row in rows.items()}
    return {
        "context": ids,
        "lengths": lengths,
        "targets": packed,
        "k": StaticInt(config.compression.k),
    }


BACKWARD = (
    "mistral_7b",
    "qwen3_8b",
)  # of a forward pass that fits, JAX makes the backward one: seen once for each method
NAMES_PHASES = itertools.product(("icae", "x500", "best"), PHASES)


@pytest.mark.parametrize(
    ("name", "phase", "base"),
    [(*pair, base) for pair, base in zip(NAMES_PHASES, itertools.cycle(BASES), strict=False)],
)  # a step's shapes depend on method and phase, not on the base: each base, each pair once
def test_a_training_step_on_a_named_base_fits(name, phase, base):
    """Breaks when a shape of the step does not hold on an architecture."""
    config = filled(name, f"{phase}-{base}")
    c, model_config = config.compression, sizes.find(config.base)
    batch = longest_batch(config)
    decided = dataclasses.replace(config, attention="xla")
    losses = CompressorLosses(decided, model_config, c, TEMPLATE.head)

    def init(params):
        return trained_tree.init(jax.random.key(1), params["embed"], model_config, config.lora, c)

    def weighted(trained, frozen, batch, key):
        sums, counts = losses.losses(trained, frozen, batch, key), losses.counts(batch)
        return sum(losses.weights[o] * s / counts[o] for o, (s, _) in sums.items())

    frozen = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), llama.param_shapes(model_config)
    )
    trained = jax.eval_shape(init, frozen)
    loss = jax.eval_shape(weighted, trained, frozen, batch, jax.random.key(2))
    assert loss.shape == () and loss.dtype == jnp.float32
    if base in BACKWARD:
        gradient = jax.eval_shape(jax.grad(weighted), trained, frozen, batch, jax.random.key(2))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), gradient) == jax.tree.map(
            lambda x: (x.shape, x.dtype), trained
        )
    assert trained["memory_table"].shape == (c.vectors + SPECIAL_ROWS, model_config.hidden_size)
    assert set(batch["targets"]) == (
        {"qa"} if phase == "finetune" else {"ae"} if name == "x500" else {"ae", "lm"}
    )


@pytest.mark.parametrize(
    ("name", "base", "phase"), itertools.product(("icae", "x500", "best"), BASES, PHASES)
)
def test_a_named_base_has_positions_enough(name, base, phase):
    """Breaks when a position of the longest example lies past the base's last."""
    config = filled(name, f"{phase}-{base}")
    c, model_config, batch = config.compression, sizes.find(config.base), longest_batch(config)
    segments, size = batch["context"].shape[1:]
    longest = max(config.data.context_lengths)
    budget = position_budget(
        c, longest, segments=segments, segment_tokens=size, head=len(TEMPLATE.head)
    )
    behind = max(t["ids"].shape[2] for t in batch["targets"].values())
    assert budget.needed(behind) <= model_config.max_position_embeddings
    assert np.sum(batch["lengths"]) == 2 * longest - 7
