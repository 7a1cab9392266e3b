"""Puts sections into one HTML file that needs nothing beside it: figures are inlined as SVG, there is no script."""

from __future__ import annotations

import html
import io
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
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
figcaption, .lead { color: #555; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.8rem; text-align: right; border-bottom: 1px solid #e5e5e5; } th { border-bottom: 2px solid #999; }
th:first-child, td:first-child { text-align: left; }
details { margin: 0.5rem 0; } pre { white-space: pre-wrap; background: #f6f6f4; padding: 0.7rem; font-size: 0.85rem; }
"""  # noqa: E501


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in this order: text (a paragraph each), figures with captions, tables, and
    longer texts that are folded away under their names."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[tuple[Figure, str]] = ()
    tables: Sequence[pd.DataFrame] = ()
    folded: Sequence[tuple[str, str]] = ()


def write_report(path: str | Path, sections: Sequence[Section], *, title: str = "Parrot testbed", lead: str = "") -> Path:
    """Writes the sections to `path`, whose folder is made when it is missing. Equal figures give equal bytes."""
    target = Path(path)
    body = [f"<h1>{html.escape(title)}</h1>"]
    if lead:
        body.append(f'<p class="lead">{html.escape(lead)}</p>')
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
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text]
    for index, (figure, caption) in enumerate(section.figures):
        drawing = _svg(figure, f"s{number}f{index}")
        caption = html.escape(caption)
        parts.append(f'<figure role="img" aria-label="{caption}">{drawing}<figcaption>{caption}</figcaption></figure>')
    parts += [table.to_html(index=False, border=0, na_rep="–", float_format=_number) for table in section.tables]
    for name, content in section.folded:
        parts.append(f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(content)}</pre></details>")
    return parts


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:#.3g}"


def _svg(figure: Figure, salt: str) -> str:
    """The figure's SVG element. `salt` keeps the ids of several figures in one page apart, and the same in every run."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    # matplotlib names groups and glyphs alike in every figure; one page has several, so all names get the salt.
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{salt}-", drawing)
