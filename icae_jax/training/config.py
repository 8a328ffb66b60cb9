"""A run's configuration as frozen dataclasses, converted and checked once, at the edge."""

import dataclasses
import pathlib
import types
import typing

import jax.numpy as jnp

from icae_jax import errors, files
from icae_jax.compression.config import CompressionConfig
from icae_jax.data.config import DataConfig
from icae_jax.errors import UserError
from icae_jax.models.llama import REMAT_POLICIES
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives.targets import OBJECTIVES
from icae_jax.runtime import attention_choice
from icae_jax.runtime.sharding import MeshConfig
from icae_jax.training import metrics

SCRATCH = "scratch"  # init_from of fine-tuning without a pretrained compressor


@dataclasses.dataclass(frozen=True)
class ObjectivesConfig:
    """Weights of the mean loss of each objective (arXiv 2307.06945, eq. 3 and 5); 0 leaves an objective out. template: of QA.

    pad_labels: AE is trained on the padding of layout `reference` too, as the reference 500xCompressor does.
    """

    ae: float = 0.5
    lm: float = 0.5
    qa: float = 0.0
    template: str = "plain"
    pad_labels: bool = False

    @property
    def weights(self):
        return {o: getattr(self, o) for o in OBJECTIVES if getattr(self, o) > 0}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """name: "adamw", or "muon" (orthogonalised momentum for the kernels, AdamW at 0.3 of the rate for the rest: small bases learn in
    fewer steps). warmup_steps: linear, from 0. schedule: "constant" or "cosine" (to 0 at decay_steps; 0 means the run's last step).

    clip: largest global gradient norm. weight_decay: decoupled, on every trained tensor.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 300
    schedule: str = "constant"
    decay_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 2.0

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise UserError(
                f"optimizer.learning_rate is {self.learning_rate}; it must be positive, such as 1e-4"
            )
        if self.name not in ("adamw", "muon"):
            raise UserError(f"optimizer.name is {self.name!r}; choose adamw or muon")
        if self.schedule not in ("constant", "cosine"):
            raise UserError(f"optimizer.schedule is {self.schedule!r}; choose constant or cosine")
        if self.warmup_steps < 0 or self.decay_steps < 0 or not self.clip > 0:
            raise UserError("optimizer.warmup_steps and decay_steps must be >= 0, and clip > 0")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What every kind of training shares. accumulate: microbatches of one step. eval_examples: held-out examples at most.

    dtype: of activations and the frozen base ("float32" or "bfloat16"); trained parameters are float32. remat: see `models.llama`.
    attention: one of `models.attention`'s implementations, or "auto" (`runtime.attention_choice`).
    mesh: how the devices are arranged (`runtime.sharding`).
    eval_every, checkpoint_every: in steps; checkpoints are made at evaluations too.
    """

    seed: int = 0
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    dtype: str = "float32"
    remat: str = "none"
    attention: str = attention_choice.AUTO
    unroll: int = 1
    loss_chunk: int = 128
    log_every: int = 10
    eval_every: int = 200
    eval_examples: int = 64
    checkpoint_every: int = 200
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "unroll",
            "loss_chunk",
            "log_every",
            "eval_every",
            "checkpoint_every",
        ):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive")
        if (
            not 0 <= self.seed < 2**32
        ):  # of a larger one JAX's keys keep the last 32 bits: another seed's dropout and first parameters
            raise UserError(f"seed is {self.seed}; give a whole number from 0 on, below 2**32")
        if self.eval_examples < 0:
            raise UserError(f"eval_examples is {self.eval_examples}; it must be 0 or more")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype is {self.dtype!r}; choose float32 or bfloat16")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat is {self.remat!r}; choose from {', '.join(REMAT_POLICIES)}")
        if self.attention not in attention_choice.CHOICES:
            raise UserError(
                f"attention is {self.attention!r}; choose from {', '.join(attention_choice.CHOICES)}"
            )

    @property
    def jnp_dtype(self):
        return jnp.dtype(self.dtype)


@dataclasses.dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """One compressor's training. phase: "pretrain" (AE, LM) or "finetune" (QA, AE). base: folder, hub id or URL.

    init_from: an adapter folder or the workdir of an earlier phase; fine-tuning needs one, or "scratch". draw_k: the phases in which
    every step draws its number of memory tokens from `compression.k_choices`; the others train compression.k alone. remat_decoder: the
    decoder's policy, "" where it is that of the encoder, `remat`.
    """

    phase: str = "pretrain"
    base: str = ""
    init_from: str = ""
    draw_k: tuple[str, ...] = ("finetune",)
    remat_decoder: str = ""
    compression: CompressionConfig = CompressionConfig()
    lora: LoraConfig = LoraConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()
    data: DataConfig = DataConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.remat_decoder and self.remat_decoder not in REMAT_POLICIES:
            raise UserError(
                f"remat_decoder is {self.remat_decoder!r}; choose from {', '.join(REMAT_POLICIES)}, or '' for that of remat"
            )
        for name, phases in (("phase", (self.phase,)), ("draw_k", self.draw_k)):
            unknown = [p for p in phases if p not in ("pretrain", "finetune")]
            if unknown:
                raise UserError(f"{name} is {unknown[0]!r}; choose pretrain or finetune")
        if self.objectives.pad_labels and not self.compression.position_layout.fixed_length:
            raise UserError(
                f"objectives.pad_labels is for compression.layout reference; with {self.compression.layout} padding is masked"
            )
        weights = [getattr(self.objectives, o) for o in OBJECTIVES]
        if min(weights) < 0 or not sum(weights) > 0:
            raise UserError(
                f"objectives ae, lm, qa are {weights}; give weights >= 0, at least one of them positive"
            )
        absent = "qa" if self.phase == "pretrain" else "lm"
        if getattr(self.objectives, absent) > 0:
            weight = getattr(self.objectives, absent)
            raise UserError(
                f"objectives.{absent} is {weight} in phase {self.phase}, which has no such targets; set 0"
            )
        for name, value in (("base", self.base), ("data.train", self.data.train)):
            if not value:
                raise UserError(f"{name} is not set; give it with --config.{name}=PATH")
        if self.phase == "finetune" and not self.init_from:
            raise UserError(
                "init_from is not set; fine-tuning starts from a pretrained compressor: --config.init_from=WORKDIR "
                f"(or {SCRATCH}, to see what pretraining is worth)"
            )

    @property
    def trained_compression(self):
        """`compression` with the numbers of memory tokens that this phase trains: what its adapter can be asked for."""
        return (
            self.compression
            if self.phase in self.draw_k
            else dataclasses.replace(self.compression, k_choices=())
        )


@dataclasses.dataclass(frozen=True)
class TinyModelConfig:
    """Sizes of a base model that is trained from scratch; the vocabulary is the corpus's tokenizer's."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    embedding_std: float = 0.02


@dataclasses.dataclass(frozen=True)
class BaseConfig(LoopConfig):
    """Training of a small base model on the synthetic corpus. mixture: stages of document kinds (`base_task.parse_mixture`)."""

    model: TinyModelConfig = TinyModelConfig()
    mixture: tuple[str, ...] = ("0 questions=0.7 repeat=0.3",)


# --------------------------------------------------------------------------------------------------------- conversion


def from_dict(kind, raw, path="config"):
    """Builds the frozen dataclass `kind` from nested mappings. UserError names unknown fields and values of the wrong type."""
    if not isinstance(raw, dict):
        raise UserError(f"{path} is {raw!r}; expected a group of fields")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(raw) - set(fields))
    if unknown:
        raise UserError(
            f"{path}.{unknown[0]} is not a field; the fields of {path} are {', '.join(fields)}"
        )
    values = {}
    for name, value in raw.items():
        hint, where = hints[name], f"{path}.{name}"
        if dataclasses.is_dataclass(hint):
            values[name] = from_dict(hint, value, where)
        elif isinstance(hint, types.GenericAlias):
            item = typing.get_args(hint)[0]
            if not isinstance(value, list | tuple):
                raise UserError(f"{where} is {value!r}; expected a tuple of {item.__name__}")
            values[name] = tuple(_scalar(item, v, where) for v in value)
        else:
            values[name] = _scalar(hint, value, where)
    return kind(**values)


def _scalar(kind, value, where):
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where} is {value!r}; expected {kind.__name__}")
    return value


# ------------------------------------------------------------------------------------------------- resuming a workdir

# What may change when a workdir is continued; any other field changes the mathematics.
FREE_FIELDS = {
    "log_every",
    "eval_every",
    "eval_examples",
    "checkpoint_every",
    "remat",
    "remat_decoder",
    "attention",
    "unroll",
}
FREE_FIELDS |= {
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
}  # the devices may change: results agree within rounding
PATH_FIELDS = {
    "base",
    "init_from",
    "data.train",
    "data.eval",
    "data.cache_dir",
    "data.tfds_dir",
}  # `identity` has their content
FREE_FIELDS |= PATH_FIELDS | {"data.max_row_bytes", "data.strict"}
# What earlier workdirs do not record: there it is taken as it is found.
LATER_IDENTITY = {"identity.tokenizer", "identity.weights", "identity.template"}


def _flat(value, prefix=""):
    if isinstance(value, dict):
        return {
            k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()
        }
    return {prefix[:-1]: list(value) if isinstance(value, tuple) else value}


def _defaults(kind):
    """A configuration's defaults, nested as its fields are."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: _defaults(hints[field.name])
        if dataclasses.is_dataclass(hints[field.name])
        else field.default
        for field in dataclasses.fields(kind)
    }


def shared_fields(config: LoopConfig) -> dict[str, object]:
    """What several processes of one run must be configured alike in, `{dotted field: value}`: all but paths, which may differ by host."""
    return {
        field: value
        for field, value in _flat(dataclasses.asdict(config)).items()
        if field not in PATH_FIELDS
    }


def steps_done(workdir) -> int:
    """The steps after which a workdir's training ended, as its DONE tells: 0 where it did not, or something else stands there."""
    done = pathlib.Path(workdir) / "DONE"
    text = done.read_bytes().strip() if done.is_file() else b""
    return int(text) if text.isdigit() else 0


def read_run(path) -> dict[str, object]:
    """`{dotted field: value}` of a workdir's config.json: fields of the configuration, and the fingerprints of `identity`. UserError where
    it is something else.
    """
    flat = files.read_json(path, "the run's configuration")
    wrong = [field for field, value in flat.items() if isinstance(value, dict)]
    if wrong:
        raise UserError(
            f"{path}: {wrong[0]} is {flat[wrong[0]]!r}; expected fields by their dotted names, such as compression.k"
        )
    for field, value in flat.items():
        if field.startswith("identity.") and isinstance(value, int | float | bool):
            raise UserError(
                f"{path}: {field} is {value!r}; expected a fingerprint, which is a text"
            )
    return flat


def nested(flat: dict[str, object], source: object) -> dict:
    """Fields by their dotted names as nested groups. UserError where a name is that of a field and of a group. source: to name it."""
    made: dict = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        node = made
        for group in groups:
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                raise UserError(
                    f"{source}: {name} and {group} are both there; {group} is a group of fields"
                )
        if isinstance(node.get(last), dict):
            raise UserError(
                f"{source}: {last} is {value!r}, and there are fields {name}.…; {last} is a group of fields"
            )
        node[last] = value
    return made


def _check_types(flat, like, path):
    """UserError where a field of a workdir's file has another type than the same field of a configuration."""
    for field, value in flat.items():
        kind = type(
            None if field.startswith("identity.") else like.get(field)
        )  # a fingerprint may have had another form
        fits = isinstance(value, bool) if kind is bool else files.is_kind(value, kind)
        if kind in (bool, int, float, str, list) and not fits:
            raise UserError(
                f"{path}: {field} is {value!r}; expected {kind.__name__}, such as {like[field]!r}. Mend that line of the file"
            )


def nothing_trained(workdir) -> bool:
    """Whether a workdir holds no step of a training: no checkpoint, damaged ones included, no line of metrics after step 0, no DONE."""
    workdir = pathlib.Path(workdir)
    lines = metrics.read_lines(workdir / "metrics.jsonl")
    there = [*workdir.glob("checkpoints/*step_*"), *workdir.glob("DONE")]
    return not there and not any(line["step"] > 0 for line in lines)


def recorded(workdir) -> dict[str, object]:
    """What a workdir's config.json holds (`read_run`); nothing where no run has begun there."""
    path = pathlib.Path(workdir) / "config.json"
    return read_run(path) if path.exists() else {}


def check_workdir(workdir, config, identity, writes=lambda: True, binding=True):
    """Compares with the configuration that the workdir was started with, and records the new one.

    A field that came later than the workdir had its default then: new fields are made so that this is what was done before them.
    identity: `{name: fingerprint}` of what paths in the configuration stand for; those are compared instead of the paths. A tuple holds
    the fingerprint and what earlier versions had in its place, which counts as the same and is replaced by it. None, before that is
    known, compares the configuration alone. writes: asked once everything was read and found good, whether this process records it.
    binding: False where nothing has been trained there yet (`nothing_trained`), as after a start without enough memory: another
    configuration may then take the workdir.
    Returns the changes to log, as text lines. UserError lists fields that change the mathematics; nothing is written then.
    """
    path = pathlib.Path(workdir) / "config.json"
    known = {
        f"identity.{k}": v if isinstance(v, tuple) else (v,) for k, v in (identity or {}).items()
    }
    now = _flat(dataclasses.asdict(config)) | {
        k: fingerprints[0] for k, fingerprints in known.items()
    }
    if not path.exists():
        lost = binding and not nothing_trained(workdir)
        if writes():
            errors.retrying(lambda: files.write_json(path, now), f"writing {path}")
        return (
            [
                f"{path} was missing, and is now this run's: it is not known what was trained there before, nor on which base"
            ]
            if lost
            else []
        )
    recorded = read_run(path)
    _check_types(recorded, now, path)
    before = _flat(_defaults(type(config))) | recorded
    if identity is None:
        before = {
            field: value for field, value in before.items() if not field.startswith("identity.")
        }
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    unsaid = LATER_IDENTITY - before.keys()
    refused = [
        k
        for k in changed
        if k not in FREE_FIELDS | unsaid and before.get(k) not in known.get(k, ())
    ]
    if (
        "steps" in refused
        and now["steps"] > before["steps"]
        and (now["optimizer.schedule"] == "constant" or now["optimizer.decay_steps"])
    ):
        refused.remove("steps")
    notes = []
    if refused and not binding:
        notes = [f"the run itself, as nothing has been trained in {workdir} yet"]
    elif refused:
        lines = "; ".join(f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in refused)
        raise UserError(
            f"{workdir} was started with another configuration, and these fields change its mathematics: {lines}. "
            "Give the old values to continue it, or another --workdir"
        )
    if writes():
        errors.retrying(lambda: files.write_json(path, now), f"writing {path}")
    return notes + [f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in changed]
