"""The error that reading and writing adapters raise."""


class AdapterError(ValueError):
    """An adapter folder that can't be written or read, or does not belong to the tree."""
