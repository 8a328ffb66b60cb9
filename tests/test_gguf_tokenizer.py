"""Tokenizers from GGUF metadata: the ids of the libraries whose tokenizers they are."""

import io
import pathlib

import gguf_files
import numpy as np
import pytest
import sentencepiece
import tokenizers as library
from conftest import WORDS
from tokenizers import decoders, models, normalizers, pre_tokenizers

from icae_jax.errors import UserError
from icae_jax.interop.hub import gguf_file, gguf_tokenizer
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.text import user_ids

TEXTS = [
    tokenizers.PROBE,
    "",
    " ",
    "  two spaces",
    "three   spaces, end ",
    "tab\tand\nline\n\nend\r\n",
    "漢字 ½ e\u0301 1234567",
    "don't SHOUT'S 3.14 <div> it's <b>",
    "the cat sat on the mat. The dog ran under a tree!",
]
TOKENIZER = gguf_files.words_tokenizer([w for w in WORDS if w.isalpha()])
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load(metadata, folder, rows=None):
    """The tokenizer of these metadata; lists of numbers become arrays, as they are read."""
    metadata = {
        key: np.asarray(value)
        if isinstance(value, list) and not isinstance(value[0], str)
        else value
        for key, value in metadata.items()
        if value is not None
    }
    file = gguf_file.GGUF(pathlib.Path("x.gguf"), metadata, {})
    folder.mkdir(exist_ok=True)
    gguf_tokenizer.write(file, folder, rows or 10**6, 64)
    return tokenizers.load_tokenizer(_as_base(folder))


def _as_base(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


# --------------------------------------------------------------------------------- SentencePiece


def train(**options):
    """A small SentencePiece model that changes no text."""
    rng, content = np.random.default_rng(0), io.BytesIO()
    words = [w for w in WORDS if w.isalpha()] + ["spaces", "shouting", "<div>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.choice(words, 12)) for _ in range(300)),
        model_writer=content,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_by_whitespace=True,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())


def test_sentencepieces_ids(tmp_path):
    """Breaks when merges are ordered otherwise than by their pieces' scores, a text gets no space
    in front, or characters without a piece are not spelt in bytes."""
    model = train()
    tokenizer = load(gguf_files.sentencepiece_tokenizer(model), tmp_path / "t")
    for text in TEXTS:
        assert user_ids(tokenizer, text) == model.encode(text), text
        assert tokenizer.decode(model.encode(text)) == model.decode(model.encode(text))
    assert tokenizer("the cat")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert len(model.encode("the cat")) < 5  # merges are made at all


def test_the_piece_of_the_highest_score_is_merged_first(tmp_path):
    """Breaks when merges are ordered by the pieces' ids, which mostly are in the same order."""
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 3 + [-9.0] * 3 + [-2.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = load(metadata, tmp_path / "t")
    assert tokenizer.convert_ids_to_tokens(user_ids(tokenizer, "abc")) == ["a", "bc"]
    # Pieces that are never used, wherever they lie, change nothing.
    for name, filler in (
        ("tokens", ["[x]", "[y]"]),
        ("scores", [0.0] * 2),
        ("token_type", [5] * 2),
    ):
        values = metadata[f"tokenizer.ggml.{name}"]
        metadata[f"tokenizer.ggml.{name}"] = values[:3] + filler + values[3:]
    tokenizer = load(metadata, tmp_path / "unused")
    assert tokenizer.convert_ids_to_tokens(user_ids(tokenizer, "abc")) == ["a", "bc"]


def test_user_defined_pieces_as_gemmas(tmp_path):
    """Breaks when a piece that a user defined is not found before all merges, or a text gets a
    space in front though add_space_prefix is false."""
    own = ["<div>", "▁▁", "▁▁▁", "cat", "\n\n"]
    model = train(user_defined_symbols=own, add_dummy_prefix=False)
    metadata = gguf_files.sentencepiece_tokenizer(model, own, add_space_prefix=False)
    tokenizer = load(metadata, tmp_path / "t")
    for text in TEXTS:
        assert user_ids(tokenizer, text) == model.encode(text), text
    assert len({*model.encode("   <div>cat\n\n")}) == 4


# --------------------------------------------------------------------------------- byte-level BPE


def reference(pre, normalizer=None, ignore_merges=False):
    """The tokenizer with TOKENIZER's tokens and this pre-tokenizer."""
    tokens = TOKENIZER["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in TOKENIZER["tokenizer.ggml.merges"]]
    backend = library.Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=ignore_merges)
    )
    backend.pre_tokenizer = pre
    if normalizer:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    return backend


def split(*patterns, own=False):
    cuts = [pre_tokenizers.Split(library.Regex(p), "isolated") for p in patterns]
    return pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)]
    )


# As the hub's tokenizer.json of such a model has them.
REFERENCES = {
    "gpt-2": lambda: reference(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: reference(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    ),
    "llama-bpe": lambda: reference(split(LLAMA3), ignore_merges=True),
    "qwen2": lambda: reference(split(LLAMA3.replace("{1,3}", "")), normalizers.NFC()),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_pre_tokenizers_of_the_hub(name, tmp_path):
    """Breaks when a text is cut otherwise than by the hub's tokenizers of this name."""
    tokenizer = load(TOKENIZER | {"tokenizer.ggml.pre": name}, tmp_path / "t")
    expected = REFERENCES[name]()
    for text in TEXTS:
        assert user_ids(tokenizer, text) == expected.encode(text).ids, text
        cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert cut == expected.pre_tokenizer.pre_tokenize_str(text)
        again = expected.normalizer.normalize_str(text) if expected.normalizer else text
        assert tokenizer.decode(user_ids(tokenizer, text)) == again


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("default", "it's 12345+x a=b", "it ' s Ġ 123 45 + x Ġa = b"),
        ("tekken", "HelloWorld it's 123/\n", "Hello World Ġit 's Ġ 1 2 3 /Ċ"),
        ("llama3", "It'S 12345 (foo)\n\n", "It 'S Ġ 123 45 Ġ( foo )ĊĊ"),
    ],
)
def test_where_other_pre_tokenizers_cut(name, text, words, tmp_path):
    """Breaks when a text is cut elsewhere than the pattern of this name says; by hand."""
    tokenizer = load(TOKENIZER | {"tokenizer.ggml.pre": name}, tmp_path / "t")
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in cut] == words.split(" ")


# ---------------------------------------------------------------------------------- special tokens


def test_special_tokens(tmp_path):
    """Breaks when bos, eos, control or user-defined tokens are not those of the file, or a text can
    spell a control token."""
    count = len(TOKENIZER["tokenizer.ggml.tokens"])
    more = ["<|im_end|>", "<tool>", "[PAD9]"]
    metadata = TOKENIZER | {
        "tokenizer.ggml.tokens": [*TOKENIZER["tokenizer.ggml.tokens"], *more],
        "tokenizer.ggml.token_type": [*TOKENIZER["tokenizer.ggml.token_type"], 3, 4, 5],
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2**32 - 1,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
    }
    tokenizer = load(metadata, tmp_path / "t")
    assert tokenizer("cat")["input_ids"][0] == 1 and tokenizer("cat")["input_ids"][-1] == 2
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", *["</s>"] * 2)
    assert tokenizers.bos_id(tokenizer) == 1 and len(tokenizer) == count + 2  # no padding rows
    assert user_ids(tokenizer, "a<tool>b")[1] == count + 1
    assert count not in user_ids(tokenizer, "a<|im_end|>b")
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "<s>hi"
    # As in the hub's files, tokens behind all others are added to the model's own.
    own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    assert len(own) == count and "</s>" in own
    metadata = {
        key: np.asarray(value) if key.endswith("type") else value for key, value in metadata.items()
    }
    file = gguf_file.GGUF(pathlib.Path("x.gguf"), metadata, {})
    assert gguf_tokenizer.end_ids(file) == [2, count]


KEY = "tokenizer.ggml"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{KEY}.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({f"{KEY}.pre": "viking"}, "tokenizer.ggml.pre, is 'viking', which is not known; known: "),
        ({f"{KEY}.pre": None}, "tokenizer.ggml.pre, is missing"),
        ({f"{KEY}.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({f"{KEY}.merges": None}, "tokenizer.ggml.merges is missing"),
        ({f"{KEY}.merges": ["ab"]}, "has 'ab', which is not two tokens"),
        ({f"{KEY}.merges": ["xyz q"]}, "no tokenizer can be made of its metadata"),
        ({f"{KEY}.token_type": [1]}, "tokens, but the types of 1"),
        ({f"{KEY}.bos_token_id": 10**6}, "bos_token_id is 1000000, of"),
        ({f"{KEY}.bos_token_id": None}, "add_bos_token is set, but there is no"),
        ({f"{KEY}.bos_token_id": "1"}, "bos_token_id is '1', which is not a whole number"),
        ({f"{KEY}.model": "llama"}, "tokenizer.ggml.scores, one for each token, is missing"),
    ],
)
def test_bad_metadata(changes, message, tmp_path):
    """Breaks when metadata that cannot be meant give a tokenizer, or a traceback."""
    with pytest.raises(UserError, match=message) as error:
        load(TOKENIZER | changes, tmp_path / "t")
    assert str(error.value).startswith("x.gguf: ")


def test_more_tokens_than_rows(tmp_path):
    """Breaks when a vocabulary that is larger than the embedding table passes."""
    count = len(TOKENIZER["tokenizer.ggml.tokens"])
    with pytest.raises(UserError, match=f"has {count} tokens, but the embedding table only"):
        load(TOKENIZER, tmp_path / "t", rows=count - 1)
