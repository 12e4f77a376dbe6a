"""Layouts, estimated, the best simulated, ranked and explained: a plan."""
