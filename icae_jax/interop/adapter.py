"""The adapter folder: LoRA in PEFT's format, the memory table, and `icae.json`, which says how they are to be read.

encoder/adapter_config.json, encoder/adapter_model.safetensors    LoRA, as PEFT writes it
memory.safetensors                                                memory_token_embed.weight [k + 3, D]
icae.json                                                         method, layout, template, base's fingerprint
"""

import dataclasses
import hashlib
import pathlib
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import icae_jax
from icae_jax.compression.encoder import SPECIAL_ROWS, CompressionConfig
from icae_jax.errors import UserError
from icae_jax.interop import base as bases
from icae_jax.interop import files
from icae_jax.interop import tokenizer as tokenizers
from icae_jax.models import lora as loras
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives.targets import Template

FORMAT_VERSION = 1
MEMORY_TABLE = "memory_token_embed.weight"
IN_WORKDIR = "adapter"  # the folder that training writes into its workdir
_LORA_NAME = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_(A|B)(?:\.default)?\.weight$")


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
                    tensors[f"{prefix}model.layers.{i}.{module}.{name}.lora_{letter}{infix}.weight"] = np.ascontiguousarray(layer.T)
    return tensors


def lora_from_hub(tensors, model_config, problems=None):
    """The LoRA tree of tensors named `…model.layers.{i}.{module}.{projection}.lora_{A,B}[.default].weight`; others are left alone.

    The rank is the A tensors' own, the projections those that any layer has. UserError lists every tensor that is missing, belongs to
    no layer of the base, or has not the base's shape. problems: a list that takes these lines instead; the tree is then None.
    """
    found, lines = {}, []
    for full in tensors:
        parsed = parse_lora_name(full)
        if parsed:
            layer, module, name, letter = parsed
            if name not in loras.PROJECTIONS or module != loras.module_of(name):
                lines.append(f"unexpected {full}: {module}.{name} is not a projection of this model")
            else:
                found[layer, name, letter] = full
    ranks = [tensors[full].shape[0] for (_, _, letter), full in found.items() if letter == "A" and len(tensors[full].shape) == 2]
    if not ranks and not lines:
        lines.append("no LoRA tensors (names ending in lora_A.weight and lora_B.weight)")
    rank = max(set(ranks), key=ranks.count) if ranks else 0
    targets = [name for name in loras.PROJECTIONS if any(key[1] == name for key in found)]
    example = next(iter(found.values()), "")
    before, infix = example.partition("model.layers.")[0], ".default" if ".default." in example else ""
    for key in [(i, name, letter) for i in range(model_config.num_layers) for name in targets for letter in "AB"]:
        i, name, letter = key
        d_in, d_out = loras.projection_shape(model_config, name)
        want = (rank, d_in) if letter == "A" else (d_out, rank)
        if key not in found:
            lines.append(f"missing {before}model.layers.{i}.{loras.module_of(name)}.{name}.lora_{letter}{infix}.weight {want}")
        elif tuple(tensors[found[key]].shape) != want:
            lines.append(f"mis-shaped {found[key]}: {tuple(tensors[found[key]].shape)}, with this base it is {want}")
    beyond = [full for (i, _, _), full in found.items() if i >= model_config.num_layers]
    lines += [f"unexpected {full}: the base has {model_config.num_layers} layers" for full in beyond]
    if lines and problems is None:
        raise UserError("the adapter's tensors do not fit this base:\n  " + "\n  ".join(lines))
    if lines:
        problems += lines
        return None
    tree = {}
    for name in targets:
        a, b = ([np.asarray(tensors[found[i, name, x]], np.float32).T for i in range(model_config.num_layers)] for x in "AB")
        tree.setdefault(loras.module_of(name), {})[name] = {"a": jnp.asarray(np.stack(a)), "b": jnp.asarray(np.stack(b))}
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
    base = pathlib.Path(adapter.base_path)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()) if base.is_dir() else adapter.base_path,  # or a hub id, or gs://…
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
        safetensors.numpy.save_file(lora_to_hub(adapter.trained["lora"]), encoder / "adapter_model.safetensors", {"format": "pt"})
        files.write_json(encoder / "adapter_config.json", peft_config(adapter))
        table = np.asarray(adapter.trained["memory_table"], np.float32)
        safetensors.numpy.save_file({MEMORY_TABLE: table}, tmp / "memory.safetensors", {"format": "pt"})
        files.write_json(tmp / "icae.json", icae_info(adapter))


def _tensors(path):
    if not path.exists():
        raise UserError(f"{path}: no such file; an adapter folder holds encoder/, memory.safetensors and icae.json")
    return files.read_safetensors(path, safetensors.numpy.load_file)


def _fields(kind, raw, source, newer=()):
    """Builds a dataclass from JSON, lists as tuples; UserError on fields that are unknown, missing or of another type.

    newer: fields that older files lack; their defaults are what those files meant.
    """
    wrong = sorted((set(raw) ^ {f.name for f in dataclasses.fields(kind)}) - (set(newer) - set(raw)))
    if wrong:
        raise UserError(f"{source}: fields {', '.join(wrong)} unknown or missing; was it written by another version of icae_jax?")
    types = {f.name: list if typing.get_origin(f.type) is tuple else f.type for f in dataclasses.fields(kind) if f.name in raw}
    files.check_fields(raw, types, source)
    numbers = [name for name, of in types.items() if of is list and not all(files.is_kind(v, int) for v in raw[name])]
    if numbers:
        raise UserError(f"{source}: {numbers[0]} is {raw[numbers[0]]!r}, which are not whole numbers")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})


def adapter_folder(path):
    """The adapter folder meant by a path: the folder itself, or the one in a training workdir."""
    path = pathlib.Path(path)
    return path / IN_WORKDIR if (path / IN_WORKDIR / "icae.json").exists() else path


def lora_folder(folder):
    """Where an adapter folder keeps what PEFT reads: in encoder/, or in itself if it was made for PEFT (`peft_folder`)."""
    inner = pathlib.Path(folder) / "encoder"
    return pathlib.Path(folder) if (pathlib.Path(folder) / "adapter_config.json").exists() else inner


def read_adapter_info(folder):
    """icae.json and adapter_config.json, checked: (icae.json's content, adapter_config.json's content)."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"adapter {str(folder)!r} is not a folder; give the folder that training wrote (it holds icae.json)")
    info = files.read_json(folder / "icae.json", "how the adapter is read")
    if info.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{folder}/icae.json: format_version is {info.get('format_version')}, this version reads {FORMAT_VERSION}")
    files.check_fields(info, {"base_fingerprint": str, "compression": dict, "template": dict}, folder / "icae.json")
    files.check_fields(info["template"], {"name": str}, f"{folder}/icae.json: template")
    if "base_identity" in info:
        files.check_fields(info, {"base_identity": dict}, folder / "icae.json")
        files.check_fields(info["base_identity"], dict.fromkeys(info["base_identity"], str), folder / "icae.json")
    if info.get("origin"):
        files.check_fields(info, {"origin": dict}, folder / "icae.json")
    path = lora_folder(folder) / "adapter_config.json"
    peft = files.read_json(path, "the LoRA's configuration")
    files.check_fields(peft, {"r": int, "lora_alpha": float, "target_modules": list, "base_model_name_or_path": str}, path)
    if peft["r"] < 1:
        raise UserError(f"{path}: r is {peft['r']}; it must be positive")
    return info, peft


def check_template(template: Template, base, source) -> None:
    """UserError where an id of a template has no row, in the base's embedding table or among the trained ones. source: names it."""
    for part in ("head", "before", "after"):
        ids = getattr(template, part)
        tokenizers.check_ids([ids], base.config.vocab_size, lambda _, part=part: f"{source}: template {part}", base.tokenizer, SPECIAL_ROWS)
    tokenizers.check_ids([[template.stop]], base.config.vocab_size, lambda _: f"{source}: template stop", base.tokenizer)


def load_adapter(folder, base):
    """Loads an adapter folder for a loaded `Base`. UserError where the base is not the one it was trained on, or shapes differ."""
    folder = pathlib.Path(folder)
    info, peft = read_adapter_info(folder)
    if info["base_fingerprint"] != base.fingerprint:
        raise UserError(
            f"adapter {folder} was trained on a base with fingerprint {info['base_fingerprint'][:12]} "
            f"({peft['base_model_name_or_path']}), but {base.path} has {base.fingerprint[:12]}; give the right base"
        )
    bases.check_identity(f"adapter {folder}", info.get("base_identity", {}), base.identity)
    compression = _fields(CompressionConfig, info["compression"], f"{folder}/icae.json: compression", ("k_choices", "trigger"))
    template = _fields(Template, info["template"], f"{folder}/icae.json: template")
    check_template(template, base, f"{folder}/icae.json")
    inner = lora_folder(folder)
    lora = lora_from_hub(_tensors(inner / "adapter_model.safetensors"), base.config)
    table = _tensors(folder / "memory.safetensors").get(MEMORY_TABLE)
    want = (compression.k + SPECIAL_ROWS, base.config.hidden_size)
    if table is None or table.shape != want:
        raise UserError(f"{folder}/memory.safetensors: {MEMORY_TABLE} is {None if table is None else table.shape}, expected {want}")
    found = {(name, pair["a"].shape[2]) for projections in lora["layers"].values() for name, pair in projections.items()}
    stated = {(str(name), peft["r"]) for name in peft["target_modules"]}
    if found != stated:
        raise UserError(f"{inner}: adapter_config.json states {sorted(stated)} (target_modules, r), the tensors are {sorted(found)}")
    for field in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if peft.get(field):
            raise UserError(f"{inner}/adapter_config.json: {field} is {peft[field]!r}, which is not supported")
    config = LoraConfig(peft["r"], peft["lora_alpha"] / peft["r"], peft.get("lora_dropout", 0.0), tuple(peft["target_modules"]))
    trained = {"lora": lora, "memory_table": jnp.asarray(table, jnp.float32)}
    return Adapter(
        compression, config, template, trained, peft["base_model_name_or_path"], info["base_fingerprint"], info.get("origin"),
        info.get("base_identity", {}),
    )  # fmt: skip
