"""The former place of datasets.tools.synthetic, for those who type it from memory."""

raise SystemExit("error: datasets.synthetic has moved: use python -m datasets.tools.synthetic")
