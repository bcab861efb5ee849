"""Commands beside training: check, pack, prepare and synthetic, each `python -m datasets.tools.<name>`."""
