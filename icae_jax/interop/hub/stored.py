"""The safetensors files of a base: which of them holds which tensor, and whether they are the model of its config.json."""

import math
import pathlib
import re
from collections.abc import Callable

import ml_dtypes
import numpy as np
import safetensors

from icae_jax import files
from icae_jax.errors import UserError
from icae_jax.models import llama

WHOLE, INDEX = (
    "model.safetensors",
    "model.safetensors.index.json",
)  # one file, or the index of several
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
# By the names that safetensors has for them.
STORED_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
COMPARED_NUMBERS = 1 << 20  # of a tensor, at once
# Other forms of weights, with what to do.
NOT_READ = {
    "pytorch_model*.bin": "pickled weights (.bin, .pt) are not read; transformers loads them, and save_pretrained writes safetensors",
    "*.pt": "pickled weights (.bin, .pt) are not read",
    "*.pth": "pickled weights (.pth), of Meta's original files as a rule, are not read; take the model in the hub's format",
    "consolidated*.safetensors": "the weights in their maker's own format, which is not read; take the model in the hub's format",
    "*.gguf": "GGUF files are not read; take the model in the hub's format",
    "adapter_model.*": "a LoRA adapter and not a base; merge it into its base first (peft: merge_and_unload)",
    "*.safetensors": f"which of them holds which tensor says {INDEX}, which is not there; download the folder again",
}


def weight_map(folder: pathlib.Path) -> dict[str, str] | None:
    """`{tensor's name: file's name}` of the folder's weight index, or None where there is none, or one file that it does not name holds
    all: that file is then read, as by transformers. UserError on files elsewhere.
    """
    index, whole = pathlib.Path(folder) / INDEX, pathlib.Path(folder) / WHOLE
    if not index.exists():
        return None
    content = files.read_json(index, "the weight index")
    held = content.get("weight_map")
    if not isinstance(held, dict) or not held:
        raise UserError(
            f"{index}: no weight_map, which says in which file each tensor is; download the folder again"
        )
    for name, file in held.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
            raise UserError(
                f"{index}: weight_map has {name} in {file!r}; only safetensors files of the folder itself are read"
            )
    if whole.exists() and WHOLE not in held.values():
        files.say(
            f"{whole} is read, as by transformers; {INDEX} and the {len(set(held.values()))} files that it names are not"
        )
        return None
    return held


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder's safetensors files; the index names them where there are many."""
    folder = pathlib.Path(folder)
    held = weight_map(folder)
    if held is not None:
        return sorted({folder / name for name in held.values()})
    if (folder / WHOLE).exists():
        return [folder / WHOLE]
    raise UserError(f"{folder}: no {WHOLE}, no {INDEX} and no Orbax copy{_instead(folder)}")


def _instead(folder):
    """What a folder without weights that are read holds in their place, as the end of a message; "" for nothing of the kind."""
    for pattern, what in NOT_READ.items():
        if held := sorted(path.name for path in folder.glob(pattern)):
            return f"; {held[0]}{f' and {len(held) - 1} more' if held[1:] else ''}: {what}"
    return ""


def find(
    folder: pathlib.Path,
    config: llama.ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    entered: Callable,
) -> dict[str, tuple[pathlib.Path, object]]:
    """`{name: (file's path, safetensors slice)}` of the model's tensors; none of them is read yet, but head and embeddings to compare them.

    shapes: of every tensor by its name, as config.json implies them. entered: enters a file's context, in which its slices can be read.
    UserError where the files and config.json contradict each other; what else is there, and not read, is named on stderr.
    """
    held, holders = weight_map(folder) or {}, {}
    for path in weight_files(folder):
        if not path.exists():
            raise UserError(
                f"{path}: named in the weight index but not there; download the folder again"
            )
        file = entered(
            files.read_safetensors(
                path, lambda path: safetensors.safe_open(path, framework="numpy")
            )
        )
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            holders.setdefault(name, {})[path.name] = path, file.get_slice(name)
    # The index decides; what it does not name is where the last file has it, as for transformers.
    stored = {
        name: of.get(held[name]) if name in held else list(of.values())[-1]
        for name, of in holders.items()
    }
    twice = sorted(name for name, of in holders.items() if len(of) > 1)
    if twice:
        files.say(
            f"{folder}: in several files each, and read from that which {INDEX} names: {_few(twice)}"
        )
    tied_head = stored.get(HEAD) if config.tie_word_embeddings else None
    if tied_head is not None and TABLE not in stored:  # one tensor under its other name
        files.say(
            f"{folder}: {TABLE} is not there; {HEAD} is read for it, since config.json says that they are one"
        )
        stored[TABLE] = tied_head
    _check(folder, config, shapes, stored, held)
    if tied_head is not None and not _equal(stored[TABLE][1], tied_head[1]):
        raise UserError(
            f"{folder}: tie_word_embeddings is true in config.json, and {HEAD} differs from {TABLE}; set tie_word_embeddings to false in "
            "config.json to use the stored head"
        )
    return {name: stored[name] for name in shapes}


def _few(names):
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"


def _equal(one, other):
    """Whether two tensors of files hold the same numbers; blocks of them are read at a time."""
    if one.get_shape() != other.get_shape() or other.get_dtype() not in STORED_DTYPES:
        return False
    count, *rest = one.get_shape()
    rows = max(1, COMPARED_NUMBERS // math.prod(rest))
    blocks = (slice(start, min(start + rows, count)) for start in range(0, count, rows))
    return all(
        np.array_equal(*(np.asarray(tensor[block], np.float64) for tensor in (one, other)))
        for block in blocks
    )


# Tensors beside those of the model: without effect, since computed anew; and signs that its weights are not what they seem to be.
_HARMLESS_TENSORS = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_OTHER_WEIGHTS = re.compile(
    r".*\b(lora_\w+|base_layer|modules_to_save|(weight|input|output|k|v)_(scale|zero_point)\w*|weight_(packed|shape|g_idx)|qweight|qzeros"
    r"|scales|g_idx|SCB|weight_format|absmax|quant_map|quant_state\S*|nested_\w+|_amax)\b.*"
)


def _check(folder, config, shapes, stored, held):
    """UserError where tensors are missing, of other shapes, not floating point, or there and not read though the model has such a part."""
    missing = [name for name in shapes if stored.get(name) is None]
    misplaced = [f"{name} (in {held[name]})" for name in missing if name in stored]
    missing = [name for name in missing if name not in stored]
    wrong, unread, other = [], [], []
    for name, place in stored.items():
        if name not in shapes:
            if name == HEAD or _HARMLESS_TENSORS.fullmatch(name):
                continue
            own = name.startswith(
                ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
            )
            (unread if own or _OTHER_WEIGHTS.fullmatch(name) else other).append(name)
        elif place is not None:
            shape, dtype = tuple(place[1].get_shape()), place[1].get_dtype()
            if shape != shapes[name]:
                wrong.append(
                    f"{name} has shape {shape} in {place[0].name}, config.json implies {shapes[name]}"
                )
            elif dtype not in STORED_DTYPES:
                wrong.append(
                    f"{name} is {dtype} in {place[0].name}; only {', '.join(STORED_DTYPES)} are read"
                )
    problems = {
        "missing": missing,
        f"not where {INDEX} has them": misplaced,
        "not as expected": wrong,
    }
    refuse(
        folder,
        problems | {"not in the model of config.json": unread + other * bool(missing)},
        _remedy(config, missing, unread),
    )
    if other:
        files.say(f"{folder}: not of this model and not read: {_few(sorted(other))}")


def _remedy(config, missing, unread):
    """What may be wrong with config.json, as the end of a message."""
    layers = max(
        (
            int(match[1]) + 1
            for match in map(re.compile(r"model\.layers\.(\d+)\.").match, missing + unread)
            if match
        ),
        default=0,
    )
    remedies = {
        "attention_bias and mlp_bias of config.json say which projections have biases": any(
            name.endswith("_proj.bias") for name in missing + unread
        ),
        f"num_hidden_layers is {config.num_layers}": layers > config.num_layers,
        "where the head is the embeddings, set tie_word_embeddings to true": missing == [HEAD],
        "merge LoRA into its base (peft: merge_and_unload), and take weights that are not quantised": any(
            _OTHER_WEIGHTS.fullmatch(name) for name in unread
        ),
    }
    return "".join(f"; {text}" for text, holds in remedies.items() if holds)


def refuse(folder: object, problems: dict[str, list[str]], remedy: str = "") -> None:
    """UserError that lists the first tensors of each kind of problem, where there are any."""
    found = [
        f"{len(lines)} tensor{'s' * (len(lines) > 1)} {what}: {', '.join(sorted(lines)[:5])}{', …' if len(lines) > 5 else ''}"
        for what, lines in problems.items()
        if lines
    ]
    if found:
        raise UserError(f"{folder}: {'; '.join(found)}{remedy}")
