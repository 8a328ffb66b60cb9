"""Base models in model-hub format: config.json, safetensors files or an Orbax copy of them, tokenizer files."""

import dataclasses
import hashlib
import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from icae_jax import errors
from icae_jax.errors import UserError
from icae_jax.interop import files, sources, weights
from icae_jax.interop.config_json import hub_config, read_config
from icae_jax.interop.weights import load_params, save_params
from icae_jax.models import llama
from icae_jax.training.sharding import on_host


def save_base(folder, config, params, tokenizer, dtype="bfloat16"):
    """Writes a hub folder (config.json, generation_config.json, model.safetensors, tokenizer) that transformers loads too."""
    folder = pathlib.Path(folder)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with files.replacing_folder(folder) as tmp:
        files.write_json(tmp / "config.json", hub_config(config, dtype, special))
        files.write_json(tmp / "generation_config.json", special)
        save_params(tmp, config, params, dtype)
        tokenizer.save_pretrained(tmp)


def load_tokenizer(folder):
    """The folder's tokenizer, through transformers; code of the base's own is never run, nor is anybody asked whether to."""
    import transformers

    folder = sources.local_folder(folder, progress=False, with_weights=False)
    if not has_tokenizer(folder):
        raise UserError(f"{folder}: no tokenizer could be loaded (it has no tokenizer.json, tokenizer.model or vocab.json)")

    def load():
        named = folder / "tokenizer_config.json"
        stated = files.read_json(named, "a tokenizer's configuration") if named.exists() and (folder / "tokenizer.json").exists() else {}
        # To look that class up among all others takes seconds, PyTorch's import among them.
        if stated.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in stated:
            return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)

    try:
        return errors.retrying(load, f"reading the tokenizer in {folder}")
    except Exception as error:  # of tokenizers, sentencepiece and jinja2, in types of their own
        if errors.transient(error) or errors.disk_full(error) or isinstance(error, MemoryError):
            raise
        own = _own_tokenizer_code(folder)
        if own:
            raise UserError(
                f"{folder}: the tokenizer is code of the base's own (auto_map: {own}), which is never run here; give a base whose "
                "tokenizer transformers has"
            ) from error
        raise UserError(f"{folder}: no tokenizer could be loaded ({(str(error) or repr(error)).splitlines()[0]})") from error


def _own_tokenizer_code(folder):
    """What a folder's auto_map names as its tokenizer, or ""."""
    for name in ("tokenizer_config.json", "config.json"):
        raw = files.read_json(folder / name, "a configuration") if (folder / name).exists() else {}
        mapped = raw.get("auto_map")
        own = mapped.get("AutoTokenizer") if isinstance(mapped, dict) else None
        if own:
            return ", ".join(sorted({str(c) for c in (own if isinstance(own, list) else [own]) if c}))
    return ""


def has_tokenizer(folder):
    """Whether a folder holds files of a tokenizer."""
    folder = pathlib.Path(folder)
    return any(path.suffix != ".py" for path in folder.glob("tokenizer*")) or (folder / "vocab.json").exists()


def bos_id(tokenizer):
    """The id that the tokenizer itself sets in front of a text, or None."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None


def stop_ids(folder, tokenizer=None):
    """Ids that end a generation: the eos ids of generation_config.json (of config.json, where that has none), and the tokenizer's."""
    found = [getattr(tokenizer, "eos_token_id", None)]
    for path in (pathlib.Path(folder) / name for name in ("generation_config.json", "config.json")):
        eos = files.read_json(path, "the ids that end a text").get("eos_token_id") if path.exists() else None
        if eos is not None:
            stated = eos if isinstance(eos, list) else [eos]
            if not all(i is None or files.is_kind(i, int) for i in stated):
                raise UserError(f"{path}: eos_token_id is {eos!r}, which is not a whole number or a list of them")
            found += stated
            break
    return tuple(sorted({int(i) for i in found if i is not None}))


# ---------------------------------------------------------------------------------------------------------- fingerprint


def fingerprint(config, params):
    """Identity of a base: sha256 over the fields that change results, the final norm and 64 embedding rows in bfloat16.

    64 rows spread over the vocabulary tell one base from another (a fine-tuned one too) without reading gigabytes, and
    rounding makes float32, bfloat16 and converted copies of one base agree.
    """
    return _fingerprint(config, *on_host([params["norm"]["scale"], params["embed"][_fingerprint_rows(config)]]))


def _fingerprint_rows(config):
    return np.linspace(0, config.vocab_size - 1, 64).astype(int)


def _fingerprint(config, norm, rows):
    digest = hashlib.sha256()
    plain = {"max_position_embeddings": config.max_position_embeddings, "windows": ()}
    plain |= dict.fromkeys(("qkv_bias", "qk_norm", "o_bias", "mlp_bias"), False)
    # Fields that came later count only where they are used, so that a base keeps the identity it had before them.
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in plain or v != plain[k]}
    digest.update(json.dumps(fields, sort_keys=True).encode())
    for value in (norm, rows):
        digest.update(value.astype(np.float32).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen base model as everything else uses it: sizes, parameters, tokenizer, stop ids, identity and where it came from.

    tokenizer: None where the folder has none and none was needed. path: as the user gave it, a hub id or URL too.
    """

    config: llama.ModelConfig
    params: dict
    tokenizer: object
    stop_ids: tuple[int, ...]
    fingerprint: str
    path: str


def sizes(source):
    """The `ModelConfig` of a base, without its weights. source: as for `load_base`."""
    return read_config(sources.local_folder(source, with_weights=False))


def load_base(source, dtype=jnp.float32, sharding=None, progress=False, need_tokenizer=True):
    """Loads a base completely: `Base`, whose `path` is the source as it was given.

    source: a folder, a hub id or a URL, see `sources.local_folder`. dtype, sharding, progress: as for `weights.load_params`.
    need_tokenizer: whether a folder without tokenizer files is an error; otherwise the `Base` has None.
    """
    folder = sources.local_folder(source, progress)
    config = read_config(folder)  # first: what is no base at all is not its tokenizer's fault
    tokenizer = load_tokenizer(folder) if need_tokenizer or has_tokenizer(folder) else None
    params = load_params(folder, config, dtype, sharding, progress)
    return Base(config, params, tokenizer, stop_ids(folder, tokenizer), fingerprint(config, params), str(source))


def identify(source):
    """(sizes, fingerprint) of a base; little of it is read, and of a hub's or a bucket's little fetched. source: as for `load_base`."""
    folder = sources.local_folder(source, with_weights=False)
    config = read_config(folder)
    remote = None if weights.has_weights(folder) else sources.remote_opener(source, folder)
    if remote is None:
        return config, fingerprint(config, load_params(folder, config, only=(("embed",), ("norm", "scale"))))
    norm = weights.read_rows(folder, remote, "model.norm.weight")
    rows = weights.read_rows(folder, remote, "model.embed_tokens.weight", _fingerprint_rows(config).tolist())
    return config, _fingerprint(config, norm[0], rows)
