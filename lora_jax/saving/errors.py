"""The error that reading and writing adapters raise."""


class AdapterError(ValueError):
    """An adapter folder cannot be written or read, or does not belong to the tree."""
