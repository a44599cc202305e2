"""Checks the web pages that may use a server: their origins, and the host names of requests."""

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from train.console.errors import UserError

ANY = "*"
_PORT = re.compile(r":\d*$")
_ORIGIN = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[^\s/?#@:*\[\]]+)(:(?P<port>\d{1,5}))?/?"
)


class Origins:
    """The web pages that may use a server.

    A browser sends requests of any page to any address, and names the page's origin in `Origin`. A
    page whose host name was rebound to this machine has itself for an origin, and for `Host`. So
    without keys, `Host` is to be a loopback name, and `Origin` the server's own.

    Attributes:
      allowed: the origins of pages elsewhere that may use the server; "*" stands for all.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        """Stores origins as `read_origin` returns them."""
        self.allowed = tuple(dict.fromkeys(allowed))
        self._hosts = {urlsplit(origin).netloc for origin in self.allowed}

    def refusal(self, headers: Headers) -> str | None:
        """Returns the reason to refuse a request without a key, or None."""
        if ANY in self.allowed:
            return None
        hosts = [host.lower() for host in headers.getlist("host")]
        for host in hosts:
            if not (host in self._hosts or is_loopback(_PORT.sub("", host))):
                return (
                    f"the request names the host {host[:200]!r}, but a server without --keys only "
                    "answers to localhost, 127.0.0.1 and [::1]. "
                    f"Start it with --keys, or with --allow-origin http://{host[:200]} if pages "
                    "there may use it."
                )
        for origin in map(str.lower, headers.getlist("origin")):
            _, _, origin_host = origin.partition("://")  # urlsplit may fail for what clients send
            is_own_page = origin_host in hosts
            if not (is_own_page or origin in self.allowed):
                return (
                    f"a web page of {origin[:200]!r} sent this request, but a server without "
                    "--keys only answers its own page. Start it with --allow-origin for other "
                    "pages."
                )
        return None


def is_loopback(host: str) -> bool:
    """Returns True if a host name refers to this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        name = host.lower().removesuffix(".")
        return name == "localhost" or name.endswith(".localhost")


def read_origin(text: str) -> str:
    """Returns an origin in the form that browsers send, or "*".

    Raises:
      UserError: it is none.
    """
    if text == ANY:
        return text
    origin = _ORIGIN.fullmatch(text.lower())
    if origin is None or int(origin["port"] or 0) >= 2**16:
        raise UserError(
            f"--allow-origin {text} is not the origin of a web page. Pass a scheme and a host, and "
            "a port if it is not the usual one, such as https://chat.example.org or "
            "http://localhost:3000. Pass * for all pages."
        )
    scheme = origin["scheme"]
    default_port = {"http": "80", "https": "443"}[scheme]
    base = f"{scheme}://{origin['host']}"
    if origin["port"] in (None, default_port):
        return base
    return f"{base}:{origin['port']}"
