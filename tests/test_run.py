"""Running suites: progress that survives a kill, identities, and summaries against hand values."""

import json

import numpy as np
import pytest
import sacrebleu

from icae_jax.evaluation import examples as drawn
from icae_jax.evaluation import run, scores, statistics
from icae_jax.evaluation.suites import SUITES, common

IDENTITY = {
    "suite": "counting",
    "config": {"k": [4], "spans": [1, 2]},
    "seed": 0,
    "adapters": {"a": "f00"},
    "examples": "abc",
}


class Counting:
    """A suite without a model: a text scores its number of tokens.

    asked: the ids of each batch measured.
    """

    name = "counting"
    METRICS = ("ae_loss",)

    def __init__(self, fail_after=None, value=float):
        self.asked, self.fail_after, self.value = [], fail_after, value

    def main(self, records):
        return records

    def measure(self, batch):
        if len(self.asked) == self.fail_after:
            raise KeyboardInterrupt
        self.asked.append([e.id for e in batch])
        return [
            [
                common.record(e)
                | {"sums": {"ae_loss": {common.MEMORY: [self.value(len(e.ids)), 1.0]}}}
            ]
            for e in batch
        ]


def make(count=10):
    return [
        drawn.example(drawn.Text(f"key{i}", f"t{i}", "set", "", ()), range(i + 1))
        for i in range(count)
    ]


# ----------------------------------------------------------------------------------------- progress


def test_a_killed_run_measures_each_example_once(tmp_path):
    """Breaks when what was done is measured again, lost, or put with another example."""
    examples, first = make(), Counting(fail_after=2)
    whole = run.measure(Counting(), examples, 3, run.Progress(tmp_path / "other", IDENTITY))
    with pytest.raises(KeyboardInterrupt):
        run.measure(first, examples, 3, run.Progress(tmp_path, IDENTITY))
    second = Counting()
    records = run.measure(second, examples, 3, run.Progress(tmp_path, IDENTITY))
    assert first.asked + second.asked == [
        [f"t{i}" for i in range(at, min(at + 3, 10))] for at in (0, 3, 6, 9)
    ]
    assert records == whole and [r["id"] for r in records] == [e.id for e in examples]


def test_a_line_cut_short_counts_for_nothing(tmp_path):
    """Breaks when half a line is taken for a result, or what is added behind it is lost to the next
    run.
    """
    examples = make()
    with pytest.raises(KeyboardInterrupt):
        run.measure(Counting(fail_after=2), examples, 3, run.Progress(tmp_path, IDENTITY))
    path = tmp_path / "progress.0.jsonl"
    whole = path.read_bytes()
    for cut in (
        5,
        len(whole.splitlines()[-1]) + 1,
    ):  # within the last line, and just in front of it
        path.write_bytes(whole[:-cut])
        again = Counting(fail_after=1)
        with pytest.raises(KeyboardInterrupt):
            run.measure(again, examples, 3, run.Progress(tmp_path, IDENTITY))
        assert again.asked == [["t5"]]
        assert [json.loads(line)["key"] for line in path.read_text().splitlines()[1:]] == [
            e.key for e in examples[:6]
        ]
    for left in (b"\0" * 50, b"\xff\xfe\x00", b"null", b"[1]", b'{"key": "a"}'):  # by a power loss
        path.write_bytes(whole + left)
        run.measure(Counting(), examples[:6], 3, run.Progress(tmp_path, IDENTITY))
        assert path.read_bytes() == whole
    path.write_bytes(whole[:7])  # killed while the file was begun
    last = Counting()
    run.measure(last, examples, 3, run.Progress(tmp_path, IDENTITY))
    assert sum(last.asked, []) == [e.id for e in examples]  # noqa: RUF017


def test_what_other_processes_did_counts(tmp_path):
    """Breaks when a run of two processes cannot be continued by one, or its files stay behind."""
    examples = make()
    one = run.Progress(tmp_path, IDENTITY)
    one.path = tmp_path / "progress.1.jsonl"
    (tmp_path / "progress.0.jsonl").rename(one.path)
    one.add(
        examples[3:6],
        [[common.record(e) | {"sums": {"ae_loss": {"memory": [7.0, 1.0]}}}] for e in examples[3:6]],
    )
    suite, progress = Counting(), run.Progress(tmp_path, IDENTITY)
    records = run.measure(suite, examples, 4, progress)
    assert suite.asked == [["t0", "t1", "t2"], ["t6", "t7"], ["t8", "t9"]]
    assert [r["sums"]["ae_loss"]["memory"][0] for r in records] == [1, 2, 3, 7, 7, 7, 7, 8, 9, 10]
    progress.remove()
    assert not list(tmp_path.iterdir())


def test_processes_take_batches_in_turn(tmp_path, monkeypatch):
    """Breaks when a batch is measured twice, or by nobody."""
    asked, made = [], []
    monkeypatch.setattr(run.jax, "process_count", lambda: 3)
    monkeypatch.setattr(
        run, "gather", lambda done: made.append(done) or {e.key: [] for e in make()}
    )
    for process in range(3):
        monkeypatch.setattr(run.jax, "process_index", lambda process=process: process)
        suite = Counting()
        assert run.measure(suite, make(), 4, run.Progress(tmp_path / str(process), IDENTITY)) == []
        asked += suite.asked
        assert (tmp_path / str(process) / f"progress.{process}.jsonl").exists()
    assert asked == [["t0", "t1", "t2", "t3"], ["t4", "t5", "t6", "t7"], ["t8", "t9"]]
    assert [len(done) for done in made] == [4, 4, 2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1, "examples": "xyz"}, "seed is 0 there and 1 here"),
        ({"config": {"k": [4], "spans": [1]}}, r"config spans is \[1, 2\] there and \[1\] here"),
        ({"adapters": {"a": "bad"}, "examples": "xyz"}, "adapters a is 'f00' there and 'bad' here"),
        ({"adapters": {"b": "f00"}}, "adapters b is None there and 'f00' here"),
        ({"examples": "xyz"}, r"the examples differ \(the data, --limit, or what fits\)"),
    ],
)
def test_another_runs_progress_is_refused(tmp_path, changed, message):
    """Breaks when scores of two runs are mixed, the error names what follows from the difference,
    or touches what is there.
    """
    progress = run.Progress(tmp_path, IDENTITY)
    progress.add(make(1), [[]])
    before = progress.path.read_bytes()
    with pytest.raises(
        ValueError,
        match=rf"progress\.0\.jsonl belongs to another run: {message}; give another --out",
    ):
        run.Progress(tmp_path, IDENTITY | changed)
    assert progress.path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [
        "progress.0.jsonl"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_ends_the_run(tmp_path, value):
    """Breaks when NaN gets into results, or is kept as done."""
    suite = Counting(value=lambda n: value if n == 5 else n)
    progress = run.Progress(tmp_path, IDENTITY)
    with pytest.raises(ValueError, match="ae_loss of memory is not finite on example t4"):
        run.measure(suite, make(), 3, progress)
    assert len(run.Progress(tmp_path, IDENTITY).done) == 3


def test_what_a_run_is_about():
    """Breaks when another text, id or partner passes for the same run, or another order for another
    one.
    """
    examples = make(4)
    same = run.content(examples)
    assert same == run.content(examples[::-1]) != run.content(examples[:3])
    other = drawn.example(drawn.Text("key9", "t0", "set", "", ()), range(1))
    assert run.content([other, *examples[1:]]) != same
    apart = [
        drawn.example(drawn.Text(f"key{i}", f"t{i}", "set", f"text {i}", ()), range(i + 1))
        for i in range(4)
    ]
    assert run.content(drawn.with_partners(apart)) != run.content(apart)


# --------------------------------------------------------------------------------------- summing up

TEXTS = {
    "memory": [
        "the cat sat on the mat",
        "a dog ran under the big tree",
        "no words here are right at all",
        "the cat sat on the mat now",
    ],
    "memory k=2": ["the cat sat on a mat", "a dog ran", "in the sea the fish", "cat"],
}
TRUTH = [
    "the cat sat on the mat",
    "a dog ran under a big tree",
    "in the sea the fish ate bread",
    "the cat sat on the mat",
]


def restored(arms=TEXTS):
    """Records of restored texts: two clusters, two lengths."""
    records = []
    for i, truth in enumerate(TRUTH):
        sums = {"bleu": {}, "ae_loss": {}}
        for a, (arm, made) in enumerate(arms.items()):
            sums["bleu"][arm] = scores.bleu_counts(made[i], truth).tolist()
            sums["ae_loss"][arm] = [1.5 * (i + 1) + a, float(2 + i)]
        group = {"tokens": "1-100" if i < 3 else "1001-1100"}
        texts = {"original": truth} | {arm: made[i] for arm, made in arms.items()}
        one = {
            "id": f"t{i}",
            "cluster": f"c{min(i, 1)}",
            "set": "s",
            "group": group,
            "sums": sums,
            "texts": texts,
            "ties": {"memory": i},
        }
        records.append(one)
    return records


def suite_named(name):
    return SUITES[name].__new__(SUITES[name])


def test_scores_of_all_are_those_of_all_texts():
    """Breaks when a score of all is a mean of scores, a group takes others' examples, or an
    interval misses what was resampled.
    """
    result = run.summarise(suite_named("autoencode"), restored(), seed=0)
    for arm, made in TEXTS.items():
        assert result["scores"]["bleu"][arm]["mean"] == pytest.approx(
            sacrebleu.corpus_bleu(made, [TRUTH]).score, abs=1e-9
        )
        groups = result["groups"]["tokens"]
        assert list(groups) == ["1-100", "1001-1100"]
        assert groups["1-100"]["bleu"][arm]["mean"] == pytest.approx(
            sacrebleu.corpus_bleu(made[:3], [TRUTH[:3]]).score, abs=1e-9
        )
        assert [g["bleu"][arm]["n"] for g in groups.values()] == [3, 1]
    assert result["scores"]["ae_loss"]["memory"]["mean"] == pytest.approx(
        (1.5 + 3 + 4.5 + 6) / (2 + 3 + 4 + 5)
    )
    # Two clusters: of a loss, a replicate is one of them, the other, or both. A quarter of all lie
    # at each end.
    ends = [1.5 / 2, (3 + 4.5 + 6) / 12]
    assert [result["scores"]["ae_loss"]["memory"][end] for end in ("low", "high")] == pytest.approx(
        ends
    )
    own = [e["scores"]["bleu"]["memory k=2"] for e in result["examples"]]
    want = [
        sacrebleu.sentence_bleu(made, [truth]).score
        for made, truth in zip(TEXTS["memory k=2"], TRUTH, strict=True)
    ]
    assert own == pytest.approx(want) and [e["id"] for e in result["examples"]] == [
        "t0",
        "t1",
        "t2",
        "t3",
    ]
    assert [e["scores"]["ae_loss"]["memory"] for e in result["examples"]] == pytest.approx(
        [1.5 / 2, 3 / 3, 4.5 / 4, 6 / 5]
    )
    assert result["ties"] == {"memory": {"texts": 3, "steps": 6}}
    assert result["examples"][0]["texts"]["memory"] == TEXTS["memory"][0] and result["examples"][0][
        "group"
    ] == {"tokens": "1-100"}


def test_the_order_of_examples_changes_nothing():
    """Breaks when intervals depend on the order in which batches or processes finish."""
    one, other = (
        run.summarise(suite_named("autoencode"), records, 3)["scores"]
        for records in (restored(), restored()[::-1])
    )
    for metric, arms in one.items():
        for arm, found in arms.items():
            assert list(other[metric][arm].values()) == pytest.approx(
                list(found.values()), rel=1e-9
            )
    assert (
        run.summarise(suite_named("autoencode"), restored(), 4)["scores"] != one
        or one["bleu"]["memory"]["low"] is not None
    )


def answered(
    full=(50, 100, 0, 20, 40), memory=(25, 100, 50, 10, 0), names=("a", "a", "a", "b", "b")
):
    records = []
    for i, (f, m, name) in enumerate(zip(full, memory, names, strict=True)):
        sums = {"f1": {common.MEMORY: [m, 1.0], common.FULL: [f, 1.0], common.NONE: [0.0, 1.0]}}
        one = {
            "id": f"q{i}",
            "cluster": f"c{i}",
            "set": name,
            "group": {"set": name},
            "sums": sums,
            "texts": {},
            "ties": {},
        }
        records.append(one)
    return records


def test_retention_is_the_mean_over_sets():
    """Breaks when sets are weighed by their examples, or a set without a score counts."""
    result = run.summarise(suite_named("qa"), answered(), 0)
    kept = result["scores"]["retention"]
    assert (
        kept["memory"]["mean"] == pytest.approx(100 * ((25 + 100 + 50) / 150 + 10 / 60) / 2)
        and kept["memory"]["n"] == 5
    )
    assert (
        kept["no context"]["mean"] == 0
        and set(kept) == {"memory", "no context"}
        and result["sets_without_retention"] == []
    )
    assert result["scores"]["f1"]["memory"]["mean"] == pytest.approx(185 / 5)
    assert result["groups"]["set"]["b"]["f1"]["full context"]["mean"] == 30
    zero = run.summarise(suite_named("qa"), answered(full=(50, 100, 0, 0, 0)), 0)
    assert (
        zero["sets_without_retention"] == ["b"] and zero["scores"]["retention"]["memory"]["n"] == 3
    )
    assert "retention" not in run.summarise(suite_named("qa"), answered(full=(0,) * 5), 0)["scores"]


def test_no_number_of_the_results_is_infinite():
    """Breaks when a replicate in which the full context scores 0 makes an interval that JSON cannot
    hold.
    """
    few = run.summarise(suite_named("qa"), answered(full=(0, 0, 50, 20, 0)), 0)
    json.dumps(few, allow_nan=False)
    assert few["scores"]["retention"]["memory"]["mean"] == pytest.approx(
        100 * (175 / 50 + 10 / 20) / 2
    )


def test_pairs_of_adapters():
    """Breaks when examples of two adapters are not paired, better is more where it is less, or ties
    count for one side.
    """
    numbers = {
        "f1": {"a": (10, 20, 30, 40), "b": (10, 25, 20, 0), "c": (0, 0, 0, 0)},
        "ae_loss": {"a": (1, 2, 4, 4), "b": (2, 3, 3, 3)},
    }
    records = []
    for i in range(4):
        sums = {
            m: {arm: [float(of[i]), 1.0] for arm, of in arms.items()} for m, arms in numbers.items()
        }
        records.append(
            {
                "id": f"{i}",
                "cluster": f"c{i}",
                "set": "s",
                "group": {"measured": "x"},
                "sums": sums,
                "texts": {},
                "ties": {},
            }
        )
    del records[3]["sums"]["ae_loss"]["b"]
    pairs = run.summarise(suite_named("ablate"), records, 0)["pairs"]
    assert list(pairs["f1"]) == ["a against b", "a against c", "b against c"] and list(
        pairs["ae_loss"]
    ) == ["a against b"]
    f1, loss = pairs["f1"]["a against b"], pairs["ae_loss"]["a against b"]
    assert f1["difference"]["mean"] == pytest.approx(25 - 13.75) and (
        f1["win"],
        f1["lose"],
        f1["tie"],
    ) == (50, 25, 25)
    assert loss["difference"]["mean"] == pytest.approx(-1 / 3) and loss["difference"]["n"] == 3
    assert (loss["win"], loss["lose"], loss["tie"]) == pytest.approx((200 / 3, 100 / 3, 0))
    weights = statistics.resample(["s c0", "s c1", "s c2", "s c3"], [0])
    want = np.quantile(weights @ np.asarray([0, -5, 10, 40]) / 4, statistics.LEVELS)
    assert [f1["difference"]["low"], f1["difference"]["high"]] == pytest.approx(want)


def test_only_the_longest_is_summed_up():
    """Breaks when contexts of several lengths, or spans of several segments, are mixed into one
    perplexity.
    """
    records = []
    for i, tokens in enumerate(("32", "128", "64", "128")):
        one = {
            "id": f"{i}",
            "cluster": f"c{i}",
            "set": "s",
            "group": {"tokens": tokens},
            "texts": {},
            "ties": {},
        }
        records.append(one | {"sums": {"perplexity": {"memory": [float(i), 2.0]}}})
    result = run.summarise(suite_named("continue"), records, 0)
    assert (
        result["scores"]["perplexity"]["memory"]["mean"] == pytest.approx(np.exp(4 / 4))
        and len(result["examples"]) == 4
    )
    assert list(result["groups"]["tokens"]) == ["32", "64", "128"]
