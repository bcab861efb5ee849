"""Measurements beside the tests, each `python -m benchmarks.<name>`; --help says what it measures."""

import sys

from utils.exits import report_uncaught

if sys.argv[:1] == ["-m"]:  # one of its commands starts, of which this is the first file
    report_uncaught()
