"""Self-contained HTML pages, and the charts in them: what a run, the demonstration and the bench have in common."""

from __future__ import annotations

import base64
import html
import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT = "#1c2733", "#d9dee4"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#8A8F98", "#B8A800")
"""Okabe and Ito's, in which grey stands for black; told apart with every common kind of colour vision."""

STYLE = """
:root { color: #1c2733; background: #f6f7f9; font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
body { margin: 0 auto; max-width: 1120px; padding: 40px 32px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 4px; }
p { margin: 6px 0 14px; max-width: 92ch; }
.run, .note, figcaption { color: #55616e; font-size: 14.5px; }
.lead { font-size: 19px; line-height: 1.5; border-left: 4px solid #0072b2; padding: 4px 0 4px 18px; margin: 24px 0; }
.warning { background: #fff4dc; border: 1px solid #e5c37a; border-radius: 8px; padding: 10px 16px; max-width: none; }
.card { background: #fff; border: 1px solid #e2e6eb; border-radius: 10px; padding: 18px 20px; margin: 14px 0; overflow-x: auto; }
img.chart { display: block; width: 100%; max-width: 940px; margin: 0 auto; }
table.numbers { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
.numbers th, .numbers td { padding: 7px 7px; text-align: right; border-bottom: 1px solid #e8ebef; }
.numbers th:first-child { text-align: left; white-space: nowrap; }
.numbers thead th { color: #55616e; font-weight: 600; border-bottom: 2px solid #cfd6dd; }
pre { background: #fff; border: 1px solid #e2e6eb; border-radius: 10px; padding: 14px 18px; font-size: 13px;
      white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def document(title: str, body: str, style: str = "") -> str:
    """A whole page that needs no other file; `style` is CSS beyond `STYLE`."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def picture(png: bytes, alt: str, kind: str = "chart") -> str:
    """An image within the page; `kind` is its CSS class."""
    return f'<img class="{kind}" alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def to_png(figure: Figure, dpi: int = 170) -> bytes:
    """A figure as PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def plain_axes(axes: Axes) -> None:
    """Take away what a chart can do without."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8a949e")
    axes.tick_params(colors=INK, length=3)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
