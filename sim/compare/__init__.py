"""Simulated runs beside real ones: how far off each metric is, against how far real runs are from each other, and whether
simulation puts policies in the order that reality does. `python -m sim.compare REAL SIM`."""
