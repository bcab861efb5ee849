"""Measurements beside the tests, each `python -m benchmarks.<name>`; --help says what it measures."""
