"""A base's tokenizer: loading, identity, and checks against the embedding table.

tokenizer.json is self-contained, but `AutoTokenizer` may encode differently: for some model types
it rebuilds the tokenizer, with its own pre-tokenizer. So the file is loaded as it is, and the ids
of a probe text are compared with those of the tokenizers library (or, if there is only a
`tokenizer.model`, of sentencepiece) for the same file.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub.text import Tokenizer, user_ids

# Never change it: fingerprints hold its ids.
PROBE = (
    "The year 2024, in 1999:  two  spaces\tand\ttabs,\nnew LINES\r\n\r\n ÀÉÎõü œuvre naïve - "
    "\u201cquotes\u201d \u2026 12345.678 don't I'LL x_y camelCase ß İ \ufb01 ½ "
    "{[(%$#@&*+=~^`|\\/)]} 漢字かな 한국어 Русский عربى हिन्दी ไทย "
    "\U0001f600\U0001f469\u200d\U0001f467 <html> \u00a0 e\u0301 end "
)
_JSON, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
# A tiktoken file begins with a token in base64 and its rank.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")
_NO_TOKENIZER = "no tokenizer could be loaded"


def has_tokenizer(folder: str | pathlib.Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    folder = pathlib.Path(folder)
    return (
        any(path.suffix != ".py" for path in folder.glob("tokenizer*"))
        or (folder / "vocab.json").exists()
    )


# ------------------------------------------------------------------------------------- loading


def load_tokenizer(folder: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a folder, hub id or URL, as a transformers object.

    None of the base's own code is run, and no confirmation is asked for.

    Raises:
        UserError: a file cannot be read, or the tokenizer encodes the probe text differently than
            its file says.
    """
    # It imports JAX, which those who only tokenise do without.
    from icae_jax.interop.hub import gguf_folder, locations

    folder = locations.local_folder(folder, progress=False, with_weights=False)
    gguf = gguf_folder.source(folder)
    if gguf is None:
        return _load_checked(folder)
    if not has_tokenizer(folder):
        raise UserError(f"{gguf}: it holds no tokenizer (tokenizer.ggml.model)")
    try:
        return _load_checked(folder)
    except UserError as error:  # the file is the user's, not what was made of it
        raise UserError(f"{gguf}: its tokenizer cannot be read: {error}") from error


def _load_checked(folder):
    """The tokenizer of a folder on this machine."""
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder}: {_NO_TOKENIZER} (it has no tokenizer.json, tokenizer.model or vocab.json)"
        )
    for path in sorted(
        {*folder.glob("tokenizer*"), *folder.glob("*.json"), *folder.glob("*.jinja")}
    ):
        if path.is_file():
            files.check_real(path)
    stated = _read_optional(folder / "tokenizer_config.json", "a tokenizer's configuration")
    path = folder / _JSON
    if path.exists():
        expected, vocabulary = _tokenizers_ids(path)
        _refuse_own_code(folder, stated)
        tokenizer = _load(folder, _from_json)
        _name_special_tokens(folder, stated, tokenizer)
        for name in ("bos_token", "eos_token"):
            token = getattr(tokenizer, name)
            if token is not None and token not in vocabulary:
                raise UserError(
                    f"{folder}: {name} is {token!r} by tokenizer_config.json, "
                    "which tokenizer.json does not know"
                )
    else:
        path = folder / _SENTENCEPIECE
        expected = _sentencepiece_ids(path) if path.exists() else None
        tokenizer = _load(folder, _from_class)
        _name_special_tokens(folder, stated, tokenizer)
    _compare(path, tokenizer, expected)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(
            f"{folder}: {_NO_TOKENIZER} "
            f"({type(tokenizer).__name__} is not one of the tokenizers library)"
        )
    return tokenizer


def _read_optional(path, what):
    """The object in a JSON file; empty if there is no such file."""
    return files.read_json(path, what) if path.exists() else {}


def _version(package):
    return f"{package} {importlib.metadata.version(package)}"


def _first_line(error):
    """A library's message, in one line."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), "") or repr(error)


def _not_the_files(error):
    """Whether an error is not due to the file's content."""
    return (
        errors.transient(error)
        or errors.disk_full(error)
        or isinstance(error, MemoryError | UserError)
    )


def _tokenizers_ids(path):
    """The tokenizers library's (ids of the probe text, vocabulary) for tokenizer.json."""
    import tokenizers

    try:
        with errors.naming(f"{path}: cannot be read"):
            data = errors.retrying(path.read_bytes, f"reading {path}")
        backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        if getattr(backend.model, "dropout", None):
            raise UserError(
                f"{path}: dropout of its model is {backend.model.dropout:g}, so the ids of a text "
                "are random; set it to null"
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend.encode(PROBE, add_special_tokens=False).ids, backend.get_vocab()
    except Exception as error:  # the library raises bare Exceptions
        if _not_the_files(error):
            raise
        raise UserError(
            f"{path}: {_NO_TOKENIZER}: {_version('tokenizers')} does not read it "
            f"({_first_line(error)}); download it again, or install a newer tokenizers if it was "
            "written by one"
        ) from error


def _sentencepiece_ids(path):
    """Sentencepiece's ids of the probe text for tokenizer.model; None if it is tiktoken's."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(PROBE)
    except Exception as error:
        if _not_the_files(error):
            raise
        with open(path, "rb") as file:
            if _TIKTOKEN.match(file.read(1024)):
                return None
        raise UserError(
            f"{path}: {_NO_TOKENIZER}: neither a SentencePiece model nor tiktoken's; "
            "download it again"
        ) from error


def _from_json(folder):
    import transformers

    return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def _from_class(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )


def _load(folder, load):
    """Returns `load(folder)`; a one-line UserError if transformers cannot read the tokenizer."""

    def load_and_try():
        tokenizer = load(folder)
        # Some fields fail only when they are used.
        ids = [*user_ids(tokenizer, PROBE), *tokenizer("a")["input_ids"]]
        tokenizer.decode(ids, skip_special_tokens=True)
        return tokenizer

    try:
        return errors.retrying(load_and_try, f"reading the tokenizer in {folder}")
    except Exception as error:  # tokenizers, sentencepiece and transformers raise their own types
        if _not_the_files(error):
            raise
        code = _own_code(folder)
        if code:
            raise _own_code_error(folder, code) from error
        versions = f"{_version('transformers')}, {_version('tokenizers')}"
        raise UserError(f"{folder}: {_NO_TOKENIZER} ({_first_line(error)}; {versions})") from error


def _own_code_error(folder, code):
    return UserError(
        f"{folder}: the tokenizer is code of the base's own (auto_map: {code}), which is never run "
        "here; give a base whose tokenizer transformers has"
    )


def _refuse_own_code(folder, stated):
    """UserError if tokenizer_config.json names the base's own code and no transformers class."""
    auto_map = stated.get("auto_map")
    code = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    if not code:
        return
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = stated.get("tokenizer_class")
    if not isinstance(name, str) or not any(
        tokenizer_class_from_name(n) for n in (name, name.removesuffix("Fast"), f"{name}Fast")
    ):
        raise _own_code_error(folder, _class_names(code))


def _class_names(code):
    """The classes of an auto_map entry, which is a name or a list of names and nulls."""
    return ", ".join(sorted({str(c) for c in (code if isinstance(code, list) else [code]) if c}))


def _own_code(folder):
    """The tokenizer classes that a folder's auto_map names, or ""."""
    for name in ("tokenizer_config.json", "config.json"):
        auto_map = _read_optional(folder / name, "a configuration").get("auto_map")
        code = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else None
        if code:
            return _class_names(code)
    return ""


def _name_special_tokens(folder, stated, tokenizer):
    """Names bos and eos by the model's configuration if the tokenizer's files do not.

    Args:
        folder: the base.
        stated: the content of tokenizer_config.json.
        tokenizer: is changed.
    """
    special = _read_optional(folder / "special_tokens_map.json", "special tokens")
    for name in ("bos_token", "eos_token"):
        if name in stated | special or getattr(tokenizer, name) is not None:
            continue
        for path in (folder / "generation_config.json", folder / "config.json"):
            number = _read_optional(path, "the ids of special tokens").get(f"{name}_id")
            number = number[0] if isinstance(number, list) and number else number
            token = None
            if files.is_kind(number, int) and 0 <= number < len(tokenizer):
                token = tokenizer.convert_ids_to_tokens(number)
            if token is not None:
                setattr(tokenizer, name, token)
                break
    _say_contradictions(folder, stated, special, tokenizer)


def _say_contradictions(folder, stated, special, tokenizer):
    """Says where a tokenizer's files contradict each other, and what counts, as in transformers.

    Args:
        folder: the base.
        stated: the content of tokenizer_config.json.
        special: the content of special_tokens_map.json.
        tokenizer: loaded from the folder.
    """
    for name in ("bos_token", "eos_token", "unk_token"):
        here, there = (
            source[name].get("content") if isinstance(source.get(name), dict) else source.get(name)
            for source in (stated, special)
        )
        if here and there and here != there:
            errors.say(
                f"{folder}: {name} is {here!r} in tokenizer_config.json and {there!r} in "
                f"special_tokens_map.json; {getattr(tokenizer, name)!r} is taken"
            )
    template = stated.get("chat_template")
    if isinstance(template, str) and template != tokenizer.chat_template:
        errors.say(
            f"{folder}: tokenizer_config.json has another chat template than chat_template.jinja, "
            "which is taken"
        )
    decoder = stated.get("added_tokens_decoder") or {}
    added_tokens = {
        "tokenizer_config.json": {
            token.get("content", ""): int(number) for number, token in decoder.items()
        },
        "added_tokens.json": _read_optional(folder / "added_tokens.json", "added tokens"),
    }
    for name, added in added_tokens.items():
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in added}
        moved = {token: number for token, number in ids.items() if number != added[token]}
        if moved:
            errors.say(
                f"{folder}: {name} gives {len(moved)} token(s) other ids than they have, as in "
                f"transformers: {errors.shown(moved)} are taken"
            )
    add_bos = stated.get("add_bos_token")
    if isinstance(add_bos, bool) and add_bos != (bos_id(tokenizer) is not None):
        sets = "none" if add_bos else repr(tokenizer.bos_token)
        errors.say(
            f"{folder}: add_bos_token is {add_bos} in tokenizer_config.json, but the tokenizer "
            f"sets {sets} in front of a text, which counts, as in transformers"
        )


def _compare(path, tokenizer, expected):
    """UserError if a tokenizer encodes the probe text differently than its file's own library.

    Args:
        path: the file.
        tokenizer: loaded from it.
        expected: the library's ids of the probe text, None if unknown.
    """
    ids = None if expected is None else user_ids(tokenizer, PROBE)
    if ids == expected:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b),
        min(len(ids), len(expected)),
    )
    theirs, ours = (tokenizer.convert_ids_to_tokens(row[at : at + 3]) for row in (expected, ids))
    raise UserError(
        f"{path}: {_version('transformers')} reads a text otherwise than this file says ({ours} in "
        f"place of {theirs}); correct tokenizer_config.json, or, of a tokenizer.model alone, add "
        "the tokenizer.json of the base's publisher"
    )


def read_alike(folder: pathlib.Path) -> bool:
    """Whether `AutoTokenizer` encodes the probe text as the tokenizer.json in a folder says.

    For a folder that this package wrote.
    """
    config = files.read_json(folder / "config.json", "the base model's configuration")
    if config["model_type"] == "llama":
        # It uses the class that tokenizer_config.json names; trying that takes seconds of imports.
        return True
    tokenizer = _load(folder, _from_class)
    encoded = tokenizer(PROBE, add_special_tokens=False, split_special_tokens=True)
    return encoded["input_ids"] == _tokenizers_ids(folder / _JSON)[0]


def bos_id(tokenizer: Tokenizer) -> int | None:
    """The id that the tokenizer itself puts in front of a text, or None."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None


def token_id(tokenizer: Tokenizer, token: str) -> int | None:
    """The id of a token, as the vocabulary spells it or as the text that it stands for."""
    number = tokenizer.convert_tokens_to_ids(token)
    if number is not None and (number != tokenizer.unk_token_id or token == tokenizer.unk_token):
        return number
    ids = user_ids(tokenizer, token)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def save(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer's files so that every reader encodes texts alike.

    They name the class that all versions of transformers load from tokenizer.json as it stands.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = files.read_json(path, "a tokenizer's configuration")
    files.write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


# ------------------------------------------------------------------------------------ identity


def fingerprint(tokenizer: Tokenizer) -> str:
    """Identity of a tokenizer: a sha256.

    It covers the ids of the probe text, bos and eos, the id of every piece of the model, and added
    tokens that texts can contain. Special tokens that were added to the model's own, such as one
    for padding, leave it as it is: they change the ids of no text.
    """
    digest = hashlib.sha256(
        json.dumps([user_ids(tokenizer, PROBE), bos_id(tokenizer), tokenizer.eos_token_id]).encode()
    )
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    for piece, number in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number} {piece}\n".encode("utf-8", "surrogatepass"))
    for number, token in sorted(tokenizer.added_tokens_decoder.items()):
        if not token.special:
            flags = token.single_word, token.lstrip, token.rstrip, token.normalized
            digest.update(
                f"added {number} {token.content} {flags}\n".encode("utf-8", "surrogatepass")
            )
    return digest.hexdigest()


# --------------------------------------------------------------------------------- ids and rows


def highest_id(tokenizer: Tokenizer) -> int:
    """The largest id of a tokenizer's vocabulary; -1 if it is empty."""
    return max(tokenizer.get_vocab().values(), default=-1)


def check_ids(
    rows: Iterable[Sequence[int] | np.ndarray],
    table_rows: int,
    what: Callable[[int], str],
    tokenizer: Tokenizer | None = None,
    special_rows: int = 0,
) -> None:
    """UserError if an id has no row in the embedding table, where JAX would silently give NaN.

    Args:
        rows: lists of ids.
        table_rows: rows of the embedding table.
        what: describes the list of this index, for messages.
        tokenizer: names the token in messages.
        special_rows: how many negative ids stand for rows of the memory table.
    """
    for number, ids in enumerate(rows):
        if len(ids) and not (-special_rows <= min(ids) and max(ids) < table_rows):
            wrong = next(i for i in ids if not -special_rows <= i < table_rows)
            # The tokenizers library takes 32-bit ids.
            known = tokenizer is not None and 0 <= wrong < 2**32
            token = tokenizer.convert_ids_to_tokens(int(wrong)) if known else None
            named = f"token {token!r} has id {wrong}" if token is not None else f"id {wrong}"
            raise UserError(
                f"{what(number)}: {named}, but the base's embedding table has {table_rows:,} rows, "
                f"0 to {table_rows - 1:,}; remove that token from it, or give a base whose "
                "embeddings were resized for its tokenizer"
            )
