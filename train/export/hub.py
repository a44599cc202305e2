"""Uploads an export to the Hugging Face hub; checks before long work that it may."""

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
_SECONDS = 30.0  # for the questions before the work
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]  # of an earlier export
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Repository:
    """A model's repository on the hub that may be written.

    Attributes:
      name: owner/name.
      private: whether it is to be made private.
      exists: whether it is there.
      has_own_card: whether it has a README.md that somebody wrote or edited.
    """

    name: str
    private: bool
    exists: bool = False
    has_own_card: bool = False


def find_repository(name: str, *, private: bool, overwrite: bool) -> Repository:
    """Returns the repository of a name, once the hub has said that it may be written.

    Args:
      name: owner/name, or a name of the user's own.
      private: the option --private.
      overwrite: accept one that is there.

    Raises:
      UserError: there is no token, the hub does not answer, or the name is taken.
    """
    given = f"--push-to-hub {name}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{given}: a name on the hub is needed, such as owner/name ({_line(error)})"
        ) from error
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(f"{given}: HF_HUB_OFFLINE is set, so the hub is not asked: unset it")
    if huggingface_hub.get_token() is None:
        raise UserError(f"{given}: there is no token for the hub: {_LOG_IN}")
    api = huggingface_hub.HfApi()
    me = _asked(given, api.whoami)
    owner, _, rest = name.rpartition("/")
    name = f"{owner or me['name']}/{rest}"
    _check_owner(given, owner, me)
    try:
        info = _asked(given, lambda: api.model_info(name))
    except RepositoryNotFoundError:
        return Repository(name, private)
    if not overwrite:
        raise UserError(
            f"{given}: the hub has {name} already: choose another name, or replace its weights "
            "with --overwrite"
        )
    if private and not info.private:
        raise UserError(
            f"{given}: {name} is public, and --private is for new repositories: make it private "
            f"in its settings ({api.endpoint}/{name}/settings), or leave out --private"
        )
    has_card = any(file.rfilename == README for file in info.siblings or ())
    if has_card:
        path = _asked(given, lambda: api.hf_hub_download(name, README))
        has_card = not is_generated(Path(path).read_text(encoding="utf-8"))
    return Repository(name, private, exists=True, has_own_card=has_card)


def push(repository: Repository, folder: Path, remedy: str) -> str:
    """Uploads a folder in one commit, or few where it is large.

    Weights of an earlier export go. A README.md that somebody wrote on the hub stays.

    Args:
      repository: see `find_repository`.
      folder: the export.
      remedy: what to do where the upload fails, for the message.

    Returns:
      The address of the repository's page.

    Raises:
      UserError: the hub refuses the upload, or cannot be reached any more.
    """
    api = huggingface_hub.HfApi()
    try:
        private = repository.private or None  # without it, as the owner's settings say
        api.create_repo(repository.name, exist_ok=repository.exists, private=private)
        api.upload_folder(
            repo_id=repository.name,
            folder_path=folder,
            commit_message="Upload an export of lora_jax",
            ignore_patterns=[README] if repository.has_own_card else None,
            delete_patterns=_WEIGHTS if repository.exists else None,
        )
    except Exception as error:  # of the layers below, anything
        raise UserError(
            f"--push-to-hub {repository.name}: the upload failed ({_line(error)}). {remedy}"
        ) from error
    return f"{api.endpoint}/{repository.name}"


def _check_owner(given: str, owner: str, me: Fields) -> None:
    """Raises a UserError if the token's user cannot write to the owner's repositories."""
    token = (me.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError(f"{given}: the token may only read: {_LOG_IN}")
    orgs = {org["name"]: org.get("roleInOrg") for org in me.get("orgs") or ()}
    if owner in ("", me["name"]) or orgs.get(owner, "read") != "read":
        return
    may = ", ".join([me["name"], *(org for org, role in orgs.items() if role != "read")])
    raise UserError(
        f"{given}: {owner} belongs to somebody else: the token of {me['name']} may write to {may}. "
        "Choose one of these, or log in as another user"
    )


def _asked(given: str, ask: Callable[[], _T]) -> _T:
    """Returns the hub's answer; asks in a separate thread, since resolving a host may hang.

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
        return answer.result(_SECONDS)
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, RepositoryNotFoundError) and status == 404:
            raise
        if status in (401, 403):
            raise UserError(
                f"{given}: the hub does not accept the token ({_line(error)}): {_LOG_IN}"
            ) from error
        why = _line(error) if answer.done() else f"no answer within {_SECONDS:g} seconds"
        raise UserError(
            f"{given}: the hub, {huggingface_hub.constants.ENDPOINT}, cannot be reached ({why}). "
            "Without --push-to-hub, the export is written all the same, and `hf upload` sends it "
            "later"
        ) from error


def _line(error: Exception) -> str:
    """Returns the beginning of an error's message, and of its cause's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return f"{text} {_line(error.__cause__)}" if isinstance(error.__cause__, Exception) else text
