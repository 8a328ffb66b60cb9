"""The adapter folder: LoRA in PEFT's format, the memory table, and `icae.json`, which says how they are to be read.

encoder/adapter_config.json, encoder/adapter_model.safetensors    LoRA, as PEFT writes it
memory.safetensors                                                memory_token_embed.weight [k + 3, D]
icae.json                                                         method, layout, template, base's fingerprint
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import icae_jax
from icae_jax import errors, files
from icae_jax.compression.encoder import SPECIAL_ROWS, CompressionConfig
from icae_jax.errors import UserError
from icae_jax.interop.adapters import peft_config as peft_configs
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.models import lora as loras
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives.targets import Template

FORMAT_VERSION = 1
MEMORY_TABLE = "memory_token_embed.weight"
INFO = "icae.json"
IN_WORKDIR = "adapter"  # the folder that training writes into its workdir
_LORA = r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_(A|B)(?:\.default)?\.weight"
_LORA_NAME = re.compile(rf"(?:^|\.){_LORA}$")
_IN_FOLDER = re.compile(
    rf"(?:base_model\.(?:model\.)?)?{_LORA}"
)  # what PEFT puts in front, of a causal LM or of its inner model


def parse_lora_name(name):
    """(layer, module, projection, "A" or "B") of a LoRA tensor's name, None of any other's."""
    match = _LORA_NAME.search(name)
    return None if match is None else (int(match[1]), *match.groups()[1:])


def is_lora(name):
    """Whether a tensor of that name is one of LoRA's."""
    return parse_lora_name(name) is not None


def lora_to_hub(lora, prefix="base_model.model.", infix=""):
    """PEFT's tensors of a LoRA tree: A `[r, in]` and B `[out, r]` a layer, named as a saved PEFT adapter names them."""
    tensors = {}
    for module, projections in lora["layers"].items():
        for name, pair in projections.items():
            for letter, value in (("A", pair["a"]), ("B", pair["b"])):
                for i, layer in enumerate(np.asarray(value, np.float32)):
                    tensors[
                        f"{prefix}model.layers.{i}.{module}.{name}.lora_{letter}{infix}.weight"
                    ] = np.ascontiguousarray(layer.T)
    return tensors


_FLOATS = {
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "f64",
    "f32",
    "f16",
    "bf16",
}  # as numpy and as safetensors call them


def read_floats(tensor, name, problems):
    """A tensor as float32; adds a line to `problems` where its type is not one of `_FLOATS`, or a number is NaN or infinite."""
    if str(tensor.dtype).lower() not in _FLOATS:
        problems.append(
            f"unreadable {name}: of type {tensor.dtype}; store it as float32, bfloat16 or float16"
        )
        return np.zeros(tensor.shape, np.float32)
    with np.errstate(over="ignore"):  # a float64 too large for float32
        value = np.asarray(tensor).astype(np.float32)
    if not np.isfinite(value).all():
        problems.append(
            f"unreadable {name}: it holds NaN or infinity; the training that wrote it had diverged, or the file is damaged"
        )
    return value


def _lora_names(tensors, lines):
    """`{(layer, projection, "A" or "B"): name}` of LoRA's tensors; adds a line for each that is no projection's, or there twice."""
    found = {}
    for full in tensors:
        parsed = parse_lora_name(full)
        if parsed:
            layer, module, name, letter = parsed
            if name not in loras.PROJECTIONS or module != loras.module_of(name):
                lines.append(
                    f"unexpected {full}: {module}.{name} is not a projection of this model"
                )
            elif (layer, name, letter) in found:
                lines.append(
                    f"unexpected {full}: {found[layer, name, letter]} is the same tensor of the same layer"
                )
            else:
                found[layer, name, letter] = full
    return found


def misfits(what, lines, most=20):
    """A message of what does not fit, tensor by tensor, in one line."""
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return f"{what}: {'; '.join([*lines[:most], *more])}"


def lora_from_hub(tensors, model_config, problems=None, stated=None):
    """The LoRA tree of tensors named `…model.layers.{i}.{module}.{projection}.lora_{A,B}[.default].weight`; others are left alone.

    The rank is the A tensors' own, the projections those that any layer has. stated: `peft_config.LoraFields`, which say otherwise which
    modules have LoRA, of which rank and scale: the tree then has the largest rank, zeros for what other modules lack of it, and in B what
    their scales are of `stated.scale`. UserError lists every tensor that is missing, belongs to no layer of the base, has not the base's
    shape, or holds no finite numbers. problems: a list that takes these lines instead; the tree is then None.
    """
    lines = []
    found = _lora_names(tensors, lines)
    if not found and not lines:
        lines.append("no LoRA tensors (names ending in lora_A.weight and lora_B.weight)")
    ranks = [
        tensors[full].shape[0]
        for (_, _, letter), full in found.items()
        if letter == "A" and len(tensors[full].shape) == 2
    ]
    common = max(set(ranks), key=ranks.count) if ranks else 0
    example = next(iter(found.values()), "")
    before, infix = (
        example.partition("model.layers.")[0],
        ".default" if ".default." in example else "",
    )
    in_peft = f"{before}model.".removeprefix(
        "base_model.model."
    )  # what PEFT calls the module that holds the layers

    def module(i, name):
        return f"{in_peft}layers.{i}.{loras.module_of(name)}.{name}"

    every = [(i, name) for name in loras.PROJECTIONS for i in range(model_config.num_layers)]
    if stated is None:
        targets = {name for _, name, _ in found}
        rank_of = {(i, name): common for i, name in every if name in targets}
    else:
        rank_of = {
            key: stated.rank_of(module(*key)) for key in every if stated.has_lora(module(*key))
        }
        others = [name for name in ("lm_head", f"{in_peft}embed_tokens") if stated.has_lora(name)]
        lines += [
            f"missing {name}: adapter_config.json gives it LoRA, which is computed for the projections of layers alone"
            for name in others
        ]
    values = {}
    for key in [(*key, letter) for key in rank_of for letter in "AB"]:
        i, name, letter = key
        d_in, d_out = loras.projection_shape(model_config, name)
        rank = rank_of[i, name]
        want = (rank, d_in) if letter == "A" else (d_out, rank)
        if key not in found:
            lines.append(
                f"missing {before}model.layers.{i}.{loras.module_of(name)}.{name}.lora_{letter}{infix}.weight {want}"
            )
        elif tuple(tensors[found[key]].shape) != want:
            by = "this base" if stated is None else f"this base and r {rank} in adapter_config.json"
            lines.append(
                f"mis-shaped {found[key]}: {tuple(tensors[found[key]].shape)}, with {by} it is {want}"
            )
        else:
            values[key] = read_floats(tensors[found[key]], found[key], lines)
    for (i, name, _), full in found.items():
        if i >= model_config.num_layers:
            lines.append(f"unexpected {full}: the base has {model_config.num_layers} layers")
        elif (i, name) not in rank_of:
            lines.append(
                f"unexpected {full}: by adapter_config.json (target_modules and the like), {module(i, name)} has no LoRA"
            )
    if lines and problems is None:
        raise UserError(misfits("the adapter's tensors do not fit this base", lines))
    if lines:
        problems += lines
        return None
    most, tree = max(rank_of.values()), {}
    for name in dict.fromkeys(name for _, name in rank_of):
        d_in, d_out = loras.projection_shape(model_config, name)
        a = np.zeros((model_config.num_layers, d_in, most), np.float32)
        b = np.zeros((model_config.num_layers, most, d_out), np.float32)
        for i, rank in ((i, rank) for (i, of), rank in rank_of.items() if of == name):
            ratio = 1.0 if stated is None else stated.scale_of(module(i, name)) / stated.scale
            with np.errstate(over="ignore"):
                a[i, :, :rank], b[i, :rank] = (
                    values[i, name, "A"].T,
                    values[i, name, "B"].T * np.float32(ratio),
                )
        if not np.isfinite(b).all():
            raise UserError(
                f"{stated.source}: alpha_pattern gives {name} scales beyond what float32 holds; is alpha right?"
            )
        tree.setdefault(loras.module_of(name), {})[name] = {
            "a": jnp.asarray(a),
            "b": jnp.asarray(b),
        }
    return {"layers": tree}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A trained compressor apart from its base.

    trained: `{"lora": tree, "memory_table": [k + 3, D]}`. base_path, base_fingerprint: the base it was trained on. origin: of a converted
    one, where it comes from and how well it restored; None for one that was trained here. base_identity: `Base.identity` of
    that base, without what an earlier version did not say.
    """

    compression: CompressionConfig
    lora: LoraConfig
    template: Template
    trained: dict
    base_path: str
    base_fingerprint: str
    origin: dict | None = None
    base_identity: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self):
        """sha256 over the trained tensors."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.trained):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf, np.float32).tobytes())
        return digest.hexdigest()


def was_forced(adapter):
    """Whether the adapter was converted although it could not be shown that its base is the one it was trained on."""
    return bool(adapter.origin and adapter.origin.get("forced"))


def peft_config(adapter):
    """adapter_config.json's content: all that PEFT needs, which silently assumes r = alpha = 8 where they are absent."""
    base, revision = (
        adapter.base_path,
        "",
    )  # a folder, URL or hub id; PEFT keeps a hub id's revision apart
    if pathlib.Path(base).is_dir():
        base = str(pathlib.Path(base).resolve())
    elif locations.is_hub_id(base):
        base, _, revision = base.partition("@")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **({"revision": revision} if revision else {}),
        "r": adapter.lora.rank,
        "lora_alpha": adapter.lora.scale * adapter.lora.rank,
        "lora_dropout": adapter.lora.dropout,
        "target_modules": list(adapter.lora.targets),
        "bias": "none",
        "inference_mode": True,
    }


def icae_info(adapter):
    """icae.json's content: how the adapter is read."""
    return {
        "format_version": FORMAT_VERSION,
        "icae_jax_version": icae_jax.__version__,
        "base_fingerprint": adapter.base_fingerprint,
        **({"base_identity": adapter.base_identity} if adapter.base_identity else {}),
        "compression": dataclasses.asdict(adapter.compression),
        "template": dataclasses.asdict(adapter.template),
        **({"origin": adapter.origin} if adapter.origin else {}),
    }


def save_adapter(folder, adapter):
    """Writes the adapter folder; one that is there is replaced only when the new one is complete."""
    with files.replacing_folder(folder) as tmp:
        encoder = tmp / "encoder"
        encoder.mkdir()
        safetensors.numpy.save_file(
            lora_to_hub(adapter.trained["lora"]),
            encoder / "adapter_model.safetensors",
            {"format": "pt"},
        )
        files.write_json(encoder / "adapter_config.json", peft_config(adapter))
        table = np.asarray(adapter.trained["memory_table"], np.float32)
        safetensors.numpy.save_file(
            {MEMORY_TABLE: table}, tmp / "memory.safetensors", {"format": "pt"}
        )
        files.write_json(tmp / "icae.json", icae_info(adapter))


def _tensors(path):
    """A safetensors file's tensors. UserError where it is absent, and says so where PEFT's pickle is there instead."""
    if not path.exists():
        pickled = path.with_suffix(".bin")
        if pickled.exists():
            raise UserError(
                f"{path}: no such file, and {pickled.name} beside it is a pickle, which is never read here; save it with peft's "
                "save_pretrained, which writes safetensors"
            )
        raise UserError(
            f"{path}: no such file; an adapter folder holds encoder/, memory.safetensors and icae.json"
        )
    tensors = files.read_safetensors(path, safetensors.numpy.load_file)
    if path.with_suffix(".bin").exists():
        errors.say(f"{path} is read, as by peft; {path.with_suffix('.bin').name} beside it is not")
    return tensors


def _check_read(path, tensors, wanted):
    """UserError naming a file's tensors that would not be read. wanted: tells by a name whether its tensor is."""
    unread = [name for name in tensors if not wanted(name)]
    if unread:
        shown = ", ".join(unread[:4]) + (f", … ({len(unread)} in all)" if len(unread) > 4 else "")
        raise UserError(
            f"{path}: {shown} would not be read, so the memory would be another than it was trained for; give plain LoRA"
        )


def _fields(kind, raw, source, newer=()):
    """Builds a dataclass from JSON, lists as tuples; UserError on fields that are unknown, missing or of another type.

    newer: fields that older files lack; their defaults are what those files meant.
    """
    wrong = sorted(
        (set(raw) ^ {f.name for f in dataclasses.fields(kind)}) - (set(newer) - set(raw))
    )
    if wrong:
        raise UserError(
            f"{source}: fields {', '.join(map(errors.field, wrong))} unknown or missing; was it written by another version of icae_jax?"
        )
    types = {
        f.name: list if typing.get_origin(f.type) is tuple else f.type
        for f in dataclasses.fields(kind)
        if f.name in raw
    }
    files.check_fields(raw, types, source)
    wrong = [
        name
        for name, of in types.items()
        if of is list and not all(files.is_kind(v, int) for v in raw[name])
    ]
    if wrong:
        raise UserError(f"{source}: {wrong[0]} is {raw[wrong[0]]!r}, which are not whole numbers")
    wrong = [
        name for name, of in types.items() if of in (int, float) and not abs(raw[name]) < 2**31
    ]  # NaN too
    if wrong:
        raise UserError(
            f"{source}: {wrong[0]} is {raw[wrong[0]]!r:.40}, which is no number of a sensible size"
        )
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def locate(adapter, progress=True):
    """`locations.LocalAdapter` of the adapter folder meant by a folder, a training workdir, a hub id or a URL, fetched where needed."""
    folder, name = locations.local_adapter(adapter, progress)
    inside = (folder / IN_WORKDIR / INFO).exists()
    if inside and (folder / INFO).exists():
        raise UserError(
            f"adapter {name!r} holds {INFO} twice, in itself and in {IN_WORKDIR}/; name that folder, or move it away"
        )
    return (
        locations.LocalAdapter(folder / IN_WORKDIR, os.path.join(name, IN_WORKDIR))
        if inside
        else locations.LocalAdapter(folder, name)
    )


def lora_folder(folder):
    """Where an adapter folder keeps what PEFT reads: in encoder/, or in itself if it was made for PEFT (`peft_folder`)."""
    folder = pathlib.Path(folder)
    there = [at for at in (folder, folder / "encoder") if (at / "adapter_config.json").exists()]
    if len(there) > 1:
        raise UserError(
            f"{folder} holds adapter_config.json twice, in itself and in encoder/; remove the one that is not the adapter's"
        )
    return there[0] if there else folder / "encoder"


def _check_is_adapter(folder, name):
    """UserError where a folder is none of this package's adapters. name: how the user calls it."""
    if not folder.is_dir() and not locations.is_remote(name):
        raise UserError(
            f"adapter {name!r} is not a folder; give the folder that training wrote (it holds {INFO}), a hub id, or gs://…"
        )
    if not (folder / INFO).exists():
        ordinary = (folder / "adapter_config.json").exists()
        what = (
            "it is an ordinary PEFT adapter, without memory tokens"
            if ordinary
            else "it is no adapter of this package"
        )
        file = (
            " (of another implementation's file, download that and give it to icae convert adapter)"
            if locations.is_remote(name)
            else ""
        )
        raise UserError(
            f"adapter {name!r} has no {INFO}, so {what}; give one that training or icae convert adapter wrote{file}"
        )


def read_adapter_info(folder, name=""):
    """icae.json and adapter_config.json, checked: (icae.json's content, `peft_config.LoraFields`). name: how the user calls the folder."""
    folder = pathlib.Path(folder)
    _check_is_adapter(folder, name or str(folder))
    info = files.read_json(folder / INFO, "how the adapter is read")
    version = info.get("format_version")
    if version != FORMAT_VERSION or not files.is_kind(version, int):
        raise UserError(
            f"{folder}/icae.json: format_version is {version!r:.40}, this version reads {FORMAT_VERSION}"
        )
    files.check_fields(
        info, {"base_fingerprint": str, "compression": dict, "template": dict}, folder / INFO
    )
    files.check_fields(info["template"], {"name": str}, f"{folder}/icae.json: template")
    if "base_identity" in info:
        files.check_fields(info, {"base_identity": dict}, folder / "icae.json")
        files.check_fields(
            info["base_identity"], dict.fromkeys(info["base_identity"], str), folder / "icae.json"
        )
    if info.get("origin"):
        files.check_fields(info, {"origin": dict}, folder / INFO)
    return info, peft_configs.read(lora_folder(folder) / "adapter_config.json")


def check_base(base, adapter):
    """The base as it is. UserError where what an adapter names as its base is nothing, or a folder of another machine."""
    if not base:
        raise UserError(
            f"adapter {adapter} names no base (base_model_name_or_path); give the base model with --base"
        )
    if pathlib.Path(base).is_absolute() and not pathlib.Path(base).is_dir():
        raise UserError(
            f"adapter {adapter} names its base as {base}, which is not a folder; give the base model with --base"
        )
    return base


def check_template(template: Template, base, source) -> None:
    """UserError where an id of a template has no row, in the base's embedding table or among the trained ones. source: names it."""
    for part in ("head", "before", "after"):
        ids = getattr(template, part)
        tokenizers.check_ids(
            [ids],
            base.config.vocab_size,
            lambda _, part=part: f"{source}: template {part}",
            base.tokenizer,
            SPECIAL_ROWS,
        )
    tokenizers.check_ids(
        [[template.stop]],
        base.config.vocab_size,
        lambda _: f"{source}: template stop",
        base.tokenizer,
    )


def load_adapter(folder, base):
    """Loads an adapter folder for a loaded `Base`. UserError where the base is not the one it was trained on, where tensors do not fit
    or would not be read, or where they and adapter_config.json disagree.
    """
    folder = pathlib.Path(folder)
    info, stated = read_adapter_info(folder)
    if info["base_fingerprint"] != base.fingerprint:
        raise UserError(
            f"adapter {folder} was trained on a base with fingerprint {info['base_fingerprint'][:12]} "
            f"({stated.base or 'not named'}), but {base.path} has {base.fingerprint[:12]}; give the right base"
        )
    bases.check_identity(f"adapter {folder}", info.get("base_identity", {}), base.identity)
    compression = _fields(
        CompressionConfig,
        info["compression"],
        f"{folder}/icae.json: compression",
        ("k_choices", "trigger"),
    )
    template = _fields(Template, info["template"], f"{folder}/icae.json: template")
    check_template(template, base, f"{folder}/icae.json")
    path = stated.source.with_name("adapter_model.safetensors")
    tensors = _tensors(path)
    _check_read(path, tensors, _IN_FOLDER.fullmatch)
    problems = []
    lora = lora_from_hub(tensors, base.config, problems, stated)
    if problems:
        raise UserError(misfits(f"{path}: the adapter's tensors do not fit this base", problems))
    path = folder / "memory.safetensors"
    tensors = _tensors(path)
    table = tensors.get(MEMORY_TABLE)
    want = (compression.k + SPECIAL_ROWS, base.config.hidden_size)
    if table is None or table.shape != want:
        raise UserError(
            f"{path}: {MEMORY_TABLE} is {None if table is None else table.shape}, expected {want}"
        )
    _check_read(path, tensors, MEMORY_TABLE.__eq__)
    table = read_floats(table, MEMORY_TABLE, problems)
    if problems:
        raise UserError(f"{path}: {problems[0]}")
    pairs = {
        name: pair for projections in lora["layers"].values() for name, pair in projections.items()
    }
    listed = stated.targets if isinstance(stated.targets, tuple) else ()  # in the order of training
    targets = tuple(dict.fromkeys([*(name for name in listed if name in pairs), *pairs]))
    rank = next(iter(pairs.values()))["a"].shape[2]
    config = LoraConfig(rank, stated.scale, stated.dropout, targets)
    trained = {"lora": lora, "memory_table": jnp.asarray(table)}
    return Adapter(
        compression, config, template, trained, stated.base or base.path, info["base_fingerprint"], info.get("origin"),
        info.get("base_identity", {}),
    )  # fmt: skip
