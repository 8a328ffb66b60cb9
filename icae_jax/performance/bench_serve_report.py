"""The report of `icae bench serve` for people."""

from collections.abc import Iterator, Mapping
from typing import Any

from icae_jax.performance.bench_report import ranged

MIB = 1 << 20
NAMES = {
    "stored": "stored memory, first question",
    "kept": "stored memory, next question",
    "full": "full context",
}


def text(report: Mapping[str, Any]) -> str:
    """The report for people."""
    r = report
    rows = "a server that runs" if r["rows"] is None else f"{r['rows']} rows"
    lines = [
        f"{r['model']}, {rows}, {r['cores']} cores; method {r['method']}, base {r['base']}, "
        f"{r['default_memory_tokens_per_segment']} memory tokens a segment of "
        f"{r['segment_tokens']}"
    ]
    part = _first(r) if "first_token" in r else _load(r)
    return "\n".join([*lines, *part])


def _load(r) -> Iterator[str]:
    kinds = ", ".join(f"{count} of {kind}" for kind, count in r["kinds"].items())
    yield (
        f"{r['requests']} requests ({kinds}; {r['streamed']} streamed); median (range) of "
        f"{r['rounds']} rounds, in which both take turns"
    )
    yield f"first pass of both, compiling included: {r['first_pass_seconds']:.3g} s"
    columns = ("requests/s", "tokens/s", "CPU ms a request")
    yield f"  {'':15}" + "".join(f"{column:>30}" for column in columns)
    both = (("together", f"{r['clients']} clients"), ("alone", "one at a time"))
    for name, about in both:
        row = r[name]
        cells = [ranged(row["requests"]), ranged(row["tokens"])]
        cells.append(_milliseconds(row["cpu"]) if "cpu" in row else "-")
        yield f"  {about:15}" + "".join(f"{cell:>30}" for cell in cells)
    yield f"  {ranged(r['ratio'])} times the throughput"
    for key, what in (("first", "first token of a stream"), ("whole", "whole answer")):
        yield f"{what}, ms"
        for name, about in both:
            row = r[name][key]
            cells = [f"{p} {_milliseconds(row[p])}" for p in row]
            yield f"  {about:15}" + "".join(f"{cell:>30}" for cell in cells)
    answers, errors = r["answers"], r["errors"]
    told = f"answers: {answers['equal']} equal to the one given alone, {answers['tied']} part at "
    told += f"a tie, {answers['different']} elsewhere"
    if answers["largest_margin"]:
        told += f" (there the two best lie up to {answers['largest_margin']:.2g} apart)"
    yield f"{told}; errors: {sum(errors.values())}"
    yield from (f"  {count} x {error}" for error, count in sorted(errors.items()))
    if "server" in r:
        before, after = r["server"]["before"], r["server"]["after"]
        yield f"server: {_taken(before)} before the rounds, {_taken(after)} behind them"
    if "soak" in r:
        yield from _soak(r["soak"])


def _soak(soak):
    yield f"soak: {soak['requests']} other requests in {soak['seconds']:.4g} s"
    for point in soak["points"]:
        told = _taken(point) if "rss" in point else "what the server takes is not known here"
        yield f"  {point['requests']:>8}  {told}"
    if "growth" in soak:
        yield f"  memory behind the first half grew by {100 * soak['growth']:.2g} %"


def _taken(point):
    return (
        f"{point['rss'] / MIB:.0f} MiB, {point['maps']} maps, {point['threads']} threads, "
        f"{point['files']} files"
    )


def _first(r) -> Iterator[str]:
    f = r["first_token"]
    least, most = f["context_tokens"]
    kept = ", their K/V stored too" if r["kv"] else ""
    tokens = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    yield (
        f"documents of {tokens} tokens, {f['memory_tokens']} memory tokens{kept}; one question "
        f"at a time, median (range) of {r['rounds']} rounds, each on a document of its own"
    )
    yield f"  {'':31}{'prompt tokens':>14}{'first token, ms':>28}{'sooner':>26}"
    for way, seconds in f["ways"].items():
        sooner = ranged(f["sooner"][way]) if way in f["sooner"] else "-"
        cells = f"{f['prompt_tokens'][way]:>14,}{_milliseconds(seconds):>28}{sooner:>26}"
        yield f"  {NAMES[way]:31}{cells}"


def _milliseconds(spread):
    return "{median:,.0f} ({min:,.0f} to {max:,.0f})".format(**_scaled(spread, 1000))


def _scaled(spread, factor):
    return {key: value * factor for key, value in spread.items()}
