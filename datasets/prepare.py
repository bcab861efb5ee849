"""The former place of datasets.tools.prepare, for those who type it from memory."""

raise SystemExit("error: datasets.prepare has moved: use python -m datasets.tools.prepare")
