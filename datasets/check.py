"""The former place of datasets.tools.check, for those who type it from memory."""

raise SystemExit("error: datasets.check has moved: use python -m datasets.tools.check")
