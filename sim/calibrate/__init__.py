"""`python -m sim.calibrate TRACE… --out PROFILE`: fits a latency profile to the iteration logs of real engines.

Decides the coefficients of parrot.latency's model, and nothing else: no number of a profile comes from anywhere but the
logs (docs/iteration-log.md). What tells the error is whole runs at loads that were not fitted (`split`), and every run in
turn predicted by a fit that has not seen its load (`spread`). The request logs of engines behind remote endpoints are told by
their headers, and make a remote profile (`remote_fitting`).
"""

from __future__ import annotations

from sim.calibrate.fitting import describe, fit, write_profile
from sim.calibrate.logs import CalibrationError, Run, read_log, read_logs
from sim.calibrate.remote_fitting import describe_remote, fit_remote
from sim.calibrate.request_logs import RemoteRun, read_request_log, read_request_logs
from sim.calibrate.split import hold_out_by_load

__all__ = [
    "CalibrationError", "RemoteRun", "Run", "describe", "describe_remote", "fit", "fit_remote", "hold_out_by_load", "read_log",
    "read_logs", "read_request_log", "read_request_logs", "write_profile",
]  # fmt: skip
