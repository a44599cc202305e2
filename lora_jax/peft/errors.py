"""The one error of this package."""


class PeftError(ValueError):
    """A PEFT adapter that cannot be read, written or represented; names the file and the key."""
