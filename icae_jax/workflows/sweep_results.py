"""The outcome of a sweep: a table, results.json, a figure and a page, from its points' metrics."""

import base64
import functools
import html
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from icae_jax import files
from icae_jax.evaluation import report
from icae_jax.training import metrics
from icae_jax.training.train import DIVERGED, DONE
from icae_jax.workflows.sweep_points import Point, short_text, varied_fields

Results = dict[str, Any]  # the content of results.json

KINDS = {"memory": "memory", "wrong_memory": "wrong memory"}  # held-out losses, with their labels
NO_VALUE = "–"


# -------------------------------------------------------------------------------------- collecting


def collect(
    identity: Mapping[str, Any], points: Sequence[Point], codes: Mapping[str, int]
) -> Results:
    """The results of a sweep. codes: `{point: exit code}` of the points trained just now."""
    fields = varied_fields([point.changes for point in points])
    outcomes = [point_outcome(point, codes.get(point.name), fields) for point in points]
    return {**identity, "fields": fields, "points": outcomes}


def point_outcome(point: Point, code: int | None, fields: Sequence[str]) -> dict[str, Any]:
    """One entry of results.json. code: None if the point was not trained just now."""
    lines = metrics.read_lines(point.folder / "metrics.jsonl")
    trained = [line for line in lines if "train" in line]
    evaluated = [line for line in lines if "eval" in line]
    # NaN compares false with everything, so it would hide the best loss.
    finite = [line for line in evaluated if math.isfinite(line["eval_loss"])]
    best = min(finite, key=lambda line: line["eval_loss"], default=None)
    speeds = [line["tokens_per_second"] for line in trained]
    state = point.state
    if code is None:
        code = {"done": DONE, "diverged": DIVERGED}.get(state)
    return {
        "point": point.name,
        "changes": point.changes,
        "at": {
            field: functools.reduce(getattr, field.split("."), point.config) for field in fields
        },
        "weights": point.config.objectives.weights,
        "state": "failed" if code not in (None, DONE, DIVERGED) else state,
        "exit_code": code,
        "steps": max((line["step"] for line in lines), default=0),
        "train": trained[-1]["train"] if trained else {},
        "held_out": evaluated[-1]["eval"] if evaluated else {},
        "eval_loss": evaluated[-1]["eval_loss"] if evaluated else None,
        "best": best and {"eval_loss": best["eval_loss"], "step": best["step"]},
        # The first speed includes compilation.
        "tokens_per_second": statistics.median(speeds[1:] or speeds) if speeds else None,
        "curve": [[line["step"], line["eval_loss"]] for line in evaluated],
    }


# ------------------------------------------------------------------------------------------- table


def _label(kind):
    """(label, " k 4" or "") of a kind of held-out losses, such as wrong_memory_k4."""
    name, _, k = kind.partition("_k")
    return KINDS.get(name, name), k and f" k {k}"


def _trained_objectives(results):
    return list(dict.fromkeys(o for point in results["points"] for o in point["train"]))


def _held_out_pairs(results):
    """The (kind, objective) pairs for which some point has held-out losses."""
    return list(
        dict.fromkeys(
            (kind, objective)
            for point in results["points"]
            for kind, losses in point["held_out"].items()
            for objective in losses
        )
    )


def table(results: Results) -> tuple[list[str], list[list[Any]]]:
    """(header, rows) with a row for each point."""
    objectives, pairs = _trained_objectives(results), _held_out_pairs(results)
    header = ["point", "state", "steps"]
    header += [f"{objective.upper()}, train" for objective in objectives]
    header += [f"{objective.upper()}, {''.join(_label(kind))}" for kind, objective in pairs]
    header += ["held out", "best (step)", "tokens/s"]
    rows = []
    for point in results["points"]:
        losses = [point["train"].get(objective) for objective in objectives]
        losses += [point["held_out"].get(kind, {}).get(objective) for kind, objective in pairs]
        losses.append(point["eval_loss"])
        best = point["best"] and f"{point['best']['eval_loss']:.4f} ({point['best']['step']})"
        speed = point["tokens_per_second"] and f"{point['tokens_per_second']:,.0f}"
        rows.append(
            [
                point["point"],
                point["state"],
                point["steps"],
                *(NO_VALUE if loss is None else f"{loss:.4f}" for loss in losses),
                best or NO_VALUE,
                speed or NO_VALUE,
            ]
        )
    return header, rows


# ------------------------------------------------------------------------------------------ figure


def _axis(results):
    """(label, each point's position, names of the positions or None, whether it is logarithmic)."""
    field = results["fields"][0] if results["fields"] else "point"
    values = [point["at"].get(field, point["point"]) for point in results["points"]]
    distinct = len(set(values)) == len(values)
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if distinct and numeric:
        return field, values, None, min(values) > 0 and max(values) / min(values) >= 10
    if not distinct:  # a grid
        field = ", ".join(results["fields"])
        values = [point["point"] for point in results["points"]]
    return field, range(len(values)), [short_text(v) for v in values], False


def figure(results: Results) -> Any:
    """A matplotlib figure: held-out losses against the swept field, and against steps.

    None without held-out losses.
    """
    # Without pyplot there is no global state, and no backend to choose.
    from matplotlib.figure import Figure

    if not any(point["curve"] for point in results["points"]):
        return None
    drawn = Figure(figsize=(14, 5), layout="constrained")
    against_field, against_steps = drawn.subplots(1, 2)
    _draw_against_field(against_field, results)
    _draw_against_steps(against_steps, results)
    for axes in (against_field, against_steps):
        _finish(axes)
    return drawn


def _draw_against_field(axes, results):
    from matplotlib import ticker

    label, positions, categories, logarithmic = _axis(results)
    pairs = _held_out_pairs(results)
    colours = report.palette(dict.fromkeys(o.upper() + _label(kind)[1] for kind, o in pairs))
    for kind, objective in pairs:
        what, k = _label(kind)
        losses = sorted(
            (position, point["held_out"][kind][objective])
            for position, point in zip(positions, results["points"], strict=True)
            if objective in point["held_out"].get(kind, {})
        )
        line, marker = (":", "s") if what == KINDS["wrong_memory"] else ("-", "o")
        axes.plot(
            *zip(*losses, strict=True),
            marker=marker,
            linestyle="none" if categories else line,  # there is nothing between names
            linewidth=1.6,
            color=colours[objective.upper() + k],
            label=report.literal(f"{objective.upper()}{k}, {what}"),
        )
    if logarithmic:
        axes.set_xscale("log")
    if categories:
        axes.set_xlim(-0.5, len(categories) - 0.5)
    if categories or len(positions) <= 12:
        texts = categories or [short_text(position) for position in positions]
        rotation = {"rotation": 20, "ha": "right"} if sum(map(len, texts)) > 60 else {}
        axes.set_xticks(positions, [report.literal(text) for text in texts], **rotation)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel(report.literal(label))
    axes.set_title("at the last step")


def _draw_against_steps(axes, results):
    from matplotlib import colormaps

    count = max(len(results["points"]) - 1, 1)
    for number, point in enumerate(results["points"]):
        if point["curve"]:
            axes.plot(
                *zip(*point["curve"], strict=True),
                "-",
                color=colormaps["viridis"](0.9 * number / count),
                label=report.literal(point["point"]),
                linewidth=1.6,
            )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_title("memory, weighted as in training")


def _finish(axes):
    from matplotlib import ticker

    values = [y for line in axes.get_lines() for y in line.get_ydata()]
    if min(values) > 0 and max(values) / min(values) >= 10:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the data, never over them.
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


# ----------------------------------------------------------------------------------------- writing


def _notes(results):
    notes = [
        "Losses: the last step's, nats per token. Wrong memory: another text's. "
        "Held out: the memory's, weighted as in training."
    ]
    if len({tuple(point["weights"].items()) for point in results["points"]}) > 1:
        notes.append(
            "The points weigh their objectives differently: "
            "compare objectives, not the weighted loss."
        )
    return notes


def write(workdir: pathlib.Path, results: Results) -> None:
    """Writes results.json, report.html and, with held-out losses, sweep.png into a folder."""
    files.write_json(workdir / "results.json", results)
    overrides = " ".join(f"--config.{field}={text}" for field, text in results["overrides"].items())
    parts = [
        f"<p>{html.escape(results['config'])} {html.escape(overrides)}</p>",
        f'<div class="wide">{report.table(*table(results))}</div>',
        *(f"<p>{html.escape(note)}</p>" for note in _notes(results)),
    ]
    image, drawn = workdir / "sweep.png", figure(results)
    if drawn:
        with files.replacing_file(image) as tmp:
            drawn.savefig(tmp, format="png", dpi=120)
        encoded = base64.b64encode(image.read_bytes()).decode()
        parts.append(
            '<img style="max-width: 100%" alt="held-out losses" '
            f'src="data:image/png;base64,{encoded}">'
        )
    report.write(workdir / "report.html", f"icae sweep: {results['sweep']}", parts)


def text(workdir: pathlib.Path, results: Results) -> str:
    """The table as text, with notes and the files that `write` wrote."""
    names = ["results.json", "sweep.png", "report.html"]
    written = [str(workdir / name) for name in names if (workdir / name).exists()]
    return "\n".join([report.text_table(*table(results)), "", *_notes(results), *written])
