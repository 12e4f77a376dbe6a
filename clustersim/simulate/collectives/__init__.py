"""Collectives as phases of flows on links: one file for each way to route them, and one collective on its own."""
