"""The error classes for reading and writing adapters."""


class AdapterError(ValueError):
    """An adapter folder cannot be written or read, or does not match the tree."""


class DamagedAdapterError(AdapterError):
    """An adapter folder lacks files, or its files have other contents than were written."""
