"""The error of everything that reads weights."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and the remedy."""
