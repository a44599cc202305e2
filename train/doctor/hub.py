"""Checks that the Hugging Face hub answers and accepts the user's token."""

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from train.doctor.troubles import Trouble, set_variables

_SECONDS = 4.0
_ON = ("1", "ON", "YES", "TRUE")  # of huggingface_hub's variables
VARIABLES = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE")
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


class HubAnswer(NamedTuple):
    """The HTTP status of the hub's answer; None, with a reason, if there was no answer."""

    status: int | None
    why: str = ""


def examine_hub(
    variables: Mapping[str, str], seconds: float = _SECONDS
) -> tuple[dict[str, Any], list[Trouble]]:
    """Returns the facts about the hub, and its troubles.

    Args:
      variables: the environment.
      seconds: the time that it has to answer.
    """
    endpoint = variables.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = read_token(variables)
    offline = any(
        variables.get(name, "").upper() in _ON
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    answer = HubAnswer(None, "not asked") if offline else ask_hub(endpoint, token, seconds)
    troubles = []
    reachable = "offline, as HF_HUB_OFFLINE asks" if offline else answer.status is not None
    if not offline and answer.status is None:
        troubles.append(
            Trouble(
                f"{endpoint} does not answer ({answer.why})",
                "set a mirror with HF_ENDPOINT or a proxy with HTTPS_PROXY; or set "
                "HF_HUB_OFFLINE=1 and use the cache, or pass --model FOLDER",
                fatal=False,
            )
        )
    if token and answer.status in (401, 403):
        troubles.append(
            Trouble(
                f"{endpoint} refuses your token, and with it every download",
                "run hf auth login with a new token; for public models, run hf auth logout and "
                "unset HF_TOKEN",
            )
        )
    facts = {
        "endpoint": endpoint,
        "answers": reachable,
        "token": ("accepted" if answer.status == 200 else "present") if token else "none",
        "set": set_variables(VARIABLES, variables),
        "proxy": True if any(name in variables for name in _PROXIES) else None,
    }
    return facts, troubles


def read_token(variables: Mapping[str, str]) -> str | None:
    """Returns the user's token, as huggingface_hub finds it; None if there is none."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := variables.get(name, "").strip():
            return token
    caches = Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(variables.get("HF_HOME") or caches / "huggingface").expanduser()
    try:
        return Path(variables.get("HF_TOKEN_PATH") or home / "token").read_text().strip() or None
    except OSError:
        return None


def ask_hub(endpoint: str, token: str | None, seconds: float) -> HubAnswer:
    """Requests the user's name from the hub, or its start page without a token.

    Args:
      endpoint: its address.
      token: the user's token.
      seconds: the time that it has, with the look-up of its name.
    """
    answers: list[HubAnswer] = []

    def wait() -> None:
        answers.append(_request(endpoint, token, seconds))

    thread = threading.Thread(target=wait, daemon=True)  # a look-up of a name has no timeout
    thread.start()
    thread.join(seconds + 1)
    return answers[0] if answers else HubAnswer(None, f"no answer within {seconds:g} s")


def _request(endpoint: str, token: str | None, seconds: float) -> HubAnswer:
    """Sends the request and returns the answer, or the reason why there is none."""
    path, headers = ("/api/whoami-v2", {"Authorization": f"Bearer {token}"}) if token else ("", {})
    try:
        request = urllib.request.Request(f"{endpoint}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return HubAnswer(answer.status)
    except urllib.error.HTTPError as error:
        return HubAnswer(error.code)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        late = isinstance(why, TimeoutError | socket.timeout)
        return HubAnswer(None, f"no answer within {seconds:g} s" if late else str(why))
