"""Base models in the hub's format: config.json, safetensors files or an Orbax copy, tokenizer."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub import locations, placing, remote_rows, weights
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.text import Tokenizer, set_stop_ids
from icae_jax.interop.hub.tokenizer import has_tokenizer, load_tokenizer
from icae_jax.interop.hub.weights import load_params, save_params
from icae_jax.models import llama
from icae_jax.models.families.architectures import computed_by
from icae_jax.models.families.config_json import hub_config, read_config
from icae_jax.runtime.sharding import on_host


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


# ------------------------------------------------------------------------------------ identity


def fingerprint(config: llama.ModelConfig, params: dict) -> str:
    """Identity of a base: a sha256 of what is read quickly.

    It covers the fields that change results, the final norm and 64 embedding rows in bfloat16.
    Rows spread over the vocabulary tell bases apart, fine-tunes too, without reading gigabytes.
    Rounding makes float32, bfloat16 and converted copies of one base agree.
    """
    norm, rows = params["norm"]["scale"], params["embed"][_fingerprint_rows(config)]
    return _fingerprint(config, *on_host([norm, rows]))


# Fields of `ModelConfig`: those that count whatever they are, and those that change no result.
_ALWAYS_COUNT = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
    *("head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings"),
}
_NEVER_COUNT = ("max_position_embeddings", "fused")


def _fingerprint_rows(config):
    return np.linspace(0, config.vocab_size - 1, 64).astype(int)


def _fingerprint(config, norm, rows):
    digest = hashlib.sha256()
    # Fields that were added later count only if they are used, so that older fingerprints hold.
    plain = {f.name: f.default for f in dataclasses.fields(config) if f.name not in _ALWAYS_COUNT}
    plain |= {name: getattr(config, name) for name in _NEVER_COUNT}
    fields = {
        k: v for k, v in dataclasses.asdict(config).items() if k not in plain or v != plain[k]
    }
    digest.update(json.dumps(fields, sort_keys=True).encode())
    for value in (norm, rows):
        digest.update(value.astype(np.float32).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


@jax.jit
def _checksums(params):
    """Two checksums of every parameter in bfloat16, and whether it is finite; by layer if stacked.

    A checksum is a sum, modulo 2^32, of each value's bits times a hash of its index, so it does not
    depend on devices or the order of summation.
    """

    def hash_bits(x):  # constants of the lowbias32 hash
        x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        return x ^ (x >> 16)

    def checksums(x):
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis, n in enumerate(x.shape):
            index = index * jnp.uint32(n) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        sums = [
            jnp.sum((bits + 1) * hash_bits(index + jnp.uint32(salt)), dtype=jnp.uint32)
            for salt in (1, 0x9E3779B9)
        ]
        return *sums, jnp.isfinite(x).all()

    # Layer by layer, since XLA on CPUs materialises the indices.
    layers = jax.tree.map(lambda x: jax.lax.map(checksums, x), params["layers"])
    others = {name: value for name, value in params.items() if name != "layers"}
    return jax.tree.map(checksums, others) | {"layers": layers}


def weights_fingerprint(params: dict, source: str = "") -> str:
    """Identity of all of a base's weights, rounded to bfloat16: a sha256 of their checksums.

    A fine-tune may share the embedding rows and the norm that `fingerprint` reads with its base.

    Args:
        params: the base.
        source: where it comes from, for messages.

    Raises:
        UserError: a weight is not finite.
    """
    digest = hashlib.sha256()
    checksums = jax.tree_util.tree_leaves_with_path(
        on_host(_checksums(params)), is_leaf=lambda x: isinstance(x, tuple)
    )
    for path, (*sums, finite) in checksums:
        name = ".".join(key.key for key in path)
        if not np.all(finite):
            raise UserError(
                f"base {source}: {name} holds numbers that are not finite; the weights are "
                "damaged, download them again"
            )
        digest.update(name.encode())
        for value in sums:
            digest.update(np.asarray(value, np.uint32).tobytes())
    return digest.hexdigest()


_DIFFERS = {
    "tokenizer": "encodes texts differently; give the base with the tokenizer that it was made "
    "with",
    "weights": "has other weights, as a fine-tune of that base has; give the base that it was made "
    "with",
}


def check_identity(what: str, stated: dict[str, str | None], have: dict[str, str]) -> None:
    """UserError if an adapter or a memory was made with another tokenizer or other weights.

    A note says if it does not tell, as those of earlier versions do not.

    Args:
        what: the adapter or memory, for messages.
        stated: the identities that it carries.
        have: `Base.identity`.
    """
    for name, own in have.items():
        if stated.get(name) not in (None, "", own):
            raise UserError(
                f"{what} was made with {name} {stated[name][:12]}, but the base's is {own[:12]}: "
                f"it {_DIFFERS[name]}"
            )
    unstated = [name for name in have if not stated.get(name)]
    if unstated:
        errors.say(
            f"{what} does not say with which {' and '.join(unstated)} it was made; "
            "taken to be the base's"
        )


# ------------------------------------------------------------------------------------- loading


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen base model and what identifies it.

    tokenizer: None if the folder has none and none was needed. path: as the user gave it, such as a
    hub id or URL.
    """

    config: llama.ModelConfig
    params: dict
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    fingerprint: str
    path: str

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Fingerprints of what changes results beyond `fingerprint`: "weights", "tokenizer"."""
        identity = {"weights": weights_fingerprint(self.params, self.path)}
        if self.tokenizer is not None:
            identity["tokenizer"] = tokenizers.fingerprint(self.tokenizer)
        return identity


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
) -> Base:
    """Loads a base completely.

    Args:
        source: a folder, a hub id or a URL, see `locations.local_folder`.
        dtype: of the parameters; this and the next two are those of `weights.load_params`.
        sharding: see there.
        progress: see there.
        need_tokenizer: whether a folder without tokenizer files is an error.
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
    params = load_params(folder, config, dtype, sharding, progress)
    return Base(config, params, tokenizer, stops, fingerprint(config, params), str(source))


def identify(source: str | os.PathLike) -> tuple[llama.ModelConfig, str]:
    """(sizes, fingerprint) of a base; reads, or fetches, only a small part of its weights.

    Args:
        source: a folder, a hub id or a URL, see `locations.local_folder`.
    """
    folder = locations.local_folder(source, with_weights=False)
    config = read_config(folder)
    remote = None if weights.has_weights(folder) else locations.remote_opener(source, folder)
    if remote is None:
        params = load_params(folder, config, only=(("embed",), ("norm", "scale")))
        return config, fingerprint(config, params)
    norm = remote_rows.read_rows(folder, remote, "model.norm.weight")
    rows = remote_rows.read_rows(
        folder, remote, "model.embed_tokens.weight", _fingerprint_rows(config).tolist()
    )
    return config, _fingerprint(config, norm[0], rows)
