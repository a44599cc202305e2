"""Encrypts exports for given recipients with age (https://age-encryption.org/v1)."""

from collections.abc import Sequence
from pathlib import Path

import pyrage

from train.serve.protocol.requests import RequestError

SUFFIX = ".age"
_MAX_RECIPIENTS = 10


def check_recipients(recipients: Sequence[object]) -> tuple[str, ...]:
    """Returns the public keys of age or SSH unchanged, after checking them.

    Raises:
      RequestError: one is none, or there are too many.
    """
    if len(recipients) > _MAX_RECIPIENTS:
        raise RequestError(
            f"age_encryption_recipients has more than {_MAX_RECIPIENTS} public keys. Pass at most "
            f"{_MAX_RECIPIENTS}."
        )
    keys: list[str] = []
    for number, recipient in enumerate(recipients, 1):
        try:
            if not isinstance(recipient, str):
                raise TypeError("it is no text")
            _public_key(recipient)
            keys.append(recipient)
        except (TypeError, pyrage.RecipientError) as error:
            raise RequestError(
                f"Entry {number} of age_encryption_recipients is not a public key ({error}). Pass "
                "a public key of age (age1…) or of SSH."
            ) from None
    return tuple(keys)


def encrypt(folder: Path, recipients: Sequence[str]) -> None:
    """Encrypts each file of a folder, and adds ``.age`` to its name."""
    keys = [_public_key(recipient) for recipient in recipients]
    for path in sorted(folder.iterdir()):
        pyrage.encrypt_file(str(path), f"{path}{SUFFIX}", keys)
        path.unlink()


def _public_key(recipient: str) -> pyrage.x25519.Recipient | pyrage.ssh.Recipient:
    kind = pyrage.x25519 if recipient.startswith("age1") else pyrage.ssh
    return kind.Recipient.from_str(recipient)
