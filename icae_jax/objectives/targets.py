"""Target layouts: what stands behind the memory, and which of its tokens are labels (arXiv 2307.06945, section 2.2.2 and 2.3;
arXiv 2408.03094, section 3).

| objective | behind head and memory                          | labels                              |
|-----------|--------------------------------------------------|-------------------------------------|
| ae        | trigger ([AE] or <s>), text, </s>                | text and </s>                       |
| lm        | ([LM],) continuation                             | continuation after its first 8 tokens |
| qa        | template's start, prompt, template's end, answer, stop | answer and stop               |

Arrays hold the special rows of the memory table as negative ids, which index the table from its end whatever its k.
"""

import dataclasses
import typing

import numpy as np

from icae_jax.errors import UserError

AE, LM, FT = -3, -2, -1
OBJECTIVES = ("ae", "lm", "qa")
LM_UNLABELLED = 8  # the first tokens of a continuation carry no loss: little in the memory could tell them (reference)
LM_MINIMUM = 64  # continuations of no more tokens are no LM target (reference), where windows are longer than that


class Target(typing.NamedTuple):
    """One target: all its tokens, the first `label_start` of which are given and the rest predicted."""

    ids: list[int]
    label_start: int


@dataclasses.dataclass(frozen=True)
class Framing:
    """What stands round a text. start: ids before it in the encoder. trigger: the id that asks for it back. eos: its end."""

    start: tuple[int, ...]
    trigger: int
    eos: int


def make_framing(compression, tokenizer, bos_id):
    """The `Framing` of a method. bos_id: the id that the tokenizer sets in front of a text, or None.

    ICAE's encoder reads the text as the base would, `<s>` included; 500xCompressor's (and that of the ICAE it is compared with, layout
    `padded`) reads the text alone, and `<s>` is what its decoder starts regeneration with. UserError where that is asked for and the
    tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token; set one in tokenizer_config.json")
    if compression.trigger == "bos" and tokenizer.bos_token_id is None:
        raise UserError(
            "compression.trigger is bos, but the base's tokenizer has no bos token; choose trained"
        )
    alone = compression.method == "x500" or compression.layout == "padded"
    start = () if alone or bos_id is None else (bos_id,)
    return Framing(
        start,
        tokenizer.bos_token_id if compression.trigger == "bos" else AE,
        tokenizer.eos_token_id,
    )


def ae_target(context, framing, padded_to=0):
    """Autoencoding: restore the context, `<s>` included where the encoder saw it.

    padded_to: a number of tokens up to which the context is filled with eos, all of them labels, as the reference 500xCompressor trains.
    """
    return Target(
        [framing.trigger, *context, *[framing.eos] * (padded_to - len(context)), framing.eos], 1
    )


def lm_target(continuation, trigger=False):
    """Language modelling: continue the context. trigger: put [LM] in front (off in the reference)."""
    given = [LM] if trigger else []
    return Target([*given, *continuation], len(given) + LM_UNLABELLED)


@dataclasses.dataclass(frozen=True)
class Template:
    """How a prompt is put to the memory. head: ids before the memory. before, after: ids round the prompt. stop: the answer's end."""

    name: str
    head: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    stop: int

    def as_json(self) -> list:
        """The template as JSON holds it, see `from_json`."""
        return [self.name, list(self.head), list(self.before), list(self.after), self.stop]

    @classmethod
    def from_json(cls, kept, source) -> "Template":
        """The template that `as_json` gave. UserError where it is none. source: the file, to name it."""
        fits = (
            isinstance(kept, list)
            and len(kept) == 5
            and isinstance(kept[0], str)
            and type(kept[4]) is int
        )
        if not fits or not all(
            isinstance(ids, list) and all(type(i) is int for i in ids) for ids in kept[1:4]
        ):
            raise UserError(f"{source}: {kept!r} is no template of ids; take another workdir")
        return cls(kept[0], *map(tuple, kept[1:4]), kept[4])

    def prompt(self, prompt_ids):
        """The ids behind the memory that ask for an answer."""
        return [*self.before, *prompt_ids, *self.after]

    def target(self, prompt_ids, answer_ids):
        """A question with its answer."""
        given = self.prompt(prompt_ids)
        return Target([*given, *answer_ids, self.stop], len(given))

    def target_sizes(self, prompt_lengths, answer_lengths):
        """(inputs, labels) of the targets of prompts and answers of these lengths, whole numbers or arrays of them; see `pack`."""
        return len(self.prompt([])) + prompt_lengths + answer_lengths, answer_lengths + 1


TEMPLATES = ("mistral", "v1", "plain", "none", "chat")


def _ids(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def make_template(name, tokenizer, eos=None):
    """A `Template` in the tokenizer's ids. tokenizer: may be None for v1 and none, which hold no words; eos: then what ends an answer.

    mistral: `<s> [INST]`, memory, [FT], prompt, `[/INST]`, answer, </s> (reference v2). v1: memory, [FT], prompt, [FT], answer, id 1.
    plain: memory, `Question: … Answer: `, answer, </s> (arXiv 2408.03094). none: memory, prompt, answer, </s>. chat: the tokenizer's own
    chat template with the memory and the prompt in the user's turn.
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
        return Template(
            name, (*bos, *_ids(tokenizer, "[INST]")), (FT,), _ids(tokenizer, "[/INST]"), eos
        )
    if name == "plain":
        return Template(name, (), _ids(tokenizer, "Question:"), _ids(tokenizer, "Answer:"), eos)
    if name == "chat":
        if not tokenizer.chat_template:
            raise UserError(
                "objectives.template is chat, but the tokenizer has no chat template; choose mistral, v1 or plain"
            )
        memory, prompt = "<<MEMORY>>", "<<PROMPT>>"
        turns = [{"role": "user", "content": f"{memory}\n{prompt}"}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            text.encode()  # fails on half of a surrogate pair, which no tokenizer takes
        except Exception as error:  # whatever a template raises, or jinja2 of it
            raise UserError(
                "objectives.template is chat, but the tokenizer's chat template does not take a single user's turn "
                f"({type(error).__name__}: {' '.join(str(error).split())}); choose mistral, v1 or plain"
            ) from error
        if (
            text.count(memory) != 1
            or text.count(prompt) != 1
            or text.index(prompt) < text.index(memory)
        ):
            raise UserError(
                "the tokenizer's chat template does not show the user's turn exactly once; choose another template"
            )
        head, rest = text.split(memory)
        before, after = rest.split(prompt)
        return Template(name, *(_ids(tokenizer, part) for part in (head, before, after)), eos)
    raise UserError(f"objectives.template is {name!r}; choose from {', '.join(TEMPLATES)}")


# -------------------------------------------------------------------------------------------------------------- packing


def pack(rows, G, T, U):
    """Stacks the targets of each example: `rows[b]` holds up to G of them, None for an absent one.

    Returns int32 arrays `ids [B, G, T]` (decoder inputs), `label_at [B, G, U]` (the input index that predicts each label),
    `labels [B, G, U]`, and `label_mask [B, G, U]` bool. UserError where a target does not fit.
    """
    B = len(rows)
    batch = {
        "ids": np.zeros((B, G, T), np.int32),
        "label_at": np.zeros((B, G, U), np.int32),
        "labels": np.zeros((B, G, U), np.int32),
        "label_mask": np.zeros((B, G, U), bool),
    }
    for b, targets in enumerate(rows):
        for g, target in enumerate(targets):
            if target is None:
                continue
            inputs, labels = len(target.ids) - 1, len(target.ids) - target.label_start
            if target.label_start < 1:
                raise ValueError(
                    "a target's first token is a label; nothing stands before it that could predict it"
                )
            if inputs > T or labels > U or len(targets) > G:
                raise ValueError(
                    f"a target of {inputs} inputs and {labels} labels does not fit in [{G}, {T}] with {U} labels"
                )
            batch["ids"][b, g, :inputs] = target.ids[:-1]
            batch["label_at"][b, g, :labels] = np.arange(target.label_start - 1, inputs)
            batch["labels"][b, g, :labels] = target.ids[target.label_start :]
            batch["label_mask"][b, g, :labels] = True
    return batch
