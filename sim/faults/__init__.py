"""Simulation testing: the whole system in one SimPy run from one seed, with everything going wrong. See docs/faults.md."""
