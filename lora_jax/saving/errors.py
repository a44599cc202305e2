"""The error class for reading and writing adapters."""


class AdapterError(ValueError):
    """An adapter folder cannot be written or read, or does not match the tree."""
