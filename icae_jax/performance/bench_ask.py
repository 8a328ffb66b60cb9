"""Measures how soon and how fast questions about contexts are answered: `icae bench ask`.

Two processes, ours and transformers', live as long as the benchmark and take turns: in every round
each way of ours and transformers answer the same, so that what else the machine does meets all of
them. Figures are medians over rounds with their range; ratios are taken within a round.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from icae_jax import files
from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.inference.sampling import TIE
from icae_jax.performance import bench_ask_throughput, bench_ask_transformers
from icae_jax.performance.bench import spread
from icae_jax.performance.bench_ask_sides import Side

AGAINST = ("transformers", "none")
PROMPT_TOKENS = 128  # of --decoding
THEIRS = "transformers"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured. Each field is a flag of the same name.

    adapter, base, base_dtype, method, k, ratio, seed: see `bench_ask_ways.Subject`. contexts:
    tokens of a context. requests: asked at once. new_tokens: of each answer, with throughput of the
    longest. rounds: of which a figure is the median. ways: of `bench_ask_ways.WAYS`, () for all.
    against: of `AGAINST`. memory: whether peak memory is measured, which starts a process for each
    way. decoding: prompts of `PROMPT_TOKENS` tokens alone. throughput: that many requests of
    different lengths, in place of the rest. rows: of their engine. save: file for the report.
    """

    adapter: str | None = None
    base: str | None = None
    base_dtype: str | None = None
    method: str = CompressionConfig.method
    k: int = 128
    ratio: float = 4.0
    seed: int = 0
    contexts: tuple[int, ...] = (512, 2048)
    requests: tuple[int, ...] = (1, 8)
    new_tokens: int = 32
    rounds: int = 5
    ways: tuple[str, ...] = ()
    against: str = THEIRS
    memory: bool = True
    decoding: bool = False
    throughput: int = 0
    rows: int = 16
    save: str | None = None

    def __post_init__(self):
        numbers = {
            "contexts": (self.contexts, 1),
            "requests": (self.requests, 1),
            "new_tokens": ((self.new_tokens,), 2),
            "rounds": ((self.rounds,), 1),
            "k": ((self.k,), 1),
            "throughput": ((self.throughput,), 0),
            "rows": ((self.rows,), 2),
        }
        for name, (values, least) in numbers.items():
            wrong = [value for value in values if value < least]
            if wrong or not values:
                raise UserError(
                    f"--{name} is {wrong[0] if wrong else 'empty'}; give whole numbers of at least "
                    f"{least}"
                )
        if not 0 < self.ratio < math.inf:
            raise UserError(f"--ratio is {self.ratio}; it must be positive and finite")
        if not self.adapter and not self.base:
            raise UserError("give --adapter, or --base for an untrained one")
        if self.decoding and self.throughput:
            raise UserError("--decoding and --throughput exclude each other; give one of them")
        if self.save and pathlib.Path(self.save).is_dir():
            raise UserError(f"--save {self.save} is a folder; give another path")

    @property
    def subject(self) -> dict[str, Any]:
        """The arguments of `bench_ask_ways.Subject`."""
        names = ("adapter", "base", "base_dtype", "method", "k", "ratio", "seed")
        return {name: getattr(self, name) for name in names}


def bench(options: Options) -> dict[str, Any]:
    """The report as plain values, which is also written to `options.save`.

    UserError on bad input, before anything is compiled.
    """
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Side("ours", **options.subject))
        ways = _ways(options, ours)
        if not options.throughput:
            contexts = () if options.decoding else options.contexts
            ours.ask("check", contexts=contexts, new_tokens=options.new_tokens)
        report = {"bench": "ask", "cores": len(os.sched_getaffinity(0)), **ours.facts}
        report |= {"rounds": options.rounds}
        if options.throughput:
            report["throughput"] = throughput(options, ours)
        else:
            theirs, report["against"] = _theirs(options, ours, stack)
            report |= {"new_tokens": options.new_tokens, "ways": ways}
            report["points"] = points(options, ways, ours, theirs)
            if options.memory:
                _save(options, report)  # what took longest is not lost with a process of the rest
                _add_memory(options, report, ours)
    _save(options, report)
    return report


def _save(options, report):
    if options.save:
        files.write_json(options.save, report)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _ways(options: Options, ours: Side) -> list[str]:
    """The ways that are measured."""
    if options.decoding:
        return ["full"]
    known = ours.facts["ways"]
    unknown = [way for way in options.ways if way not in known]
    if unknown:
        raise UserError(
            f"--ways names {unknown[0]!r}; those of method {ours.facts['method']} are "
            f"{', '.join(known)}"
        )
    return [way for way in known if way in (options.ways or known)]


def _theirs(options, ours, stack) -> tuple[Side | None, dict[str, Any]]:
    """Transformers' process, None without one; and what the report says of it."""
    if options.against == "none":
        return None, {"skipped": "--against none"}
    facts = ours.facts
    why = bench_ask_transformers.why_not(facts["base_format"], facts["platform"])
    if why:
        return None, {"skipped": why}
    side = stack.enter_context(Side(THEIRS, **_arguments(facts)))
    return side, side.facts


def _arguments(facts):
    return {"base": facts["base"], "dtype": facts["base_format"], "platform": facts["platform"]}


# ---------------------------------------------------------------------------------------- rounds


def points(options: Options, ways: Sequence[str], ours: Any, theirs: Any) -> list[dict[str, Any]]:
    """What was measured at each context length, with each number of requests at once.

    ours, theirs: `Side`s; theirs may be None.
    """
    lengths = options.contexts
    if options.decoding:
        lengths = (PROMPT_TOKENS - len(ours.ask("prompts", tokens=0, requests=1)[0]),)
    return [
        point for length in lengths for point in _of_length(options, length, ways, ours, theirs)
    ]


def _of_length(options, length, ways, ours, theirs):
    """The points of one context length: all that they hold takes turns."""
    prompts = {n: ours.ask("prompts", tokens=length, requests=n) for n in options.requests}
    run = {"tokens": length, "new_tokens": options.new_tokens}

    def measure(n, name, margins=False):
        if name == THEIRS:
            how = {"new_tokens": options.new_tokens, "margins": margins}
            return theirs.ask("run", prompts=prompts[n], **how)
        return ours.ask("run", way=name, requests=n, **run)

    # They take turns within a way too: the one to compare with stands beside its rival.
    names = [name for way in ways for name in (way, THEIRS) if way == "full" or name == way]
    names = [name for name in names if theirs is not None or name != THEIRS]
    texts = {}
    _progress(f"context of {length} tokens: compiling")
    for n in options.requests:  # compiles, and gives the texts
        first = {name: measure(n, name, margins=True) for name in names}
        if THEIRS in first and "full" in first:
            texts[n] = compare_texts(first["full"], first[THEIRS])
    rounds = []
    for turn in range(options.rounds):
        _progress(f"context of {length} tokens: round {turn + 1} of {options.rounds}")
        keys = [(n, name) for n in options.requests for name in names]
        rounds.append({key: figures(measure(*key), len(prompts[key[0]][0])) for key in keys})
    return [_point(length, n, names, rounds, texts.get(n), prompts[n]) for n in options.requests]


def figures(timed: dict[str, list], prompt_tokens: int) -> dict[str, float]:
    """What a run's times say; all tokens of one request come at different times.

    first_mean, first_last: seconds to the first token of each request, and of the last one.
    seconds: until all had ended. request_tokens: tokens/s that a request sees behind its first,
    mean. all_tokens: tokens/s of all behind the last one's first. step: seconds that a token of
    each takes then. prefill_tokens: prompt tokens/s until the last one's first token.
    """
    times = timed["times"]
    first, end = [row[0] for row in times], max(row[-1] for row in times)
    last = max(first)
    behind = sum(at > last for row in times for at in row)
    speeds = [(len(row) - 1) / (row[-1] - row[0]) for row in times]
    return {
        "first_mean": statistics.mean(first),
        "first_last": last,
        "seconds": end,
        "request_tokens": statistics.mean(speeds),
        "all_tokens": behind / (end - last),
        "step": (end - last) * len(times) / behind,
        "prefill_tokens": prompt_tokens * len(times) / last,
    }


def _point(length, n, names, rounds, texts, prompts):
    """A point of the report: each way's figures, and ratios to the full context and to theirs."""
    point = {"context": length, "requests": n, "prompt_tokens": len(prompts[0]), "ways": {}}
    for name in names:
        turns = [turn[n, name] for turn in rounds]
        row = {key: spread([turn[key] for turn in turns]) for key in turns[0]}
        if name not in ("full", THEIRS):
            del row["prefill_tokens"]  # the prompt of the full context was not read
            if (n, "full") in rounds[0]:
                for key in ("first_mean", "first_last"):
                    row[f"{key}_sooner"] = _ratios(rounds, (n, "full"), (n, name), key)
        point["ways"][name] = row
    if THEIRS in names:
        ours, theirs = (n, "full"), (n, THEIRS)
        keys = {"prefill": "prefill_tokens", "decoding": "all_tokens"}
        point["to_transformers"] = {
            what: _ratios(rounds, ours, theirs, key) for what, key in keys.items()
        }
        point["texts"] = texts
    if (1, "full") in rounds[0] and n > 1:
        point["step_to_one"] = _ratios(rounds, (n, "full"), (1, "full"), "step")
    return point


def _ratios(rounds, over, under, key):
    """Of one figure, within each round."""
    return spread([turn[over][key] / turn[under][key] for turn in rounds])


def compare_texts(ours: dict[str, list], theirs: dict[str, list]) -> dict[str, Any]:
    """How many texts are equal, part at a tie, or part elsewhere.

    largest_margin: of the two best logits (theirs) where texts part, 0 if none does.
    """
    margins = []
    for a, b, margin in zip(ours["ids"], theirs["ids"], theirs["margins"], strict=True):
        parting = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        margins += [margin[parting[0]]] if parting else []
    return {
        "equal": len(ours["ids"]) - len(margins),
        "tied": sum(margin < TIE for margin in margins),
        "different": sum(margin >= TIE for margin in margins),
        "largest_margin": max(margins, default=0.0),
    }


# ---------------------------------------------------------------------------------------- memory


def _add_memory(options, report, ours):
    """Peak memory of every way at every point, each in a process of its own."""
    new = {"new_tokens": options.new_tokens}
    for point in report["points"]:
        asked = {"tokens": point["context"], "requests": point["requests"]}
        for name, row in point["ways"].items():
            if name == THEIRS:
                prompts = ours.ask("prompts", **asked)
                with Side(THEIRS, **_arguments(report)) as side:
                    row |= side.ask("peak", prompts=prompts, **new)
            else:
                with Side("ours", **options.subject) as side:
                    row |= side.ask("peak", way=name, **asked, **new)


# ------------------------------------------------------------------------------------ throughput


def throughput(options: Options, ours: Any) -> dict[str, Any]:
    """Requests of different lengths through an engine of `options.rows`, against one at a time."""
    drawn = bench_ask_throughput.draw(options.throughput, options.new_tokens, options.seed)

    def run(rows):
        return ours.ask("throughput", drawn=drawn, rows=rows)

    _progress("compiling")
    together, alone = run(options.rows), run(1)
    equal = [a == b for a, b in zip(together["ids"], alone["ids"], strict=True)]
    tied = [bool(ties) for ties in together["ties"]]
    rounds = []
    for turn in range(options.rounds):
        _progress(f"round {turn + 1} of {options.rounds}")
        seconds = {"together": run(options.rows)["seconds"], "alone": run(1)["seconds"]}
        rounds.append(seconds)
    tokens = sum(new for _, new in drawn)
    return {
        "requests": len(drawn),
        "rows": options.rows,
        "prompt_tokens": sum(prompt for prompt, _ in drawn),
        "new_tokens": tokens,
        **{
            name: {
                "seconds": spread([turn[name] for turn in rounds]),
                "tokens": spread([tokens / turn[name] for turn in rounds]),
            }
            for name in ("together", "alone")
        },
        "ratio": spread([turn["alone"] / turn["together"] for turn in rounds]),
        "texts": {
            "equal": sum(equal),
            "tied": sum(not e and t for e, t in zip(equal, tied, strict=True)),
            "different": sum(not e and not t for e, t in zip(equal, tied, strict=True)),
        },
    }
