"""`python -m experiments.paper --measured FILE --workloads FILE --azure FILE --out DIR`: the paper's comparisons in simulation.

Parrot against a client that runs its program itself, on the shipped profiles of the paper's GPUs: how many times faster,
beside how many times faster the paper measured it to be. Times are compared by `experiments.fidelity`, whose runs these are.

    pairs       which two systems are compared by which metric, and what of it the file of measurements does not have
    scenarios   the two figures that it has no rows of: chains among other requests, and map-reduce
    ratios      every run, and from them the ratios with their intervals
    report      the tables and the picture

No constant belongs to a figure but what the paper or its artifact set for it.
"""
