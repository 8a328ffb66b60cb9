"""Chats in a server: its token ids are those of training, or it is said that they are not."""

import copy
import dataclasses
import string

import pytest
import tokenizers
import transformers
from conftest import make_tokenizer
from export_helpers import make, reader_of
from tokenizers import normalizers, pre_tokenizers

from icae_jax.interop import prompts
from icae_jax.interop.export import chats
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub.text import user_ids
from icae_jax.objectives import joint, targets

QUESTIONS = ("who saw it ?", "Where?", "3 cats", "is \u00fc a letter")
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def sentencepiece_like(legacy=False):
    """A tokenizer of characters that puts a space before a text.

    legacy: before each part of it between control tokens, too.
    """
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "\n", *string.printable[:94]]
    model = tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
    model.unk_token = "<unk>"
    backend = tokenizers.Tokenizer(model)
    if legacy:
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first", split=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def served_ids(tokenizer, jinja, content):
    """What a server reads, with None for the memory."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<prompt_embeds>"]})
    turns = [{"role": "user", "content": f"<prompt_embeds>\n{content}"}]
    text = tokenizer.apply_chat_template(
        turns, chat_template=jinja, tokenize=False, add_generation_prompt=True
    )
    memory = tokenizer.convert_tokens_to_ids("<prompt_embeds>")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [None if i == memory else i for i in ids]


def trained_ids(tokenizer, template, question):
    return [*template.head, None, *template.prompt(user_ids(tokenizer, question))]


def reader(tiny_base, tokenizer, template):
    """A `Reader` of an adapter with this template, on a base with this tokenizer."""
    base = bases.load_base(tiny_base)
    compressor, _ = make(base)
    adapter = dataclasses.replace(
        compressor.adapter, template=targets.make_template(template, tokenizer)
    )
    base = dataclasses.replace(base, tokenizer=tokenizer)
    return dataclasses.replace(reader_of(compressor), base=base, adapter=adapter)


@pytest.mark.parametrize(("jinja", "legacy"), [(LLAMA_2, False), (CHATML, False), (LLAMA_2, True)])
def test_a_chat_is_tokenised_as_a_whole(tiny_base, jinja, legacy):
    """Breaks when the parts of a chat are tokenised alone: a SentencePiece tokenizer puts a space
    before what follows the question, and the server none; or when the question has other ids there.
    """
    tokenizer = sentencepiece_like(legacy)
    tokenizer.chat_template = jinja
    template = targets.make_template("chat", tokenizer)
    apart = [targets._ids(tokenizer, text) for text in targets._chat_parts(tokenizer)]
    assert [template.head, template.before, template.after] != apart, "else this shows nothing"
    found = chats.framing(reader(tiny_base, tokenizer, "chat"), QUESTIONS)
    assert found == chats.Framing(None, " ", "")
    for question in QUESTIONS:
        ids = served_ids(tokenizer, jinja, found.padding + question)
        assert ids == trained_ids(tokenizer, template, question)


def test_tokens_that_do_not_depend_on_their_neighbours_stay_as_they_were(tiny_tokenizer):
    """Breaks when adapters of bases whose parts are tokenised alike alone and together get other
    ids than before.
    """
    template = targets.make_template("chat", tiny_tokenizer)
    apart = [targets._ids(tiny_tokenizer, text) for text in targets._chat_parts(tiny_tokenizer)]
    assert [template.head, template.before, template.after] == apart


def test_a_text_that_cannot_be_split_is_tokenised_in_parts():
    """Breaks when a template whose ids depend on the question fails, or gets those of one question.

    Here a merge joins the last letter of a question with what follows it.
    """
    pieces = ["<s>", *string.printable, *(f"{letter}\n" for letter in "dt?8n")]
    merges = [(letter, "\n") for letter in "dt?8n"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<s>"
    )
    tokenizer.chat_template = "{{ messages[0]['content'] + '\\n' }}"
    assert joint.split(tokenizer, *targets._chat_parts(tokenizer)) is None
    template = targets.make_template("chat", tokenizer)
    newline = tokenizer.convert_tokens_to_ids("\n")
    assert (template.head, template.before, template.after) == ((), (newline,), (newline,))


def test_what_a_server_reads_otherwise_is_said(tiny_base):
    """Breaks when a chat whose ids differ from those of training passes for one that was framed as
    trained: the note names a question.
    """
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = LLAMA_2
    told = chats.framing(reader(tiny_base, tokenizer, "chat"), (*QUESTIONS, "</s> what ?"))
    assert (
        "the server gives 1 question other token ids" in told.note and "'</s> what ?'" in told.note
    )
    trained_apart = reader(tiny_base, tokenizer, "chat")
    apart = [targets._ids(tokenizer, text) for text in targets._chat_parts(tokenizer)]
    template = targets.Template("chat", *apart, trained_apart.adapter.template.stop)
    adapter = dataclasses.replace(trained_apart.adapter, template=template)
    told = chats.framing(dataclasses.replace(trained_apart, adapter=adapter), QUESTIONS)
    assert "the server gives 4 questions other token ids" in told.note, (
        "stored ids stay as they are"
    )
    told = chats.framing(reader(tiny_base, tokenizer, "plain"), QUESTIONS)
    assert told.jinja is None and "trained with template plain" in told.note


@pytest.mark.parametrize("make_one", [sentencepiece_like, make_tokenizer])
@pytest.mark.parametrize("name", ["plain", "none"])
def test_a_base_without_a_chat_template_gets_one(tiny_base, make_one, name):
    """Breaks when the chat template that is exported frames a memory otherwise than training."""
    tokenizer = make_one()
    tokenizer.chat_template = None
    found = chats.framing(reader(tiny_base, tokenizer, name), QUESTIONS)
    template = targets.make_template(name, tokenizer)
    assert not found.note and not found.padding
    for question in QUESTIONS:
        assert served_ids(tokenizer, found.jinja, question) == trained_ids(
            tokenizer, template, question
        )


def test_later_turns_of_the_exported_chat_template(tiny_base):
    """Breaks when the template that is exported loses a turn, or ends none of the answers."""
    tokenizer = sentencepiece_like()
    jinja = chats.framing(reader(tiny_base, tokenizer, "plain"), QUESTIONS).jinja
    turns = [("user", "<prompt_embeds>\nwho ?"), ("assistant", "Ann"), ("user", "why ?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False)
    want = "<prompt_embeds> Question: who ? Answer: Ann</s> Question: why ? Answer:"
    assert " ".join(text.split()) == want
    alone = tokenizer.apply_chat_template(messages[2:], chat_template=jinja, tokenize=False)
    assert " ".join(alone.split()) == "Question: why ? Answer:"


def test_trained_tokens_have_no_text(tiny_base):
    """Breaks when a chat template leaves out a trained token that the memory was trained with."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    told = chats.framing(reader(tiny_base, tokenizer, "mistral"), ())
    assert told.jinja is None and "no text spells the trained tokens" in told.note


@pytest.mark.parametrize("jinja", [LLAMA_2, CHATML])
@pytest.mark.parametrize("legacy", [False, True])
def test_later_turns_are_tokenised_as_a_whole(jinja, legacy):
    """Breaks when what stands between an answer and the next question has ids of its own, as where
    SentencePiece puts a space before whatever it is given.
    """
    tokenizer = sentencepiece_like(legacy)
    tokenizer.chat_template = jinja
    template, text = targets.make_template("chat", tokenizer), targets.chat_texts(tokenizer, 2)[-2]
    turns = [prompts.Turn("who ran ?", "the cat"), prompts.Turn("where ?", "on it")]
    got = prompts.conversation_ids(turns, "why ?", tokenizer, template)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    want, rest = template.prompt(ids("who ran ?")), ["the cat", "where ?", "on it", "why ?"]
    for answer, question in zip(rest[::2], rest[1::2], strict=True):
        whole = [ids(f"{answer}{text}{space}{question}") for space in ("", " ")]
        exact = [row for row in whole if row[-len(ids(question)) :] == ids(question)]
        assert exact  # as a whole, and the question with the ids of training
        want += [*exact[0], *template.after]
    assert got == want
