"""One self-contained HTML page: tables, figures, and restored texts with their differences marked."""

import difflib
import html
import io

from icae_jax.interop import files

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .9rem; border-bottom: 1px solid #d5dae1; text-align: right; }
td:first-child, th:first-child { text-align: left; } del { background: #ffd7d5; } ins { background: #ccf2d4; text-decoration: none; }
pre { background: #f4f6f8; padding: .8rem; overflow-x: auto; } .text { background: #f4f6f8; padding: .6rem .9rem; margin: .4rem 0; }
svg { max-width: 100%; height: auto; } h2 { margin-top: 2.2rem; }
"""


def table(header, rows):
    """An HTML table of cells as they are given (numbers formatted by the caller)."""
    cells = ["".join(f"<th>{html.escape(str(c))}</th>" for c in header)]
    cells += ["".join(f"<td>{html.escape(str(c))}</td>" for c in row) for row in rows]
    return f"<table>{''.join(f'<tr>{c}</tr>' for c in cells)}</table>"


def text_table(header, rows):
    """The same table as aligned plain text."""
    rows = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = []
    for row in rows:
        lines.append("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def difference(original, restored):
    """The restored text word by word against the original: what was lost struck out, what was made up marked."""
    a, b, out = original.split(), restored.split(), []
    for op, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if op == "equal":
            out.append(html.escape(" ".join(a[a0:a1])))
            continue
        if a1 > a0:
            out.append(f"<del>{html.escape(' '.join(a[a0:a1]))}</del>")
        if b1 > b0:
            out.append(f"<ins>{html.escape(' '.join(b[b0:b1]))}</ins>")
    return f'<div class="text">{" ".join(out)}</div>'


def curves(series, xlabel="step", ylabel="loss (nats per token)", log=False):
    """An SVG line chart. series: `{name: (xs, ys, dashed)}`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for name, (xs, ys, dashed) in series.items():
        axes.plot(xs, ys, "--" if dashed else "-", label=name, linewidth=1.4)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def write(path, title, parts):
    """Writes the page. parts: HTML fragments in order."""
    body = "\n".join(parts)
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    with files.replacing_file(path) as tmp:
        tmp.write_text(f"{page}<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n", encoding="utf-8")
