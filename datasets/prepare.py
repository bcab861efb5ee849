"""The former place of datasets.tools.prepare, for those who type it from memory."""

raise SystemExit(
    "error: datasets.prepare has moved: use datasets.tools.prepare, e.g. python -m datasets.tools.prepare --help"
)
