"""What any global-scheduler policy must hold, and the random programs and engines under which it is tried.

`play` does what clients and engines do to a core, `script` draws what they do from a seed, `laws` must hold after every
instant, `watch` stands between the core and the policy, `suite` runs an example and finds the shortest that fails.
`python -m sim.check_policy` is the command; tests/properties plays the same under Hypothesis.
"""
