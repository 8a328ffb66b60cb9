"""A chat's text tokenised as a whole, as servers do, with one token in the memory's place.

Where tokens depend on what stands beside them, the parts of a text have other ids than the text. A
SentencePiece tokenizer, for one, puts a space before whatever it is given: before a question, which
is right behind a space, and before what follows the question, which is not.
"""

import copy
import itertools
from typing import Any

import tokenizers

MEMORY = "<prompt_embeds>"  # vLLM's token for embeddings
# What may stand between a chat's text and a question, so that the question has the ids that it has
# alone.
PADDINGS = ("", " ")
# They begin and end with letters of both cases, a digit and a mark.
PROBES = ("who saw the cat", "Where was Anna in 1963 ?", "7 and 8", "is it a house or a Garden")


def with_memory_token(tokenizer: Any) -> Any:
    """A copy of the tokenizer, to which `MEMORY` is one token."""
    tokenizer = copy.deepcopy(tokenizer)
    token = tokenizers.AddedToken(MEMORY, special=True, normalized=False)
    tokenizer.add_tokens([token], special_tokens=True)
    return tokenizer


def around_memory(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The ids before and behind `MEMORY`, which a text holds once.

    tokenizer: as `with_memory_token` gives it.
    """
    ids = _ids(tokenizer, text)
    at = ids.index(tokenizer.convert_tokens_to_ids(MEMORY))
    return ids[:at], ids[at + 1 :]


def split(
    tokenizer: Any, head: str, before: str, after: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """The ids of the texts before a memory, before a question and after it, in one text.

    With them the question has the ids that it has alone. None if there are no such ids, because
    those of a question depend on the text, or those of the text on the question.
    """
    alone = [_ids(tokenizer, probe) for probe in PROBES]
    likely = len(_ids(tokenizer, before)) if before else 0
    marked = with_memory_token(tokenizer)
    for padding in PADDINGS:
        texts = [f"{head}{MEMORY}{before}{padding}{probe}{after}" for probe in PROBES]
        heads, whole = zip(*(around_memory(marked, text) for text in texts), strict=True)
        frame = _frame(whole, alone, likely)
        if frame is not None and all(ids == heads[0] for ids in heads):
            return tuple(heads[0]), *frame
    return None


def between(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of a text between two others, such as an answer and the next question.

    With them both have the ids that they have alone; where there are no such ids, those of the text
    alone.
    """
    for padding in PADDINGS:
        found = set()
        for first, second in itertools.pairwise(PROBES):
            first_ids, second_ids = _ids(tokenizer, first), _ids(tokenizer, second)
            ids = _ids(tokenizer, f"{first}{text}{padding}{second}")
            middle = ids[len(first_ids) : len(ids) - len(second_ids)]
            fits = ids == [*first_ids, *middle, *second_ids]
            found.add(tuple(middle) if fits else None)
        if len(found) == 1 and None not in found:
            return found.pop()
    return tuple(_ids(tokenizer, text))


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _frame(whole, questions, likely):
    """What is before and after every question in its text, the same in all; None if there is none.

    likely: about how many ids are before a question.
    """
    rest = len(whole[0]) - len(questions[0])
    for size in sorted(range(rest + 1), key=lambda size: abs(size - likely)):
        before, after = whole[0][:size], whole[0][size + len(questions[0]) :]
        if all(
            ids == [*before, *question, *after]
            for ids, question in zip(whole, questions, strict=True)
        ):
            return tuple(before), tuple(after)
    return None
