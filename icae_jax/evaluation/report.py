"""A self-contained HTML page: tables, SVG figures, restored texts with differences marked."""

import difflib
import html
import io
import itertools
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from icae_jax import files

Table = tuple[list[Any], list[list[Any]]]
"""(header, rows) of cells; the caller formats numbers."""

Estimates = Sequence
"""(mean, low, high, …) each, such as `statistics.Estimate`; None leaves a gap in bars."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .3rem .9rem; border-bottom: 1px solid #d5dae1; text-align: right; }
td:first-child, th:first-child { text-align: left; }
del { background: #ffd7d5; color: #82071e; }
ins { background: #ccf2d4; text-decoration: none; border-bottom: 2px solid #1a7f37; }
pre { background: #f4f6f8; padding: .8rem; overflow-x: auto; }
.text { background: #f4f6f8; padding: .6rem .9rem; margin: .4rem 0; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; } figcaption { color: #57606a; }
svg { max-width: 100%; height: auto; } h2 { margin-top: 2.2rem; }
.wide { overflow-x: auto; font-size: 88%; }
.wide td, .wide th { white-space: nowrap; padding: .3rem .5rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(27rem, 1fr)); gap: 1rem; }
"""
DIFFERENCE_LEGEND = "<p><del>lost</del> <ins>made up</ins> (⏎ stands for a line break)</p>"

# Paul Tol's "muted" colours, distinct for colour-blind readers too. Controls without a memory are
# black and grey in every figure.
COLOURS = (
    "#CC6677",
    "#332288",
    "#999933",
    "#117733",
    "#88CCEE",
    "#882255",
    "#44AA99",
    "#DDCC77",
    "#AA4499",
)
CONTROLS = {
    "full context": "#000000",
    "full context with decoder LoRA": "#555555",
    "no context": "#999999",
}
MARKERS = "osD^vP*Xp<>"  # tell arms apart without colours
MOST_LABELS = 16  # along the x axis
_NO_WIDTH = "\u200b"  # a zero-width space


def table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """An HTML table."""
    cells = ["".join(f"<th>{html.escape(str(c))}</th>" for c in header)]
    cells += ["".join(f"<td>{html.escape(str(c))}</td>" for c in row) for row in rows]
    return f"<table>{''.join(f'<tr>{c}</tr>' for c in cells)}</table>"


def text_table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """The same table as aligned plain text."""
    rows = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = []
    for row in rows:
        lines.append(
            "  ".join(
                c.ljust(w) if i == 0 else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
        )
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def difference(original: str, restored: str) -> str:
    """HTML of the restored text, with words lost struck out and words made up marked.

    Line breaks are compared like words; other white space is not compared. `DIFFERENCE_LEGEND`
    explains the marks.
    """
    a, b = (re.findall(r"\S+|\n", text) for text in (original, restored))
    out = []
    for op, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if op == "equal":
            out.append(_words(a[a0:a1], "<br>"))
            continue
        if a1 > a0:
            out.append(f"<del>{_words(a[a0:a1], '⏎')}</del>")
        if b1 > b0:
            out.append(f"<ins>{_words(b[b0:b1], '⏎<br>')}</ins>")
    return f'<div class="text">{" ".join(out)}</div>'


def _words(words: list[str], line_break: str) -> str:
    return html.escape(" ".join(words)).replace("\n", line_break)


# ---------------------------------------------------------------------------------------- figures
def palette(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name: its own, or where another name has that, the next free one.

    Made of all arms of a page and passed to each figure as `colours`, it gives an arm one colour
    throughout.
    """
    out = {}
    for name in names:
        start = zlib.crc32(name.encode()) % len(COLOURS)
        own = COLOURS[start:] + COLOURS[:start]
        out[name] = CONTROLS.get(name) or next((c for c in own if c not in out.values()), own[0])
    return out


def literal(text: Any) -> str:
    """Escapes a text for matplotlib.

    Two $ would make a formula of what is between them, and legends omit names that begin with _.
    """
    text = str(text).replace("$", r"\$")
    return f"{_NO_WIDTH}{text}" if text.startswith("_") else text


def _unescaped(text: str) -> str:
    """Undoes `literal`."""
    return text.removeprefix(_NO_WIDTH).replace(r"\$", "$")


def curves(
    series: Mapping[str, tuple],
    xlabel: str = "step",
    ylabel: str = "loss (nats per token)",
    log: bool = False,
    title: str | None = None,
    caption: str | None = None,
    colours: Mapping[str, str] | None = None,
) -> str:
    """A line chart as SVG, without intervals. series: `{name: (xs, ys, dashed)}`; else: `lines`."""
    figure, axes = _axes(xlabel, ylabel, title, [x for xs, *_ in series.values() for x in xs])
    colours = colours or palette(series)
    for name, (xs, ys, dashed) in series.items():
        axes.plot(
            xs, ys, "--" if dashed else "-", label=literal(name), linewidth=1.6, color=colours[name]
        )
    return _svg(figure, axes, log, caption)


def lines(
    series: Mapping[str, tuple[Sequence, Estimates]],
    xlabel: str,
    ylabel: str,
    log: bool = False,
    title: str | None = None,
    caption: str | None = None,
    colours: Mapping[str, str] | None = None,
    levels: Mapping[str, Sequence] | None = None,
    log_x: bool = False,
) -> str:
    """Lines with their 95 % bands as SVG; `bars` where there is only one position.

    The same input gives the same bytes.

    Args:
      series: `{name: (xs, estimates)}`.
      xlabel: of the x axis.
      ylabel: of the y axis.
      log: whether the y axis is logarithmic.
      title: stands in the figure.
      caption: stands under it; the SVG then comes inside a <figure>.
      colours: a `palette` shared by several figures.
      levels: estimates by name that hold at every position, such as of controls: dashed.
      log_x: whether the x axis is logarithmic.

    Raises:
      ValueError: a series without exactly one value for each position.
    """
    for name, (xs, estimates) in series.items():
        if len(xs) != len(estimates) or not len(xs):
            raise ValueError(
                f"{name}: {len(xs)} positions and {len(estimates)} values; "
                "give one value for each, and at least one"
            )
    positions = [x for xs, _ in series.values() for x in xs]
    levels = levels or {}
    if len(set(positions)) == 1:
        return bars(
            [f"{positions[0]:g}"],
            {name: e for name, (_, e) in series.items()} | {n: [e] for n, e in levels.items()},
            ylabel,
            xlabel,
            title,
            caption,
            colours,
        )
    figure, axes = _axes(xlabel, ylabel, title, positions)
    colours = colours or palette([*series, *levels])
    for i, (name, (xs, estimates)) in enumerate(series.items()):
        mean, low, high = np.array([e[:3] for e in estimates], float).T
        mark = {
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4.5,
            "markevery": math.ceil(len(xs) / 20),
        }
        axes.plot(xs, mean, label=literal(name), linewidth=1.6, color=colours[name], **mark)
        if len(xs) == 1:  # a band over one position has no width
            _error_bars(axes, xs, mean, low, high, colours[name])
        else:
            axes.fill_between(xs, low, high, color=colours[name], alpha=0.15, linewidth=0)
    for name, (mean, low, high, *_) in levels.items():
        axes.axhline(mean, ls="--", label=literal(name), linewidth=1.6, color=colours[name])
        axes.axhspan(low, high, color=colours[name], alpha=0.1, linewidth=0)
    if log_x:
        _logarithmic(axes, axes.xaxis)
    return _svg(figure, axes, log, caption)


def bars(
    groups: Sequence[str],
    series: Mapping[str, Estimates],
    ylabel: str,
    xlabel: str = "",
    title: str | None = None,
    caption: str | None = None,
    colours: Mapping[str, str] | None = None,
) -> str:
    """Grouped bars from 0 with their 95 % intervals as SVG.

    groups: names along the x axis; of many, only every so many is written. series: an estimate for
    each group by arm. The rest: `lines`.
    """
    figure, axes = _axes(xlabel, ylabel, title)
    colours = colours or palette(series)
    width = 0.84 / max(len(series), 1)
    for i, (arm, estimates) in enumerate(series.items()):
        if len(estimates) != len(groups):
            raise ValueError(
                f"{arm}: {len(estimates)} values for {len(groups)} groups; "
                "give one for each, or None"
            )
        shown_groups = np.flatnonzero([e is not None for e in estimates])
        mean, low, high = np.array([estimates[j][:3] for j in shown_groups], float).reshape(-1, 3).T
        xs = shown_groups + (i - (len(series) - 1) / 2) * width
        axes.bar(xs, mean, width * 0.94, label=literal(arm), color=colours[arm])
        if len(groups) * len(series) <= 60:  # wide enough for a white rim, seen on dark bars
            _error_bars(axes, xs, mean, low, high, "#ffffff", 3.0)
        _error_bars(axes, xs, mean, low, high, "#000000")
    stride = math.ceil(len(groups) / MOST_LABELS)
    shown = [str(g) for g in groups[::stride]]
    # Some 77 characters fit side by side; neighbours share their two places.
    crowded = any((len(a) + len(b)) / 2 + 2 > 77 / len(shown) for a, b in itertools.pairwise(shown))
    turned = {"rotation": 30, "ha": "right"} if crowded else {}
    axes.set_xticks(range(0, len(groups), stride), [literal(name) for name in shown], **turned)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.grid(visible=False, axis="x")
    axes.axhline(0, color="#000000", linewidth=0.8)
    return _svg(figure, axes, False, caption)


def _error_bars(axes, xs, mean, low, high, colour: str, width: float = 1.2) -> None:
    ends = np.stack([mean - low, high - mean]).clip(0)  # percentiles may leave the mean outside
    axes.errorbar(xs, mean, ends, fmt="none", ecolor=colour, elinewidth=width)


def _axes(xlabel: str, ylabel: str, title: str | None, positions: Sequence = ()):
    from matplotlib.figure import Figure  # without pyplot: no global state, no backend

    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    axes.set_xlabel(literal(xlabel))
    axes.set_ylabel(literal(ylabel))
    axes.set_title(literal(title or ""))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=all(float(x).is_integer() for x in positions))
    return figure, axes


def _logarithmic(axes, axis) -> None:
    from matplotlib import ticker

    axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def _svg(figure, axes, log: bool, caption: str | None) -> str:
    """The figure as SVG, inside a <figure> where it has a caption."""
    from matplotlib import rc_context

    if log:
        _logarithmic(axes, axes.yaxis)
    # Beside the data, never on them.
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    buffer = io.StringIO()
    # Text stays text: small, searchable, in the reader's font. A fixed salt and no metadata give
    # the same bytes every time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "icae"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's font has it
        figure.savefig(
            buffer,
            format="svg",
            bbox_inches="tight",
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    svg = buffer.getvalue()
    # Without ids: one page would have the "axes_1" of each figure.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    title, ylabel, xlabel = map(
        _unescaped, (axes.get_title(), axes.get_ylabel(), axes.get_xlabel())
    )
    names = [_unescaped(name) for name in axes.get_legend_handles_labels()[1]]
    what = " ".join(t for t in (title, ylabel, xlabel and f"by {xlabel}") if t)
    svg = svg.replace(
        "<svg ",
        f'<svg role="img" aria-label="{html.escape(what)}: {html.escape(", ".join(names))}" ',
        1,
    )
    return (
        f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" if caption else svg
    )


def write(path: str | os.PathLike, title: str, fragments: Iterable[str]) -> None:
    """Writes a page of HTML fragments."""
    title, body = html.escape(title), "\n".join(fragments)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    page = f'<!doctype html><html lang="en">{head}<body><h1>{title}</h1>\n{body}\n</body></html>\n'
    with files.replacing_file(path) as tmp:
        tmp.write_text(page, encoding="utf-8")
