"""What may be drawn and how, against transformers' processors; and text as it comes."""

import jax
import numpy as np
import pytest
import tokenizers
import transformers

from icae_jax.errors import UserError
from icae_jax.inference import sampling
from icae_jax.inference.sampling import Sampling, Settings
from icae_jax.inference.streaming import TextStream, decoded

V = 50


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(0, 3, (6, V)).astype(np.float32)


def settings_of(samplings):
    return jax.tree.map(jax.numpy.asarray, Settings.of(samplings))


@pytest.mark.parametrize(
    "how",
    [
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 0.6, "top_k": 9, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 2.0},
    ],
    ids=str,
)
def test_the_same_tokens_are_allowed_as_in_transformers(logits, how):
    """Breaks when a filter keeps one token more or less, or they are applied in another order."""
    torch = pytest.importorskip("torch")
    how = {"temperature": 1.0} | how
    config = transformers.GenerationConfig(do_sample=True, **({"top_k": 0, "top_p": 1.0} | how))
    scores = torch.tensor(logits) / config.temperature
    logits_process = transformers.generation.logits_process
    if config.top_k:
        scores = logits_process.TopKLogitsWarper(config.top_k)(None, scores)
    if config.top_p < 1:
        scores = logits_process.TopPLogitsWarper(config.top_p)(None, scores)
    if config.min_p:
        scores = logits_process.MinPLogitsWarper(config.min_p)(None, scores)
    want = np.isfinite(scores.numpy())
    settings = settings_of([Sampling(**how)] * len(logits))
    scaled = logits / settings.temperature[:, None]
    np.testing.assert_array_equal(sampling._allowed(scaled, settings), want)
    assert "top_k" not in how or (want.sum(1) <= how["top_k"]).all()


def test_draws_follow_the_probabilities(logits):
    """Breaks when temperature is ignored, or a row draws with another's settings or key."""
    rows, one = 4000, logits[:1]
    settings = settings_of([Sampling(temperature=1.5, seed=seed, top_k=6) for seed in range(rows)])
    many, number = np.repeat(one, rows, 0), np.zeros(rows, np.int32)
    choice = jax.jit(sampling.choose)(many, settings, np.zeros((rows, V), bool), number)
    counts = np.bincount(choice.token, minlength=V) / rows
    scaled = np.where(one[0] >= np.sort(one[0])[-6], one[0] / 1.5, -np.inf)
    want = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    np.testing.assert_allclose(counts, want, atol=0.03)
    log_probs = one[0] - np.log(np.exp(one[0].astype(float)).sum())
    np.testing.assert_allclose(choice.log_prob, log_probs[np.asarray(choice.token)], rtol=1e-4)
    later = jax.jit(sampling.choose)(many, settings, np.zeros((rows, V), bool), number + 1)
    assert (np.asarray(later.token) != np.asarray(choice.token)).any()


def test_the_penalty_is_that_of_transformers(logits):
    """Breaks when positive or negative logits are penalised the wrong way."""
    torch = pytest.importorskip("torch")
    seen = np.random.default_rng(1).integers(0, V, (6, 20))
    processor = transformers.generation.logits_process.RepetitionPenaltyLogitsProcessor(1.3)
    want = processor(torch.tensor(seen), torch.tensor(logits)).argmax(-1).numpy()
    holds = np.zeros((6, V), bool)
    np.put_along_axis(holds, seen, True, 1)
    settings = settings_of([Sampling(repetition_penalty=1.3)] * 6)
    got = sampling.choose(logits, settings, holds, np.zeros(6, np.int32))
    np.testing.assert_array_equal(got.token, want)
    assert (want != logits.argmax(-1)).any()


def test_equal_logits_are_a_tie(logits):
    """Breaks when a choice between equals passes for a sure one, or a later token is taken."""
    twins = logits.copy()
    best = twins[0].argmax()
    twins[0, 49 if best != 49 else 48] = twins[0, best]
    choice = sampling.best(twins, 2)
    assert choice.tie.tolist() == [True, *[False] * 5]
    assert choice.token.tolist() == twins.argmax(-1).tolist()
    assert choice.others[:, 0].tolist() == choice.token.tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0), ("max_new_tokens", -3), ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1), ("top_k", 2**31), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1),
        ("repetition_penalty", 0.0), ("repetition_penalty", 1e-39),
        ("seed", -1), ("stop", [".", ""]), ("alternatives", 21),
    ],
)  # fmt: skip
def test_bad_settings(field, value):
    """Breaks when a setting that means nothing is taken."""
    with pytest.raises(UserError, match=field):
        Sampling(**{field: value})


# ------------------------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def by_bytes():
    """A tokenizer of single bytes: every character beyond ASCII is several tokens."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: i for i, letter in enumerate(sorted(alphabet))}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model)


TEXTS = ["naïve café", "日本語と🙂👩‍👩‍👧 emoji", "�", "", "ends in half a character é"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(by_bytes, text):
    """Breaks when half a character is shown, or something is lost, doubled or never handed out."""
    ids = by_bytes(text)["input_ids"]
    ids = ids[:-1] if text.startswith("ends") else ids
    stream, pieces = TextStream(by_bytes), []
    for i, token in enumerate(ids):
        pieces.append(stream.add([token], i == len(ids) - 1))
        assert "�" not in pieces[-1] or i == len(ids) - 1 or text == "�"
    assert "".join(pieces) == stream.text == decoded(by_bytes, ids)
    assert not ids or len([piece for piece in pieces if piece]) >= len(text) // 3


def test_stop_texts_are_found_across_tokens_and_left_out(by_bytes):
    """Breaks when a stop text that spans tokens is missed, partly shown, or what only begins like
    one is lost.
    """
    stream = TextStream(by_bytes, ["END", "?é"])
    pieces = [stream.add([token]) for token in by_bytes("an ENEMY, EN")["input_ids"]]
    assert stream.text == "an ENEMY, " and not stream.stopped_by
    pieces += [stream.add(by_bytes("D and more")["input_ids"]), stream.add([5], last=True)]
    assert "".join(pieces) == stream.text == "an ENEMY, " and stream.stopped_by == "END"
    stream = TextStream(by_bytes, ["END", "?é"])
    ids = by_bytes("so?é END")["input_ids"]
    assert stream.add(ids) == "so" and stream.stopped_by == "?é"
    stream = TextStream(by_bytes, ["END"])
    assert stream.add(by_bytes("the EN")["input_ids"], last=True) == "the EN"
