"""Target layouts, question templates, and packing."""

import copy
import dataclasses

import numpy as np
import pytest
from conftest import FRAMING, WORDS

from icae_jax.compression.config import CompressionConfig
from icae_jax.objectives import targets
from icae_jax.objectives.packing import pack
from icae_jax.objectives.targets import AE, FT, LM


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def test_autoencoding():
    """Breaks when [AE] or </s> is missing, or [AE] is a label."""
    assert targets.ae_target([1, 9, 10], FRAMING) == ([AE, 1, 9, 10, 2], 1)


@pytest.mark.parametrize(
    ("fields", "framing"),
    [
        ({"method": "icae"}, ((1,), AE, 2)),
        ({"method": "icae", "trigger": "bos"}, ((1,), 1, 2)),
        ({"method": "x500"}, ((), 1, 2)),
        ({"method": "x500", "trigger": "trained"}, ((), AE, 2)),
    ],
)
def test_framing(tiny_tokenizer, fields, framing):
    """Breaks when 500xCompressor's encoder reads <s>, ICAE's does not, or another token asks for
    the text back.
    """
    assert (
        dataclasses.astuple(targets.make_framing(CompressionConfig(**fields), tiny_tokenizer, 1))
        == framing
    )


def test_framing_without_the_tokens_it_needs(tiny_tokenizer):
    """Breaks when a missing <s> or </s> becomes a None among the ids."""
    bare = copy.deepcopy(tiny_tokenizer)
    bare.bos_token = None
    with pytest.raises(
        ValueError, match=r"compression\.trigger is bos, but .* no bos token; choose trained"
    ):
        targets.make_framing(CompressionConfig(method="x500"), bare, None)
    assert targets.make_framing(CompressionConfig(), bare, None).start == ()
    assert targets.make_framing(CompressionConfig(), bare, 1).start == (1,)
    assert targets.make_framing(CompressionConfig(layout="padded"), bare, 1).start == ()
    bare.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        targets.make_framing(CompressionConfig(), bare, None)


def test_padded_autoencoding():
    """Breaks when the reference's padded labels are miscounted: the text and padding to 5 tokens,
    then the final eos.
    """
    assert targets.ae_target([9, 10], targets.Framing((), 1, 2), padded_to=5) == (
        [1, 9, 10, 2, 2, 2, 2],
        1,
    )


def test_language_modelling():
    """Breaks when the first 8 tokens are labels (with or without [LM] in front), or an </s> is
    added.
    """
    text = list(range(10, 22))
    assert targets.lm_target(text) == (text, 8)
    assert targets.lm_target(text, trigger=True) == ([LM, *text], 9)


@pytest.mark.parametrize(
    ("name", "head", "sequence", "labels"),
    [
        ("mistral", "<s> [INST]", [FT, *ids("who sat"), *ids("[/INST]"), *ids("the cat"), 2], 3),
        ("v1", "", [FT, *ids("who sat"), FT, *ids("the cat"), 1], 3),
        ("plain", "", [*ids("Question: who sat Answer: the cat"), 2], 3),
        ("none", "", [*ids("who sat the cat"), 2], 3),
        ("chat", "<s> [INST]", [*ids("who sat [/INST] the cat"), 2], 3),
    ],
)
def test_templates(tiny_tokenizer, name, head, sequence, labels):
    """Breaks when a template puts anything elsewhere, labels the prompt, or stops on another id (v1
    stops on 1, not on </s>).
    """
    template = targets.make_template(name, tiny_tokenizer)
    assert list(template.head) == ids(head) and template.stop == sequence[-1]
    target = template.target(ids("who sat"), ids("the cat"))
    assert target.ids == sequence and len(sequence) - target.label_start == labels
    assert template.prompt(ids("who sat")) == sequence[:-labels]


def test_impossible_templates_are_refused(tiny_tokenizer):
    """Breaks when a tokenizer that cannot serve a template is found out only in training."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    with pytest.raises(ValueError, match="template is 'poem'; choose from mistral"):
        targets.make_template("poem", tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }} {{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="exactly once"):
        targets.make_template("chat", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        targets.make_template("chat", tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        targets.make_template("plain", tokenizer)


def test_pack():
    """Breaks when a label is predicted from another place than the token before it, or padding
    counts as labels.
    """
    batch = pack(
        [[targets.Target([5, 6, 7, 8], 2), None], [None, targets.Target([9, 10], 1)], []], 2, 4, 3
    )
    assert {k: v.shape for k, v in batch.items()} == {
        "ids": (3, 2, 4),
        "label_at": (3, 2, 3),
        "labels": (3, 2, 3),
        "label_mask": (3, 2, 3),
    }
    assert batch["ids"][:2].tolist() == [[[5, 6, 7, 0], [0] * 4], [[0] * 4, [9, 0, 0, 0]]]
    assert batch["label_at"][0, 0].tolist() == [1, 2, 0] and batch["labels"][0, 0].tolist() == [
        7,
        8,
        0,
    ]
    assert batch["label_at"][1, 1, 0] == 0 and batch["labels"][1, 1, 0] == 10
    assert np.argwhere(batch["label_mask"]).tolist() == [[0, 0, 0], [0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize(("G", "T", "U"), [(1, 3, 2), (2, 2, 2), (2, 3, 1)])
def test_pack_refuses_what_does_not_fit(G, T, U):
    """Breaks when targets are cut silently: two targets of 3 inputs and 2 labels need G 2, T 3 and
    U 2.
    """
    rows = [[targets.Target([5, 6, 7, 8], 2)] * 2]
    assert pack(rows, 2, 3, 2)["label_mask"].sum() == 4
    with pytest.raises(ValueError, match="3 inputs and 2 labels does not fit"):
        pack(rows, G, T, U)
