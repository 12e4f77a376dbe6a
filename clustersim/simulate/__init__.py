"""The interpreter on a clock: folding, network sharing, collectives, the SimPy engine."""
