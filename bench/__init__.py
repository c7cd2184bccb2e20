"""Benchmarks: every op and the model against the peers and ceilings of the same run. ``python -m bench --help``."""
