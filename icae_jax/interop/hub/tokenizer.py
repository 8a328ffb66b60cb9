"""A base's tokenizer: read as its own files have it, known by a fingerprint, and held against the rows of the embedding table.

tokenizer.json says everything itself. `AutoTokenizer` may read it otherwise: for some model types it builds the tokenizer anew, with a
pre-tokenizer of its own. So the file is read as it is, and the ids of a probe text are compared with those that the tokenizers library
(of a `tokenizer.model` alone, sentencepiece) makes of the same file.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.interop.hub.text import user_ids

# Never to be changed: fingerprints hold what tokenizers make of it.
PROBE = (
    "The year 2024, in 1999:  two  spaces\tand\ttabs,\nnew LINES\r\n\r\n ÀÉÎõü œuvre naïve - \u201cquotes\u201d \u2026 12345.678 don't "
    "I'LL x_y camelCase ß İ \ufb01 ½ {[(%$#@&*+=~^`|\\/)]} 漢字かな 한국어 Русский عربى हिन्दी ไทย \U0001f600\U0001f469\u200d\U0001f467 "
    "<html> \u00a0 e\u0301 end "
)
_JSON, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_TIKTOKEN = re.compile(
    rb"[A-Za-z0-9+/]+=* \d+\s"
)  # how such a file begins: a token in base64, and its rank
_NO_TOKENIZER = "no tokenizer could be loaded"


def has_tokenizer(folder: str | pathlib.Path) -> bool:
    """Whether a folder holds files of a tokenizer."""
    folder = pathlib.Path(folder)
    return (
        any(path.suffix != ".py" for path in folder.glob("tokenizer*"))
        or (folder / "vocab.json").exists()
    )


# ------------------------------------------------------------------------------------------------------------- reading


def load_tokenizer(folder: str | pathlib.Path):
    """The tokenizer of a folder, a hub id or a URL, as transformers' object. No code of the base's own is run, nor is anybody asked.

    UserError names the file that cannot be read, and why; and a tokenizer that reads the probe text otherwise than its file says.
    """
    from icae_jax.interop.hub import (
        locations,  # and JAX with it, which those who only tokenise go without
    )

    folder = locations.local_folder(folder, progress=False, with_weights=False)
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder}: {_NO_TOKENIZER} (it has no tokenizer.json, tokenizer.model or vocab.json)"
        )
    for path in sorted(
        {*folder.glob("tokenizer*"), *folder.glob("*.json"), *folder.glob("*.jinja")}
    ):
        if path.is_file():
            files.check_real(path)
    named = folder / "tokenizer_config.json"
    stated = files.read_json(named, "a tokenizer's configuration") if named.exists() else {}
    if (folder / _JSON).exists():
        own, vocabulary = _own_reading(folder / _JSON)
        _refuse_own_code(folder, stated)
        tokenizer = _reading(folder, _as_the_file_says)
        _name_special_tokens(folder, stated, tokenizer)
        for name in ("bos_token", "eos_token"):
            if getattr(tokenizer, name) is not None and getattr(tokenizer, name) not in vocabulary:
                raise UserError(
                    f"{folder}: {name} is {getattr(tokenizer, name)!r} by tokenizer_config.json, which tokenizer.json does not know"
                )
        _compare(folder / _JSON, tokenizer, own)
    else:
        model = folder / _SENTENCEPIECE
        own = _sentencepiece_reading(model) if model.exists() else None
        tokenizer = _reading(folder, _by_its_class)
        _name_special_tokens(folder, stated, tokenizer)
        _compare(model, tokenizer, own)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(
            f"{folder}: {_NO_TOKENIZER} ({type(tokenizer).__name__} is not one of the tokenizers library)"
        )
    return tokenizer


def _version(package):
    return f"{package} {importlib.metadata.version(package)}"


def _cause(error):
    """What a library said, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "") or repr(
        error
    )


def _passes(error):
    """Whether an error is nothing that the file is to blame for."""
    return (
        errors.transient(error)
        or errors.disk_full(error)
        or isinstance(error, MemoryError | UserError)
    )


def _own_reading(path):
    """(ids of the probe text as the tokenizers library reads tokenizer.json, all tokens that it knows)."""
    import tokenizers

    try:
        with errors.naming(f"{path}: cannot be read"):
            data = errors.retrying(path.read_bytes, f"reading {path}")
        backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        if getattr(backend.model, "dropout", None):
            raise UserError(
                f"{path}: dropout of its model is {backend.model.dropout:g}, so a text is read anew each time; set it to null"
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend.encode(PROBE, add_special_tokens=False).ids, backend.get_vocab()
    except Exception as error:  # the library raises bare Exceptions
        if _passes(error):
            raise
        raise UserError(
            f"{path}: {_NO_TOKENIZER}: {_version('tokenizers')} does not read it ({_cause(error)}); download it again, or install a newer "
            "tokenizers if it was written by one"
        ) from error


def _sentencepiece_reading(path):
    """The ids of the probe text as sentencepiece reads tokenizer.model; None where the file is tiktoken's. UserError on any other."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(PROBE)
    except Exception as error:
        if _passes(error):
            raise
        with open(path, "rb") as file:
            if _TIKTOKEN.match(file.read(1024)):
                return None
        raise UserError(
            f"{path}: {_NO_TOKENIZER}: neither a SentencePiece model nor tiktoken's; download it again"
        ) from error


def _as_the_file_says(folder):
    import transformers

    return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def _by_its_class(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )


def _reading(folder, load):
    """The tokenizer that `load(folder)` makes. UserError, in one line, where transformers or what it calls does not read it."""

    def tried():
        tokenizer = load(folder)
        tokenizer.decode(
            [*user_ids(tokenizer, PROBE), *tokenizer("a")["input_ids"]], skip_special_tokens=True
        )  # some fields fail only now
        return tokenizer

    try:
        return errors.retrying(tried, f"reading the tokenizer in {folder}")
    except (
        Exception
    ) as error:  # of tokenizers, sentencepiece and transformers, in types of their own
        if _passes(error):
            raise
        own = _own_code(folder)
        if own:
            raise _error_of_own_code(folder, own) from error
        raise UserError(
            f"{folder}: {_NO_TOKENIZER} ({_cause(error)}; {_version('transformers')}, {_version('tokenizers')})"
        ) from error


def _error_of_own_code(folder, own):
    return UserError(
        f"{folder}: the tokenizer is code of the base's own (auto_map: {own}), which is never run here; give a base whose tokenizer "
        "transformers has"
    )


def _refuse_own_code(folder, stated):
    """UserError where tokenizer_config.json names code of the base's own and no class of transformers that would do in its place."""
    mapped = stated.get("auto_map")
    own = mapped.get("AutoTokenizer") if isinstance(mapped, dict) else mapped
    if not own:
        return
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = stated.get("tokenizer_class")
    if not isinstance(name, str) or not any(
        tokenizer_class_from_name(n) for n in (name, name.removesuffix("Fast"), f"{name}Fast")
    ):
        raise _error_of_own_code(folder, _named(own))


def _named(own):
    return ", ".join(sorted({str(c) for c in (own if isinstance(own, list) else [own]) if c}))


def _own_code(folder):
    """What a folder's auto_map names as its tokenizer, or ""."""
    for name in ("tokenizer_config.json", "config.json"):
        raw = files.read_json(folder / name, "a configuration") if (folder / name).exists() else {}
        mapped = raw.get("auto_map")
        own = mapped.get("AutoTokenizer") if isinstance(mapped, dict) else None
        if own:
            return _named(own)
    return ""


def _name_special_tokens(folder, stated, tokenizer):
    """Gives a tokenizer whose files do not name its bos and eos those that the model's configuration has the ids of."""
    path = folder / "special_tokens_map.json"
    beside = files.read_json(path, "special tokens") if path.exists() else {}
    for name in ("bos_token", "eos_token"):
        if name in stated | beside or getattr(tokenizer, name) is not None:
            continue
        for path in (folder / "generation_config.json", folder / "config.json"):
            number = (
                files.read_json(path, "the ids of special tokens").get(f"{name}_id")
                if path.exists()
                else None
            )
            number = number[0] if isinstance(number, list) and number else number
            token = (
                tokenizer.convert_ids_to_tokens(number)
                if files.is_kind(number, int) and 0 <= number < len(tokenizer)
                else None
            )
            if token is not None:
                setattr(tokenizer, name, token)
                break
    _say_contradictions(folder, stated, beside, tokenizer)


def _say_contradictions(folder, stated, beside, tokenizer):
    """Says where two files of a tokenizer say different things, and which counts: transformers' choice.

    stated: tokenizer_config.json. beside: special_tokens_map.json.
    """
    for name in ("bos_token", "eos_token", "unk_token"):
        here, there = (
            of[name].get("content") if isinstance(of.get(name), dict) else of.get(name)
            for of in (stated, beside)
        )
        if here and there and here != there:
            taken = getattr(tokenizer, name)
            files.say(
                f"{folder}: {name} is {here!r} in tokenizer_config.json and {there!r} in special_tokens_map.json; {taken!r} is taken"
            )
    template = stated.get("chat_template")
    if isinstance(template, str) and template != tokenizer.chat_template:
        files.say(
            f"{folder}: tokenizer_config.json has another chat template than chat_template.jinja, which is taken"
        )
    decoder, path = stated.get("added_tokens_decoder") or {}, folder / "added_tokens.json"
    named = {
        "tokenizer_config.json": {
            token.get("content", ""): int(number) for number, token in decoder.items()
        }
    }
    named[path.name] = files.read_json(path, "added tokens") if path.exists() else {}
    for name, added in named.items():
        taken = {token: tokenizer.convert_tokens_to_ids(token) for token in added}
        moved = {token: number for token, number in taken.items() if number != added[token]}
        if moved:
            what = f"gives {len(moved)} token(s) other ids than they have, as in transformers"
            files.say(f"{folder}: {name} {what}: {files.shown(moved)} are taken")
    in_front = stated.get("add_bos_token")
    if isinstance(in_front, bool) and in_front != (bos_id(tokenizer) is not None):
        sets = f"sets {'none' if in_front else repr(tokenizer.bos_token)} in front of a text, which counts, as in transformers"
        files.say(
            f"{folder}: add_bos_token is {in_front} in tokenizer_config.json, but the tokenizer {sets}"
        )


def _compare(path, tokenizer, own):
    """UserError where a tokenizer reads the probe text otherwise than the library whose file it is."""
    ids = None if own is None else user_ids(tokenizer, PROBE)
    if ids == own:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(ids, own, strict=False)) if a != b),
        min(len(ids), len(own)),
    )
    theirs, ours = (tokenizer.convert_ids_to_tokens(row[at : at + 3]) for row in (own, ids))
    raise UserError(
        f"{path}: {_version('transformers')} reads a text otherwise than this file says ({ours} in place of {theirs}); "
        "correct tokenizer_config.json, or, of a tokenizer.model alone, add the tokenizer.json of the base's publisher"
    )


def read_alike(folder: pathlib.Path) -> bool:
    """Whether transformers' `AutoTokenizer` reads the probe text of a folder that was written here as its tokenizer.json says."""
    if (
        files.read_json(folder / "config.json", "the base model's configuration")["model_type"]
        == "llama"
    ):
        return True  # there it takes the class that tokenizer_config.json names; to ask takes seconds of importing
    theirs = _reading(folder, _by_its_class)
    return (
        theirs(PROBE, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        == _own_reading(folder / _JSON)[0]
    )


def bos_id(tokenizer) -> int | None:
    """The id that the tokenizer itself sets in front of a text, or None."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None


# ------------------------------------------------------------------------------------------------------------- identity


def fingerprint(tokenizer) -> str:
    """Identity of a tokenizer: sha256 over the ids of the probe text, its bos and eos, the id of every piece of its model, and added tokens
    that texts are read into.

    Special tokens that were added behind the model's own, such as one for padding, leave it as it is: no text becomes other ids by them.
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


# -------------------------------------------------------------------------------------------------------------- indices


def highest_id(tokenizer) -> int:
    """The largest id that a tokenizer knows."""
    return max(tokenizer.get_vocab().values(), default=-1)


def check_ids(
    rows: Iterable[Sequence[int]],
    table_rows: int,
    what: Callable[[int], str],
    tokenizer=None,
    special_rows: int = 0,
) -> None:
    """UserError that names token, id and rows where an id has no row in the embedding table, of which JAX would make NaN without a word.

    rows: lists of ids. what: names the list of a number. special_rows: how many negative ids stand for rows of the memory table.
    """
    for number, ids in enumerate(rows):
        if len(ids) and not (-special_rows <= min(ids) and max(ids) < table_rows):
            wrong = next(i for i in ids if not -special_rows <= i < table_rows)
            askable = (
                tokenizer is not None and 0 <= wrong < 2**32
            )  # the tokenizers library counts in as many bits
            token = tokenizer.convert_ids_to_tokens(int(wrong)) if askable else None
            named = f"token {token!r} has id {wrong}" if token is not None else f"id {wrong}"
            raise UserError(
                f"{what(number)}: {named}, but the base's embedding table has {table_rows:,} rows, 0 to {table_rows - 1:,}; remove that "
                "token from it, or give a base whose embeddings were resized for its tokenizer"
            )


def save(folder: pathlib.Path, tokenizer) -> None:
    """Writes a tokenizer's files so that every reader makes the same ids of a text: the class that all versions of transformers take from
    tokenizer.json as it stands.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    files.write_json(
        path,
        files.read_json(path, "a tokenizer's configuration")
        | {"tokenizer_class": "PreTrainedTokenizerFast"},
    )
