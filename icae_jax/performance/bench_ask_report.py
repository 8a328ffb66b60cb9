"""The report of `icae bench ask` for people."""

from collections.abc import Mapping
from typing import Any

from icae_jax.performance.bench_report import ranged
from icae_jax.performance.subject import GIB

NAMES = {
    "full": "full context",
    "compress": "compress + ask",
    "memory": "stored memory",
    "kv": "stored K/V",
    "transformers": "transformers",
}


def text(report: Mapping[str, Any]) -> str:
    """The report for people."""
    r = report
    lines = [
        f"{r['device']}, {r['cores']} cores; jax {r['jax']}; base {r['base']} in {r['base_format']}"
    ]
    if "throughput" in r:
        return "\n".join([*lines, *_throughput(r["throughput"], r["rounds"])])
    against = r["against"]
    lines += [
        f"method {r['method']}, ratio {r['ratio']:g}, {r['k']} memory tokens a segment; a question "
        f"of {r['question_tokens']} tokens, {r['new_tokens']} new ones, stop tokens ignored",
        f"transformers: skipped, {against['skipped']}"
        if "skipped" in against
        else f"transformers {against['transformers']}, torch {against['torch']}",
        f"median (range) of {r['rounds']} rounds, in which all take turns",
    ]
    for point in r["points"]:
        lines += ["", *_point(point)]
    return "\n".join(lines)


def _point(point):
    requests = f"{point['requests']} requests at once" if point["requests"] > 1 else "one request"
    yield f"context of {point['context']:,} tokens, {requests}"
    columns = ("first token, s", "of the last, s", "sooner", "tokens/s each", "tokens/s in all")
    yield (
        f"  {'':15}"
        + "".join(f"{c:>34}" for c in columns)
        + f"{'prefill, tokens/s':>34}{'peak, GiB':>20}"
    )
    for name, row in point["ways"].items():
        keys = ("first_mean", "first_last", "first_last_sooner", "request_tokens", "all_tokens")
        cells = [ranged(row[key]) if key in row else "-" for key in (*keys, "prefill_tokens")]
        peak = "-"
        if "peak_bytes" in row:
            above = (row["peak_bytes"] - row["loaded_bytes"]) / GIB
            peak = f"{row['peak_bytes'] / GIB:.2f} (+{above:.2f})"
        yield f"  {NAMES[name]:15}" + "".join(f"{cell:>34}" for cell in cells) + f"{peak:>20}"
    if "to_transformers" in point:
        ratios, texts = point["to_transformers"], point["texts"]
        yield (
            f"  full context to transformers: prefill {ranged(ratios['prefill'])}, decoding "
            f"{ranged(ratios['decoding'])} of its tokens/s; {_texts(texts)}"
        )
    if "step_to_one" in point:
        yield (
            f"  a step of {point['requests']} rows takes {ranged(point['step_to_one'])} times as "
            "long as one of 1 row"
        )


def _texts(texts):
    told = f"texts: {texts['equal']} equal, {texts['tied']} part at a tie, {texts['different']} "
    told += "elsewhere"
    if texts.get("largest_margin"):
        told += f" (there the two best logits lie up to {texts['largest_margin']:.2g} apart)"
    return told


def _throughput(t, rounds):
    yield (
        f"{t['requests']} requests, {t['prompt_tokens']:,} prompt tokens and {t['new_tokens']:,} "
        f"new ones; median (range) of {rounds} rounds, in which both take turns"
    )
    for name, about in (("together", f"{t['rows']} rows"), ("alone", "one at a time")):
        tokens, seconds = ranged(t[name]["tokens"]), ranged(t[name]["seconds"])
        yield f"  {about:15}{tokens:>26} tokens/s{seconds:>26} s"
    yield f"  {ranged(t['ratio'])} times the throughput; {_texts(t['texts'])}"
