"""Base models in the hub's format: config.json, safetensors files or an Orbax copy, tokenizer."""

import dataclasses
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub import locations, placing, remote_rows, stored_scheme, weights
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.identity import (
    fingerprint,
    fingerprint_of,
    fingerprint_rows,
    weights_fingerprint,
)
from icae_jax.interop.hub.text import Tokenizer, set_stop_ids
from icae_jax.interop.hub.tokenizer import has_tokenizer, load_tokenizer
from icae_jax.interop.hub.weights import save_params
from icae_jax.models import llama
from icae_jax.models.families.architectures import computed_by
from icae_jax.models.families.config_json import hub_config, read_config
from icae_jax.models.schemes import SCHEMES


def save_base(
    folder: str | os.PathLike,
    config: llama.ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    dtype: str = "bfloat16",
) -> None:
    """Writes a hub folder that transformers loads too.

    It holds config.json, generation_config.json, model.safetensors and the tokenizer. For some
    model types transformers uses a tokenizer class of its own, which may encode differently. The
    same model is then written as a Llama; where it is not one (sliding windows), a note says so.
    """
    folder = pathlib.Path(folder)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with files.replacing_folder(folder) as tmp:
        tokenizers.save(tmp, tokenizer)
        files.write_json(tmp / "generation_config.json", special)
        files.write_json(tmp / "config.json", hub_config(config, dtype, special))
        if not tokenizers.read_alike(tmp):
            as_llama = _as_llama(config, params)
            if as_llama is None:
                errors.say(
                    f"{folder}: transformers' own tokenizer for this model's type reads texts "
                    "differently than tokenizer.json says"
                )
            else:
                config, params = as_llama
                files.write_json(tmp / "config.json", hub_config(config, dtype, special))
        save_params(tmp, config, params, dtype)


def _as_llama(config: llama.ModelConfig, params: dict) -> tuple[llama.ModelConfig, dict] | None:
    """The same model as a Llama with biases in all attention projections, that of o zero.

    A Llama's tokenizer class is the one that tokenizer_config.json names, while Qwen2's has its own
    pre-tokenizer. None if the model is not a Llama.
    """
    if not config.qkv_bias or config.o_bias:
        return None
    as_llama = dataclasses.replace(config, o_bias=True)
    if computed_by(as_llama) != "LlamaForCausalLM":
        return None
    attention = params["layers"]["self_attn"]
    zeros = jnp.zeros((config.num_layers, config.hidden_size), attention["o_proj"]["kernel"].dtype)
    attention = attention | {"o_proj": attention["o_proj"] | {"bias": zeros}}
    layers = params["layers"] | {"self_attn": attention}
    return as_llama, params | {"layers": layers}


def stop_ids(folder: str | os.PathLike, tokenizer: Tokenizer | None = None) -> tuple[int, ...]:
    """The ids that end a generation, sorted: the tokenizer's eos and those of the folder.

    The latter are the eos ids of generation_config.json, or else of config.json. UserError if they
    are not whole numbers.
    """
    ids = [getattr(tokenizer, "eos_token_id", None)]
    for path in (pathlib.Path(folder) / name for name in ("generation_config.json", "config.json")):
        if not path.exists():
            continue
        eos = files.read_json(path, "the ids that end a text").get("eos_token_id")
        if eos is not None:
            stated = eos if isinstance(eos, list) else [eos]
            if not all(i is None or files.is_kind(i, int) for i in stated):
                raise UserError(
                    f"{path}: eos_token_id is {eos!r}, which is not a whole number "
                    "or a list of them"
                )
            ids += stated
            break
    return tuple(sorted({int(i) for i in ids if i is not None}))


# ------------------------------------------------------------------------------------- loading


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen base model and what identifies it.

    tokenizer: None if the folder has none and none was needed. path: as the user gave it, such as a
    hub id or URL. quantize: the scheme that the parameters' numbers are in (`models.schemes`), ""
    for none; those of a quantised copy stay rounded when they are dequantised.
    weights: what `identity` says of a quantised base's weights; "" to compute it from `params`.
    """

    config: llama.ModelConfig
    params: dict
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    fingerprint: str
    path: str
    quantize: str = ""
    weights: str = ""

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Fingerprints of what changes results beyond `fingerprint`: "weights", "tokenizer".

        Those of a quantised base are of the weights that it was made of.
        """
        identity = {"weights": self.weights or weights_fingerprint(self.params, self.path)}
        if self.tokenizer is not None:
            identity["tokenizer"] = tokenizers.fingerprint(self.tokenizer)
        return identity


def precision(base_dtype: str | DTypeLike | None) -> tuple[str, str | None]:
    """(dtype of activations, `quantize` of `load_base`) for a value of --base_dtype.

    With a quantised base, activations are bfloat16 on accelerators and float32 on CPUs. None is
    what is stored, with float32 activations everywhere. UserError if it is none of them.
    """
    if base_dtype is None:
        return "float32", ""
    name = base_dtype if base_dtype in SCHEMES else jnp.dtype(base_dtype).name
    if name in SCHEMES:
        return "float32" if jax.default_backend() == "cpu" else "bfloat16", name
    return name, None


def sizes(source: str | os.PathLike) -> llama.ModelConfig:
    """The `ModelConfig` of a base, without its weights.

    Args:
        source: a folder, a hub id or a URL, see `locations.local_folder`.
    """
    return read_config(locations.local_folder(source, with_weights=False))


def load_base(
    source: str | os.PathLike,
    dtype: DTypeLike = jnp.float32,
    sharding: Sharding | placing.Rule | None = None,
    progress: bool = False,
    need_tokenizer: bool = True,
    quantize: str | None = "",
) -> Base:
    """Loads a base completely.

    Args:
        source: a folder, a hub id or a URL, see `locations.local_folder`.
        dtype: of the parameters; this and the next two are those of `weights.load_params`.
        sharding: see there.
        progress: see there.
        need_tokenizer: whether a folder without tokenizer files is an error.
        quantize: a scheme of `models.schemes`; "" for what is stored, None for full precision.
    """
    folder = locations.local_folder(source, progress)
    config = read_config(folder)  # first: without one, a missing tokenizer is beside the point
    tokenizer = load_tokenizer(folder) if need_tokenizer or has_tokenizer(folder) else None
    stops = stop_ids(folder, tokenizer)
    tokenizers.check_ids(
        [stops],
        config.vocab_size,
        lambda _: f"{folder}: what ends a text (eos_token_id)",
        tokenizer,
    )
    if tokenizer is not None:
        set_stop_ids(tokenizer, stops)
        beyond = sum(i >= config.vocab_size for i in tokenizer.get_vocab().values())
        if beyond:
            errors.say(
                f"base {source}: {beyond} token(s) of its tokenizer have no row in the embedding "
                f"table of {config.vocab_size:,}; a text that holds one is refused"
            )
    loaded = weights.load(folder, config, dtype, sharding, progress, quantize=quantize)
    own = loaded.fingerprint or fingerprint(config, loaded.params)
    return Base(
        config, loaded.params, tokenizer, stops, own, str(source), loaded.quantize, loaded.weights
    )


def without_weights(source: str | os.PathLike, weights: str, quantize: str | None = "") -> Base:
    """A base without parameters: what tells in seconds whether something is of it.

    It reads, or fetches, only a small part of the weights.

    Args:
        source: a folder, a hub id or a URL, see `locations.local_folder`.
        weights: what its `identity` is to say of them.
        quantize: see `load_base`.
    """
    folder = locations.local_folder(source, with_weights=False)
    config, own = identify(source)
    stored = stored_scheme.read(folder)
    scheme = stored.scheme if stored and quantize == "" else quantize or ""
    tokenizer = load_tokenizer(folder)
    stops = stop_ids(folder, tokenizer)
    set_stop_ids(tokenizer, stops)
    return Base(config, {}, tokenizer, stops, own, str(source), scheme, weights)


def identify(source: str | os.PathLike) -> tuple[llama.ModelConfig, str]:
    """(sizes, fingerprint) of a base; reads, or fetches, only a small part of its weights.

    Args:
        source: a folder, a hub id or a URL, see `locations.local_folder`.
    """
    folder = locations.local_folder(source, with_weights=False)
    config = read_config(folder)
    stored = stored_scheme.read(folder)
    if stored is not None:
        return config, stored.fingerprint
    remote = None if weights.has_weights(folder) else locations.remote_opener(source, folder)
    if remote is None:
        params = weights.load_params(folder, config, only=(("embed",), ("norm", "scale")))
        return config, fingerprint(config, params)
    norm = remote_rows.read_rows(folder, remote, "model.norm.weight")
    rows = remote_rows.read_rows(
        folder, remote, "model.embed_tokens.weight", fingerprint_rows(config).tolist()
    )
    return config, fingerprint_of(config, norm[0], rows)
