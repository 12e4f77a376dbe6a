"""Closed forms over arrays of layouts."""
