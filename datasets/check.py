"""The former place of datasets.tools.check, for those who type it from memory."""

raise SystemExit(
    "error: datasets.check has moved: use datasets.tools.check, e.g. python -m datasets.tools.check --help"
)
