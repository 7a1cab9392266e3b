"""The example of docs/analysis.md is what a core makes of it."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_guide_shows_what_the_core_deduces() -> None:
    script = runpy.run_path(str(DOCS / "images" / "analysis.py"))
    assert script["table"](script["analysed"]()) in (DOCS / "analysis.md").read_text()
