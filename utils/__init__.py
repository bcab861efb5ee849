"""Plumbing below everything else: command line, processes, logs, files."""
