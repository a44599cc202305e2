"""Reads a chat template that replaces the model's own, from a Jinja file or an adapter's folder."""

from lora_jax.buckets.copies import path_to_read
from lora_jax.training.data.templates import check_template
from lora_jax.training.errors import TrainingError
from train.console.errors import UserError, as_user_errors


def read_template(path: str, option: str | None = None) -> str:
    """Reads a chat template.

    Args:
      path: the file, which may lie in a bucket (gs://).
      option: the option that names it, for messages; by default --chat-template.

    Raises:
      UserError: the file cannot be read, or is no template of chats.
    """
    option_text = option or f"--chat-template {path}"
    try:
        text = path_to_read(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{option_text}: The template cannot be read ({error.strerror or error}). Name a Jinja "
            "file, such as a model's chat_template.jinja."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option_text}: The template is not UTF-8 text ({error}). Save the file as UTF-8."
        ) from error
    with as_user_errors(TrainingError, prefix=f"{option_text}: "):
        check_template(text)
    return text
