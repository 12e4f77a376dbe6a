"""Calibration: constants of a framework on a kind of cluster, from runs and from measured steps."""
