"""`python -m sim.calibrate TRACE… --out PROFILE`: fits a latency profile to the iteration logs of real engines.

Decides the coefficients of parrot.latency's model, and nothing else: no number of a profile comes from anywhere but the
logs (docs/iteration-log.md). What tells the error is whole runs at loads that were not fitted (`split`), and every run in
turn predicted by a fit that has not seen its load (`spread`).
"""

from __future__ import annotations

from sim.calibrate.fitting import describe, fit, write_profile
from sim.calibrate.logs import CalibrationError, Run, read_log, read_logs
from sim.calibrate.split import hold_out_by_load

__all__ = ["CalibrationError", "Run", "describe", "fit", "hold_out_by_load", "read_log", "read_logs", "write_profile"]
