"""Honest numbers from predictions.csv: intervals, baselines, groups, anticipation, calibration, comparisons.

    python -m engine.report [NAME=]A/predictions.csv [[NAME=]B/predictions.csv ...] [--same_clips] [--out DIR]

prints the report and writes report.json and report.html. `write_report` does the same for a program.
"""

import sys

from utils.exits import report_uncaught

if sys.argv[:1] == ["-m"]:  # its command starts, of which this is the first file
    report_uncaught()

from engine.report.build import Options, make_report, save_report, write_report
from engine.report.frames import ScoresError, read_frames
from engine.report.lists import clip_hash, clip_list

__all__ = [
    "Options",
    "ScoresError",
    "clip_hash",
    "clip_list",
    "make_report",
    "read_frames",
    "save_report",
    "write_report",
]
