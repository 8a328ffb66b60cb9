"""Any ratio at use time: the nearest k to what is wanted, in memories, files and the command."""

import json
import math

import numpy as np
import pytest
from cli_helpers import compress, make_files
from suite_helpers import compressor, words

from icae_jax.cli import main as cli
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.segments import choose_k
from icae_jax.errors import UserError
from icae_jax.inference import writing
from icae_jax.interop.adapters import folder as adapters

FEW = CompressionConfig(k=16, rate=4, k_choices=(1, 2, 5, 16))
ANY = CompressionConfig(method="pooled", k=16, rate=4)
TEXTS = [words(n, n) for n in (30, 5, 40)]  # of 2, 1 and 3 segments of 16 tokens


def off(k, config, lengths, tokens=None, ratio=None):
    """How far k is from what is wanted: the mean of squared logs, by its definition."""
    total = 0.0
    for n in lengths:
        memory = k * -(-n // config.segment_tokens)
        total += math.log(memory / (tokens or n / ratio)) ** 2
    return total / len(lengths)


@pytest.mark.parametrize("config", [FEW, ANY], ids=["few", "any"])
def test_the_nearest_k_is_that_of_all_tries(config):
    """Breaks when nearness is not that of the docstring, segments are not counted, one text decides
    for all, or a known k is not tried.
    """
    known = range(1, 65) if config is ANY else FEW.k_choices
    rng, chosen = np.random.default_rng(0), set()
    for _ in range(60):
        lengths = rng.integers(1, 400, rng.integers(1, 5)).tolist()
        for wanted in (
            {"tokens": int(rng.integers(1, 100))},
            {"ratio": float(np.exp(rng.uniform(-0.5, 5)))},
        ):
            k = choose_k(config, lengths, **wanted)
            distances = {other: off(other, config, lengths, **wanted) for other in known}
            assert distances[k] <= min(distances.values()) + 1e-9
            chosen.add(k)
    assert chosen == set(FEW.k_choices) if config is FEW else len(chosen) > 15


def test_half_and_twice_are_as_far_and_the_larger_is_taken():
    """Breaks when nearness is counted in tokens, where 2 would be nearer to 4 than 8 is."""
    config = CompressionConfig(k=8, rate=4, k_choices=(2, 8))
    assert choose_k(config, [32], tokens=4) == 8 and choose_k(config, [32], tokens=3) == 2
    assert choose_k(config, [32, 32], ratio=8) == 8 and choose_k(config, [64], tokens=8) == 8
    assert choose_k(config, [32]) == choose_k(config, []) == 8 and choose_k(config, [9], k=2) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 2, "ratio": 4.0}, "k 2 and ratio 4.0 are given"),
        ({"tokens": 0}, "tokens is 0"),
        ({"ratio": math.nan}, "ratio is nan"),
        ({"ratio": math.inf}, "ratio is inf; it must be positive and finite"),
        ({"k": 3}, "k is 3; this compressor was trained with 1, 2, 5, 16"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        choose_k(FEW, [10], **given)


def test_memories_of_any_ratio_are_kept_and_joined(tiny_base, tmp_path):
    """Breaks when a ratio does not reach the encoder, or a file or a join knows trained ks only."""
    one = compressor(tiny_base, "pooled")
    memory = one.compress(TEXTS, ratio=5.5)
    # 31, 6 and 41 tokens with <s>: the geometric mean of n / 5.5 / segments is 1.9.
    assert memory.tokens_per_segment == 2 and memory.tokens.tolist() == [4, 2, 6]
    short = one.compress(TEXTS[1], tokens=3)
    assert short.tokens.tolist() == [3] and 3 not in one.config.choices
    one.save(tmp_path / "m.safetensors", short)
    again, _ = one.load_memory(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(again.slots, short.slots)
    assert one.join([again, short]).tokens.tolist() == [6]
    with pytest.raises(UserError, match="tokens 3 and ratio 2 are given"):
        one.compress(TEXTS, tokens=3, ratio=2)


@pytest.mark.parametrize(("method", "passes"), [("pooled", 1), ("icae", 2)])
def test_a_ladder_of_memories_is_that_of_single_ks(tiny_base, monkeypatch, method, passes):
    """Breaks when a memory of a ladder is another k's, or a pass that could be shared is not."""
    one, calls, written = compressor(tiny_base, method), [], writing._compress

    def counted(*args, ks, **kw):
        calls.append(ks)
        return written(*args, ks=ks, **kw)

    monkeypatch.setattr(writing, "_compress", counted)
    together = one.compress_ladder(TEXTS, (2, 4))
    assert len(calls) == passes and sum(calls, ()) == (2, 4)
    for k, memory in zip((2, 4), together, strict=True):
        alone = one.compress(TEXTS, k=k)
        assert memory.tokens_per_segment == k
        np.testing.assert_allclose(memory.slots, alone.slots, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(memory.segment_lengths, alone.segment_lengths)


def test_the_command_takes_a_ratio_and_says_the_k(tiny_base, tmp_path, capsys):
    """Breaks when the flag does not reach the encoder, or the k is not told."""
    files, output = make_files(tmp_path, tiny_base), tmp_path / "m.safetensors"
    adapters.save_adapter(tmp_path / "adapter", compressor(tiny_base, "pooled").adapter)
    # Each text has 13 tokens with <s>; 3 is nearer to 13 / 5 than 2, and not one of k_choices.
    argv = compress(tmp_path / "adapter", files, output, "--ratio", "5")
    assert cli.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["k"], told["memory_tokens"], told["texts"]) == (3, 18, 6)
    assert cli.main([*argv[:-2], "--tokens", "3"]) == 0
    assert "18 memory tokens (4.33x, k 3)" in capsys.readouterr().out
    assert cli.main([*argv[:-1], "-1"]) == 2
    assert "ratio is -1.0; it must be positive" in capsys.readouterr().err
