"""One module for each engine, run as `python -m benchmarks.engines.<name>`; each is a `child.Handler`."""
