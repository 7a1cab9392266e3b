"""`python -m experiments.fidelity --measured FILE --workloads FILE --out DIR`: how well the shipped profiles of the paper's
GPUs predict what the paper measured, row by row; and, with `--fit`, how those profiles are made.

    hardware    devices and models as numbers, and a latency profile from them and a few efficiencies
    measured    the file of measurements: its rows, and which of them are fitted
    prototype   the prototype's engines, and one simulated run on them
    scenarios   what the real simulator runs for a row, and what it reads off the run
    fitting     the efficiencies, from the fitted rows
    report      the table of rows, the table by figure and system, a picture

No constant belongs to a figure: a profile has one set for its model, device and attention function.
"""
