"""Prompts as ids: questions behind a memory, after earlier turns, or without a memory."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from icae_jax.errors import UserError
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.text import user_ids
from icae_jax.objectives import joint
from icae_jax.objectives.targets import Template, chat_texts


class Turn(NamedTuple):
    """A question that was asked before, and its answer."""

    question: str
    answer: str


def question_ids(
    question: str, tokenizer: PreTrainedTokenizerBase, template: Template, where: str = ""
) -> list[int]:
    """The ids of a question.

    UserError if neither they nor the template have a token, since decoding needs one to start
    from. where: the beginning of the message.
    """
    ids = user_ids(tokenizer, question)
    if not template.prompt(ids):
        raise UserError(
            f"{where}the question {question!r} has no tokens, and template {template.name} puts no "
            "words around it; ask something"
        )
    return ids


def conversation_ids(
    turns: Sequence[Turn],
    question: str,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    where: str = "",
) -> list[int]:
    """The ids behind a memory that ask a question after earlier turns.

    The first turn is framed as in training. Behind an answer and its stop token the template begins
    anew, without `<s>` and memory; template chat goes on as the tokenizer's chat template does.
    UserError as for `question_ids`, or if the chat template takes no earlier turns.
    """
    asked = [*(turn.question for turn in turns), question]
    rows = [question_ids(text, tokenizer, template, where) for text in asked]
    ids = template.prompt(rows[0])
    between = _between(tokenizer, template) if turns else ()
    for turn, row in zip(turns, rows[1:], strict=True):
        ids += [*user_ids(tokenizer, turn.answer), *between, *row, *template.after]
    return ids


def _between(tokenizer, template) -> tuple[int, ...]:
    """The ids between an answer and the next question."""
    if template.name == "chat":
        return joint.between(tokenizer, chat_texts(tokenizer, 2)[-2])
    head = tuple(i for i in template.head if i != tokenizer.bos_token_id)
    return (template.stop, *head, *template.before)


def chat_ids(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a conversation in the tokenizer's own chat template, up to where it answers.

    As the template and the tokenizer make them; control tokens that a message spells stay text.
    messages: `{"role", "content"}`. UserError if the template does not take them.
    """

    def render(contents):
        turns = [m | {"content": content} for m, content in zip(messages, contents, strict=True)]
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs: they raise anything
            raise UserError(
                f"the base's chat template does not take these messages ({type(error).__name__}: "
                f"{' '.join(str(error).split())})"
            ) from error

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    contents = [message["content"] for message in messages]
    if all(user_ids(tokenizer, content) == ids(content) for content in contents):
        return ids(render(contents))
    marks = [f"<<TURN{i}>>" for i in range(len(contents))]
    rest, result = render(marks), []
    for mark, content in zip(marks, contents, strict=True):
        before, found, rest = rest.partition(mark)
        if not found:
            raise UserError("the base's chat template does not show every message")
        result += [*ids(before), *user_ids(tokenizer, content)]
    return [*result, *ids(rest)]


def without_trained(template: Template) -> Template:
    """A template without its trained tokens, which mean nothing without a memory."""
    ids = (
        tuple(i for i in part if i >= 0)
        for part in (template.head, template.before, template.after)
    )
    return Template(template.name, *ids, template.stop)


def start_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text: `<s>`, or nothing."""
    bos = tokenizers.bos_id(tokenizer)
    return () if bos is None else (bos,)


def without_memory(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    text_ids: Sequence[int],
    prompt_ids: Sequence[int],
) -> list[int]:
    """What the base alone reads: a text (or part, or none) in the memory's place, and the prompt.

    Begins with the template's head, else with `<s>` where the tokenizer puts one. prompt_ids: as
    `Template.prompt` or `conversation_ids` give them.
    """
    return [*(template.head or start_ids(tokenizer)), *text_ids, *prompt_ids]
