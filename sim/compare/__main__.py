"""The command `python -m sim.compare`: real runs beside simulated ones.

One JSON document on stdout, a short table on stderr, a page in the folder of --out. Exit status: 0 done, 1 refused (one line on
stderr says why), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sim.compare.comparing import compare
from sim.compare.document import Comparison, encode
from sim.compare.matching import CompareError, match_folders
from sim.compare.page import interval_text, named, percent, plain, write_page
from sim.compare.resampling import Bootstrap
from sim.results import ResultsError

PAGE = "compare.html"
WIDTH = 160  #: columns of the tables where stderr is no terminal
SHOWN_ORDERS = (("jct_s", "mean"), ("jct_s", "p99"), ("ttft_s", "mean"))  #: on the terminal; the document has all


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sim.compare",
        description="Compare the results of simulated runs with those of real ones: errors by metric, the order of policies.",
        epilog="Both are folders that sim.run wrote (--out). docs/comparison.md says what the numbers mean.",
    )
    p.add_argument("real", metavar="REAL", help="results of --backend real or emulated")
    p.add_argument("simulated", metavar="SIM", help="results of --backend sim")
    p.add_argument("--out", metavar="DIR", help=f"folder of {PAGE} (compare, beside REAL)")
    p.add_argument("--anyway", action="store_true", help="compare in spite of what would be refused; it is listed instead")
    p.add_argument("--draws", type=int, default=1000, metavar="N", help="bootstrap draws of an interval (%(default)s)")
    p.add_argument("--confidence", type=float, default=0.95, metavar="C", help="of the intervals (%(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (%(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parser().parse_args(argv)
    if arguments.draws < 100 or not 0.0 < arguments.confidence < 1.0 or arguments.seed < 0:
        parser().error("--draws is 100 or more, --confidence between 0 and 1, --seed 0 or more")
    out = Path(arguments.out) if arguments.out is not None else Path(arguments.real).resolve().parent / "compare"
    try:
        out.mkdir(parents=True, exist_ok=True)
        matched = match_folders(arguments.real, arguments.simulated, anyway=arguments.anyway)
        compared = compare(matched, Bootstrap(arguments.draws, arguments.seed, arguments.confidence))
        page = write_page(out / PAGE, compared)
    except (CompareError, ResultsError) as error:
        print(f"sim.compare: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"sim.compare: --out {out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(encode(compared.document), flush=True)
    console = Console(stderr=True)
    _show(compared.document, page, console if console.is_terminal else Console(stderr=True, width=WIDTH))
    return 0


def _show(document: Comparison, page: Path, console: Console) -> None:
    table = Table(title=f"error over {len(document.cells)} cells (simulated / real − 1)", title_justify="left")
    for name in ("metric", "mean size", "worst", "floor", "interval contains 0"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for row in document.overall:
        table.add_row(
            named(row.metric, row.statistic),
            percent(row.mean_error),
            percent(row.worst_error),
            percent(row.mean_floor),
            f"{row.interval_contains_0} of {row.with_interval}" if row.with_interval else "–",
        )
    console.print(table)
    shown = [r for r in document.rankings if (r.metric, r.statistic) in SHOWN_ORDERS]
    if shown:
        orders = Table(title="order of the choices", title_justify="left")
        for name in ("condition", "by", "τ", "τ floor", "τ without ties", "simulation picks", "regret", "regret floor"):
            orders.add_column(name, justify="left" if name in ("condition", "by", "simulation picks") else "right")
        for ranking in shown:
            orders.add_row(
                ranking.condition or "–",
                named(ranking.metric, ranking.statistic),
                plain(ranking.tau),
                plain(ranking.floor_tau),
                plain(ranking.clear_tau),
                " or ".join(ranking.picked),
                percent(ranking.regret) + interval_text(ranking.regret_interval),
                percent(ranking.floor_regret),
            )
        console.print(orders)
    for warning in document.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    for unmatched in document.unmatched:
        console.print(f"not compared: {unmatched.cell}: only {unmatched.side}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
