"""What a run of the bench measured, as a page that needs no other file."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from dropgen_fast.bench.report import Row
from dropgen_fast.page import document, picture


def page(title: str, facts: Mapping[str, Any], screens: Mapping[str, str], pictures: Mapping[str, bytes],
         rows: Sequence[Row]) -> str:
    """The page.

    Args:
        title: of the page.
        facts: of the machine and the software.
        screens: by suite what it printed.
        pictures: by caption, PNG.
        rows: all that were made.
    """
    told = ", ".join(f"{name} {facts[name]}" for name in ("dropgen_fast", "torch", "triton", "cuda", "driver") if facts[name])
    parts = [f"<h1>{html.escape(title)}</h1>",
             f'<p class="run">{html.escape(str(facts["device"]))} · {facts["threads"]} threads · {html.escape(told)} · commit '
             f'{html.escape(str(facts["commit"])[:12])} · {html.escape(str(facts["date"]))}</p>']
    for caption, png in pictures.items():
        parts += [f"<h2>{html.escape(caption)}</h2>", f'<div class="card">{picture(png, caption)}</div>']
    for suite, text in screens.items():
        parts += [f"<h2>{html.escape(suite)}</h2>", f"<pre>{html.escape(text)}</pre>"]
    parts += ["<h2>Rows</h2>", f'<div class="card">{_table(rows)}</div>']
    return document(title, "\n".join(parts), STYLE)


STYLE = """
pre { font-size: 12px; white-space: pre; overflow-x: auto; }
img.chart { max-width: 100%; }
"""


def _table(rows: Sequence[Row]) -> str:
    lines = "".join(f'<tr><th scope="row">{html.escape(row["name"])}</th><td>{row["value"]:.4g}</td><td>{row["low"]:.4g}</td>'
                    f'<td>{row["high"]:.4g}</td><td>{html.escape(row["unit"])}</td></tr>' for row in rows)
    return ('<table class="numbers"><thead><tr><th>row</th><th>median</th><th>lower quartile</th><th>upper</th><th>unit</th></tr>'
            f"</thead><tbody>{lines}</tbody></table>")
