"""A GGUF file as a folder in the hub's format, so that it is a base wherever a folder is one.

The folder is in the cache. It holds config.json, generation_config.json and the tokenizer's files,
made of the file's metadata once; the tensors stay where they are (`gguf_tensors`), and NOTE says
where that is.
"""

import hashlib
import pathlib

from icae_jax import cache, errors, files
from icae_jax.interop.hub import gguf_config, gguf_file, gguf_tensors, gguf_tokenizer
from icae_jax.models.families import config_json

NOTE = "params.gguf.json"
_VERSION = 1  # of what is made of a file; it is made anew by another
_HASHED_BYTES = 16 << 20  # the most metadata, those of a vocabulary of 262,144 tokens, are 9 MB


def source(folder: pathlib.Path) -> pathlib.Path | None:
    """The GGUF file that a folder stands for, None if it is another folder."""
    note = folder / NOTE
    if not note.is_file():
        return None
    return pathlib.Path(files.read_json(note, "where a GGUF file is")["path"])


def open_tensors(folder: pathlib.Path) -> gguf_tensors.Tensors:
    """The tensors of the file that a folder stands for."""
    file = gguf_file.read(source(folder))
    raw = gguf_config.config_json(file)
    return gguf_tensors.Tensors(
        file,
        gguf_config.architecture(file),
        raw["num_attention_heads"],
        raw["num_key_value_heads"],
    )


def folder_of(path: pathlib.Path) -> pathlib.Path:
    """The folder that stands for a GGUF file; it is made if the file is new or has changed.

    UserError if the file is damaged, or its model or tokenizer is not one that is read.
    """
    path = path.absolute()
    key = hashlib.sha256(f"{_VERSION} {path}".encode("utf-8", "surrogateescape"))
    for part in gguf_file.parts(path):
        if not part.exists():
            continue  # `gguf_file.read` refuses it
        status = part.stat()
        key.update(f" {status.st_size} {status.st_mtime_ns} ".encode())
        with errors.naming(f"{part}: cannot be read"), part.open("rb") as file:
            # Also the metadata, since a file may be replaced by one of the same size and time.
            key.update(file.read(_HASHED_BYTES))
    relative = pathlib.Path("gguf") / key.hexdigest()[:32]
    folder = cache.folder(holding=relative / NOTE) / relative
    if not (folder / NOTE).is_file():
        with cache.alone(folder, f"reading {path.name}"):
            if not (folder / NOTE).is_file():
                _make(path, folder)
    return folder


def _make(path, folder):
    file = gguf_file.read(path)
    raw = gguf_config.config_json(file)
    config = config_json.parse_config(raw, path)
    with files.replacing_folder(folder) as tmp:
        generation = gguf_tokenizer.stated_config(file)
        if gguf_tokenizer.has_tokenizer(file):
            gguf_tokenizer.write(file, tmp, config.vocab_size, config.max_position_embeddings)
        files.write_json(tmp / "generation_config.json", generation)
        files.write_json(tmp / "config.json", raw | generation)
        files.write_json(tmp / NOTE, {"path": str(path)})
