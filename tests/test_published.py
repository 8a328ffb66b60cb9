"""Published figures: spot values, the papers' own averages, and that reports can show all."""

import math

import numpy as np
import pytest

from icae_jax.evaluation import published, report, statistics

SETS = ["ArxivQA", "SQuAD", "RelationExtraction", "HotpotQA", "RACE"]


def value(**fields):
    """The one record with these fields."""
    found = [
        r.value for r in published.RECORDS if all(getattr(r, k) == v for k, v in fields.items())
    ]
    assert len(found) == 1, (fields, found)
    return found[0]


def x500(metric, arm, memory, data):
    return value(source=published.X500, metric=metric, arm=arm, memory=memory, data=data)


def test_spot_values():
    """Breaks when a number slips into another row or column."""
    assert value(suite="autoencode", base="Llama-2-7b", metric="BLEU-4 (%)") == 99.5
    assert value(suite="autoencode", arm="ICAE", tokens=480, memory=4) == 40.0
    assert value(suite="autoencode", arm="memory, step 2000") == 0.10
    assert value(suite="continue", base="Llama-2-13b", arm="memory") == 8.45
    assert value(suite="continue", tokens=256, arm="full context") == 9.45
    assert value(suite="memorise", data="completely random text", metric="BLEU-4 (%)") == 0.2
    assert value(suite="qa", base="Llama-2-7b-chat", memory=256) == 77.8
    assert (
        x500("F1 (%)", "ICAE", 4, "RelationExtraction") == 67.28
        and x500("exact match (%)", "500x", 1, "RACE") == 7.56
    )
    assert (
        x500("F1 (%)", "full context", None, "SQuAD") == 70.65
        and x500("exact match (%)", "no context", None, "ArxivQA") == 0.04
    )
    assert value(source=published.FLEXCOMP, arm="SAC", ratio=51, data="MRQA, out of domain") == 32.3
    assert value(source=published.BENCHPRESS, arm="mean pooling", ratio=16) == 71.4
    assert value(source=published.ARC, base="Mistral") == 58.8
    assert value(suite="ablate", arm="pretrained against LM only", metric="tie (%)") == 40.0
    assert value(suite="speed", data="batch of 32", metric="speed-up (x)") == 3.6


@pytest.mark.parametrize(("memory", "headline"), [(16, 72.89), (4, 67.12), (1, 62.26)])
def test_retention_is_the_papers_headline(memory, headline):
    """Breaks when an F1 of the table is copied wrongly, or when our retention is another formula
    than the paper's.
    """
    pairs = {
        s: (x500("F1 (%)", "500x", memory, s), x500("F1 (%)", "full context", None, s))
        for s in SETS
    }
    assert round(100 * np.mean([a / f for a, f in pairs.values()]), 2) == headline
    got, left_out = statistics.retention(
        {s: ([a], [f], np.ones((1, 1), np.uint8)) for s, (a, f) in pairs.items()}
    )
    assert (
        round(got.mean, 2) == headline == x500("F1 kept (%)", "500x", memory, "average of the five")
        and not left_out
    )


@pytest.mark.parametrize("metric", ["F1 (%)", "exact match (%)"])
def test_averages_are_of_their_rows(metric):
    """Breaks when a number of the 500x tables is copied wrongly: each row's average is published
    beside it.
    """
    arms = {
        (r.arm, r.memory)
        for r in published.RECORDS
        if r.source == published.X500 and r.metric == metric
    }
    assert len(arms) == 8
    for arm, memory in arms:
        mean = np.mean([x500(metric, arm, memory, s) for s in SETS])
        assert mean == pytest.approx(x500(metric, arm, memory, "average of the five"), abs=0.0101)


def test_shares_add_up():
    """Breaks when win, lose or tie is copied wrongly."""
    judged = [r for r in published.RECORDS if r.metric in ("win (%)", "lose (%)", "tie (%)")]
    assert len(judged) == 12
    for arm in {r.arm for r in judged}:
        assert sum(r.value for r in judged if r.arm == arm) == pytest.approx(100)


def test_records_are_complete():
    """Breaks when a record cannot be told from another or does not say where it is from and what it
    measures.
    """
    assert {r.suite for r in published.RECORDS} == set(published.SUITES)
    for record in published.RECORDS:
        assert all(
            isinstance(x, str) and x
            for x in (record.source, record.base, record.data, record.arm, record.metric)
        )
        assert math.isfinite(record.value) and record.value >= 0
        assert record.memory is None or record.ratio is None
        assert "%" not in record.metric or record.value <= 100
    assert (
        len({r[:-1] for r in published.RECORDS}) >= len(published.RECORDS) - 2
    )  # one perplexity pair stands in two tables of its paper
    assert len({(r[:-1], r.value) for r in published.RECORDS}) == len(
        {r[:-1] for r in published.RECORDS}
    )  # where they must agree


@pytest.mark.parametrize("suite", published.SUITES)
def test_tables_can_be_shown(suite):
    """Breaks when a table loses a record, has a ragged row, or does not warn that bases and data
    differ.
    """
    shown = 0
    for caption, header, rows in published.tables(suite):
        assert "bases, data and training differ" in caption and any(
            x in caption for x in ("arXiv", "FlexComp", "UPL")
        )
        assert {len(row) for row in rows} == {len(header)} and all(
            isinstance(x, str) for row in rows for x in (*header, *row)
        )
        assert len(set(map(tuple, rows))) == len(rows)
        report.table(header, rows)
        report.text_table(header, rows)
        keys = sum(
            x in ("", "base", "tokens", "memory tokens", "tokens per memory token") for x in header
        )
        shown += sum(x != "–" for row in rows for x in row[keys:])
    assert shown == sum(r.suite == suite for r in published.RECORDS)


def test_a_table_in_full():
    """Breaks when rows or columns change places, or numbers lose the decimals they were published
    with.
    """
    _, header, rows = published.tables("continue")[1]
    assert header == ["tokens", "perplexity, full context", "perplexity, memory"]
    assert rows == [["128", "9.99", "10.15"], ["256", "9.45", "9.77"], ["512", "9.01", "9.50"]]


def test_an_unknown_suite_is_refused():
    """Breaks when a misspelt suite shows an empty table."""
    with pytest.raises(ValueError, match="suite is 'qq'; it must be one of autoencode"):
        published.tables("qq")
