"""The files in which the reference implementations keep what they trained: read, recognised by their content, and written.

| format  | file                 | tensors                                                                                       |
|---------|----------------------|-----------------------------------------------------------------------------------------------|
| icae-v2 | safetensors          | `icae.….lora_{A,B}.default.weight`, `memory_token_embed.weight` `[k + 3, D]`; a full training save has |
|         |                      | the base (`….base_layer.weight`) and a `decoder.*` copy of it besides                         |
| icae-v1 | pickle (`.pt`)       | the same, and a scalar 0.0 in the place of every tensor of the base                           |
| x500    | pickle, safetensors  | `llama.….lora_{A,B}.default.weight`, `memory_embeddings` `[1, k, D]`; the ICAE of the same repository |
|         |                      | has `ae_embedding` `[1, 1, D]` after pretraining, and the very keys of x500 after tuning on questions |
"""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from icae_jax import errors, files
from icae_jax.compression.encoder import SPECIAL_ROWS, CompressionConfig
from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.models.families import tensor_names
from icae_jax.models.lora import LoraConfig

ALPHA = 32.0  # of every released file and of every golden one; no file says it
DROPOUT = 0.05
V1_CONTEXT, X500_CONTEXT = 512, 500  # tokens of a segment
PREFIX = {"icae": "icae.base_model.model.", "x500": "llama.base_model.model."}
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
INV_FREQ = (
    "model.layers.{}.self_attn.rotary_emb.inv_freq"  # a buffer that transformers used to save
)
READING = "reading.json"  # beside a file that was written here: what its tensors do not tell
NAMES = {"icae-v1": "icae.pt", "icae-v2": "icae.safetensors", "x500": "lora_params.pt"}


# ------------------------------------------------------------------------------------------------------ files of tensors


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file, read when it is asked for (`np.asarray`): saves with two copies of the base are larger than memory."""

    shape: tuple[int, ...]
    dtype: str
    read: object

    def __array__(self, dtype=None, copy=None):
        value = self.read()
        return value if dtype is None else value.astype(dtype)


def need_torch_for(form):
    """The torch module where a format is a pickle, else None."""
    return errors.need_torch(f"format {form}, a pickle,") if NAMES[form].endswith(".pt") else None


def file_kind(path):
    """What a file is by its first bytes: "safetensors", "pickle" (what `torch.save` writes) or None."""
    path = pathlib.Path(path)

    def first_bytes():
        with open(path, "rb") as f:
            return f.read(9)

    with errors.naming(f"{path}: cannot be read"):
        start = errors.retrying(first_bytes, f"reading {path}")
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return "pickle"
    header = int.from_bytes(start[:8], "little")
    return "safetensors" if start[8:] == b"{" and header + 8 <= path.stat().st_size else None


def open_tensors(path):
    """(`{name: Stored}`, metadata) of a safetensors file or a pickled flat dict of tensors.

    Of a pickle nothing but tensors is ever constructed; UserError where it holds anything else.
    """
    path = pathlib.Path(path)
    files.check_real(path)
    kind = file_kind(path)
    if kind is None:
        raise UserError(f"{path}: neither safetensors nor a file that torch.save wrote")
    if kind == "safetensors":
        return files.read_safetensors(path, _stored)
    torch = errors.need_torch(f"reading {path}, a pickle,")
    try:
        content = errors.retrying(
            lambda: torch.load(path, map_location="cpu", weights_only=True), f"reading {path}"
        )
    except Exception as error:  # a pickle can fail in any way; none of them may run code
        if errors.transient(error) or isinstance(error, MemoryError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: refused, a pickle with more in it than tensors, or a damaged one ({reason})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: refused, it holds a {type(content).__name__} and not a flat dict of tensors"
        )
    fine = (torch.Tensor, float, int)  # numbers: the zeros of icae-v1
    other = [
        f"{k!r}: {type(v).__name__}"
        for k, v in content.items()
        if not (isinstance(k, str) and isinstance(v, fine))
    ]
    if other:
        raise UserError(
            f"{path}: refused, a flat dict of tensors is expected and it holds {', '.join(other[:5])}"
        )
    tensors = {
        k: v if isinstance(v, torch.Tensor) else torch.tensor(float(v)) for k, v in content.items()
    }

    def stored(value):
        return Stored(
            tuple(value.shape),
            str(value.dtype).removeprefix("torch."),
            lambda: value.detach().float().numpy(),
        )

    return {name: stored(value) for name, value in tensors.items()}, {}


def _stored(path):
    with safetensors.safe_open(path, framework="numpy") as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
        return {
            n: Stored(tuple(s.get_shape()), s.get_dtype(), _reader(path, n))
            for n, s in slices.items()
        }, f.metadata() or {}


def _reader(path, name):
    def read(path):
        with safetensors.safe_open(path, framework="numpy") as f:
            return f.get_tensor(name)

    return lambda: files.read_safetensors(path, read)


# ----------------------------------------------------------------------------------------------------------- recognising


def _ending(tensors, suffix):
    """The one name that ends so, or None."""
    return next((name for name in tensors if name == suffix or name.endswith("." + suffix)), None)


def recognise(tensors):
    """The format, "icae-v1", "icae-v2" or "x500"; None where the tensors are no trained compressor of these."""
    lora = any(adapters.is_lora(name) for name in tensors)
    if lora and _ending(tensors, adapters.MEMORY_TABLE):
        return "icae-v1" if any(t.shape == () for t in tensors.values()) else "icae-v2"
    return "x500" if lora and _ending(tensors, "memory_embeddings") else None


def is_table(name):
    """Whether a tensor of that name holds trained embeddings."""
    return any(
        name == n or name.endswith("." + n)
        for n in (adapters.MEMORY_TABLE, "memory_embeddings", "ae_embedding")
    )


def rows(table):
    """How many rows a table of embeddings has, 0 where it is none by its axes."""
    return (0, 0, *table.shape)[-2]


def methods_of(form, tensors, phase=None):
    """The methods that a file of that format may be of."""
    if form != "x500":
        return ("icae",)
    if _ending(tensors, "ae_embedding"):
        return ("icae",)
    return ("x500",) if phase == "pretrain" else ("x500", "icae")


# --------------------------------------------------------------------------------------------------------------- reading


def read_trained(form, tensors, base, source):
    """The trained tree `{"lora": tree, "memory_table": [k + 3, D]}` of a recognised file, float32, for a loaded `Base`.

    UserError lists every tensor that is missing, unexpected or of a shape that is not the base's, and where the file carries a base of
    its own that is not this one.
    """
    problems, D = [], base.config.hidden_size
    lora = adapters.lora_from_hub(tensors, base.config, problems)
    left = {name: t for name, t in tensors.items() if not adapters.is_lora(name)}
    if form == "x500":
        table_name, trigger_name = (
            _ending(tensors, n) for n in ("memory_embeddings", "ae_embedding")
        )
        k = rows(tensors[table_name])
        shapes = {table_name: (1, k, D)} | ({trigger_name: (1, 1, D)} if trigger_name else {})
    else:
        table_name = _ending(tensors, adapters.MEMORY_TABLE)
        shapes = {table_name: (max(rows(tensors[table_name]), SPECIAL_ROWS + 1), D)}
    for name, want in shapes.items():
        if left.pop(name).shape != want:
            problems.append(
                f"mis-shaped {name}: {tensors[name].shape}, with this base it is {want}"
            )
    copies = _base_copies(left, base.config, problems)
    floats = (
        {}
        if problems
        else {name: adapters.read_floats(tensors[name], name, problems) for name in shapes}
    )
    if problems:
        raise UserError(
            adapters.misfits(f"{source}: the tensors do not fit base {base.path}", problems)
        )
    for copy in copies:
        theirs = bases.fingerprint(base.config, copy)
        if theirs != base.fingerprint:
            have = f"{base.path} has {base.fingerprint[:12]}"
            raise UserError(
                f"{source} carries a base with fingerprint {theirs[:12]}, but {have}; give the right base"
            )
    table = floats[table_name]
    if form == "x500":
        table = np.concatenate([table[0], np.zeros((SPECIAL_ROWS, D), np.float32)])
        if trigger_name:
            table[-SPECIAL_ROWS] = floats[trigger_name][0, 0]
    return {"lora": lora, "memory_table": jnp.asarray(table)}


def _base_copies(left, config, problems):
    """What a training save holds of the base: checks that nothing else is left, returns what `bases.fingerprint` needs of each copy.

    The encoder's embedding table may have grown by the special tokens, which the reference adds to it.
    """
    shapes = tensor_names.hub_shapes(config) | {
        "lm_head.weight": (config.vocab_size, config.hidden_size)
    }  # saved where it is tied, too
    inv_freq = {INV_FREQ.format(i) for i in range(config.num_layers)}
    copies = {}
    for name, tensor in left.items():
        plain = name[name.find("model.layers.") :] if "model.layers." in name else name
        plain = plain.replace(".base_layer.", ".")
        short = next((n for n in (EMBED, NORM, "lm_head.weight") if name.endswith(n)), plain)
        if short in inv_freq and len(tensor.shape) < 2:
            continue
        want = shapes.get(short)
        if want is None:
            problems.append(f"unexpected {name} {tensor.shape}")
        elif tensor.shape == ():
            if float(np.asarray(tensor)) != 0:
                problems.append(
                    f"unexpected {name}: the scalar {float(np.asarray(tensor))}, where a zero stands for a tensor of the base"
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
    whole = [
        {name: np.asarray(t, np.float32) for name, t in copy.items()}
        for copy in copies.values()
        if len(copy) == 2
    ]
    return [
        {"embed": copy[EMBED][: config.vocab_size], "norm": {"scale": copy[NORM]}} for copy in whole
    ]


def defaults(form, method, phase, k):
    """What the tensors of a format do not tell, as its implementation has it: `{alpha, context_length, layout, template}`.

    phase: "pretrain" (no question was ever asked, so there is no template) or "finetune". k: memory tokens of a segment.
    """
    layout, template = {
        ("icae-v1", "icae"): ("sequential", "v1"),
        ("icae-v2", "icae"): ("sequential", "mistral"),
        ("x500", "x500"): ("reference", "plain"),
        ("x500", "icae"): ("padded", "plain"),
    }[form, method]
    length = {"icae-v1": V1_CONTEXT, "icae-v2": 4 * k, "x500": X500_CONTEXT}[form]
    return {
        "alpha": ALPHA,
        "context_length": length,
        "layout": layout,
        "template": "none" if phase == "pretrain" else template,
    }


def make_adapter(trained, base, template, *, method, alpha, context_length, layout):
    """The `Adapter` of a trained tree that was read from one of the formats. context_length: most text tokens of a segment."""
    targets = tuple(name for of in trained["lora"]["layers"].values() for name in of)
    rank = next(
        pair["a"].shape[2] for of in trained["lora"]["layers"].values() for pair in of.values()
    )
    k = trained["memory_table"].shape[0] - SPECIAL_ROWS
    compression = CompressionConfig(method, k, context_length / k, layout=layout)
    lora = LoraConfig(rank, alpha / rank, DROPOUT, targets)
    identity = {"base_fingerprint": base.fingerprint, "base_identity": base.identity}
    return adapters.Adapter(compression, lora, template, trained, base.path, **identity)


# --------------------------------------------------------------------------------------------------------------- writing


def misreadings(form, adapter):
    """Why the implementation that reads a format would read this adapter otherwise than it was trained, as lines; [] where it would not."""
    c, wrong = adapter.compression, []
    layouts = {
        "icae-v1": {"icae": "sequential"},
        "icae-v2": {"icae": "sequential"},
        "x500": {"x500": "reference", "icae": "padded"},
    }[form]
    if c.method not in layouts:
        raise UserError(
            f"--format {form} cannot hold an adapter of method {c.method}; choose native, peft or x500"
        )
    if c.layout != layouts[c.method]:
        wrong.append(
            f"it reads layout {layouts[c.method]}, the adapter was trained with {c.layout}"
        )
    if c.trigger != ("bos" if c.method == "x500" else "trained"):
        wrong.append(f"the adapter's trigger is {c.trigger}")
    if set(adapter.lora.targets) != {"q_proj", "v_proj"}:
        wrong.append(
            f"it has LoRA on q_proj and v_proj, the adapter on {', '.join(adapter.lora.targets)}"
        )
    return wrong


def tensors_of(form, adapter, model_config):
    """The adapter's tensors as a format names and shapes them, float32 numpy."""
    table = np.asarray(adapter.trained["memory_table"], np.float32)
    lora = adapters.lora_to_hub(
        adapter.trained["lora"], PREFIX["x500" if form == "x500" else "icae"], ".default"
    )
    if form == "x500":
        trigger = (
            {"ae_embedding": table[None, -SPECIAL_ROWS, None]}
            if adapter.compression.method == "icae"
            else {}
        )
        return {"memory_embeddings": table[None, :-SPECIAL_ROWS]} | trigger | lora
    zeros = {}
    if form == "icae-v1":
        names = [
            *tensor_names.tensor_names(model_config),
            *map(INV_FREQ.format, range(model_config.num_layers)),
        ]
        zeros = {PREFIX["icae"] + name: np.zeros((), np.float32) for name in names}
    return zeros | lora | {adapters.MEMORY_TABLE: table}


def write(form, folder, adapter, model_config, dtype="float32"):
    """Writes `folder` with the one file of a format; returns its path. dtype: of the tensors. Pickles need PyTorch."""
    tensors = tensors_of(form, adapter, model_config)
    name = NAMES[form]
    torch = need_torch_for(form)
    with files.replacing_folder(folder) as tmp:
        if torch:
            # A copy: torch wants arrays that it may write to.
            torch.save(
                {
                    k: torch.from_numpy(v.copy()).to(getattr(torch, dtype))
                    for k, v in tensors.items()
                },
                tmp / name,
            )
        else:
            values = {
                k: np.ascontiguousarray(v.astype(jnp.dtype(dtype))) for k, v in tensors.items()
            }
            safetensors.numpy.save_file(values, tmp / name, {"format": "pt"})
        files.write_json(tmp / READING, reading(adapter))
    return pathlib.Path(folder) / name


def reading(adapter):
    """What a file of tensors does not say of itself, as plain values."""
    return {
        "alpha": adapter.lora.scale * adapter.lora.rank,
        "context_length": adapter.compression.segment_tokens,
        "layout": adapter.compression.layout,
        "method": adapter.compression.method,
        "template": adapter.template.name,
        "base": adapter.base_path,
        "base_fingerprint": adapter.base_fingerprint,
        "base_identity": adapter.base_identity,
        "template_ids": adapter.template.as_json(),
        "forced": adapters.was_forced(adapter),
    }


READING_FIELDS = dict.fromkeys(("layout", "method", "template", "base", "base_fingerprint"), str)
READING_FIELDS |= {"alpha": float, "context_length": int, "forced": bool}


def read_reading(path):
    """What was written beside a file of tensors of how it is read, or None. UserError where that is incomplete or of another type."""
    beside = pathlib.Path(path).parent / READING
    if not beside.exists():
        return None
    told = files.read_json(beside, "how the file is read")
    missing = sorted(READING_FIELDS.keys() - set(told))
    if missing:
        raise UserError(
            f"{beside}: {', '.join(missing)} missing; move it away if it does not belong to {pathlib.Path(path).name}"
        )
    files.check_fields(told, READING_FIELDS, beside)
    for name in ("alpha", "context_length"):
        if not 0 < abs(told[name]) < 2**31:  # NaN neither
            raise UserError(
                f"{beside}: {name} is {errors.shown(told[name])}, which is no number of a sensible size"
            )
    return told
