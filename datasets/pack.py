"""The former place of datasets.tools.pack, for those who type it from memory."""

raise SystemExit("error: datasets.pack has moved: use datasets.tools.pack, e.g. python -m datasets.tools.pack --help")
