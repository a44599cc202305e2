"""The chat template that takes the place of a model's own: a Jinja file, and that of an adapter."""

from lora_jax.buckets.copies import readable
from lora_jax.training.data.templates import check_template
from lora_jax.training.errors import TrainingError
from train.console.errors import UserError, as_user_errors


def read_template(path: str, given: str | None = None) -> str:
    """Reads a chat template.

    Args:
      path: the file, which may lie in a bucket (gs://).
      given: the option that names it, for messages; by default --chat-template.

    Raises:
      UserError: the file cannot be read, or is no template of chats.
    """
    given = given or f"--chat-template {path}"
    try:
        text = readable(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{given}: the template cannot be read: {error.strerror or error}. Name a file of "
            "Jinja, such as a model's chat_template.jinja"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{given}: the template is not UTF-8 text ({error})") from error
    with as_user_errors(TrainingError, prefix=f"{given}: "):
        check_template(text)
    return text
