"""The former place of datasets.tools.pack, for those who type it from memory."""

raise SystemExit("error: datasets.pack has moved: use python -m datasets.tools.pack")
