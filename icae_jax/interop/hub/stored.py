"""Which safetensors file holds which tensor of a base, and whether they match config.json."""

import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub import gguf_folder
from icae_jax.models import llama
from icae_jax.models.families import multimodal

WHOLE = "model.safetensors"  # one file with all tensors
INDEX = "model.safetensors.index.json"  # or the index of several
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
# By safetensors' names.
STORED_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
COMPARED_NUMBERS = 1 << 20  # of a tensor, at once
# Weights in formats that are not read, with the remedy.
NOT_READ = {
    "pytorch_model*.bin": "pickled weights (.bin, .pt) are not read; transformers loads them, "
    "and save_pretrained writes safetensors",
    "*.pt": "pickled weights (.bin, .pt) are not read",
    "*.pth": "pickled weights (.pth), usually Meta's original files, are not read; "
    "take the model in the hub's format",
    "consolidated*.safetensors": "the weights in their maker's own format, which is not read; "
    "take the model in the hub's format",
    "*.gguf": "a GGUF file, which is a base by itself; give the file's own path as the base",
    "adapter_model.*": "a LoRA adapter and not a base; "
    "merge it into its base first (peft: merge_and_unload)",
    "*.safetensors": f"{INDEX}, which says which of them holds which tensor, is missing; "
    "download the folder again",
}


def weight_map(folder: str | pathlib.Path) -> dict[str, str] | None:
    """`{tensor name: file name}` from the folder's weight index; None if a single file holds all.

    A single file that the index does not name takes precedence, as in transformers. UserError if
    the index is malformed or names files outside the folder.
    """
    index, whole = pathlib.Path(folder) / INDEX, pathlib.Path(folder) / WHOLE
    if not index.exists():
        return None
    content = files.read_json(index, "the weight index")
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(
            f"{index}: no weight_map, which says in which file each tensor is; "
            "download the folder again"
        )
    for name, file in names.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
            raise UserError(
                f"{index}: weight_map has {name} in {file!r}; "
                "only safetensors files of the folder itself are read"
            )
    if whole.exists() and WHOLE not in names.values():
        errors.say(
            f"{whole} is read, as by transformers; {INDEX} and the {len(set(names.values()))} "
            "files that it names are not"
        )
        return None
    return names


def weight_files(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """The folder's safetensors files, or the GGUF file that it stands for.

    UserError, which names what is there instead, if there are none.
    """
    folder = pathlib.Path(folder)
    if gguf := gguf_folder.source(folder):
        return [gguf]
    names = weight_map(folder)
    if names is not None:
        return sorted({folder / name for name in names.values()})
    if (folder / WHOLE).exists():
        return [folder / WHOLE]
    raise UserError(f"{folder}: no {WHOLE}, no {INDEX} and no Orbax copy{_instead(folder)}")


def _instead(folder):
    """The end of a message: weights of other formats that a folder holds, or ""."""
    for pattern, remedy in NOT_READ.items():
        if names := sorted(path.name for path in folder.glob(pattern)):
            more = f" and {len(names) - 1} more" if names[1:] else ""
            return f"; {names[0]}{more}: {remedy}"
    return ""


def open_tensors(
    folder: pathlib.Path,
    config: llama.ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    enter: Callable[[Any], Any],
) -> dict[str, tuple[pathlib.Path, Any]]:
    """`{name: (file, slice)}` of the model's tensors, none of which is read yet.

    A slice is safetensors', or one of a GGUF file that is indexed alike.

    Only a tied head is compared with its embeddings. Of a multimodal checkpoint, the text part's
    tensors go by the names that they have in a text model. Other tensors in the files are named on
    stderr.

    Args:
        folder: holds the safetensors files, or stands for a GGUF file.
        config: the model.
        shapes: of every tensor by its name, as config.json implies them.
        enter: enters the context of a file, in which its slices can be read.

    Raises:
        UserError: the files and config.json contradict each other.
    """
    index = {multimodal.text_name(name): f for name, f in (weight_map(folder) or {}).items()}
    holders: dict[str, dict[str, tuple]] = {}  # tensor name -> {file name: (path, slice)}
    gguf = gguf_folder.source(folder)
    for path in weight_files(folder):
        if gguf:
            file = gguf_folder.open_tensors(folder)
        elif path.exists():
            file = files.read_safetensors(
                path, lambda path: safetensors.safe_open(path, framework="numpy")
            )
        else:
            raise UserError(
                f"{path}: named in the weight index but not there; download the folder again"
            )
        file = enter(file)
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            place = path, file.get_slice(name)
            holders.setdefault(multimodal.text_name(name), {})[path.name] = place
    # As in transformers, the index decides, and the last file for tensors that it does not name.
    stored = {
        name: places.get(index[name]) if name in index else list(places.values())[-1]
        for name, places in holders.items()
    }
    twice = sorted(name for name, places in holders.items() if len(places) > 1)
    if twice:
        errors.say(
            f"{folder}: in several files each, and read from the one that {INDEX} names: "
            f"{_listed(twice)}"
        )
    tied_head = stored.get(HEAD) if config.tie_word_embeddings else None
    if tied_head is not None and TABLE not in stored:  # one tensor under its other name
        errors.say(
            f"{folder}: {TABLE} is not there; {HEAD} is read for it, "
            "since config.json says that they are one"
        )
        stored[TABLE] = tied_head
    _check(gguf or folder, config, shapes, stored, index)
    if tied_head is not None and not _equal(stored[TABLE][1], tied_head[1]):
        raise UserError(
            f"{folder}: tie_word_embeddings is true in config.json, and {HEAD} differs from "
            f"{TABLE}; set tie_word_embeddings to false in config.json to use the stored head"
        )
    return {name: stored[name] for name in shapes}


def _listed(lines, what=""):
    """A count of tensors, and the first five of them."""
    more = ", …" if len(lines) > 5 else ""
    count = f"{len(lines)} tensor{'s' * (len(lines) > 1)}"
    first = ", ".join(lines[:5])
    return f"{count} {what}: {first}{more}" if what else f"{count} ({first}{more})"


def _equal(one, other):
    """Whether two stored tensors hold the same numbers; they are read block by block."""
    if one.get_shape() != other.get_shape() or other.get_dtype() not in STORED_DTYPES:
        return False
    count, *rest = one.get_shape()
    rows = max(1, COMPARED_NUMBERS // math.prod(rest))
    blocks = (slice(start, min(start + rows, count)) for start in range(0, count, rows))
    return all(
        np.array_equal(*(np.asarray(tensor[block], np.float64) for tensor in (one, other)))
        for block in blocks
    )


# Tensors that have no effect, since they are computed anew.
_HARMLESS_TENSORS = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
# Signs of quantised weights or of an unmerged adapter.
_OTHER_WEIGHTS = re.compile(
    r".*\b(lora_\w+|base_layer|modules_to_save|(weight|input|output|k|v)_(scale|zero_point)\w*"
    r"|weight_(packed|shape|g_idx)|qweight|qzeros|scales|g_idx|SCB|weight_format|absmax|quant_map"
    r"|quant_state\S*|nested_\w+|_amax)\b.*"
)
_OWN_PARTS = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")


def _check(folder, config, shapes, stored, index):
    """Compares the stored tensors with those of the model.

    UserError if tensors are missing, have other shapes, are not floating point, or belong to a part
    of the model without being read.
    """
    missing = [name for name in shapes if stored.get(name) is None]
    misplaced = [f"{name} (in {index[name]})" for name in missing if name in stored]
    missing = [name for name in missing if name not in stored]
    wrong, unread, other = [], [], []
    for name, place in stored.items():
        if name not in shapes:
            if name == HEAD or _HARMLESS_TENSORS.fullmatch(name):
                continue
            own = name.startswith(_OWN_PARTS)
            (unread if own or _OTHER_WEIGHTS.fullmatch(name) else other).append(name)
        elif place is not None:
            path, tensor = place
            shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
            if shape != shapes[name]:
                wrong.append(
                    f"{name} has shape {shape} in {path.name}, config.json implies {shapes[name]}"
                )
            elif dtype not in STORED_DTYPES:
                wrong.append(
                    f"{name} is {dtype} in {path.name}; only {', '.join(STORED_DTYPES)} are read"
                )
    problems = {
        "missing": missing,
        f"not where {INDEX} has them": misplaced,
        "not as expected": wrong,
        "not in the model of config.json": unread + other * bool(missing),
    }
    refuse(folder, problems, _remedy(config, missing, unread))
    if other:
        errors.say(f"{folder}: not of this model and not read: {_listed(sorted(other))}")


def _remedy(config, missing, unread):
    """The end of a message: what may be wrong with config.json."""
    numbers = (re.match(r"model\.layers\.(\d+)\.", name) for name in missing + unread)
    layers = max((int(match[1]) + 1 for match in numbers if match), default=0)
    remedies = {
        "attention_bias and mlp_bias of config.json say which projections have biases": any(
            name.endswith("_proj.bias") for name in missing + unread
        ),
        f"num_hidden_layers is {config.num_layers}": layers > config.num_layers,
        "where the head is the embeddings, set tie_word_embeddings to true": missing == [HEAD],
        "merge LoRA into its base (peft: merge_and_unload), and take weights that are not "
        "quantised": any(_OTHER_WEIGHTS.fullmatch(name) for name in unread),
    }
    return "".join(f"; {text}" for text, applies in remedies.items() if applies)


def refuse(folder: object, problems: dict[str, list[str]], remedy: str = "") -> None:
    """UserError that lists the first tensors with each kind of problem, if there are any."""
    lines = [_listed(sorted(names), problem) for problem, names in problems.items() if names]
    if lines:
        raise UserError(f"{folder}: {'; '.join(lines)}{remedy}")
