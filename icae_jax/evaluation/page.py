"""What results look like: the printed table, the papers' figures, the HTML page with examples."""

import html
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from icae_jax import errors
from icae_jax.evaluation import published, report
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.common import MEMORY
from icae_jax.evaluation.suites.tokens import first, without

Scores = dict[str, dict[str, dict[str, Any]]]  # {metric: {arm: {"mean", "low", "high", "n"}}}

Sizes = dict[str, dict[str, Any]]  # {arm: {"tokens", "bytes"}}, bytes None without a memory

SIZES = {"memory tokens": "tokens", "memory bytes": "bytes"}  # by label
SHOWN = 8  # examples on a page
NUMBERS = re.compile(r"(\d+-)?\d+")  # groups with a place along an axis: "128", or "1-100"
CELL = "{mean} [{low}, {high}]"


# ------------------------------------------------------------------------------------------- text


def cell(metric: str, estimate: dict[str, Any]) -> str:
    """A score with its interval; a dash stands for an end without a bound."""
    digits = common.METRICS[metric].digits
    ends = {name: estimate[name] for name in ("mean", "low", "high")}
    return CELL.format(
        **{name: "–" if end is None else f"{end:.{digits}f}" for name, end in ends.items()}
    )


def table(
    scores: Scores, arms: Sequence[str] | None = None, label: str = "", sizes: Sizes | None = None
) -> report.Table:
    """A row for each arm, a column for each metric, and those of the memory's size if known."""
    metrics = [m for m in scores if scores[m]]
    arms = arms or list(dict.fromkeys(arm for m in metrics for arm in scores[m]))
    header = [label, *(common.METRICS[m].label for m in metrics), *(SIZES if sizes else ()), "n"]
    rows = []
    for arm in arms:
        cells = [cell(m, scores[m][arm]) if arm in scores[m] else "" for m in metrics]
        cells += _size_cells(sizes.get(arm)) if sizes else ()
        rows.append([arm, *cells, max(scores[m][arm]["n"] for m in metrics if arm in scores[m])])
    return header, rows


def _size_cells(size: dict[str, Any] | None) -> list[str]:
    if size is None or size["bytes"] is None:  # no memory
        return ["", ""]
    return [f"{size['tokens']:.4g}", f"{size['bytes']:,.0f}"]


def facts(result: dict[str, Any]) -> list[str]:
    """Lines that say what was measured on what."""
    lines = []
    for name, about in result["adapters"].items():
        k = ", ".join(map(str, about["k"]))
        sizes = f"{k} memory tokens for up to {about['segment_tokens']} of text"
        path = about["path"] if name == about["path"] else f"{name} {about['path']}"
        lines.append(f"{path}: {about['method']}, {sizes}, layout {about['layout']}")
    wanted = result["config"]["k"] or next(iter(result["adapters"].values()))["k"]
    if len(wanted) > 1:
        lines.append(f"memory: with {max(wanted)} memory tokens a segment")
    if ladder := result["config"].get("ladder"):
        steps = ", ".join(map(str, ladder))
        threshold = result["config"]["threshold"]
        lines.append(
            f"{common.CASCADE}: {steps} memory tokens a segment, the next where an answer's "
            f"mean log-probability is below {threshold:.3f}; sizes are of all that was read"
        )
    base = result["base"]
    fingerprint = base["fingerprint"][:12]
    lines.append(f"base {base['path']} ({fingerprint}), {result['config']['base_dtype']}")
    sets = ", ".join(
        f"{name} ({errors.counted(count, 'texts')})"
        for name, count in result["data"]["texts"].items()
    )
    lines.append(f"data {sets}; seed {result['seed']}")
    lines += [
        f"left out: {errors.counted(count, reason)}" for reason, count in result["left_out"].items()
    ]
    ties = ", ".join(
        f"{arm} {counts['steps']} in {errors.counted(counts['texts'], 'texts')}"
        for arm, counts in result["ties"].items()
        if counts["steps"]
    )
    return lines + ([f"steps where the two best tokens tied: {ties}"] if ties else [])


def text(result: dict[str, Any]) -> str:
    """The scores as the command prints them."""
    arms, lines = None, []
    if result["suite"] == "tokens":
        arms = _few(dict.fromkeys(arm for metric in result["scores"].values() for arm in metric))
        lines = [_extremes(metric, by_arm) for metric, by_arm in result["scores"].items()]
    return "\n\n".join([*(report.text_table(*t) for t in _tables(result, arms)), *lines])


def summary(result: dict[str, Any]) -> str:
    """What was measured on what, then the scores."""
    return "\n".join(facts(result)) + f"\n\n{text(result)}"


def _few(arms: Iterable[str]) -> list[str]:
    """The arms of suite tokens that fit a terminal: powers of two of the first tokens."""
    powers = {first(2**i) for i in range(12)}
    return [
        arm
        for arm in arms
        if not arm.startswith(without("")) and (not arm.startswith(first("")) or arm in powers)
    ]


def _tables(result, arms=None) -> list[report.Table]:
    """A table of all examples, then one for each group where there are several.

    Suite ablate measures different things in different groups, so it has no table of all.
    """
    ablate = result["suite"] == "ablate"
    sizes = result.get("sizes")  # results of earlier versions have none
    tables = [] if ablate else [table(result["scores"], arms, sizes=sizes)]
    for kind, values in result["groups"].items():
        if len(values) > 1 or ablate:
            tables += [table(scores, label=f"{kind} {value}") for value, scores in values.items()]
    return tables + ([_pairs_table(result["pairs"])] if result.get("pairs") else [])


def _extremes(metric: str, by_arm: dict) -> str:
    """Which memory token is missed most, and which least."""
    prefix = without("")
    losses = sorted(
        (estimate["mean"], arm.removeprefix(prefix))
        for arm, estimate in by_arm.items()
        if arm.startswith(prefix)
    )
    label, whole = common.METRICS[metric].label, by_arm[common.MEMORY]["mean"]
    (least, least_missed), (most, most_missed) = losses[0], losses[-1]
    return (
        f"{label}: {whole:.3f} with all tokens, {most:.3f} without token {most_missed}, "
        f"{least:.3f} without token {least_missed}"
    )


def _pairs_table(pairs) -> report.Table:
    rows = []
    for metric, by_pair in pairs.items():
        label, digits = common.METRICS[metric].label, common.METRICS[metric].digits
        for pair, compared in by_pair.items():
            d = compared["difference"]
            difference = (
                f"{d['mean']:+.{digits}f} [{d['low']:+.{digits}f}, {d['high']:+.{digits}f}]"
            )
            marks = [f"{compared[name]:.1f}" for name in ("win", "lose", "tie")]
            rows.append([f"{pair}: {label}", difference, *marks, d["n"]])
    return ["", "difference", "win %", "lose %", "tie %", "n"], rows


# ---------------------------------------------------------------------------------------- figures


def _triple(estimate):
    return estimate["mean"], estimate["low"], estimate["high"]


def figures(result: dict[str, Any], group_label: str) -> list[str]:
    """SVG figures, as in the papers where they have one.

    Scores by group where there are several groups, else the arms side by side.
    """
    scores = result["scores"]
    if result["suite"] == "tokens":
        return [svg for metric, by_arm in scores.items() for svg in _token_figures(metric, by_arm)]
    colours = report.palette(dict.fromkeys(arm for by_arm in scores.values() for arm in by_arm))
    svgs = []
    for metric, by_arm in scores.items():
        label = common.METRICS[metric].label
        with_metric = [
            {value: scores[metric] for value, scores in values.items() if metric in scores}
            for values in result["groups"].values()
        ]
        with_metric = [by_value for by_value in with_metric if len(by_value) > 1]
        svgs += [_group_figure(by_value, label, group_label, colours) for by_value in with_metric]
        if not with_metric:
            bars = {arm: [_triple(estimate)] for arm, estimate in by_arm.items()}
            svgs.append(report.bars([""], bars, label, colours=colours))
    return svgs + _size_figures(result, colours)


def _size_figures(result: dict[str, Any], colours: dict) -> list[str]:
    """The main scores against memory tokens and bytes, where memories of several sizes were read.

    Memories of one adapter make a line; the full context and none are levels across it.
    """
    sizes = result.get("sizes", {})
    metrics = [m for m in ("f1", "em") if m in result["scores"]] or list(result["scores"])[:1]
    svgs = []
    for metric in metrics:
        by_arm = result["scores"][metric]
        arms = [arm for arm in by_arm if sizes.get(arm, {}).get("bytes")]
        of_k = [arm for arm in arms if arm == MEMORY or arm.startswith(f"{MEMORY} k=")]
        lines = {MEMORY: of_k} | {arm: [arm] for arm in arms if arm == common.CASCADE}
        if len(of_k) < 2:
            continue
        own_colours = {MEMORY: colours[of_k[0]]} | colours
        controls = (common.FULL, common.TUNED, common.NONE)
        levels = {arm: _triple(by_arm[arm]) for arm in controls if arm in by_arm}
        for label, unit in SIZES.items():
            series = {}
            for name, points in lines.items():
                points = sorted(points, key=lambda arm: sizes[arm][unit])
                xs = [sizes[arm][unit] for arm in points]
                series[name] = (xs, [_triple(by_arm[arm]) for arm in points])
            svgs.append(
                report.lines(
                    series,
                    label,
                    common.METRICS[metric].label,
                    colours=own_colours,
                    levels=levels,
                    log_x=True,
                )
            )
    return svgs


def _group_figure(by_value: dict, label: str, group_label: str, colours: dict) -> str:
    """Lines over groups that are numbers, else bars. by_value: `{group: {arm: estimate}}`."""
    arms = dict.fromkeys(arm for by_arm in by_value.values() for arm in by_arm)
    if all(NUMBERS.fullmatch(value) for value in by_value):
        series = {}
        for arm in arms:
            points = {
                int(value.rpartition("-")[2]): _triple(by_arm[arm])
                for value, by_arm in by_value.items()
                if arm in by_arm
            }
            series[arm] = (list(points), list(points.values()))
        return report.lines(series, group_label, label, colours=colours)
    series = {
        arm: [_triple(by_arm[arm]) if arm in by_arm else None for by_arm in by_value.values()]
        for arm in arms
    }
    return report.bars(list(by_value), series, label, group_label, colours=colours)


def _token_figures(metric: str, by_arm: dict) -> list[str]:
    """The loss without each token, and with the first few."""
    label, whole = common.METRICS[metric].label, by_arm[common.MEMORY]

    def numbered(name):
        prefix = name("")
        return {
            int(arm.removeprefix(prefix)): estimate
            for arm, estimate in by_arm.items()
            if arm.startswith(prefix)
        }

    hidden, kept = numbered(without), numbered(first)
    series = {
        "one token hidden": (list(hidden), [_triple(estimate) for estimate in hidden.values()]),
        "all tokens": (list(hidden), [_triple(whole)] * len(hidden)),
    }
    svgs = [report.lines(series, "memory token that is hidden", label)]
    if kept:
        points = kept | {max(max(kept), max(hidden)) + 1: whole}
        series = {"first tokens": (list(points), [_triple(e) for e in points.values()])}
        svgs.append(report.lines(series, "memory tokens kept, from the first", label))
    return svgs


# ------------------------------------------------------------------------------------------- page


def _restored_arms(example: dict) -> list[str]:
    """The arms of which an example has a text, beside the originals."""
    return [
        name
        for name in example["texts"]
        if name not in ("original", "question", "answers") and not name.startswith("original, ")
    ]


def _shown(result) -> list[dict]:
    """Examples to look at: the worst, then evenly up to the best, by the first text's score."""
    ranked = []
    for example in result["examples"]:
        scores, arm = example["scores"], next(iter(_restored_arms(example)), None)
        metrics = (m for m in ("f1", "bleu", "answer_loss") if arm in scores.get(m, {}))
        metric = next(metrics, None)
        if metric is not None:
            sign = 1 if common.METRICS[metric].better == "higher" else -1
            ranked.append((sign * scores[metric][arm], example["id"], example))
    ranked.sort(key=lambda r: r[:2])
    if len(ranked) > SHOWN:
        half = SHOWN // 2
        worst, others = ranked[:half], ranked[half:]
        ranked = worst + [others[i * (len(others) - 1) // (half - 1)] for i in range(half)]
    return [example for *_, example in ranked]


def _example(example: dict) -> str:
    texts = example["texts"]
    fragments = [f"<h3>{html.escape(example['set'])}: {html.escape(example['id'])}</h3>"]
    if "question" in texts:
        question, answers = (
            html.escape(texts["question"]),
            html.escape(" | ".join(texts["answers"])),
        )
        fragments.append(f"<p><b>{question}</b> — {answers}</p>")
    for arm in _restored_arms(example):
        if "question" in texts:
            original = texts["answers"][0]
        else:
            original = texts.get(f"original, {arm}", texts.get("original", ""))
        numbers = [
            f"{common.METRICS[m].label} {by_arm[arm]:.{common.METRICS[m].digits}f}"
            for m, by_arm in example["scores"].items()
            if arm in by_arm
        ]
        shown = f" ({', '.join(numbers[:2])})" if numbers else ""
        difference = report.difference(original, texts[arm])
        fragments.append(f"<p>{html.escape(arm)}{shown}</p>{difference}")
    return "\n".join(fragments)


def write(
    path: str | os.PathLike, result: dict[str, Any], group_label: str, facts: Sequence[str]
) -> None:
    """Writes the HTML page. facts: lines that say what was measured on what."""
    of_all, *others = [f'<div class="wide">{report.table(*t)}</div>' for t in _tables(result)]
    fragments = [f"<p>{'<br>'.join(html.escape(fact) for fact in facts)}</p>", of_all]
    note = "In brackets: 95 % intervals, from resampling the contexts. n: examples."
    fragments.append(f"<p>{note}</p>")
    fragments.append(f'<div class="figures">{"".join(figures(result, group_label))}</div>')
    fragments += others
    if shown := _shown(result):
        heading = "<h2>Examples</h2><p>The worst first.</p>"
        fragments += [f"{heading}{report.DIFFERENCE_LEGEND}", *map(_example, shown)]
    if result["suite"] in published.SUITES:
        fragments.append("<h2>Published figures</h2>")
        fragments += [
            f"<p>{html.escape(caption)}</p>{report.table(header, rows)}"
            for caption, header, rows in published.tables(result["suite"])
        ]
    report.write(path, f"icae evaluate: {result['suite']}", fragments)
