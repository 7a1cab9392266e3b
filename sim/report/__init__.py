"""One self-contained HTML file of plots, tables and text. Decides how results look, and never what they are."""

from sim.report.html import Section, write_report

__all__ = ["Section", "write_report"]
