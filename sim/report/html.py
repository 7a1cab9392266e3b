"""Puts sections into one HTML file that needs nothing beside it: figures are inlined as SVG, there is no script."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; overflow-wrap: anywhere; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
nav { font-size: 0.9rem; margin: 1rem 0; } nav a { margin-right: 1.1rem; white-space: nowrap; }
a { color: #0b5394; text-decoration: none; } a:hover { text-decoration: underline; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
figcaption, .lead { color: #555; }
.table { overflow-x: auto; } .warning { background: #fff4e0; border-left: 4px solid #e69f00; padding: 0.5rem 0.8rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: 0.85rem; }
th, td { padding: 0.25rem 0.5rem; text-align: right; border-bottom: 1px solid #e5e5e5; } th { border-bottom: 2px solid #999; vertical-align: bottom; }
td { white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
.facts th { border-bottom: 1px solid #e5e5e5; vertical-align: top; font-weight: 600; white-space: nowrap; } .facts td { text-align: left; white-space: normal; }
details { margin: 0.5rem 0; } pre { white-space: pre-wrap; background: #f6f6f4; padding: 0.7rem; font-size: 0.85rem; }
"""  # noqa: E501


FULL_WIDTH_IN, FULL_WIDTH_PX = 9.0, 1000  #: a figure so wide fills the page; a narrower one is drawn at the same scale


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in this order: warnings, text (a paragraph each), facts (name, what it is), figures
    with captions, tables, longer texts or tables that are folded away under their names, and links (name, address)."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[tuple[Figure, str]] = ()
    tables: Sequence[pd.DataFrame] = ()
    folded: Sequence[tuple[str, str | pd.DataFrame]] = ()
    warnings: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    links: Sequence[tuple[str, str]] = ()


def write_report(
    path: str | Path, sections: Sequence[Section], *, title: str = "Parrot testbed", lead: str = "", contents: bool = False
) -> Path:
    """Writes the sections to `path`, whose folder is made when it is missing. Equal figures give equal bytes.

    contents: links to the sections below the title.
    """
    target = Path(path)
    body = [f"<h1>{html.escape(title)}</h1>"]
    if lead:
        body.append(f'<p class="lead">{html.escape(lead)}</p>')
    if contents:
        links = (f'<a href="#s{number}">{html.escape(section.title)}</a>' for number, section in enumerate(sections))
        body.append(f"<nav>{chr(10).join(links)}</nav>")
    for number, section in enumerate(sections):
        body += _section(section, number)
    page = (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _section(section: Section, number: int) -> list[str]:
    parts = [f'<section id="s{number}">', f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f'<p class="warning">{html.escape(warning)}</p>' for warning in section.warnings]
    parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text]
    if section.facts:
        rows = "\n".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(fact)}</td></tr>" for name, fact in section.facts)
        parts.append(f'<table class="facts">{rows}</table>')
    for index, (figure, caption) in enumerate(section.figures):
        drawing = _svg(figure, f"s{number}f{index}")
        caption = html.escape(caption)
        parts.append(f'<figure role="img" aria-label="{caption}">{drawing}<figcaption>{caption}</figcaption></figure>')
    parts += [_table(table) for table in section.tables]
    for name, content in section.folded:
        inside = f"<pre>{html.escape(content)}</pre>" if isinstance(content, str) else _table(content)
        parts.append(f"<details><summary>{html.escape(name)}</summary>{inside}</details>")
    parts += [f'<p><a href="{html.escape(address)}">{html.escape(name)}</a></p>' for name, address in section.links]
    return [*parts, "</section>"]


def _table(table: pd.DataFrame) -> str:
    return f'<div class="table">{table.to_html(index=False, border=0, na_rep="–", float_format=format_number)}</div>'


def format_number(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:#.3g}"


def format_interval(mean: float, low: float | None, high: float | None) -> str:
    """Mean ± half of an interval around it, to the second significant digit of that half; "–" for a mean that is null."""
    if mean is None or math.isnan(mean):
        return "–"
    if low is None or high is None or math.isnan(low):
        return format_number(mean)
    half = (high - low) / 2
    if half <= 1e-9 * abs(mean):
        return f"{format_number(mean)} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return f"{mean:,.{decimals}f} ± {half:,.{decimals}f}"


def _svg(figure: Figure, salt: str) -> str:
    """The figure's SVG element. `salt` keeps the ids of several figures in one page apart, and the same in every run."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    width_px = round(figure.get_figwidth() * FULL_WIDTH_PX / FULL_WIDTH_IN)
    drawing = f'<svg style="max-width: {width_px}px"{drawing[drawing.index("<svg") + 4 :]}'
    # matplotlib names groups and glyphs alike in every figure; one page has several, so all names get the salt.
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{salt}-", drawing)
