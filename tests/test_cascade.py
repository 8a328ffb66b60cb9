"""The cascade: log-probabilities of answers, rungs read in turn, what was read, bad ladders."""

import json
import math
import pathlib

import numpy as np
import pytest
from cli_helpers import make_files
from suite_helpers import compressor, words

from icae_jax.cli import main as cli
from icae_jax.errors import UserError
from icae_jax.inference.batching import few_shapes
from icae_jax.inference.writing import MemoryWriter
from icae_jax.interop.adapters import folder as adapters
from icae_jax.objectives.targets import Target

TEXTS = [words(n, n) for n in (30, 5, 40, 14, 17)]
QUESTIONS = [[words(2 + (i + j) % 4, [i, j]) for j in range(1 + i % 3)] for i in range(len(TEXTS))]
LADDER, NEW = (1, 2, 4), 6


@pytest.fixture(scope="module", params=["icae", "pooled"])
def one(request, tiny_base):
    """A compressor whose memories at several k take a pass each, and one that writes all in one."""
    return compressor(tiny_base, request.param, k_choices=LADDER)


@pytest.fixture(scope="module")
def rungs(one):
    return one.compress_ladder(TEXTS, LADDER)


@pytest.fixture(scope="module")
def alone(one, rungs):
    """The answers of each rung by itself."""
    return [one.ask(memory, QUESTIONS, NEW, details=True) for memory in rungs]


def flat(answers):
    return [g for row in answers for g in (row if isinstance(row, list) else [row])]


def test_log_probabilities_are_those_that_scoring_gives(one, rungs, alone):
    """Breaks when a token of the answer is left out or counted twice, a stop token is not counted,
    or one counts that never came.
    """
    template, stopped = one.adapter.template, []
    prompts = [[template.prompt(one.question_ids(q)) for q in row] for row in QUESTIONS]
    # Behind a stop id that comes in the middle of an answer, and behind none.
    middle = next(g.ids[2] for g in flat(alone[2]) if g.ids[2] not in g.ids[:2])
    stop_ids = one.reader.stop_ids
    for stops in ((), (middle,)):
        one.reader.stop_ids = lambda objective, stops=stops: stops
        answers = one.ask(rungs[2], QUESTIONS, NEW, details=True)
        one.reader.stop_ids = stop_ids
        rows = [
            [
                Target([*prompt, *g.ids, *(stops if g.stopped else ())], len(prompt))
                for prompt, g in zip(of_text, row, strict=True)
            ]
            for of_text, row in zip(prompts, answers, strict=True)
        ]
        scores = flat([list(row) for row in one.score_targets(rungs[2], rows, "qa")])
        for g, score in zip(flat(answers), scores, strict=True):
            assert score.tokens == len(g.ids) + g.stopped
            assert g.log_prob == pytest.approx(score.log_prob, rel=1e-4)
            assert g.mean_log_prob == pytest.approx(score.log_prob / score.tokens, rel=1e-4)
        stopped += [g.stopped for g in flat(answers)]
    assert set(stopped) == {True, False}


def by_hand(alone, threshold):
    """(rung, tokens read) of each question."""
    chosen = []
    for answers in zip(*map(flat, alone), strict=True):
        rung = next((i for i, g in enumerate(answers) if g.mean_log_prob >= threshold), 2)
        chosen.append((rung, sum(g.tokens for g in answers[: rung + 1])))
    return chosen


def test_answers_are_those_of_the_rung_that_they_name(one, rungs, alone):
    """Breaks when a question stays that should go on or goes on that should stay, an answer comes
    from another rung, text or question than it says, or what was read is miscounted.
    """
    means = sorted(g.mean_log_prob for g in flat(alone[0]) + flat(alone[1]))
    # Between two values, so that no rounding decides.
    threshold = (means[len(means) // 2] + means[len(means) // 2 + 1]) / 2
    want = by_hand(alone, threshold)
    assert {rung for rung, _ in want} == {0, 1, 2}
    answers = one.ask(rungs, QUESTIONS, NEW, details=True, threshold=threshold)
    assert [len(row) for row in answers] == [len(row) for row in QUESTIONS]
    for i, (got, (rung, read)) in enumerate(zip(flat(answers), want, strict=True)):
        expected = flat(alone[rung])[i]
        assert got.k == LADDER[rung] == expected.k and got.tokens == expected.tokens
        assert got.tokens_read == read and expected.tokens_read == expected.tokens
        assert got.ties or got.ids == expected.ids
        assert got.log_prob == pytest.approx(expected.log_prob, rel=1e-4)
    texts = one.ask(TEXTS, QUESTIONS, NEW, details=True, ladder=LADDER, threshold=threshold)
    assert [(g.k, g.tokens_read) for g in flat(texts)] == [
        (g.k, g.tokens_read) for g in flat(answers)
    ]
    in_pairs = one.ask(rungs, QUESTIONS, NEW, 2, True, threshold=threshold)
    assert [g.k for g in flat(in_pairs)] == [g.k for g in flat(answers)]


def test_a_threshold_that_all_or_none_reach(one, rungs, alone):
    """Breaks when the threshold is compared the wrong way round, or the last answer is not kept."""
    for threshold, rung in ((-math.inf, 0), (0.0, 2), (math.inf, 2)):
        answers = flat(one.ask(rungs, QUESTIONS, NEW, details=True, threshold=threshold))
        assert {g.k for g in answers} == {LADDER[rung]}
        wanted = [
            sum(g.tokens for g in of) for of in zip(*map(flat, alone[: rung + 1]), strict=True)
        ]
        assert [g.tokens_read for g in answers] == wanted


def test_larger_memories_are_written_only_where_they_are_needed(one, alone, monkeypatch):
    """Breaks when texts that are done are compressed again at a larger k."""
    first, second, *_ = sorted(g.mean_log_prob for g in flat(alone[0]))
    seen, write = [], type(one.writer).write_several

    def counted(self, contexts, ks, batch_size):
        seen.append((len(contexts), tuple(ks)))
        return write(self, contexts, ks, batch_size)

    monkeypatch.setattr(type(one.writer), "write_several", counted)
    one.ask(TEXTS, QUESTIONS, NEW, ladder=LADDER, threshold=(first + second) / 2)
    if one.config.method == "pooled":
        assert seen == [(5, LADDER)]
    else:  # one question is left
        assert seen[:2] == [(5, (1,)), (1, (2,))]


def test_numbers_of_rows_are_few():
    """Breaks when every number of questions left makes a program of its own."""
    assert [few_shapes(n, 12) for n in range(1, 15)] == [*(1, 2, 4, 4, *[8] * 4, *[12] * 4, 13, 14)]


def test_bad_ladders_are_refused(one, rungs):
    unknown = "k is 3" if one.config.method == "icae" else "k is 17"
    for ladder, message in (
        ((4, 2), r"ladder is \(4, 2\); give rising"),
        ((2, 2), "give rising"),
        ((2, int(unknown[5:])), unknown),
        ((), "texts are asked without a memory"),
    ):
        with pytest.raises(UserError, match=message):
            one.ask(TEXTS, QUESTIONS, ladder=ladder)
    for memory, ladder, message in (
        (rungs[0], (1, 2), "memories have their k"),
        (rungs[::-1], (), r"have k \[4, 2, 1\]"),
        ([rungs[0], rungs[1][:2]], (), "hold 5, 2 texts"),
    ):
        with pytest.raises(UserError, match=message):
            one.ask(memory, QUESTIONS, ladder=ladder)
    with pytest.raises(UserError, match="threshold is nan"):
        one.ask(rungs, QUESTIONS, threshold=math.nan)


def test_what_is_asked_is_checked_before_a_memory_is_written(one, monkeypatch):
    """Breaks when texts are compressed for minutes before a bad question or number is refused."""
    monkeypatch.setattr(MemoryWriter, "write_several", None)
    for questions, most, threshold, message in (
        (QUESTIONS, NEW, math.nan, "threshold is nan"),
        (QUESTIONS, 0, 0.0, "max_new_tokens is 0"),
        (QUESTIONS[:2], NEW, 0.0, "questions has 2 entries for 5 texts"),
    ):
        with pytest.raises(UserError, match=message):
            one.ask(TEXTS, questions, most, ladder=LADDER, threshold=threshold)


@pytest.mark.nightly
def test_the_command_asks_texts_by_a_ladder(tiny_base, tmp_path, capsys):
    """Breaks when ladder or threshold do not arrive, or what was read is not told."""
    files, one = make_files(tmp_path, tiny_base), compressor(tiny_base, k_choices=LADDER)
    adapters.save_adapter(tmp_path / "adapter", one.adapter)
    argv = ["ask", "--adapter", str(tmp_path / "adapter"), "--question", "who ?"]
    more = ["--input", files["contexts"], "--ladder", "1,2", "--max_new_tokens", "4"]
    lines = pathlib.Path(files["contexts"]).read_text(encoding="utf-8").splitlines()
    rows = list(map(json.loads, lines))
    want = one.ask([row["text"] for row in rows], "who ?", 4, details=True, ladder=(1, 2))
    assert cli.main([*argv, *more, "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(t["id"], t["answer"], t["k"], t["tokens_read"]) for t in told] == [
        (row["id"], g.text, g.k, g.tokens_read) for row, g in zip(rows, want, strict=True)
    ]
    likely = [t["mean_log_prob"] for t in told], [g.mean_log_prob for g in want]
    np.testing.assert_allclose(*likely, rtol=1e-5)
    assert cli.main([*argv, *more, "--threshold=-100"]) == 0
    assert capsys.readouterr().out.count("\t(k 1, 1 memory tokens read)\n") == len(rows)
    for spoiled, message in (
        (argv, "give one of --memory"),
        ([*argv, *more[:2]], "--input needs --adapter and --ladder"),
        ([*argv, *more[:2], *more[2:], "--id", "doc1"], "takes no --id"),
        ([*argv, "--memory", "m.safetensors", *more[2:4]], "a memory file has its k"),
        ([*argv, "--memory", "m.safetensors", "--threshold=-1"], "--threshold -1.0 counts only"),
    ):
        assert cli.main(spoiled) == 2 and message in capsys.readouterr().err
