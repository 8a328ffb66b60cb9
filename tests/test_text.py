"""User text as ids: never a control token, whatever the tokenizer."""

import pytest
import transformers
from conftest import ROOT, WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from icae_jax.data import synthetic
from icae_jax.errors import UserError
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.text import user_ids
from icae_jax.objectives import targets

SPELLED = "the <s>cat</s> sat <s> on </s>"


def pieces():
    """A unigram tokenizer with control tokens in its vocabulary, as sentencepiece's have."""
    vocabulary = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        *((piece, -3.0) for piece in "▁</>sthecaon"),
    ]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_pairs():
    """The model of the next tokenizer: bytes, and one merge of them with which a control token's
    name begins.
    """
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [("<", "s")]))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    return backend


def bytes_alone():
    """A byte-level tokenizer whose control tokens are added ones, one of them both eos and unknown,
    as in GPT-2's.
    """
    backend = byte_pairs()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="</s>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("make", [pieces, bytes_alone, synthetic.build_tokenizer])
def test_no_text_spells_a_control_token(make):
    """Breaks when a control token's name in a text becomes the token, by the search for added
    tokens or since it is in the vocabulary. Also when the next call, for our own frames, no longer
    finds control tokens.
    """
    tokenizer = make()
    control = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert control <= set(tokenizer(SPELLED, add_special_tokens=False)["input_ids"]), (
        "else this shows nothing"
    )
    ids = user_ids(tokenizer, SPELLED)
    assert ids and not control & set(ids)
    assert (
        user_ids(tokenizer, [SPELLED, "the cat", ""]) == [ids, user_ids(tokenizer, "the cat"), []]
        and user_ids(tokenizer, []) == []
    )
    assert (
        user_ids(tokenizer, "the cat")
        == tokenizer("the cat", add_special_tokens=False)["input_ids"]
    )
    assert control <= set(tokenizer(SPELLED, add_special_tokens=False)["input_ids"])


def test_a_spelled_token_is_read_as_its_characters():
    """Breaks when what a text spells is lost or changed though the tokenizer has its characters."""
    for tokenizer in (pieces(), bytes_alone()):
        decoded = tokenizer.decode(user_ids(tokenizer, SPELLED), skip_special_tokens=True)
        assert decoded.replace(" ", "").replace("▁", "") == SPELLED.replace(" ", "")


def test_a_spelled_token_is_read_in_the_pieces_of_any_other_text():
    """Breaks when a found token is needlessly spelled character by character, which the model was
    never trained to read.
    """
    assert (
        user_ids(bytes_alone(), SPELLED)
        == byte_pairs().encode(SPELLED).ids
        != [byte_pairs().encode(c).ids[0] for c in SPELLED]
    )


def test_a_text_without_spelled_tokens_is_what_it_was(tiny_tokenizer):
    """Breaks when texts without a control token's name get other ids than in earlier versions:
    adapters would read them differently. The words of templates have no such name.
    """
    assert user_ids(tiny_tokenizer, "the cat [INST] nothing") == [
        WORDS.index(w) for w in ("the", "cat", "[INST]", "<unk>")
    ]
    assert tokenizers.bos_id(tiny_tokenizer) == WORDS.index("<s>")
    assert targets.make_template("mistral", tiny_tokenizer).head == (
        WORDS.index("<s>"),
        WORDS.index("[INST]"),
    )
    assert targets.make_template("chat", tiny_tokenizer).head[0] == WORDS.index("<s>")


def test_half_a_surrogate_pair_is_the_user_s(tiny_tokenizer):
    """Breaks when a question with half an emoji, which a command line can hold, is the tokenizer's
    TypeError.
    """
    for text in ("who \ud83d", ["who", "who \ud83d"]):
        with pytest.raises(UserError, match=r"^the text is not valid text"):
            user_ids(tiny_tokenizer, text)


OWN_FRAMES = {  # files that tokenise what we wrote, and how often
    "interop/hub/tokenizer.py": 2,
    "interop/adapters/peft_folder.py": 1,
    "interop/prompts.py": 1,
    "objectives/joint.py": 1,
    "objectives/targets.py": 1,
    "workflows/quickstart_results.py": 1,
    "training/base_task.py": 1,
}


@pytest.mark.parametrize("other", [None, 5, b"the cat", ["the", "cat"]], ids=repr)
def test_what_is_no_text_is_named(tiny_tokenizer, other):
    """Breaks when a table's missing cell, passed from Python, is a traceback of the tokenizers
    library.
    """
    with pytest.raises(UserError, match=f"^a text is {type(other).__name__}, expected str"):
        user_ids(tiny_tokenizer, ["the cat", other])


def test_only_our_own_frames_are_tokenised_otherwise():
    """Breaks when new code, or a generated script, tokenises user text and lets it spell control
    tokens.
    """
    found = {}
    for path in sorted((ROOT / "icae_jax").rglob("*.py")):
        lines = [
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if "tokenizer(" in line and '["input_ids"]' in line
        ]
        unguarded = [line for line in lines if "split_special_tokens=True" not in line]
        found[str(path.relative_to(ROOT / "icae_jax"))] = len(unguarded)
    assert {name: count for name, count in found.items() if count} == OWN_FRAMES
