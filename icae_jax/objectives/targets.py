"""Targets: the tokens behind the memory, and which of them are labels.

Sources: arXiv 2307.06945, sections 2.2.2 and 2.3; arXiv 2408.03094, section 3.

| objective | behind head and memory                                 | labels                     |
|-----------|--------------------------------------------------------|----------------------------|
| ae        | trigger ([AE] or <s>), text, </s>                      | text and </s>              |
| lm        | ([LM],) continuation                                   | all but its first 8 tokens |
| qa        | template's start, prompt, template's end, answer, stop | answer and stop            |

Special rows of the memory table are negative ids, which index the table from its end, whatever its
k.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.objectives import joint

AE, LM, FT = -3, -2, -1
OBJECTIVES = ("ae", "lm", "qa")
TAUGHT = ("lm", "qa")  # those that a teacher knows something of (`distil`)
# The first tokens of a continuation carry no loss: the memory says little about them (reference).
LM_UNLABELLED = 8
# A continuation must be longer than this to be an LM target (reference), if windows are longer.
LM_MINIMUM = 64


class Target(NamedTuple):
    """One target: its tokens. The first `label_start` are given, the others predicted."""

    ids: list[int]
    label_start: int


@dataclasses.dataclass(frozen=True)
class Framing:
    """The ids around a text.

    start: before the text in the encoder. trigger: asks for the text back. eos: ends it.
    """

    start: tuple[int, ...]
    trigger: int
    eos: int


def make_framing(compression: CompressionConfig, tokenizer: Any, bos_id: int | None) -> Framing:
    """The `Framing` of a configuration.

    bos_id: the id that the tokenizer puts in front of a text, or None.

    ICAE's encoder reads the text as the base would, `<s>` included. 500xCompressor's reads the text
    alone, and `<s>` is what its decoder starts regeneration with. UserError if an id is needed that
    the tokenizer does not have.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token; set one in tokenizer_config.json")
    if compression.trigger == "bos" and tokenizer.bos_token_id is None:
        raise UserError(
            "compression.trigger is bos, but the base's tokenizer has no bos token; choose trained"
        )
    start = () if bos_id is None or not compression.bos_before_text else (bos_id,)
    trigger = tokenizer.bos_token_id if compression.trigger == "bos" else AE
    return Framing(start, trigger, tokenizer.eos_token_id)


def ae_target(context: Sequence[int], framing: Framing, padded_to: int = 0) -> Target:
    """Autoencoding: restore the context, `<s>` included if the encoder reads it.

    padded_to: tokens up to which the context is filled with eos. All of them are labels, as the
    reference 500xCompressor trains.
    """
    padding = [framing.eos] * (padded_to - len(context))
    return Target([framing.trigger, *context, *padding, framing.eos], 1)


def lm_target(continuation: Sequence[int], trigger: bool = False) -> Target:
    """Continue the context. trigger: put [LM] in front (the reference does not)."""
    given = [LM] if trigger else []
    return Target([*given, *continuation], len(given) + LM_UNLABELLED)


@dataclasses.dataclass(frozen=True)
class Template:
    """How a prompt is put to the memory.

    head: ids before the memory. before, after: ids around the prompt. stop: the id that ends the
    answer.
    """

    name: str
    head: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    stop: int

    def as_json(self) -> list:
        """The template as JSON, for `from_json`."""
        return [self.name, list(self.head), list(self.before), list(self.after), self.stop]

    @classmethod
    def from_json(cls, value: Any, source: Any) -> "Template":
        """The template that `as_json` gave. UserError, which names `source`, if it is none."""

        def is_ids(value):
            return isinstance(value, list) and all(type(i) is int for i in value)

        valid = (
            isinstance(value, list)
            and len(value) == 5
            and isinstance(value[0], str)
            and all(map(is_ids, value[1:4]))
            and type(value[4]) is int
        )
        if not valid:
            raise UserError(f"{source}: {value!r} is no template of ids; take another workdir")
        return cls(value[0], *map(tuple, value[1:4]), value[4])

    def prompt(self, prompt_ids: Sequence[int]) -> list[int]:
        """The ids behind the memory that ask for an answer."""
        return [*self.before, *prompt_ids, *self.after]

    def target(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Target:
        """A question with its answer."""
        given = self.prompt(prompt_ids)
        return Target([*given, *answer_ids, self.stop], len(given))

    def target_sizes(self, prompt_lengths: Any, answer_lengths: Any) -> tuple[Any, Any]:
        """(inputs, labels) of targets, see `packing.pack`. Lengths may be numbers or arrays."""
        return len(self.prompt([])) + prompt_lengths + answer_lengths, answer_lengths + 1


TEMPLATES = ("mistral", "v1", "plain", "none", "chat")


def make_template(name: str, tokenizer: Any, eos: int | None = None) -> Template:
    """A `Template` in the tokenizer's ids.

    mistral: `<s> [INST]`, memory, [FT], prompt, `[/INST]`, answer, </s> (reference v2). v1: memory,
    [FT], prompt, [FT], answer, id 1. plain: memory, `Question:`, prompt, `Answer:`, answer, </s>
    (arXiv 2408.03094). none: memory, prompt, answer, </s>. chat: the tokenizer's own chat template,
    with memory and prompt in the user's turn, in the ids of the text as a whole where they can be
    split (`joint`), else of its parts.

    tokenizer: may be None for v1 and none, which hold no words; then eos ends an answer. UserError
    for an unknown name, or a template that the tokenizer cannot make.
    """
    if name == "v1":
        return Template(name, (), (FT,), (FT,), 1)
    eos = eos if tokenizer is None else tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no eos token; set one in tokenizer_config.json")
    if name == "none":
        return Template(name, (), (), (), eos)
    if name == "mistral":
        bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
        head = (*bos, *_ids(tokenizer, "[INST]"))
        return Template(name, head, (FT,), _ids(tokenizer, "[/INST]"), eos)
    if name == "plain":
        return Template(name, (), _ids(tokenizer, "Question:"), _ids(tokenizer, "Answer:"), eos)
    if name == "chat":
        texts = _chat_parts(tokenizer)
        parts = joint.split(tokenizer, *texts) or (_ids(tokenizer, text) for text in texts)
        return Template(name, *parts, eos)
    raise UserError(f"objectives.template is {name!r}; choose from {', '.join(TEMPLATES)}")


def _ids(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def _chat_parts(tokenizer):
    """The chat template's text before the memory, before the prompt, and after the prompt."""
    head, *rest = chat_texts(tokenizer, 1, f"{joint.MEMORY}\n")
    if head.count(joint.MEMORY) != 1:
        raise UserError(_NOT_SHOWN)
    before_memory, before_prompt = head.split(joint.MEMORY)
    return before_memory, before_prompt, *rest


_NOT_SHOWN = (
    "the tokenizer's chat template does not show every turn exactly once; choose another template"
)


def chat_texts(tokenizer: Any, questions: int, first: str = "") -> list[str]:
    """The text of a chat template around the turns of a conversation, which ends with a question.

    Before each turn, and behind the last, which asks for an answer. first: put before the first
    question. UserError if the template cannot make it.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "objectives.template is chat, but the tokenizer has no chat template; choose mistral, "
            "v1 or plain"
        )
    contents = [f"<<TURN{i}>>" for i in range(2 * questions - 1)]
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": ("" if i else first) + content}
        for i, content in enumerate(contents)
    ]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        text.encode()  # fails on half of a surrogate pair, which no tokenizer takes
    except Exception as error:  # templates are programs: they raise anything
        raise UserError(
            "objectives.template is chat, but the tokenizer's chat template does not take "
            f"{'a single user' if questions == 1 else 'a user and an assistant'}'s turn "
            f"({type(error).__name__}: {' '.join(str(error).split())}); choose mistral, v1 or plain"
        ) from error
    around = []
    for content in contents:
        if text.count(content) != 1:
            raise UserError(_NOT_SHOWN)
        before, text = text.split(content)
        around.append(before)
    return [*around, text]
