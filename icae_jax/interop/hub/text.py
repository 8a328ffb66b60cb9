"""User text as token ids. Control tokens that a text merely spells out stay text."""

import functools
import json
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from icae_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = object  # importing transformers takes seconds

_STOP_IDS = "icae_stop_ids"
# tokenizer -> (its special ids, the result of `_control_tokens` for them)
_SPELLED = weakref.WeakKeyDictionary()


def set_stop_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    """Has `user_ids` treat a base's stop ids as control tokens too.

    The tokenizer itself may not call them special. They are kept as its attribute, since texts are
    encoded wherever a tokenizer goes, and a forgotten argument would let a text end itself.
    """
    setattr(tokenizer, _STOP_IDS, tuple(ids))


def user_ids(tokenizer: Tokenizer, text: str | Sequence[Any]) -> list[int] | list[list[int]]:
    """The ids of a text, or of each text of a list, without special tokens.

    Neither does the tokenizer add any, nor can the text spell one: `</s>` in a web page or
    `<|eot_id|>` in a question is read as its characters.

    Raises:
        UserError: a text is not a str, or holds half of a surrogate pair.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        return []
    for item in texts:
        if not isinstance(item, str):
            raise UserError(f"a text is {type(item).__name__}, expected str")
    try:
        # verbose=False: texts are cut into windows later, so a warning about length would mislead.
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
    except (TypeError, UnicodeError) as error:
        for item in texts:
            check_encodable(item, "the text")
        raise error
    spelled = _control_tokens(tokenizer)
    # Most tokenizers give no control tokens now. Word-level and unigram models still find one that
    # is in their vocabulary.
    rows = [
        [i for t in ids for i in spelled.get(t, (t,))]
        if not spelled.keys().isdisjoint(ids)
        else ids
        for ids in encoded["input_ids"]
    ]
    return rows[0] if isinstance(text, str) else rows


def check_encodable(text: str, what: str) -> None:
    """UserError if a text holds half of a surrogate pair.

    JSON can spell one, and no tokenizer or file can hold it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} is not valid text: {error}; half of a surrogate pair, remove it or give the "
            "whole character"
        ) from error


def _control_tokens(tokenizer: Tokenizer) -> dict[int, tuple[int, ...]]:
    """`{id of a control token: ids that replace it}`.

    The replacements are the ids of its characters, or none if the tokenizer lacks them. The unknown
    token is not a control token: words that the vocabulary lacks become it.
    """
    # A plain piece that ends texts, such as "\n", stays a piece.
    added_tokens = tokenizer.added_tokens_decoder
    stops = [i for i in getattr(tokenizer, _STOP_IDS, ()) if i in added_tokens]
    special = [i for i in (*tokenizer.all_special_ids, *stops) if i is not None]
    # Special tokens may be named after the tokenizer has read its first text.
    if _SPELLED.get(tokenizer, (None,))[0] != special:
        unknown = _unknown_id(tokenizer)
        control = {i: token.content for i, token in added_tokens.items() if token.special}
        control |= {i: tokenizer.convert_ids_to_tokens(i) for i in special}
        if unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            control.pop(unknown, None)
        spell = functools.partial(
            _character_ids, tokenizer, unknown if unknown not in control else None
        )
        spelled = {
            i: tuple(c for c in spell(content) if c not in control)
            for i, content in control.items()
        }
        _SPELLED[tokenizer] = (special, spelled)
    return _SPELLED[tokenizer][1]


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id of the unknown token, which some tokenizers know only in their model."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if tokenizer.unk_token_id is not None or model is None:
        return tokenizer.unk_token_id
    if hasattr(model, "unk_token"):
        return None if model.unk_token is None else model.token_to_id(model.unk_token)
    # A unigram model tells it only in its serialised form.
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("unk_id")


def _character_ids(tokenizer: Tokenizer, unknown: int | None, content: str) -> Iterator[int]:
    """The ids of each character; the unknown token, if there is one, for those it lacks.

    By the tokenizer's model alone, which adds no spaces around them.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    for character in content:
        try:
            ids = [] if model is None else [token.id for token in model.tokenize(character)]
        except Exception:  # a bare Exception, from a model without an unknown token
            ids = []
        yield from ids or ([] if unknown is None else [unknown])
