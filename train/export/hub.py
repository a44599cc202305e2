"""Uploads an export to the Hugging Face hub, after checking that the upload is allowed."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from lora_jax.core.types import Fields
from train.console.errors import UserError
from train.export.card import is_generated

README = "README.md"
_TIMEOUT_SECONDS = 30.0  # for a question to the hub before the work
_OLD_WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]  # of an earlier export
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access."
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Repository:
    """A model's repository on the hub that the user may write to.

    Attributes:
      name: owner/name.
      private: whether a new repository is made private.
      exists: whether the repository exists already.
      has_own_card: whether it has a README.md that somebody wrote or edited.
    """

    name: str
    private: bool
    exists: bool = False
    has_own_card: bool = False


def find_repository(name: str, *, private: bool, overwrite: bool) -> Repository:
    """Asks the hub whether the user may write to a repository, and returns the repository.

    Args:
      name: owner/name, or the name alone of a repository of the user.
      private: the option --private.
      overwrite: accept a repository that exists.

    Raises:
      UserError: there is no token, the hub does not answer, or the name is taken.
    """
    option = f"--push-to-hub {name}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{option}: This is not a name on the hub ({_summarize_error(error)}). Use a name such "
            "as owner/name."
        ) from error
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{option}: The hub cannot be asked, because HF_HUB_OFFLINE is set. Unset it."
        )
    if huggingface_hub.get_token() is None:
        raise UserError(f"{option}: There is no token for the hub. {_LOG_IN}")
    api = huggingface_hub.HfApi()
    user_info = _ask_hub(option, api.whoami)
    owner, _, short_name = name.rpartition("/")
    name = f"{owner or user_info['name']}/{short_name}"
    _check_write_access(option, owner, user_info)
    try:
        info = _ask_hub(option, lambda: api.model_info(name))
    except RepositoryNotFoundError:
        return Repository(name, private)
    if not overwrite:
        raise UserError(
            f"{option}: The hub has {name} already. Choose another name, or replace its weights "
            "with --overwrite."
        )
    if private and not info.private:
        raise UserError(
            f"{option}: {name} is public, and --private works for new repositories only. Make it "
            f"private in its settings ({api.endpoint}/{name}/settings), or remove --private."
        )
    has_own_card = False
    if any(file.rfilename == README for file in info.siblings or ()):
        path = _ask_hub(option, lambda: api.hf_hub_download(name, README))
        has_own_card = not is_generated(Path(path).read_text(encoding="utf-8"))
    return Repository(name, private, exists=True, has_own_card=has_own_card)


def push_folder(repository: Repository, folder: Path, remedy: str) -> str:
    """Uploads a folder in one commit, or in a few commits if the folder is large.

    The weights of an earlier export are deleted. A README.md that somebody wrote on the hub stays.

    Args:
      repository: see `find_repository`.
      folder: the folder of the export.
      remedy: an instruction for an upload that fails, as a sentence.

    Returns:
      The address of the repository's page.

    Raises:
      UserError: the hub refuses the upload, or cannot be reached any more.
    """
    api = huggingface_hub.HfApi()
    try:
        private = repository.private or None  # None: the owner's settings decide
        api.create_repo(repository.name, exist_ok=repository.exists, private=private)
        api.upload_folder(
            repo_id=repository.name,
            folder_path=folder,
            commit_message="Upload an export of lora_jax",
            ignore_patterns=[README] if repository.has_own_card else None,
            delete_patterns=_OLD_WEIGHT_PATTERNS if repository.exists else None,
        )
    except Exception as error:  # the layers below raise many classes
        raise UserError(
            f"--push-to-hub {repository.name}: The upload failed ({_summarize_error(error)}). "
            f"{remedy}"
        ) from error
    return f"{api.endpoint}/{repository.name}"


def _check_write_access(option: str, owner: str, user_info: Fields) -> None:
    """Raises a UserError if the token's user cannot write to the owner's repositories.

    Args:
      option: the option that names the repository, for messages.
      owner: the owner of the repository; "" for the user.
      user_info: the hub's answer on the token's user.
    """
    token = (user_info.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError(f"{option}: The token has read access only. {_LOG_IN}")
    user = user_info["name"]
    writable_owners = [user]
    for organization in user_info.get("orgs") or ():
        if organization.get("roleInOrg") != "read":
            writable_owners.append(organization["name"])
    if owner == "" or owner in writable_owners:
        return
    raise UserError(
        f"{option}: The token of {user} cannot write to {owner}. It can write to "
        f"{', '.join(writable_owners)}. Choose one of these owners, or log in as another user."
    )


def _ask_hub(option: str, ask: Callable[[], _T]) -> _T:
    """Returns the hub's answer. Asks in a separate thread, because resolving a host may hang.

    Raises:
      UserError: there is no answer in time, or the token is refused.
      RepositoryNotFoundError: there is no such repository.
    """
    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answer.result(_TIMEOUT_SECONDS)
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, RepositoryNotFoundError) and status == 404:
            raise
        if status in (401, 403):
            raise UserError(
                f"{option}: The hub does not accept the token ({_summarize_error(error)}). "
                f"{_LOG_IN}"
            ) from error
        reason = f"no answer within {_TIMEOUT_SECONDS:g} seconds"
        if answer.done():
            reason = _summarize_error(error)
        raise UserError(
            f"{option}: The hub, {huggingface_hub.constants.ENDPOINT}, cannot be reached "
            f"({reason}). Export without --push-to-hub, and upload the folder later with `hf "
            "upload`."
        ) from error


def _summarize_error(error: Exception) -> str:
    """Returns the first two lines of an error's message and of its cause's, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    cause = error.__cause__
    return f"{text} {_summarize_error(cause)}" if isinstance(cause, Exception) else text
