"""What a sweep came to: a table, results.json, a figure and a page, all read from its points' metrics."""

import base64
import functools
import html
import math
import statistics

from icae_jax import files
from icae_jax.evaluation import report
from icae_jax.training import metrics
from icae_jax.training.train import DIVERGED, DONE

KINDS = {
    "memory": "memory",
    "wrong_memory": "wrong memory",
}  # of held-out losses, and what they are called


def shown(value):
    """A field's value in a few characters."""
    if isinstance(value, tuple):
        return "+".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------------ collecting


def _point(point, code, fields):
    """One entry of results.json."""
    path = point.folder / "metrics.jsonl"
    lines = metrics.read_lines(path) if path.exists() else []
    trained, evaluated = ([line for line in lines if key in line] for key in ("train", "eval"))
    finite = [
        line for line in evaluated if math.isfinite(line["eval_loss"])
    ]  # no comparison with NaN holds
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
        "tokens_per_second": statistics.median(speeds[1:] or speeds)
        if speeds
        else None,  # the first one holds compilation
        "curve": [[line["step"], line["eval_loss"]] for line in evaluated],
    }


def collect(sweep, fields, points, codes):
    """The content of results.json. fields: what the points differ in, the first of them the figure's axis. codes: as `sweep.train`'s."""
    return sweep | {
        "fields": fields,
        "points": [_point(point, codes.get(point.name), fields) for point in points],
    }


def _kind(kind):
    """("memory" or "wrong memory", " k 4" or "") of a kind of held-out losses such as wrong_memory_k4."""
    name, _, k = kind.partition("_k")
    return KINDS.get(name, name), k and f" k {k}"


def _columns(results, part):
    """The (kind, objective) pairs that some point has held-out losses of, or the objectives of part "train"."""
    if part == "train":
        return list(dict.fromkeys(o for p in results["points"] for o in p["train"]))
    return list(
        dict.fromkeys(
            (kind, o)
            for p in results["points"]
            for kind, losses in p["held_out"].items()
            for o in losses
        )
    )


def table(results):
    """(header, rows) as text cells: a row for each point."""
    objectives, held_out = _columns(results, "train"), _columns(results, "held_out")
    header = ["point", "state", "steps", *(f"{o.upper()}, train" for o in objectives)]
    header += [f"{o.upper()}, {''.join(_kind(kind))}" for kind, o in held_out] + [
        "held out",
        "best (step)",
        "tokens/s",
    ]
    rows = []
    for p in results["points"]:
        losses = [p["train"].get(o) for o in objectives] + [
            p["held_out"].get(kind, {}).get(o) for kind, o in held_out
        ]
        cells = ["–" if x is None else f"{x:.4f}" for x in (*losses, p["eval_loss"])]
        best = p["best"] and f"{p['best']['eval_loss']:.4f} ({p['best']['step']})"
        speed = p["tokens_per_second"] and f"{p['tokens_per_second']:,.0f}"
        rows.append([p["point"], p["state"], p["steps"], *cells, best or "–", speed or "–"])
    return header, rows


# ---------------------------------------------------------------------------------------------------------------- figure


def _axis(results):
    """(label, position of each point, names of the positions or None, whether it is logarithmic) of the swept field."""
    field = results["fields"][0] if results["fields"] else "point"
    values = [p["at"].get(field, p["point"]) for p in results["points"]]
    alone = len(set(values)) == len(values)
    if alone and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return field, values, None, min(values) > 0 and max(values) / min(values) >= 10
    if not alone:  # a grid
        field, values = ", ".join(results["fields"]), [p["point"] for p in results["points"]]
    return field, range(len(values)), [shown(v) for v in values], False


def figure(results):
    """The figure as matplotlib's: held-out losses against the swept field, and against steps; None without held-out losses."""
    from matplotlib import colormaps, ticker
    from matplotlib.figure import (
        Figure,  # without pyplot there is no global state, and no backend to choose
    )

    measured = [(i, p) for i, p in enumerate(results["points"]) if p["curve"]]
    if not measured:
        return None
    drawn = Figure(figsize=(14, 5), layout="constrained")
    against_field, against_steps = drawn.subplots(1, 2)
    label, positions, categories, log_x = _axis(results)
    pairs = _columns(results, "held_out")
    colours = report.palette(dict.fromkeys(o.upper() + _kind(kind)[1] for kind, o in pairs))
    for kind, o in pairs:
        what, k = _kind(kind)
        has = sorted(
            (positions[i], p["held_out"][kind][o])
            for i, p in measured
            if o in p["held_out"].get(kind, {})
        )
        line, marker = (":", "s") if what == KINDS["wrong_memory"] else ("-", "o")
        style = {
            "marker": marker,
            "linestyle": "none" if categories else line,
            "linewidth": 1.6,
        }  # between names there is nothing
        against_field.plot(
            *zip(*has, strict=True),
            **style,
            color=colours[o.upper() + k],
            label=report.literal(f"{o.upper()}{k}, {what}"),
        )
    if log_x:
        against_field.set_xscale("log")
    if categories:
        against_field.set_xlim(-0.5, len(categories) - 0.5)
    ticks = positions if categories or len(positions) <= 12 else None
    if ticks is not None:
        texts = categories or [shown(x) for x in ticks]
        turned = {"rotation": 20, "ha": "right"} if sum(map(len, texts)) > 60 else {}
        against_field.set_xticks(ticks, [report.literal(text) for text in texts], **turned)
        against_field.xaxis.set_minor_locator(ticker.NullLocator())
    against_field.set_xlabel(report.literal(label))
    against_field.set_title("at the last step")

    for i, p in measured:
        colour = colormaps["viridis"](0.9 * i / max(len(results["points"]) - 1, 1))
        against_steps.plot(
            *zip(*p["curve"], strict=True),
            "-",
            color=colour,
            label=report.literal(p["point"]),
            linewidth=1.6,
        )
    against_steps.xaxis.get_major_locator().set_params(integer=True)
    against_steps.set_xlabel("step")
    against_steps.set_title("memory, weighted as in training")
    for axes in (against_field, against_steps):
        values = [y for line in axes.get_lines() for y in line.get_ydata()]
        if min(values) > 0 and max(values) / min(values) >= 10:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_ylabel("held-out loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1)
        )  # beside the data, never on them
    return drawn


def write(workdir, results):
    """Writes results.json, sweep.png and report.html into a folder. Returns the table as text, with what to know of it."""
    files.write_json(workdir / "results.json", results)
    header, rows = table(results)
    notes = [
        "Losses: the last step's, nats per token. Wrong memory: another text's. Held out: the memory's, weighted as in training."
    ]
    if len({tuple(p["weights"].items()) for p in results["points"]}) > 1:
        notes.append(
            "The points weigh their objectives differently: compare objectives, not the weighted loss."
        )
    overrides = " ".join(f"--config.{field}={text}" for field, text in results["overrides"].items())
    parts = [
        f"<p>{html.escape(results['config'])} {html.escape(overrides)}</p>",
        f'<div class="wide">{report.table(header, rows)}</div>',
    ]
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    image, drawn = workdir / "sweep.png", figure(results)
    if drawn:
        with files.replacing_file(image) as tmp:
            drawn.savefig(tmp, format="png", dpi=120)
        encoded = base64.b64encode(image.read_bytes()).decode()
        parts.append(
            f'<img style="max-width: 100%" alt="held-out losses" src="data:image/png;base64,{encoded}">'
        )
    report.write(workdir / "report.html", f"icae sweep: {results['sweep']}", parts)
    shown_files = ["results.json", *(["sweep.png"] if drawn else []), "report.html"]
    return "\n".join(
        [
            report.text_table(header, rows),
            "",
            *notes,
            *(f"{workdir / name}" for name in shown_files),
        ]
    )
