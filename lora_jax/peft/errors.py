"""The error class of this package."""


class PeftError(ValueError):
    """A PEFT adapter cannot be read, written or represented; names the file and the key."""
