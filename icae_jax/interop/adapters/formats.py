"""Files of trained tensors as the reference implementations write them.

| format  | file                | tensors                                                          |
|---------|---------------------|------------------------------------------------------------------|
| icae-v2 | safetensors         | `icae.….lora_{A,B}.default.weight`, `memory_token_embed.weight`  |
|         |                     | `[k + 3, D]`; a full training save also has the base             |
|         |                     | (`….base_layer.weight`) and a copy of it as `decoder.*`          |
| icae-v1 | pickle (`.pt`)      | the same, with a scalar 0.0 in place of every tensor of the base |
| x500    | pickle, safetensors | `llama.….lora_{A,B}.default.weight`, `memory_embeddings`         |
|         |                     | `[1, k, D]`; the ICAE of the same repository adds `ae_embedding` |
|         |                     | `[1, 1, D]` in pretraining, and saves x500's names after         |
|         |                     | fine-tuning on questions                                         |
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float

from icae_jax import errors, files
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.method import PEFT
from icae_jax.compression.trained import SPECIAL_ROWS
from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import lora_tensors
from icae_jax.interop.hub import base as bases
from icae_jax.models.families import tensor_names
from icae_jax.models.llama import ModelConfig
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives.targets import Template

ALPHA = 32.0  # of all released files, none of which says so
DROPOUT = 0.05
LORA_TARGETS = ("q_proj", "v_proj")
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
MEMORY_EMBEDDINGS, AE_EMBEDDING = "memory_embeddings", "ae_embedding"
# A buffer that transformers used to save.
INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"
READING = "reading.json"  # beside a file written here: what its tensors do not tell


@dataclasses.dataclass(frozen=True)
class Conventions:
    """How an implementation reads the tensors of one method.

    template: after fine-tuning; pretraining asks no questions. trigger: of autoencoding.
    """

    layout: str
    template: str
    trigger: str = "trained"


@dataclasses.dataclass(frozen=True)
class Format:
    """One row of the table above.

    Attributes:
        file_name: what the implementation calls the file.
        prefix: what stands before PEFT's names of the LoRA's tensors.
        segment_tokens: the default number of text tokens per segment, from k.
        methods: which methods it can hold, and how each is read.
        special_rows: whether the table of the memory tokens ends in [AE], [LM], [FT]. Otherwise
            the only special row is [AE], a tensor of its own where the method trains it.
        zeros: whether it has a scalar 0.0 in place of every tensor of the base.
    """

    file_name: str
    prefix: str
    segment_tokens: Callable[[int], int]
    methods: dict[str, Conventions]
    special_rows: bool = True
    zeros: bool = False

    @property
    def is_pickle(self) -> bool:
        """Whether the file is written with PyTorch."""
        return self.file_name.endswith(".pt")


ICAE, X500 = "icae", "x500"  # the methods that the reference implementations are of
FORMATS = {
    "icae-v1": Format(
        "icae.pt",
        "icae.base_model.model.",
        lambda k: 512,
        {ICAE: Conventions("sequential", "v1")},
        zeros=True,
    ),
    "icae-v2": Format(
        "icae.safetensors",
        "icae.base_model.model.",
        lambda k: 4 * k,
        {ICAE: Conventions("sequential", "mistral")},
    ),
    "x500": Format(
        "lora_params.pt",
        "llama.base_model.model.",
        lambda k: 500,
        {X500: Conventions("reference", "plain", "bos"), ICAE: Conventions("padded", "plain")},
        special_rows=False,
    ),
}


def need_torch_for(form: str) -> ModuleType | None:
    """The torch module for a format that is a pickle, else None; UserError if not installed."""
    if not FORMATS[form].is_pickle:
        return None
    return errors.need_torch(f"format {form}, a pickle,")


# --- Recognising ---


def _ending(tensors: Mapping, suffix: str) -> str | None:
    """The first name that ends in a whole part `suffix`."""
    return next((name for name in tensors if name == suffix or name.endswith("." + suffix)), None)


def recognise(tensors: Mapping[str, Any]) -> str | None:
    """The format of a file's tensors, a key of `FORMATS`; None if they are of none."""
    if not any(lora_tensors.is_lora(name) for name in tensors):
        return None
    if _ending(tensors, adapters.MEMORY_TABLE):
        return "icae-v1" if any(t.shape == () for t in tensors.values()) else "icae-v2"
    return "x500" if _ending(tensors, MEMORY_EMBEDDINGS) else None


def is_table(name: str) -> bool:
    """Whether a tensor of that name holds trained embeddings."""
    tables = (adapters.MEMORY_TABLE, MEMORY_EMBEDDINGS, AE_EMBEDDING)
    return any(name == table or name.endswith("." + table) for table in tables)


def rows(table: Any) -> int:
    """The number of rows of an embedding table; 0 if it has too few axes to be one."""
    return (0, 0, *table.shape)[-2]


def memory_tokens(form: str, table: Any) -> int:
    """The number of memory tokens in a format's embedding table."""
    return max(0, rows(table) - (SPECIAL_ROWS if FORMATS[form].special_rows else 0))


def methods_of(form: str, tensors: Mapping[str, Any], phase: str | None = None) -> tuple[str, ...]:
    """The methods that a file of that format may be of. phase: "pretrain", "finetune" or unknown.

    Only ICAE trains [AE]; fine-tuned, both methods of the x500 repository save the same names.
    """
    methods = tuple(FORMATS[form].methods)
    if len(methods) == 1:
        return methods
    trains_trigger = {name: c.trigger == "trained" for name, c in FORMATS[form].methods.items()}
    if _ending(tensors, AE_EMBEDDING):
        return tuple(method for method in methods if trains_trigger[method])
    if phase == "pretrain":
        return tuple(method for method in methods if not trains_trigger[method])
    return methods


# --- Reading ---


def read_trained(
    form: str, tensors: Mapping[str, Any], base: bases.Base, source: str | os.PathLike
) -> dict:
    """The trained tree of a recognised file: `{"lora": tree, "memory_table": [k + 3, D]}`, float32.

    Raises UserError listing every tensor that is missing, unexpected or of another shape than the
    base's, or if the file carries a copy of another base.
    """
    problems: list[str] = []
    D = base.config.hidden_size
    lora = lora_tensors.lora_from_hub(tensors, base.config, problems)
    others = {name: t for name, t in tensors.items() if not lora_tensors.is_lora(name)}
    trigger_name = None
    if FORMATS[form].special_rows:
        table_name = _ending(tensors, adapters.MEMORY_TABLE)
        shapes = {table_name: (max(rows(tensors[table_name]), SPECIAL_ROWS + 1), D)}
    else:
        table_name = _ending(tensors, MEMORY_EMBEDDINGS)
        trigger_name = _ending(tensors, AE_EMBEDDING)
        shapes = {table_name: (1, rows(tensors[table_name]), D)}
        if trigger_name:
            shapes[trigger_name] = (1, 1, D)
    for name, want in shapes.items():
        if others.pop(name).shape != want:
            problems.append(
                f"mis-shaped {name}: {tensors[name].shape}, with this base it is {want}"
            )
    copies = _base_copies(others, base.config, problems)
    floats = {}
    if not problems:
        floats = {name: lora_tensors.read_floats(tensors[name], name, problems) for name in shapes}
    if problems:
        raise UserError(
            lora_tensors.misfits(f"{source}: the tensors do not fit base {base.path}", problems)
        )
    for copy in copies:
        theirs = bases.fingerprint(base.config, copy)
        if theirs != base.fingerprint:
            have = f"{base.path} has {base.fingerprint[:12]}"
            raise UserError(
                f"{source} carries a base with fingerprint {theirs[:12]}, but {have}; give the "
                "right base"
            )
    table = floats[table_name]
    if not FORMATS[form].special_rows:
        table = np.concatenate([table[0], np.zeros((SPECIAL_ROWS, D), np.float32)])
        if trigger_name:
            table[-SPECIAL_ROWS] = floats[trigger_name][0, 0]
    return {"lora": lora, "memory_table": jnp.asarray(table)}


def _base_copies(others: Mapping, config: ModelConfig, problems: list[str]) -> list[dict]:
    """What `bases.fingerprint` needs of each copy of the base that a training save holds.

    Appends a line to `problems` for each tensor that is no part of such a copy. An embedding table
    may have more rows than the base's: the reference adds special tokens to the encoder's.
    """
    # Some saves have the head although it is tied to the embeddings.
    head = {HEAD: (config.vocab_size, config.hidden_size)}
    shapes = tensor_names.hub_shapes(config) | head
    inv_freq = {INV_FREQ.format(i) for i in range(config.num_layers)}
    copies: dict[str, dict] = {}
    for name, tensor in others.items():
        plain = name[name.find("model.layers.") :] if "model.layers." in name else name
        plain = plain.replace(".base_layer.", ".")
        short = next((end for end in (EMBED, NORM, HEAD) if name.endswith(end)), plain)
        if short in inv_freq and len(tensor.shape) < 2:
            continue
        want = shapes.get(short)
        if want is None:
            problems.append(f"unexpected {name} {tensor.shape}")
        elif tensor.shape == ():
            if float(np.asarray(tensor)) != 0:
                problems.append(
                    f"unexpected {name}: the scalar {float(np.asarray(tensor))}, where a zero "
                    "stands for a tensor of the base"
                )
        elif (
            tensor.shape[1:] != want[1:]
            or tensor.shape[0] < want[0]
            or (tensor.shape[0] > want[0] and "layers" in short)
        ):
            problems.append(f"mis-shaped {name}: {tensor.shape}, with this base it is {want}")
        elif short in (EMBED, NORM):
            copies.setdefault(name.removesuffix(short), {})[short] = tensor
    if problems:
        return []
    complete = [
        {name: np.asarray(t, np.float32) for name, t in copy.items()}
        for copy in copies.values()
        if len(copy) == 2
    ]
    return [
        {"embed": copy[EMBED][: config.vocab_size], "norm": {"scale": copy[NORM]}}
        for copy in complete
    ]


def defaults(form: str, method: str, phase: str, k: int) -> dict[str, Any]:
    """What tensors do not tell, as the implementation has it.

    Returns `{alpha, context_length, layout, template}`. phase: "pretrain" or "finetune".
    """
    conventions = FORMATS[form].methods[method]
    return {
        "alpha": ALPHA,
        "context_length": FORMATS[form].segment_tokens(k),
        "layout": conventions.layout,
        "template": "none" if phase == "pretrain" else conventions.template,
    }


def make_adapter(
    trained: dict,
    base: bases.Base,
    template: Template,
    *,
    method: str,
    alpha: float | int,
    context_length: int,
    layout: str,
) -> adapters.Adapter:
    """The `Adapter` of a tree from `read_trained`. context_length: text tokens per segment."""
    targets, rank = lora_tensors.targets_and_rank(trained["lora"])
    k = trained["memory_table"].shape[0] - SPECIAL_ROWS
    compression = CompressionConfig(method, k, context_length / k, layout=layout)
    lora = LoraConfig(rank, alpha / rank, DROPOUT, targets)
    identity = {"base_fingerprint": base.fingerprint, "base_identity": base.identity}
    return adapters.Adapter(compression, lora, template, trained, base.path, **identity)


# --- Writing ---


def _check_place(form: str, adapter: adapters.Adapter) -> None:
    """UserError if a format has no place for a part of the adapter."""
    if adapter.has_decoder_lora:
        what = "a decoder LoRA"
    elif adapter.compression.encoder_layers:
        what = "an encoder of fewer layers than the base (compression.encoder_layers)"
    else:
        return
    raise UserError(
        f"--format {form} cannot carry {what}, which the adapter was trained with; use --format "
        "native"
    )


def misreadings(form: str, adapter: adapters.Adapter) -> list[str]:
    """Why a format's implementation would read this adapter otherwise than trained, as lines.

    UserError if the format cannot hold the adapter at all.
    """
    compression = adapter.compression
    conventions = FORMATS[form].methods.get(compression.method)
    if conventions is None:
        able = [name for name, f in FORMATS.items() if compression.method in f.methods]
        peft = ["peft"] if PEFT in compression.spec.exports else []
        choices = ", ".join(["native", *peft, *able])
        raise UserError(
            f"--format {form} cannot hold an adapter of method {compression.method}; choose from "
            f"{choices}"
        )
    _check_place(form, adapter)
    lines = []
    if compression.layout != conventions.layout:
        lines.append(
            f"it reads layout {conventions.layout}, the adapter was trained with "
            f"{compression.layout}"
        )
    if compression.trigger != conventions.trigger:
        lines.append(f"the adapter's trigger is {compression.trigger}")
    if compression.encoder_mask != "causal":
        lines.append(
            f"its encoder is causal, the adapter was trained with mask {compression.encoder_mask}"
        )
    if set(adapter.lora.targets) != set(LORA_TARGETS):
        lines.append(
            f"it has LoRA on {' and '.join(LORA_TARGETS)}, the adapter on "
            f"{', '.join(adapter.lora.targets)}"
        )
    return lines


def tensors_of(
    form: str, adapter: adapters.Adapter, model_config: ModelConfig
) -> dict[str, Float[np.ndarray, "..."]]:
    """The adapter's tensors as a format names and shapes them, float32."""
    format_ = FORMATS[form]
    table = np.asarray(adapter.trained["memory_table"], np.float32)
    lora = lora_tensors.lora_to_hub(adapter.trained["lora"], format_.prefix, ".default")
    if not format_.special_rows:
        tensors = {MEMORY_EMBEDDINGS: table[None, :-SPECIAL_ROWS]}
        if format_.methods[adapter.compression.method].trigger == "trained":
            tensors[AE_EMBEDDING] = table[None, -SPECIAL_ROWS, None]
        return tensors | lora
    zeros = {}
    if format_.zeros:
        inv_freq = [INV_FREQ.format(i) for i in range(model_config.num_layers)]
        names = [*tensor_names.tensor_names(model_config), *inv_freq]
        zeros = {format_.prefix + name: np.zeros((), np.float32) for name in names}
    return zeros | lora | {adapters.MEMORY_TABLE: table}


def write(
    form: str,
    folder: str | os.PathLike,
    adapter: adapters.Adapter,
    model_config: ModelConfig,
    dtype: str = "float32",
) -> pathlib.Path:
    """Writes a folder with the one file of a format; returns the file's path.

    dtype: of the tensors. UserError if the format is a pickle and PyTorch is not installed.
    """
    _check_place(form, adapter)
    tensors = tensors_of(form, adapter, model_config)
    name = FORMATS[form].file_name
    torch = need_torch_for(form)
    with files.replacing_folder(folder) as tmp:
        if torch:
            # Copies, since torch wants writable arrays.
            values = {
                name: torch.from_numpy(value.copy()).to(getattr(torch, dtype))
                for name, value in tensors.items()
            }
            torch.save(values, tmp / name)
        else:
            values = {
                name: np.ascontiguousarray(value.astype(jnp.dtype(dtype)))
                for name, value in tensors.items()
            }
            safetensors.numpy.save_file(values, tmp / name, {"format": "pt"})
        files.write_json(tmp / READING, reading_json(adapter))
    return pathlib.Path(folder) / name


def reading_json(adapter: adapters.Adapter) -> dict[str, Any]:
    """The content of reading.json: what a file of tensors does not say of itself."""
    return {
        "alpha": adapter.lora.scale * adapter.lora.rank,
        "context_length": adapter.compression.segment_tokens,
        "layout": adapter.compression.layout,
        "method": adapter.compression.method,
        "template": adapter.template.name,
        "base": adapter.base_path,
        "base_fingerprint": adapter.base_fingerprint,
        "base_identity": adapter.base_identity,
        **({"base_quantize": adapter.base_quantize} if adapter.base_quantize else {}),
        "template_ids": adapter.template.as_json(),
        "forced": adapter.was_forced,
    }


READING_FIELDS = dict.fromkeys(("layout", "method", "template", "base", "base_fingerprint"), str)
READING_FIELDS |= {"alpha": float, "context_length": int, "forced": bool}


def read_reading(path: str | os.PathLike) -> dict[str, Any] | None:
    """The reading.json beside a file of tensors, or None; UserError if it is damaged."""
    beside = pathlib.Path(path).parent / READING
    if not beside.exists():
        return None
    stated = files.read_json(beside, "how the file is read")
    missing = sorted(READING_FIELDS.keys() - set(stated))
    if missing:
        raise UserError(
            f"{beside}: {', '.join(missing)} missing; move it away if it does not belong to "
            f"{pathlib.Path(path).name}"
        )
    files.check_fields(stated, READING_FIELDS, beside)
    for name in ("alpha", "context_length"):
        if not 0 < abs(stated[name]) < 2**31:  # NaN neither
            raise UserError(
                f"{beside}: {name} is {errors.shown(stated[name])}, which is not a number of "
                "sensible size"
            )
    return stated
