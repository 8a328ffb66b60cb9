"""What `icae serve` says of tokens, and the order of turns, without a server."""

import numpy as np
import pytest
from conftest import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from icae_jax.compression.decoder import Prefix
from icae_jax.inference.requests import Request
from icae_jax.inference.sampling import Sampling
from icae_jax.server.answers import Tokens
from icae_jax.server.asking import conversation
from icae_jax.server.failures import ApiError
from icae_jax.server.scheduler import Bucket, Scheduler, buckets, without_memory
from icae_jax.server.schema import Message


def test_bytes_of_tokens_that_are_parts_of_a_character():
    """Breaks when a client cannot put a character together from its tokens."""
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate("\u00c3\u00a9\u0120a")}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokens = Tokens(PreTrainedTokenizerFast(tokenizer_object=backend))
    ids = backend.encode("é a").ids
    assert [tokens.bytes(i) for i in ids] == [[0xC3], [0xA9], [0x20], [0x61]]
    assert bytes(byte for i in ids for byte in tokens.bytes(i)).decode() == "é a"
    pieces = ["<unk>", "\u2581the", "x", "<0xE2>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokens = Tokens(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert tokens.text(1) == " the" and tokens.bytes(1) == list(b" the")
    assert tokens.bytes(3) == [0xE2] and tokens.bytes(2) == [0x78]


def test_texts_of_plain_tokens():
    """Breaks when a word-level token is shown otherwise than it is decoded."""
    tokenizer = make_tokenizer()
    tokens = Tokens(tokenizer)
    assert tokens.text(tokenizer.convert_tokens_to_ids("cat")) == "cat"


def message(role, text):
    return Message(role=role, content=text)


def test_turns():
    """Breaks when neighbours of one role are lost, or a conversation that cannot be is taken."""
    system, turns, question = conversation(
        [
            message("user", "a"),
            message("user", "b"),
            message("assistant", "c"),
            message("developer", "d"),
            message("user", "e"),
        ]
    )
    assert (system, turns, question) == (["d"], [("a\nb", "c")], "e")
    assert conversation([message("system", "s"), message("user", "q")]) == (["s"], [], "q")
    for messages in (
        [message("system", "s")],
        [message("assistant", "a"), message("user", "q")],
        [message("user", "q"), message("assistant", "a")],
    ):
        with pytest.raises(ApiError) as error:
            conversation(messages)
        assert error.value.status == 400 and error.value.param == "messages"


@pytest.mark.parametrize(
    ("positions", "rows", "tokens", "of_each"),
    [
        (64, 16, [64], [16]),
        (256, 4, [128, 256], [4, 4]),
        (512, 16, [128, 512], [16, 16]),
        (8192, 16, [128, 512, 2048, 8192], [16, 16, 4, 1]),
        (8000, 64, [128, 512, 2048, 8000], [64, 64, 16, 4]),
    ],
)
def test_buckets(positions, rows, tokens, of_each):
    """Breaks when the longest prompt has no bucket, or a long one as many rows as a short one."""
    got = buckets(positions, rows)
    assert [bucket.tokens for bucket in got] == tokens
    assert [bucket.rows for bucket in got] == of_each
    assert all(bucket.memory_tokens >= bucket.tokens for bucket in got)
    assert isinstance(got[0], Bucket)


@pytest.mark.parametrize(
    ("base_bytes", "token_bytes", "of_each"),
    [
        (0, 1, [16, 4, 1, 1]),  # the base costs nothing: as many bytes as the smallest bucket's
        (1 << 40, 1, [16, 16, 4, 1]),  # the base costs all
        (2 * 512 * 10 * 7, 10, [16, 7, 1, 1]),
    ],
)
def test_a_bucket_has_no_more_rows_than_pay(base_bytes, token_bytes, of_each):
    """Breaks when a step of a long bucket reads more of free rows than of the base."""
    got = buckets(8192, 16, base_bytes, token_bytes)
    assert [bucket.rows for bucket in got] == of_each


def test_a_long_text_without_a_memory_looks_through_no_place_for_one():
    """Breaks when a text that is read as it is attends to an empty memory of its own length."""
    sizes = buckets(512, 4)
    sizes = sorted([*sizes, *without_memory(sizes)])
    scheduler = Scheduler(lambda bucket: None, sizes, 8, lambda _: None)
    how, empty = Sampling(max_new_tokens=8), np.zeros((1, 1, 64, 1, 1), np.float32)
    mask, zeros = np.ones((1, 64), bool), np.zeros((1, 64), np.int32)
    prefix = Prefix(empty, empty, mask, zeros, zeros[:, 0])
    for tokens, read, bucket in (
        (100, None, (128, 128)),  # short ones share steps with those that have a memory
        (200, None, (512, 0)),
        (100, prefix, (128, 128)),
        (200, prefix, (512, 512)),
    ):
        lane = scheduler._lane(Request([1] * tokens, how, 0, read))
        assert (lane.bucket.tokens, lane.bucket.memory_tokens) == bucket
