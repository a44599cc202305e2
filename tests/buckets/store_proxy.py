"""A bucket for tests: gcp-storage-emulator behind a proxy that is slow, fails and kills.

The emulator knows no preconditions (ifGenerationMatch), no generations of what is read, and no
upload that it is told twice to end; the proxy adds them, as the store has them. It also waits,
answers 503, cuts connections before and after the emulator did what was asked, and tells a test of
each request, so that it can kill a process at a moment of its own.
"""

import contextlib
import http.client
import http.server
import json
import os
import re
import threading
import time
from urllib.parse import parse_qs, quote, unquote, urlsplit

BUCKET = "bucket"
_HOPS = {"connection", "transfer-encoding", "content-length", "keep-alive", "host"}


class StoreProxy:
    """The proxy. Tests set what it does.

    Attributes:
      latency: seconds that each request takes at least.
      failing: (number of the request, method, path) -> None, "503", "cut" (before it is done) or
        "lost" (done, but the answer is cut in its middle).
      seen: is called before each request, with its method, its path and the object's name; "cut"
        drops it.
      requests: the requests so far, as (method, path).
    """

    def __init__(self, port):
        self.latency, self.failing = 0.0, lambda number, method, path: None
        self.seen = lambda method, path: None
        self.requests, self.answers, self._ended = [], [], {}
        self._emulator, self._lock = port, threading.Lock()

    def ask(self, method, path, body=None, headers=()):
        """Sends a request to the emulator; returns status, headers and content."""
        connection = http.client.HTTPConnection("127.0.0.1", self._emulator, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def generation(self, name):
        """Returns the generation of an object; 0 for none."""
        path = f"/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}"
        status, _, content = self.ask("GET", path)
        return int(json.loads(content)["generation"]) if status == 200 else 0

    def objects(self, prefix=""):
        """Returns the contents of the objects by name."""
        _, _, content = self.ask("GET", f"/storage/v1/b/{BUCKET}/o?prefix={quote(prefix)}")
        names = [item["name"] for item in json.loads(content).get("items", ())]
        path = f"/storage/v1/b/{BUCKET}/o"
        return {
            name: self.ask("GET", f"{path}/{quote(name, safe='')}?alt=media")[2] for name in names
        }

    def put(self, name, content):
        """Writes an object."""
        path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quote(name, safe='')}"
        kind = {"Content-Type": "application/octet-stream"}
        assert self.ask("POST", path, content, kind)[0] == 200

    def delete(self, name):
        """Deletes an object."""
        self.ask("DELETE", f"/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}")

    def answer(self, method, path, body, headers):
        """Returns the answer to a request, after its preconditions."""
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        wanted = query.get("ifGenerationMatch", query.get("generation"))
        with self._lock:  # as the store does: condition and deed at once
            if wanted is not None and method in ("GET", "POST", "DELETE"):
                here = self.generation(_name_of(parts.path, query, body))
                if here != int(wanted):
                    status = 412 if "ifGenerationMatch" in query else 404
                    text = json.dumps({"error": {"code": status, "message": "another generation"}})
                    return status, [("Content-Type", "application/json")], text.encode()
            if (upload := query.get("upload_id")) in self._ended:
                return self._ended[upload]
            status, given, content = self.ask(method, path, body, headers)
            if upload and status == 200:
                self._ended[upload] = status, given, content
            if method == "GET" and query.get("alt") == "media":
                here = self.generation(_name_of(parts.path, query, body))
                given = [*given, ("X-Goog-Generation", str(here))]
            return status, given, content


def _named(path, body):
    parts = urlsplit(path)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    try:
        return _name_of(parts.path, query, body)
    except TypeError:
        return ""


def _name_of(path, query, body):
    """Returns the object that a request is about."""
    if "name" in query:
        return query["name"]
    if match := re.search(r"/o/([^/]+)$", path):
        return unquote(match[1])
    return json.loads(re.search(rb'\{[^{}]*"name"[^{}]*\}', body)[0])["name"]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one(self):
        proxy = self.server.proxy
        size = self.headers.get("Content-Length")
        body = self.rfile.read(int(size)) if size else self._chunks()
        proxy.requests.append((self.command, self.path))
        number = len(proxy.requests)
        if proxy.seen(self.command, f"{self.path} {_named(self.path, body)}") == "cut":
            return self._cut()
        time.sleep(proxy.latency)
        fails = proxy.failing(number, self.command, self.path)
        if fails == "cut":
            return self._cut()
        if fails == "503":
            return self._send(503, [], b"try again")
        kept = {name: value for name, value in self.headers.items() if name.lower() not in _HOPS}
        kept["Host"] = self.headers["Host"]  # the emulator answers with addresses of the proxy
        status, headers, content = proxy.answer(self.command, self.path, body, kept)
        proxy.answers.append((self.command, unquote(self.path), fails, status))
        self._send(status, headers, content, lost=fails == "lost")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_one

    def _chunks(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return None
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status, headers, content, lost=False):
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in {*_HOPS, "server", "date"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if lost:
            self.wfile.write(content[: len(content) // 2])
            return self._cut()
        self.wfile.write(content)

    def _cut(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(2)

    def log_message(self, *_):
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, address):
        """Says nothing of clients that are gone: tests kill them."""


@contextlib.contextmanager
def bucket_store():
    """Runs an empty bucket; yields its proxy, and the variables that lead clients to it."""
    from gcp_storage_emulator.server import create_server

    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    emulator.start()
    port = emulator._api._httpd.server_address[1]
    server = _Server(("127.0.0.1", 0), _Handler)
    server.proxy = StoreProxy(port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    variables = {
        "STORAGE_EMULATOR_HOST": address,  # Google's client and gcsfs
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which the emulator does not answer
        "GOOGLE_CLOUD_PROJECT": "tests",
    }
    try:
        yield server.proxy, variables
    finally:
        _forget_client()
        server.shutdown()
        server.server_close()
        emulator.stop()


def _forget_client():
    """Closes the connections of this process's client."""
    from lora_jax.buckets import store

    if store._client.cache_info().currsize:
        store._client()._http.close()
        store._client.cache_clear()


def use(variables, monkeypatch):
    """Leads this process's clients to the bucket."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _forget_client()
    assert os.environ["STORAGE_EMULATOR_HOST"] == variables["STORAGE_EMULATOR_HOST"]
