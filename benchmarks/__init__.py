"""Measurements of the service and of its peers on the machine at hand: `python -m benchmarks`."""
