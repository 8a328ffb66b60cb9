"""`icae bench ask`: what is measured, in which order, what is made of it, and bad input."""

import json

import pytest

from icae_jax.cli import main as cli
from icae_jax.errors import UserError
from icae_jax.performance import (
    bench_ask,
    bench_ask_report,
    bench_ask_sides,
    bench_ask_throughput,
    bench_ask_transformers,
)
from icae_jax.performance.bench_ask import Options

SMALL = {"k": 4, "contexts": (16,), "requests": (2,), "new_tokens": 3, "rounds": 2}


def through_json(value):
    return json.loads(json.dumps(value))


class Here(bench_ask_sides.Side):
    """A side in this process, to which everything goes as JSON too."""

    def __init__(self, name, **arguments):
        self.name = name
        self.side = bench_ask_sides.SIDES[name](**through_json(arguments))
        self.facts = through_json(self.side.facts)

    def __exit__(self, *_):
        pass

    def ask(self, what, **arguments):
        return through_json(getattr(self.side, what)(**through_json(arguments)))


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(bench_ask, "Side", Here)


@pytest.fixture(scope="module")
def ours(tiny_base):
    return Here("ours", base=str(tiny_base), k=4)


# --- The ways, and transformers ---


def test_a_memory_gives_the_same_answers_however_it_is_at_hand(ours):
    """Breaks when a way reads another context or question than it says, decodes too many or too
    few tokens, stops at a stop token, or a request's tokens are told as another's."""
    answers = {way: ours.ask("run", way=way, tokens=16, requests=2, new_tokens=3)
               for way in ours.facts["ways"]}  # fmt: skip
    assert list(answers) == ["full", "compress", "memory", "kv"]
    assert answers["compress"]["ids"] == answers["memory"]["ids"] == answers["kv"]["ids"]
    for answer in answers.values():
        assert [len(ids) for ids in answer["ids"]] == [3, 3]
        for times in answer["times"]:
            assert len(times) == 3 and times == sorted(times) and times[0] > 0
    one = ours.ask("run", way="compress", tokens=16, requests=1, new_tokens=3)
    assert one["ids"] == answers["compress"]["ids"][:1]
    prompts = ours.ask("prompts", tokens=16, requests=2)
    assert prompts[0] != prompts[1] and len(prompts[0]) == len(prompts[1]) > 16


def test_transformers_reads_the_same_prompts_and_gives_the_same_texts(here, tiny_base):
    """Breaks when the two sides read different prompts or decode different numbers of tokens, or
    when a text's equality is not told."""
    pytest.importorskip("torch")
    options = Options(base=str(tiny_base), ways=("full", "kv"), memory=False, **SMALL)
    report = through_json(bench_ask.bench(options))
    assert report["against"]["transformers"] and report["base_format"] == "float32"
    (point,) = report["points"]
    assert list(point["ways"]) == ["full", "transformers", "kv"]
    assert point["texts"]["equal"] == 2 and not point["texts"]["different"]
    assert set(point["to_transformers"]) == {"prefill", "decoding"}
    assert "first_last_sooner" in point["ways"]["kv"]
    assert "prefill_tokens" not in point["ways"]["kv"]
    text = bench_ask_report.text(report)
    assert "stored K/V" in text and "texts: 2 equal, 0 part at a tie, 0 elsewhere" in text


def test_without_pytorch_it_is_skipped_with_a_reason(monkeypatch):
    """Breaks when the benchmark needs PyTorch, or compares with a base that it cannot read."""
    assert "int8" in bench_ask_transformers.why_not("int8", "cpu")
    assert bench_ask_transformers.why_not("float32", "tpu").endswith("(tpu)")
    monkeypatch.setattr(bench_ask_transformers.importlib.util, "find_spec", lambda name: None)
    assert "icae_jax[bench]" in bench_ask_transformers.why_not("float32", "cpu")


# --- What is made of the times ---


def test_the_figures_of_a_run():
    """Breaks when prefilling counts as decoding, or a mean is taken for the last one's."""
    got = bench_ask.figures({"times": [[1.0, 2.5, 3.0, 5.0], [2.0, 3.0, 4.0, 6.0]]}, 10)
    assert got == {
        "first_mean": 1.5,
        "first_last": 2.0,
        "seconds": 6.0,
        "request_tokens": 0.75,  # three tokens in four seconds, both
        "all_tokens": 1.5,  # six tokens behind the last one's first, in four seconds
        "step": 2 / 1.5,
        "prefill_tokens": 10.0,
    }


class Scripted:
    """A side whose runs take what a script says, slower from round to round."""

    def __init__(self, log, seconds):
        self.log, self.seconds, self.runs = log, seconds, {}

    def ask(self, what, **a):
        if what == "prompts":
            return [[5] * 20] * a["requests"]
        requests = a["requests"] if "requests" in a else len(a["prompts"])
        key = a.get("way", "transformers"), requests
        self.log.append(key)
        turn = self.runs[key] = self.runs.get(key, -1) + 1
        first = self.seconds[key] * (1, 1, 3, 2)[turn]  # the first is not measured
        ids, margins = [[7, 8 + (key[0] == "transformers")]] * requests, [[1.0, 2e-5]] * requests
        return {"times": [[first, 2 * first]] * requests, "ids": ids, "margins": margins}


def test_all_take_turns_and_ratios_are_within_a_round():
    """Breaks when one side runs all its rounds first, the run that compiles is measured, a ratio is
    of medians of different rounds or upside down, or texts that part at a tie are said to differ.
    """
    log, options = [], Options(base="b", contexts=(16,), requests=(1, 2), rounds=3, new_tokens=2)
    seconds = {("full", 1): 4.0, ("kv", 1): 0.5, ("transformers", 1): 6.0}
    seconds |= {("full", 2): 8.0, ("kv", 2): 2.0, ("transformers", 2): 4.0}
    ours, theirs = Scripted(log, seconds), Scripted(log, seconds)
    one, two = bench_ask.points(options, ("full", "kv"), ours, theirs)
    turn = [(name, n) for n in (1, 2) for name in ("full", "transformers", "kv")]
    assert log == turn * 4
    assert one["ways"]["full"]["first_mean"] == {"median": 8.0, "min": 4.0, "max": 12.0}
    assert one["ways"]["kv"]["first_mean_sooner"] == {"median": 8.0, "min": 8.0, "max": 8.0}
    assert one["to_transformers"]["prefill"]["median"] == 1.5
    assert two["to_transformers"]["decoding"]["median"] == 0.5
    assert two["step_to_one"]["median"] == 2.0 and "step_to_one" not in one
    assert two["texts"] == {"equal": 0, "tied": 2, "different": 0, "largest_margin": 2e-5}


def test_where_texts_part_the_margin_decides():
    """Breaks when another place than the first difference is looked at."""
    theirs = {"ids": [[1, 2, 3], [1, 2, 3], [1, 2, 3]], "margins": [[5.0, 0.25, 1e-5]] * 3}
    got = bench_ask.compare_texts({"ids": [[1, 2, 3], [1, 2, 4], [1, 9, 9]]}, theirs)
    assert got == {"equal": 1, "tied": 1, "different": 1, "largest_margin": 0.25}


# --- Throughput ---


def test_many_requests_end_with_their_own_tokens(ours, monkeypatch):
    """Breaks when a request of the batch gets another's tokens or too few, or when what is drawn
    is not a function of the seed."""
    monkeypatch.setattr(bench_ask_throughput, "PROMPT_TOKENS", (4, 12))
    monkeypatch.setattr(bench_ask_throughput, "FEWEST_NEW", 2)
    drawn = bench_ask_throughput.draw(5, 6, 1)
    assert drawn == bench_ask_throughput.draw(5, 6, 1) != bench_ask_throughput.draw(5, 6, 2)
    assert len(set(drawn)) > 2 and all(4 <= p <= 12 and 2 <= n <= 6 for p, n in drawn)
    options = Options(base="b", throughput=5, new_tokens=6, rows=2, rounds=1, seed=1)
    got = bench_ask.throughput(options, ours)
    assert got["texts"]["equal"] + got["texts"]["tied"] == 5
    assert got["new_tokens"] == sum(new for _, new in drawn)
    one = ours.ask("throughput", drawn=drawn, rows=1)
    assert [len(ids) for ids in one["ids"]] == [new for _, new in drawn]
    report = {"throughput": got, "rounds": 1, "cores": 2, **ours.facts}
    assert "2 rows" in bench_ask_report.text(report)


# --- Bad input ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--contexts 0", "--contexts is 0; give whole numbers of at least 1"),
        ("--requests ,", "--requests is empty"),
        ("--new_tokens 1", "--new_tokens is 1; give whole numbers of at least 2"),
        ("--rounds 0", "--rounds is 0"),
        ("--rows 1 --throughput 4", "--rows is 1"),
        ("--ratio nan", "--ratio is nan; it must be positive"),
        ("--decoding --throughput 3", "exclude each other"),
        (
            "--ways full,nonsense",
            "--ways names 'nonsense'; those of method icae are full, compress",
        ),
        ("--contexts 250", "it takes 2"),
        ("--save .", "--save . is a folder"),
    ],
)
def test_bad_input_is_named_before_anything_is_measured(
    flags, message, here, ours, tiny_base, monkeypatch, capsys
):
    """Breaks when a flag that cannot be meant is taken, or is noticed only after hours."""
    monkeypatch.setattr(bench_ask_sides.Ours, "__init__", lambda self, **_: None)
    monkeypatch.setattr(bench_ask_sides.Ours, "facts", ours.facts, raising=False)
    monkeypatch.setattr(bench_ask_sides.Ours, "ways", ours.side.ways, raising=False)
    monkeypatch.setattr(bench_ask_sides.Ours, "run", lambda *_: pytest.fail("it was measured"))
    argv = ["bench", "ask", "--base", str(tiny_base), "--against", "none", *flags.split()]
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_base_or_an_adapter_is_needed():
    """Breaks when it begins with neither."""
    with pytest.raises(UserError, match=r"give --adapter, or --base"):
        Options()


# --- Processes ---


@pytest.mark.nightly
def test_the_command_in_processes_of_its_own(tiny_base, capsys):
    """Breaks when a side's process is not asked as it answers, an error of its is not the user's,
    a death is not told, or peak memory is that of another process."""
    argv = ["bench", "ask", "--base", str(tiny_base), "--method", "x500", "--k", "4"]
    argv += ["--contexts", "16", "--requests", "1", "--new_tokens", "2", "--rounds", "1"]
    argv += ["--against", "none", "--json"]
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    (point,) = report["points"]
    assert list(point["ways"]) == ["full", "compress", "kv"]  # K/V that is kept is what is read
    assert all(row["peak_bytes"] > row["loaded_bytes"] > 2**26 for row in point["ways"].values())
    assert cli.main([*argv, "--contexts", "300"]) == 2
    assert "--contexts 300" in capsys.readouterr().err
    with bench_ask_sides.Side("ours", base=str(tiny_base)) as side:
        side._process.kill()
        with pytest.raises(RuntimeError, match=r"ours failed \(SIGKILL\)"):
            side.ask("prompts", tokens=1, requests=1)
