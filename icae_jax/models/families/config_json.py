"""config.json of a model-hub folder: which models this family computes, in both directions.

A field either is computed, or is known to change nothing (`config_fields`), or is refused by its name: what an unknown one does cannot be
known, and its author meant something by it, also where transformers' class for the architecture does not read it.
"""

import dataclasses
import math
import pathlib
import typing

import numpy as np

from icae_jax import files
from icae_jax.errors import UserError
from icae_jax.models import llama, rope
from icae_jax.models.families import config_fields


class Family(typing.NamedTuple):
    """An architecture of the hub: what it always has, what config.json may add, and what it leaves out. head_dim 0: hidden_size / heads.

    qkv_bias, qk_norm: as in `ModelConfig`, always so. attention_bias: whether config.json's field of that name gives q, k, v and o biases;
    mlp_bias: likewise. window: what stands for an absent `sliding_window`, None where the field is not read.
    """

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    kv_heads: int = 0
    head_dim: int = 0
    max_positions: int = 2048


FAMILIES = {
    "LlamaForCausalLM": Family("llama", attention_bias=True, mlp_bias=True),
    "MistralForCausalLM": Family("mistral", window=4096, kv_heads=8, max_positions=131072),
    "Qwen2ForCausalLM": Family(
        "qwen2", qkv_bias=True, window=4096, kv_heads=32, max_positions=32768
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        qk_norm=True,
        attention_bias=True,
        window=4096,
        kv_heads=32,
        head_dim=128,
        max_positions=32768,
    ),
}

MOST_POSITIONS = 2**31 - 1
# Sizes, with the largest that are taken (beyond any model's; arrays of them could not be counted): those that every config.json has, and
# those that it may leave out.
_SIZES = {
    "vocab_size": 2**26,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
}
_OPTIONAL_SIZES = {
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": MOST_POSITIONS,
}
_READ = {
    *_SIZES, *_OPTIONAL_SIZES, "architectures", "model_type", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "original_max_position_embeddings", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
}  # fmt: skip
# Code of a repository's own, by what transformers would load with it, that computes something else than the logits.
_OTHER_CODE = {
    "AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor", "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification", "AutoModelForQuestionAnswering",
}  # fmt: skip
_QUANTISED = (
    "quantization_config",
    "quantization",
    "quantize",
    "quant_config",
    "compression_config",
)
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim",
    ),
}  # fmt: skip


def read_config(folder):
    """The `ModelConfig` of a hub folder. UserError where the folder's model is not one that `models.llama` computes."""
    path = pathlib.Path(folder) / "config.json"
    return parse_config(files.read_json(path, "the base model's configuration"), path)


def parse_config(raw: dict, source: object = "config.json") -> llama.ModelConfig:
    """The `ModelConfig` of config.json's content, in both spellings of RoPE (`rope_theta` at the top, or `rope_parameters`).

    null counts as absent, a number may be written as a text or a whole one with a fraction of 0. UserError, which names the source and the
    field, where the model is not one of `FAMILIES`, or has what is not computed.
    """
    try:
        return _parse_config(raw, source)
    except UserError:
        raise
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
    ) as error:  # it computes with nothing but this file
        raise UserError(
            f"{source}: a field has a value of another kind than it should ({error})"
        ) from error


def architecture(raw: dict, source: object = "config.json") -> str:
    """The architecture of config.json's content: the first that it names, else that of its model_type. UserError if not supported."""
    names, model_type = raw.get("architectures") or [], raw.get("model_type")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{source}: architectures is {files.shown(names)}, which is not a list of names"
        )
    if not names:
        names = [name for name, family in FAMILIES.items() if family.model_type == model_type]
    if not names:
        if "phase" in raw and "base" in raw:
            raise UserError(
                f"{source}: the configuration of a training run, whose folder is no base; its base is {files.shown(raw['base'])}"
            )
        known = f"model_type is {files.shown(model_type)}" if model_type else "nor a model_type"
        raise UserError(
            f"{source}: no architectures ({known}), which say what the model is; supported: {', '.join(FAMILIES)}"
        )
    if names[0] not in FAMILIES:
        raise UserError(
            f"{source}: architecture {names[0]} is not supported; supported: {', '.join(FAMILIES)}"
        )
    if model_type not in (None, FAMILIES[names[0]].model_type):
        raise UserError(
            f"{source}: model_type is {files.shown(model_type)}, by which transformers goes, and the architecture {names[0]}; write the "
            "one that is meant into both"
        )
    return names[0]


def stored_dtype(raw: dict, source: object = "config.json") -> object:
    """The dtype that config.json's content states, under its new name or its old one, or None; transformers' choice where they differ."""
    new, old = raw.get("dtype"), raw.get("torch_dtype")
    if new is not None and old is not None and new != old:
        files.say(
            f"{source}: dtype is {files.shown(new)} and torch_dtype {files.shown(old)}; dtype counts, as in transformers"
        )
    return old if new is None else new


def _number(value, name, source, whole=False, most=math.inf, zero=False):
    """A positive, finite number, also one that is written as a text. whole: an int. zero: it may be 0. UserError otherwise."""
    try:
        number = value if isinstance(value, int) else float(value)
        fits = (
            not isinstance(value, bool)
            and (number > 0 or (zero and number == 0))
            and number <= most
            and math.isfinite(number)
        )
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits or (whole and number != int(number)):
        kind = f"a {'whole' if whole else 'finite'} number {'from 0' if zero else 'above 0'}{f' to {most}' if most < math.inf else ''}"
        raise UserError(f"{source}: {name} is {files.shown(value)}, which is not {kind}")
    return int(number) if whole else float(number)


def _flag(raw, name, source):
    """true or false; None where the field is absent or null."""
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(
            f"{source}: {name} is {files.shown(value)}, which is neither true nor false"
        )
    return value


def _check_fields(raw, name, family, source):
    """UserError on the first field that is neither read nor known to change nothing."""
    own_code = raw.get("auto_map")
    if (
        isinstance(own_code, dict)
        and {part for part, code in own_code.items() if code} <= _OTHER_CODE
    ):
        own_code = None
    elif isinstance(own_code, dict):
        raise UserError(
            f"{source}: auto_map names code of the repository's own, not run here; remove it if that is {name} too"
        )
    # What an architecture always has, some say too.
    stated = dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm"), (family.qk_norm,))
    stated |= dict.fromkeys(("qkv_bias", "use_qkv_bias", "add_qkv_bias"), (family.qkv_bias,))
    read = _READ | {field for field in ("attention_bias", "mlp_bias") if getattr(family, field)}
    read |= {"attention_bias"} if family.qkv_bias else set()
    neutral = config_fields.NEUTRAL | stated
    for field, value in (raw | {"auto_map": own_code}).items():
        if field in read or config_fields.is_neutral(field, value, neutral):
            continue
        if field in _QUANTISED:
            raise UserError(f"{source}: {field} is set; use the unquantised checkpoint")
        if field in neutral:
            only = next((same for same in neutral[field] if same not in ([], {})), None)
            raise UserError(
                f"{source}: {field} is {files.shown(value)}, which this model does not compute; only {only!r} is supported"
            )
        raise UserError(
            f"{source}: {files.field(field)} is {files.shown(value)}, a field that is not known here and may change what the model "
            "computes; where it does not, remove it from config.json"
        )


def _parse_config(raw, source):
    name = architecture(raw, source)
    family = FAMILIES[name]
    _check_fields(raw, name, family, source)
    if raw.get("dual_chunk_attention_config"):
        files.say(
            f"{source}: dual_chunk_attention_config is not computed, as it is not in transformers: attention sees all at once"
        )

    absent = [field for field in _SIZES if raw.get(field) is None]
    if absent:
        raise UserError(f"{source}: {', '.join(absent)} missing; is the file complete?")
    given = {
        field: most
        for field, most in (_SIZES | _OPTIONAL_SIZES).items()
        if raw.get(field) is not None
    }
    sizes = {
        field: _number(raw[field], field, source, whole=True, most=most)
        for field, most in given.items()
    }
    heads = sizes["num_attention_heads"]
    positions = sizes.get("max_position_embeddings", family.max_positions)
    default_kv_heads = (
        heads if "num_key_value_heads" in raw else family.kv_heads or heads
    )  # null is not absent, to transformers
    eps = raw.get("rms_norm_eps")
    rope_theta, rope_scaling = _rope(raw, positions, source)
    attention_bias = family.attention_bias and bool(_flag(raw, "attention_bias", source))
    fields = dict(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=sizes.get("num_key_value_heads", default_kv_heads),
        head_dim=sizes.get("head_dim", family.head_dim or sizes["hidden_size"] // heads),
        max_position_embeddings=positions,
        rms_norm_eps=1e-6 if eps is None else _number(eps, "rms_norm_eps", source),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=bool(_flag(raw, "tie_word_embeddings", source)),
        qkv_bias=family.qkv_bias or attention_bias,
        qk_norm=family.qk_norm,
        windows=_windows(raw, family, sizes["num_hidden_layers"], source),
        o_bias=attention_bias,
        mlp_bias=family.mlp_bias and bool(_flag(raw, "mlp_bias", source)),
    )
    try:
        config = llama.ModelConfig(**fields)
    except UserError as error:  # which does not know where its fields come from
        raise UserError(f"{source}: {error}") from error
    try:
        with np.errstate(all="ignore"):
            finite = np.isfinite(rope.frequencies(config)).all()
    except ArithmeticError:
        finite = False
    if not finite:
        raise UserError(
            f"{source}: rope_theta {rope_theta:g} with {files.shown(rope_scaling)} gives frequencies of RoPE that are no numbers"
        )
    return config


def _windows(raw, family, layers, source):
    """`ModelConfig.windows`, by the rules of the architecture's configuration in transformers, with its defaults."""
    types, use = raw.get("layer_types"), _flag(raw, "use_sliding_window", source)
    width, first = raw.get("sliding_window", family.window), raw.get("max_window_layers")
    qwen = family.model_type.startswith("qwen")
    if qwen and not use:
        width = None
    elif family.window is None and width is not None:
        if use is not False:
            raise UserError(
                f"{source}: sliding_window is {width}, which this architecture does not compute; only null is supported"
            )
        width = None
    elif width is not None and not qwen and (use is False or first):
        field = "use_sliding_window" if use is False else "max_window_layers"
        raise UserError(
            f"{source}: {field} is {files.shown(raw[field])}, which this architecture does not read, and sliding_window "
            f"{files.shown(width)}; set sliding_window to null where no layer has a window, or remove {field}"
        )
    if width is not None:
        width = _number(width, "sliding_window", source, whole=True, most=MOST_POSITIONS)
        first = (
            28
            if first is None
            else _number(
                first, "max_window_layers", source, whole=True, most=MOST_POSITIONS, zero=True
            )
        )
    sliding = [width is not None and (not qwen or i >= first) for i in range(layers)]
    if types is not None:
        if not isinstance(types, list):
            raise UserError(f"{source}: layer_types is {files.shown(types)}, which is not a list")
        meant = [t == "sliding_attention" for t in types]
        unknown = [t for t in types if t not in ("full_attention", "sliding_attention")]
        of_its_own = qwen and (width is not None or not any(meant))
        if unknown or len(types) != layers or (meant != sliding and not of_its_own):
            raise UserError(
                f"{source}: layer_types is {files.shown(types)}, which {family.model_type} with sliding_window {width} does not compute"
            )
        sliding = meant
    return tuple(width if s else 0 for s in sliding) if any(sliding) else ()


def _rope(raw, positions, source):
    """(theta, scaling or None) of either spelling; of both, where they mean the same."""
    spellings = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)}
    for name, fields in spellings.items():
        if not isinstance(fields, dict):
            raise UserError(f"{source}: {name} is {files.shown(fields)}, which is not an object")
    meant = {
        _spelled_rope(fields, raw, positions, source) for fields in list(spellings.values()) or [{}]
    }
    if len(meant) == 2:  # transformers would take rope_scaling, and lose the theta of the other
        raise UserError(
            f"{source}: rope_parameters and rope_scaling are both set, to different values; keep the one that is meant"
        )
    return meant.pop()


def _spelled_rope(fields, raw, positions, source):
    """(theta, scaling or None) of one spelling."""
    truncate = (
        _flag(fields, "truncate", source) if "truncate" in fields else True
    )  # null is false, as in transformers
    fields = {field: value for field, value in fields.items() if value is not None}

    def number(field, default=None, **kw):
        return (
            _number(fields[field], f"{field} of RoPE", source, **kw) if field in fields else default
        )

    inner, outer = (
        _number(of["rope_theta"], "rope_theta", source)
        if of.get("rope_theta") is not None
        else None
        for of in (fields, raw)
    )
    theta = next((value for value in (inner, outer) if value is not None), 10000.0)
    if outer not in (None, theta):
        files.say(
            f"{source}: rope_theta is {outer:g}, and {theta:g} beside the type of RoPE; the latter counts, as in transformers"
        )
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in tuple(ROPE_FIELDS):
        raise UserError(
            f"{source}: RoPE type {files.shown(kind)} is not supported; supported: {', '.join(ROPE_FIELDS)}"
        )
    if fields.get("type", kind) != kind:
        files.say(
            f"{source}: RoPE has rope_type {kind} and type {files.shown(fields['type'])}; rope_type counts, as in transformers"
        )
    for field, value in fields.items():
        if field in ("rope_theta", "rope_type", "type", *ROPE_FIELDS[kind]):
            continue
        if field == "attn_factor" and kind == "yarn" and value != 1:
            files.say(
                f"{source}: attn_factor of RoPE ({files.shown(value)}) is not read, as it is not by transformers; attention_factor is"
            )
        elif not config_fields.is_neutral(
            field, value, config_fields.ROPE_NEUTRAL, config_fields.ROPE_HARMLESS
        ):
            if field in config_fields.ROPE_NEUTRAL:
                raise UserError(
                    f"{source}: {field} of RoPE is {files.shown(value)}, which this model does not compute; only 1 is supported"
                )
            raise UserError(
                f"{source}: RoPE of type {kind} has {field}, which this model does not compute; where it changes nothing, remove it"
            )
    top = raw.get("original_max_position_embeddings")
    if top is not None:
        fields["original_max_position_embeddings"] = top
    original = number(
        "original_max_position_embeddings", positions, whole=True, most=MOST_POSITIONS
    )
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }.get(kind, ())
    absent = [field for field in needed if field not in fields]
    if absent:
        raise UserError(f"{source}: RoPE of type {kind} lacks {', '.join(absent)}")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, rope.LinearScaling(number("factor"))
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise UserError(
                f"{source}: low_freq_factor of RoPE is {low:g}, which is not below high_freq_factor, {high:g}"
            )
        return theta, rope.Llama3Scaling(number("factor"), low, high, original)
    factor, magnitude = number("factor", positions / original), number("attention_factor")
    if (
        magnitude is None
    ):  # arXiv 2309.00071, eq. 22; mscale and mscale_all_dim are DeepSeek's refinement
        mscale, all_dim = number("mscale", 0, zero=True), number("mscale_all_dim", 0, zero=True)
        scales = (mscale, all_dim) if mscale and all_dim else (1.0, 0.0)
        above, below = (1.0 + (0.1 * m * math.log(factor) if factor > 1 else 0.0) for m in scales)
        magnitude = above / below
    fast, slow = number("beta_fast", 0, zero=True) or 32.0, number("beta_slow", 0, zero=True) or 1.0
    return theta, rope.YarnScaling(factor, original, magnitude, fast, slow, bool(truncate))


def hub_config(config, dtype, special_ids):
    """config.json's content for a `ModelConfig`, as the plainest architecture that computes it.

    special_ids: `{"bos_token_id": …, "eos_token_id": …}`. UserError where no architecture does.
    """
    widths = set(config.windows) - {0}
    everywhere = len(set(config.windows)) <= 1
    fitting = [
        name
        for name, f in FAMILIES.items()
        if f.qk_norm == config.qk_norm
        and (
            (config.qkv_bias, config.o_bias) == (f.qkv_bias, False)
            or (f.attention_bias and config.qkv_bias and config.o_bias)
        )
        and (f.mlp_bias or not config.mlp_bias)
        and (
            not widths
            or (f.model_type == "mistral" and everywhere)
            or (f.model_type.startswith("qwen") and len(widths) == 1)
        )
        and not (f.model_type == "mistral" and not widths)
    ]
    if not fitting:
        biased = ", ".join(config.biased) or "no projection"
        raise UserError(
            f"no architecture of the hub has biases of {biased}, qk_norm {config.qk_norm} and windows {config.windows}"
        )
    family = FAMILIES[fitting[0]]
    parameters = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        kind = {
            rope.LinearScaling: "linear",
            rope.Llama3Scaling: "llama3",
            rope.YarnScaling: "yarn",
        }
        parameters |= {
            "rope_type": kind[type(config.rope_scaling)],
            **dataclasses.asdict(config.rope_scaling),
        }
    windows = {}
    if family.model_type == "mistral":
        windows = {"sliding_window": widths.pop()}
    elif widths:
        types = ["sliding_attention" if w else "full_attention" for w in config.windows]
        windows = {
            "use_sliding_window": True,
            "sliding_window": widths.pop(),
            "layer_types": types,
            "max_window_layers": 0,
        }
    biases = (
        {"attention_bias": config.o_bias}
        if family.attention_bias and (family.mlp_bias or config.o_bias)
        else {}
    )
    biases |= {"mlp_bias": config.mlp_bias} if family.mlp_bias else {}
    return {
        "architectures": [fitting[0]],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": parameters,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        **biases,
        **windows,
        "dtype": dtype,
        **special_ids,
    }
