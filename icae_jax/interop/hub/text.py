"""What a user wrote, as token ids. Control tokens that a text merely spells stay text: only our own frames hold them."""

import functools
import json
import weakref
from collections.abc import Sequence

from icae_jax.errors import UserError

STOPS = "icae_stop_ids"  # of a base's tokenizer: what ends a text by the base's configuration, which the tokenizer may not call special
_SPELLED = (
    weakref.WeakKeyDictionary()
)  # tokenizer -> (its special ids, `_control_tokens` with them)


def user_ids(tokenizer, text: str | Sequence[str]):
    """The ids of a text (of a list of texts: a list of them), without special tokens: not those that a tokenizer adds, and none that the
    text spells. `</s>` in a page of the web, or `<|eot_id|>` in a question, is read as the characters that it is written with.

    UserError where a text is none, or cannot be encoded at all, since it holds half of a surrogate pair.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        return []
    for one in texts:
        if not isinstance(one, str):
            raise UserError(f"a text is {type(one).__name__}, expected str")
    try:
        # verbose=False: texts are cut into windows later, so the tokenizer's length warning would mislead.
        made = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
    except (TypeError, UnicodeError) as error:
        for one in texts:
            check_encodable(one, "the text")
        raise error
    spelled = _control_tokens(tokenizer)
    # Most tokenizers give none now; one of whole words, or of pieces by their probability, still finds the token among its words.
    rows = [
        [i for t in ids for i in spelled.get(t, (t,))]
        if not spelled.keys().isdisjoint(ids)
        else ids
        for ids in made["input_ids"]
    ]
    return rows[0] if isinstance(text, str) else rows


def check_encodable(text: str, what: str) -> None:
    """UserError where a text holds half of a surrogate pair, which JSON can spell and no tokenizer or file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} is not valid text: {error}; half of a surrogate pair, remove it or give the whole character"
        ) from error


def _control_tokens(tokenizer) -> dict[int, tuple[int, ...]]:
    """`{id of a control token: ids to read in its place}`: those of its characters, or nothing where the tokenizer has none for them.

    The unknown token is none of them: it is what a tokenizer makes of the words that it lacks.
    """
    ends = [
        i for i in getattr(tokenizer, STOPS, ()) if i in tokenizer.added_tokens_decoder
    ]  # a plain piece, as "\n", stays what it is
    special = [i for i in (*tokenizer.all_special_ids, *ends) if i is not None]
    if (
        _SPELLED.get(tokenizer, (None,))[0] != special
    ):  # its end may be named after it has read a text
        unknown = _unknown(tokenizer)
        added = {
            i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        control = added | {i: tokenizer.convert_ids_to_tokens(i) for i in special}
        if unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            control.pop(unknown, None)
        spell = functools.partial(
            _characters, tokenizer, unknown if unknown not in control else None
        )
        _SPELLED[tokenizer] = (
            special,
            {
                i: tuple(c for c in spell(content) if c not in control)
                for i, content in control.items()
            },
        )
    return _SPELLED[tokenizer][1]


def _unknown(tokenizer) -> int | None:
    """The id of what a tokenizer makes of words that it lacks: as it is named, or else as its model alone knows it."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if tokenizer.unk_token_id is not None or model is None:
        return tokenizer.unk_token_id
    if hasattr(model, "unk_token"):
        return None if model.unk_token is None else model.token_to_id(model.unk_token)
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"].get(
        "unk_id"
    )  # of pieces by probability, which do not tell


def _characters(tokenizer, unknown, content):
    """The id of each character by the tokenizer's model alone, which puts no spaces round it; the unknown token where it has none."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    for character in content:
        try:
            ids = [] if model is None else [token.id for token in model.tokenize(character)]
        except Exception:  # the library's own kind, of a model without an unknown token
            ids = []
        yield from ids or ([] if unknown is None else [unknown])
