"""Base models in model-hub format: config.json, safetensors files or an Orbax copy of them, tokenizer files."""

import dataclasses
import functools
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from icae_jax import files
from icae_jax.errors import UserError
from icae_jax.interop.hub import locations, weights
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.text import STOPS
from icae_jax.interop.hub.tokenizer import bos_id, has_tokenizer, load_tokenizer  # noqa: F401 - of a base, as all else here
from icae_jax.interop.hub.weights import load_params, save_params
from icae_jax.models import llama
from icae_jax.models.families.config_json import hub_config, read_config
from icae_jax.runtime.sharding import on_host


def save_base(folder, config, params, tokenizer, dtype="bfloat16"):
    """Writes a hub folder (config.json, generation_config.json, model.safetensors, tokenizer) that transformers loads too.

    Where transformers has a tokenizer of its own for the model's type, which would read texts otherwise, the same model is written as a
    Llama; where it is none (sliding windows), that is said.
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
                files.say(
                    f"{folder}: transformers' own tokenizer for this model's type reads texts otherwise than tokenizer.json says"
                )
            else:
                config, params = as_llama
                files.write_json(tmp / "config.json", hub_config(config, dtype, special))
        save_params(tmp, config, params, dtype)


def _as_llama(config, params):
    """The same model with biases in all of attention's projections, o's zero: a Llama, whose tokenizer's class is the one that
    tokenizer_config.json names, where Qwen2's is one with a pre-tokenizer of its own. None where no Llama computes it.
    """
    if not config.qkv_bias or config.windows or config.qk_norm:
        return None
    attention = params["layers"]["self_attn"]
    zeros = jnp.zeros((config.num_layers, config.hidden_size), attention["o_proj"]["kernel"].dtype)
    attention = attention | {"o_proj": attention["o_proj"] | {"bias": zeros}}
    return dataclasses.replace(config, o_bias=True), params | {
        "layers": params["layers"] | {"self_attn": attention}
    }


def stop_ids(folder, tokenizer=None):
    """Ids that end a generation: the eos ids of generation_config.json (of config.json, where that has none), and the tokenizer's."""
    found = [getattr(tokenizer, "eos_token_id", None)]
    for path in (pathlib.Path(folder) / name for name in ("generation_config.json", "config.json")):
        eos = (
            files.read_json(path, "the ids that end a text").get("eos_token_id")
            if path.exists()
            else None
        )
        if eos is not None:
            stated = eos if isinstance(eos, list) else [eos]
            if not all(i is None or files.is_kind(i, int) for i in stated):
                raise UserError(
                    f"{path}: eos_token_id is {eos!r}, which is not a whole number or a list of them"
                )
            found += stated
            break
    return tuple(sorted({int(i) for i in found if i is not None}))


# ---------------------------------------------------------------------------------------------------------- fingerprint


def fingerprint(config, params):
    """Identity of a base: sha256 over the fields that change results, the final norm and 64 embedding rows in bfloat16.

    64 rows spread over the vocabulary tell one base from another (a fine-tuned one too) without reading gigabytes, and
    rounding makes float32, bfloat16 and converted copies of one base agree.
    """
    return _fingerprint(
        config, *on_host([params["norm"]["scale"], params["embed"][_fingerprint_rows(config)]])
    )


def _fingerprint_rows(config):
    return np.linspace(0, config.vocab_size - 1, 64).astype(int)


def _fingerprint(config, norm, rows):
    digest = hashlib.sha256()
    plain = {"max_position_embeddings": config.max_position_embeddings, "windows": ()}
    plain |= dict.fromkeys(("qkv_bias", "qk_norm", "o_bias", "mlp_bias"), False)
    # Fields that came later count only where they are used, so that a base keeps the identity it had before them.
    fields = {
        k: v for k, v in dataclasses.asdict(config).items() if k not in plain or v != plain[k]
    }
    digest.update(json.dumps(fields, sort_keys=True).encode())
    for value in (norm, rows):
        digest.update(value.astype(np.float32).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


@jax.jit
def _checksums(params):
    """Two checksums of every parameter (of stacked ones two a layer), and whether it is finite; of its values in bfloat16.

    Sums of whole numbers, in which every value counts with a factor of its place's own: the same whatever the devices, and the order.
    """

    def mixed(
        x,
    ):  # spreads the bits of a place's number over all of the factor's (constants of the lowbias32 hash)
        x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        return x ^ (x >> 16)

    def checksums(x):
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, n in enumerate(x.shape):
            place = place * jnp.uint32(n) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        sums = [
            jnp.sum((bits + 1) * mixed(place + jnp.uint32(salt)), dtype=jnp.uint32)
            for salt in (1, 0x9E3779B9)
        ]
        return *sums, jnp.isfinite(x).all()

    # Layer by layer, since on CPUs the places' factors are arrays as large as what they are of.
    layers = jax.tree.map(lambda x: jax.lax.map(checksums, x), params["layers"])
    return jax.tree.map(
        checksums, {name: of for name, of in params.items() if name != "layers"}
    ) | {"layers": layers}


def weights_fingerprint(params: dict, source: str = "") -> str:
    """Identity of all of a base's weights, rounded to bfloat16: sha256 over checksums of every one of them.

    `fingerprint` looks at some rows of the embeddings and the final norm alone, which a fine-tune may share with the base that it is of.
    UserError where a weight is not a finite number. source: the base, to name it.
    """
    digest = hashlib.sha256()
    for path, (*sums, finite) in jax.tree_util.tree_leaves_with_path(
        on_host(_checksums(params)), is_leaf=lambda x: isinstance(x, tuple)
    ):
        name = ".".join(key.key for key in path)
        if not np.all(finite):
            raise UserError(
                f"base {source}: {name} holds numbers that are not finite; the weights are damaged, download them again"
            )
        digest.update(name.encode())
        for value in sums:
            digest.update(np.asarray(value, np.uint32).tobytes())
    return digest.hexdigest()


_DIFFERS = {
    "tokenizer": "makes other ids of a text; give the base with the tokenizer that it was made with",
    "weights": "has other weights, as a fine-tune of that base has; give the base that it was made with",
}


def check_identity(what: str, stated: dict[str, str], have: dict[str, str]) -> None:
    """UserError where an adapter or a memory was made with another tokenizer or other weights; says so where it does not tell, as those of
    earlier versions do not. what: names it. stated: what it carries. have: `Base.identity`.
    """
    for name, own in have.items():
        if stated.get(name) not in (None, "", own):
            raise UserError(
                f"{what} was made with {name} {stated[name][:12]}, but the base's is {own[:12]}: it {_DIFFERS[name]}"
            )
    unsaid = [name for name in have if not stated.get(name)]
    if unsaid:
        files.say(
            f"{what} does not say with which {' and '.join(unsaid)} it was made; taken to be the base's"
        )


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen base model as everything else uses it: sizes, parameters, tokenizer, stop ids, identities and where it came from.

    tokenizer: None where the folder has none and none was needed. path: as the user gave it, a hub id or URL too.
    """

    config: llama.ModelConfig
    params: dict
    tokenizer: object
    stop_ids: tuple[int, ...]
    fingerprint: str
    path: str

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What changes results beside what `fingerprint` holds, each by a fingerprint of its own: "weights", and "tokenizer" with one."""
        own = {"weights": weights_fingerprint(self.params, self.path)}
        return (
            own
            if self.tokenizer is None
            else own | {"tokenizer": tokenizers.fingerprint(self.tokenizer)}
        )


def sizes(source):
    """The `ModelConfig` of a base, without its weights. source: as for `load_base`."""
    return read_config(locations.local_folder(source, with_weights=False))


def load_base(source, dtype=jnp.float32, sharding=None, progress=False, need_tokenizer=True):
    """Loads a base completely: `Base`, whose `path` is the source as it was given.

    source: a folder, a hub id or a URL, see `locations.local_folder`. dtype, sharding, progress: as for `weights.load_params`.
    need_tokenizer: whether a folder without tokenizer files is an error; otherwise the `Base` has None.
    """
    folder = locations.local_folder(source, progress)
    config = read_config(folder)  # first: what is no base at all is not its tokenizer's fault
    tokenizer = load_tokenizer(folder) if need_tokenizer or has_tokenizer(folder) else None
    stops = stop_ids(folder, tokenizer)
    tokenizers.check_ids(
        [stops],
        config.vocab_size,
        lambda _: f"{folder}: what ends a text (eos_token_id)",
        tokenizer,
    )
    if tokenizer is not None:
        setattr(tokenizer, STOPS, stops)
    if tokenizer is not None and (
        beyond := sum(i >= config.vocab_size for i in tokenizer.get_vocab().values())
    ):
        files.say(
            f"base {source}: {beyond} token(s) of its tokenizer have no row in the embedding table of {config.vocab_size:,}; a text that "
            "holds one is refused"
        )
    params = load_params(folder, config, dtype, sharding, progress)
    return Base(config, params, tokenizer, stops, fingerprint(config, params), str(source))


def identify(source):
    """(sizes, fingerprint) of a base; little of it is read, and of a hub's or a bucket's little fetched. source: as for `load_base`."""
    folder = locations.local_folder(source, with_weights=False)
    config = read_config(folder)
    remote = None if weights.has_weights(folder) else locations.remote_opener(source, folder)
    if remote is None:
        return config, fingerprint(
            config, load_params(folder, config, only=(("embed",), ("norm", "scale")))
        )
    norm = weights.read_rows(folder, remote, "model.norm.weight")
    rows = weights.read_rows(
        folder, remote, "model.embed_tokens.weight", _fingerprint_rows(config).tolist()
    )
    return config, _fingerprint(config, norm[0], rows)
