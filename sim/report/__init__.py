"""What a sweep showed, as one HTML file (`write_report`), and a run as a Perfetto trace (`sim.report.perfetto`).

Decides how results look, and never what they are. `sim.report.html` makes such a page of any sections.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["write_report"]


def write_report(folder: str | Path, objectives: Mapping[str, float] | None = None) -> Path:
    """See `sim.report.page.write_report`."""
    from sim.report import page  # matplotlib, which a worker that writes traces can do without

    return page.write_report(folder, objectives)
