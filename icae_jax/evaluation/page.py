"""What a run's results look like: the printed table, the figures after the papers', and the HTML page with restored texts."""

import html
import re

from icae_jax.evaluation import published, report
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.tokens import first, without

SHOWN = 8  # examples on a page
NUMBERS = re.compile(
    r"(\d+-)?\d+"
)  # a group that has a place along an axis: "128", or a bucket such as "1-100"
CELL = "{mean} [{low}, {high}]"


def cell(metric, found):
    """A score with its interval, as text; a dash for an end without a bound."""
    digits = common.METRICS[metric].digits
    return CELL.format(
        **{
            name: "–" if found[name] is None else f"{found[name]:.{digits}f}"
            for name in ("mean", "low", "high")
        }
    )


def table(scores, arms=None, label=""):
    """(header, rows) of scores: a row for each arm, a column for each metric."""
    metrics = [m for m in scores if scores[m]]
    arms = arms or list(dict.fromkeys(arm for m in metrics for arm in scores[m]))
    header = [label, *(common.METRICS[m].label for m in metrics), "n"]
    rows = []
    for arm in arms:
        cells = [cell(m, scores[m][arm]) if arm in scores[m] else "" for m in metrics]
        rows.append([arm, *cells, max(scores[m][arm]["n"] for m in metrics if arm in scores[m])])
    return header, rows


def _few(arms):
    """Of the arms of suite tokens those that a terminal has room for: powers of two of the first tokens."""
    powers = {first(2**i) for i in range(12)}
    return [
        arm
        for arm in arms
        if not arm.startswith(without("")) and (not arm.startswith(first("")) or arm in powers)
    ]


def _tables(result, arms=None):
    """(header, rows) of every table of a run: of all examples, then of each group where there are several.

    What ablate measures differs from group to group, so that there all examples together have no table.
    """
    ablate = result["suite"] == "ablate"
    made = [] if ablate else [table(result["scores"], arms)]
    for kind, values in result["groups"].items():
        if len(values) > 1 or ablate:
            made += [table(of, label=f"{kind} {value}") for value, of in values.items()]
    return made + ([_pairs_table(result["pairs"])] if result.get("pairs") else [])


def text(result):
    """The results as the command prints them."""
    arms, rest = None, []
    if result["suite"] == "tokens":
        arms = _few(dict.fromkeys(arm for metric in result["scores"].values() for arm in metric))
        rest = [_extremes(metric, of) for metric, of in result["scores"].items()]
    return "\n\n".join([*(report.text_table(*made) for made in _tables(result, arms)), *rest])


def _extremes(metric, of):
    """Which memory token is missed most, and least."""
    prefix = without("")
    missed = sorted(
        (found["mean"], arm.removeprefix(prefix))
        for arm, found in of.items()
        if arm.startswith(prefix)
    )
    label, whole = common.METRICS[metric].label, of[common.MEMORY]["mean"]
    (least, which_least), (most, which_most) = missed[0], missed[-1]
    return f"{label}: {whole:.3f} with all tokens, {most:.3f} without token {which_most}, {least:.3f} without token {which_least}"


def _pairs_table(pairs):
    rows = []
    for metric, of in pairs.items():
        label, digits = common.METRICS[metric].label, common.METRICS[metric].digits
        for pair, found in of.items():
            d = found["difference"]
            apart = f"{d['mean']:+.{digits}f} [{d['low']:+.{digits}f}, {d['high']:+.{digits}f}]"
            rows.append(
                [
                    f"{pair}: {label}",
                    apart,
                    *(f"{found[name]:.1f}" for name in ("win", "lose", "tie")),
                    d["n"],
                ]
            )
    return ["", "difference", "win %", "lose %", "tie %", "n"], rows


# --------------------------------------------------------------------------------------------------------------- figures


def _triple(found):
    return found["mean"], found["low"], found["high"]


def figures(result, group_label):
    """SVG figures, the papers' where they have one: by group where there are several, else the arms side by side."""
    if result["suite"] == "tokens":
        return [
            svg for metric, of in result["scores"].items() for svg in _token_figures(metric, of)
        ]
    made, colours = (
        [],
        report.palette(dict.fromkeys(arm for of in result["scores"].values() for arm in of)),
    )
    for metric, of in result["scores"].items():
        label = common.METRICS[metric].label
        several = [
            (kind, values)
            for kind, values in result["groups"].items()
            if len([v for v in values.values() if metric in v]) > 1
        ]
        for _, values in several:
            having = {value: found[metric] for value, found in values.items() if metric in found}
            arms = dict.fromkeys(arm for found in having.values() for arm in found)
            if all(NUMBERS.fullmatch(value) for value in having):
                series = {}
                for arm in arms:
                    at = {
                        int(value.rpartition("-")[2]): _triple(found[arm])
                        for value, found in having.items()
                        if arm in found
                    }
                    series[arm] = (list(at), list(at.values()))
                made.append(report.lines(series, group_label, label, colours=colours))
            else:
                series = {
                    arm: [
                        _triple(found[arm]) if arm in found else None for found in having.values()
                    ]
                    for arm in arms
                }
                made.append(report.bars(list(having), series, label, group_label, colours=colours))
        if not several:
            made.append(
                report.bars(
                    [""],
                    {arm: [_triple(found)] for arm, found in of.items()},
                    label,
                    colours=colours,
                )
            )
    return made


def _token_figures(metric, of):
    """The loss without each token, and with the first few."""
    label, whole = common.METRICS[metric].label, of[common.MEMORY]

    def numbered(name):
        prefix = name("")
        return {
            int(arm.removeprefix(prefix)): found
            for arm, found in of.items()
            if arm.startswith(prefix)
        }

    hidden, kept = numbered(without), numbered(first)
    lost = [_triple(found) for found in hidden.values()]
    every = {
        "one token hidden": (list(hidden), lost),
        "all tokens": (list(hidden), [_triple(whole)] * len(hidden)),
    }
    made = [report.lines(every, "memory token that is hidden", label)]
    if kept:
        most = max(max(kept), max(hidden)) + 1
        at = kept | {most: whole}
        series = {"first tokens": (list(at), [_triple(found) for found in at.values()])}
        made.append(report.lines(series, "memory tokens kept, from the first", label))
    return made


# ------------------------------------------------------------------------------------------------------------------ page


def _shown(result):
    """Examples to look at: the worst first, then evenly up to the best, by the first score that the memory's texts have."""
    ranked = []
    for one in result["examples"]:
        arm = next(
            (
                a
                for a in one["texts"]
                if a not in ("original", "question", "answers") and not a.startswith("original, ")
            ),
            None,
        )
        metric = next(
            (m for m in ("f1", "bleu", "answer_loss") if arm in one["scores"].get(m, {})), None
        )
        if metric is None:
            continue
        score = one["scores"][metric][arm]
        ranked.append(
            (score if common.METRICS[metric].better == "higher" else -score, one["id"], one)
        )
    ranked.sort(key=lambda r: r[:2])
    if len(ranked) > SHOWN:
        worst = ranked[: SHOWN // 2]
        rest = ranked[SHOWN // 2 :]
        ranked = worst + [rest[i * (len(rest) - 1) // (SHOWN // 2 - 1)] for i in range(SHOWN // 2)]
    return [one for *_, one in ranked]


def _example(one):
    texts = one["texts"]
    parts = [f"<h3>{html.escape(one['set'])}: {html.escape(one['id'])}</h3>"]
    if "question" in texts:
        parts.append(
            f"<p><b>{html.escape(texts['question'])}</b> — {html.escape(' | '.join(texts['answers']))}</p>"
        )
    for arm, made in texts.items():
        if arm in ("original", "question", "answers") or arm.startswith("original, "):
            continue
        original = (
            texts["answers"][0]
            if "question" in texts
            else texts.get(f"original, {arm}", texts.get("original", ""))
        )
        numbers = [
            f"{common.METRICS[m].label} {of[arm]:.{common.METRICS[m].digits}f}"
            for m, of in one["scores"].items()
            if arm in of
        ]
        shown = f" ({', '.join(numbers[:2])})" if numbers else ""
        parts.append(f"<p>{html.escape(arm)}{shown}</p>{report.difference(original, made)}")
    return "\n".join(parts)


def write(path, result, group_label, facts):
    """Writes the HTML page of a run's results. facts: lines that say what was measured on what."""
    of_all, *others = [f'<div class="wide">{report.table(*made)}</div>' for made in _tables(result)]
    parts = [f"<p>{'<br>'.join(html.escape(fact) for fact in facts)}</p>", of_all]
    parts.append("<p>In brackets: 95 % intervals, from resampling the contexts. n: examples.</p>")
    parts.append(f'<div class="figures">{"".join(figures(result, group_label))}</div>')
    parts += others
    shown = _shown(result)
    if shown:
        parts.append(f"<h2>Examples</h2><p>The worst first.</p>{report.DIFFERENCE_LEGEND}")
        parts += [_example(one) for one in shown]
    if result["suite"] in published.SUITES:
        parts.append("<h2>Published figures</h2>")
        known = published.tables(result["suite"])
        parts += [
            f"<p>{html.escape(caption)}</p>{report.table(header, rows)}"
            for caption, header, rows in known
        ]
    report.write(path, f"icae evaluate: {result['suite']}", parts)
