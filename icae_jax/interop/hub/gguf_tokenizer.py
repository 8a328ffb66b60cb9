"""The tokenizer in the metadata of a GGUF file -> tokenizer.json and its companions.

Two models are read: `gpt2`, byte-level BPE whose merges are stored and whose pre-tokenizer is
named, and `llama`, SentencePiece's BPE, whose merges follow from the scores of its pieces. A
pre-tokenizer is what the hub's tokenizers of that name have, or refused by name.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub.gguf_file import GGUF

KEY = "tokenizer.ggml"
# Kinds of tokens, by the format's numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Tokens that end a turn or a text, in whose place the file may state only one.
_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
)
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_WORDS = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_LETTERS[0]}]*[{_LETTERS[1]}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_LETTERS[0]}]+[{_LETTERS[1]}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PreTokenizer(NamedTuple):
    """How a text is cut before byte-level BPE.

    Attributes:
        patterns: each cuts what the one before it left, at both ends of its matches.
        nfc: whether the text is put into Unicode's form NFC first.
        gpt2: whether GPT-2's own pattern cuts last.
        whole_words: whether a word that is a token is taken without its merges.
        adds_bos: whether bos is set in front of a text where the file does not say.
    """

    patterns: tuple[str, ...] = ()
    nfc: bool = False
    gpt2: bool = False
    whole_words: bool = False
    adds_bos: bool = False


_LLAMA3 = PreTokenizer((rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), whole_words=True, adds_bos=True)
# By tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(gpt2=True),
    "smollm": PreTokenizer((r"\p{N}",), gpt2=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": PreTokenizer((rf"{_WORDS}|\p{{N}}|{_REST}",), nfc=True),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, adds_bos=True),
    # llama.cpp's own, for models of whose hub tokenizer its converter knows nothing.
    "default": PreTokenizer(
        (
            r"[\p{P}\$\+<=>\^~\|]+",
            rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)",
            r"\p{N}+",
            "[0-9][0-9][0-9]",
        )
    ),
}


class Vocabulary(NamedTuple):
    """The tokens of a file by their ids, and the kind of each."""

    tokens: list[str]
    kinds: np.ndarray


def has_tokenizer(file: GGUF) -> bool:
    """Whether a file states a tokenizer."""
    return file.get(f"{KEY}.model", str, "none") not in ("none", "no_vocab")


def write(file: GGUF, folder: pathlib.Path, rows: int, positions: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, if the file has one, chat_template.jinja.

    Args:
        file: satisfies `has_tokenizer`.
        folder: where.
        rows: of the embedding table.
        positions: of the model, which the tokenizer states as its longest text.

    Raises:
        UserError: the metadata are missing, contradict each other, or name what is not read.
    """
    model = file.get(f"{KEY}.model", str)
    if model not in ("gpt2", "llama"):
        raise UserError(
            f"{file.path}: {KEY}.model is {errors.shown(model)}, a tokenizer that is not read from "
            "GGUF files; gpt2 and llama are"
        )
    vocabulary = _vocabulary(file, rows)
    special = special_tokens(file)
    try:
        backend = (_gpt2 if model == "gpt2" else _sentencepiece)(file, vocabulary)
        _add_tokens(file, backend, vocabulary)
        _add_ends(file, backend, vocabulary, special)
        backend.save(str(folder / "tokenizer.json"), pretty=False)
    except (UserError, MemoryError, OSError):
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(
            f"{file.path}: no tokenizer can be made of its metadata ({str(error)[:200]})"
        ) from error
    named = {name: vocabulary.tokens[number] for name, number in special.items()}
    # The class that all versions of transformers load from tokenizer.json as it stands.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions}
    config |= {"clean_up_tokenization_spaces": False, **named}
    files.write_json(folder / "tokenizer_config.json", config)
    template = file.get("tokenizer.chat_template", str)
    if template:
        files.write_text(folder / "chat_template.jinja", template)


def special_tokens(file: GGUF) -> dict[str, int]:
    """`{"bos_token": id, …}` of bos, eos, unk and pad, where the file has them."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    usual = {"bos": 1, "eos": 2, "unk": 0} if file.get(f"{KEY}.model", str) == "llama" else {}
    count, ids = len(_vocabulary(file, None).tokens), {}
    for name, key in keys.items():
        number = file.get(f"{KEY}.{key}_token_id", int, usual.get(name))
        if number is None or number == 2**32 - 1:  # -1 in an unsigned field: none
            continue
        if not 0 <= number < count:
            raise UserError(f"{file.path}: {KEY}.{key}_token_id is {number}, of {count:,} tokens")
        ids[f"{name}_token"] = number
    return ids


def end_ids(file: GGUF) -> list[int]:
    """The ids that end a generation, sorted: eos, eot and eom, and control tokens that name one."""
    tokens, kinds = _vocabulary(file, None)
    stated = [file.get(f"{KEY}.{name}_token_id", int) for name in ("eot", "eom")]
    stated += [special_tokens(file).get("eos_token")]
    ends = {i for i in stated if i is not None and 0 <= i < len(tokens)}
    control = np.flatnonzero(kinds == CONTROL).tolist()
    return sorted(ends | {i for i in control if tokens[i] in _ENDS})


def _vocabulary(file, rows):
    """The tokens and their kinds. UserError if they contradict each other or the table's rows."""
    path = file.path
    tokens, kinds = (file.metadata.get(f"{KEY}.{name}") for name in ("tokens", "token_type"))
    for name, value, kind in (("tokens", tokens, list), ("token_type", kinds, np.ndarray)):
        if not isinstance(value, kind) or not len(value):
            raise UserError(
                f"{path}: {KEY}.{name} is missing or of another type; convert the model again"
            )
    if len(kinds) != len(tokens):
        raise UserError(f"{path}: {len(tokens):,} tokens, but the types of {len(kinds):,}")
    if rows is not None and len(tokens) > rows:
        raise UserError(
            f"{path}: its tokenizer has {len(tokens):,} tokens, but the embedding table only "
            f"{rows:,} rows; give a file whose embeddings were resized for its tokenizer"
        )
    return Vocabulary(tokens, kinds.astype(np.int64))


def _model_vocabulary(file, vocabulary):
    """`{token: id}` of the tokenizer's model.

    Special tokens behind all others are left out: they are added, as in the hub's tokenizers.
    """
    tokens, kinds = vocabulary
    added = np.isin(kinds, (CONTROL, USER_DEFINED))
    used = kinds != UNUSED
    plain = np.flatnonzero(used & ~added)
    if not plain.size:
        raise UserError(f"{file.path}: all of its {len(tokens):,} tokens are special")
    end = int(plain[-1]) + 1
    # An added token gets the next id.
    last = len(tokens) if used[:end].all() and _contiguous(np.flatnonzero(used[end:])) else 0
    ids = np.flatnonzero(used[: end if last else None]).tolist()
    model = {tokens[i]: i for i in ids}
    if len(model) != len(ids):
        twice = next(tokens[i] for i in ids if model[tokens[i]] != i)
        raise UserError(f"{file.path}: token {twice!r:.60} has several ids")
    return model


def _contiguous(indices):
    return indices.tolist() == list(range(len(indices)))


def _gpt2(file, vocabulary):
    """A byte-level BPE tokenizer."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    name, merges = file.get(f"{KEY}.pre", str), file.metadata.get(f"{KEY}.merges")
    if name not in PRE_TOKENIZERS:
        what = "is missing" if name is None else f"is {errors.shown(name)}, which is not known"
        raise UserError(
            f"{file.path}: the pre-tokenizer's name, {KEY}.pre, {what}; "
            f"known: {', '.join(PRE_TOKENIZERS)}"
        )
    if not isinstance(merges, list):
        raise UserError(f"{file.path}: {KEY}.merges is missing or of another type")
    pairs = []
    for merge in merges:
        at = merge.find(" ", 1)
        if at < 0:
            raise UserError(f"{file.path}: {KEY}.merges has {merge!r:.60}, which is not two tokens")
        pairs.append((merge[:at], merge[at + 1 :]))
    pre = PRE_TOKENIZERS[name]
    backend = tokenizers.Tokenizer(
        models.BPE(
            _model_vocabulary(file, vocabulary),
            pairs,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=pre.whole_words,
        )
    )
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre.patterns]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.gpt2)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file, vocabulary):
    """A tokenizer with SentencePiece's BPE: no pre-tokenizer, spaces as U+2581, bytes as pieces."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = file.metadata.get(f"{KEY}.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(vocabulary.tokens):
        raise UserError(f"{file.path}: {KEY}.scores, one for each token, is missing")
    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        value = file.metadata.get(f"{KEY}.{key}")
        if value is not None and np.any(value):
            raise UserError(f"{file.path}: {KEY}.{key} is set, which is not read")
    model = _model_vocabulary(file, vocabulary)
    unknown = [vocabulary.tokens[i] for i in np.flatnonzero(vocabulary.kinds == UNKNOWN)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            model,
            _merges(vocabulary, scores),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=bool((vocabulary.kinds == BYTE).any()),
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get(f"{KEY}.add_space_prefix", bool, True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(decoding)
    return backend


def _merges(vocabulary, scores):
    """The pairs of pieces that merge, those into the piece of the highest score first."""
    plain = {vocabulary.tokens[i]: i for i in np.flatnonzero(vocabulary.kinds == NORMAL).tolist()}
    merges = []
    for piece, number in plain.items():
        pairs = [
            (piece[:at], piece[at:])
            for at in range(1, len(piece))
            if piece[:at] in plain and piece[at:] in plain
        ]
        pairs.sort(key=lambda pair: (plain[pair[0]], plain[pair[1]]))
        merges += [(float(scores[number]), pair) for pair in pairs]
    merges.sort(key=lambda merge: -merge[0])
    return [pair for _, pair in merges]


def _add_tokens(file, backend, vocabulary):
    """Adds control and user-defined tokens, which are found in a text before anything else."""
    import tokenizers

    special = np.isin(vocabulary.kinds, (CONTROL, UNKNOWN))
    numbers = np.flatnonzero(special | (vocabulary.kinds == USER_DEFINED)).tolist()
    backend.add_tokens(
        [
            tokenizers.AddedToken(vocabulary.tokens[i], special=bool(special[i]), normalized=False)
            for i in numbers
        ]
    )
    for i in numbers:
        if backend.token_to_id(vocabulary.tokens[i]) != i:
            raise UserError(f"{file.path}: token {vocabulary.tokens[i]!r:.60} has several ids")


def _add_ends(file, backend, vocabulary, special):
    """Has the tokenizer set bos in front of a text and eos behind it, as the file says."""
    from tokenizers import processors

    model, pre = file.get(f"{KEY}.model", str), file.get(f"{KEY}.pre", str, "")
    usual = model == "llama" or PRE_TOKENIZERS[pre].adds_bos
    parts, ids = ["$A"], []
    for name, default in (("bos", usual), ("eos", False)):
        if not file.get(f"{KEY}.add_{name}_token", bool, default):
            continue
        if f"{name}_token" not in special:
            raise UserError(
                f"{file.path}: {KEY}.add_{name}_token is set, but there is no {KEY}.{name}_token_id"
            )
        token = vocabulary.tokens[special[f"{name}_token"]]
        parts = [token, *parts] if name == "bos" else [*parts, token]
        ids.append((token, special[f"{name}_token"]))
    if ids:
        backend.post_processor = processors.TemplateProcessing(
            single=parts,
            pair=[*parts, *("$B" if p == "$A" else p for p in parts)],
            special_tokens=ids,
        )


def stated_config(file: GGUF) -> dict[str, Any]:
    """The content of generation_config.json: bos, and the ids that end a generation."""
    if not has_tokenizer(file):
        return {}
    bos = special_tokens(file).get("bos_token")
    return {"bos_token_id": bos, "eos_token_id": end_ids(file)}
