"""Applications' own code as a workload: a program written with `P`, unmodified, many instances of it, on either backend.

`simulate_programs` and `run_programs` carry out a run of a specification that names a program.
"""
