"""A stand-in for the Hugging Face hub: the few endpoints that an upload asks, over HTTP."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKENS = {"good": "write", "reader": "read"}


class Hub:
    """The state of the stand-in, and its server.

    Attributes:
      repos: name -> {"private": bool, "files": {path: bytes}}.
      asked: the requests, "POST /api/repos/create".
      broken: paths whose requests fail with 500.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.broken: tuple[str, ...] = ()
        self.blobs: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        poll = (0.01,)  # seconds: it ends so soon
        threading.Thread(target=self._server.serve_forever, args=poll, daemon=True).start()

    def add(self, name: str, *, private: bool = False, **files: bytes) -> None:
        """Makes a repository."""
        self.repos[name] = {"private": private, "files": dict(files)}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _commit_of(files: dict[str, bytes]) -> str:
    """A commit's name, which changes with the files."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.asked.append(f"{self.command} {path}")
        role = TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if any(part in path for part in self.state.broken):
            return self._send(500, {"error": "broken"})
        if path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path.rsplit("/", 1)[-1]
            self.state.blobs[path.rsplit("/", 1)[-1]] = body
            return self._send(200, {})
        if role is None or (self.command == "POST" and role != "write"):
            return self._send(401, {"error": "Invalid credentials"})
        if path == "/api/whoami-v2":
            orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "watch", "roleInOrg": "read"}]
            auth = {"accessToken": {"role": role}}
            return self._send(200, {"type": "user", "name": "me", "orgs": orgs, "auth": auth})
        if path == "/api/validate-yaml":
            return self._send(200, {"warnings": [], "errors": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._lfs(json.loads(body)["objects"])
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repo = self.state.repos.get(name)
        if repo is None:
            return self._send(
                404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
        what = parts[4] if parts[0] == "api" and len(parts) > 4 else ""
        if parts[2] == "resolve":
            return self._file(repo["files"].get("/".join(parts[4:])), _commit_of(repo["files"]))
        if what == "tree":
            files = [
                {"type": "file", "path": p, "size": len(b), "oid": "0"}
                for p, b in repo["files"].items()
            ]
            return self._send(200, files)
        if what == "preupload":
            return self._preupload(json.loads(body)["files"])
        if what == "commit":
            return self._commit(name, repo["files"], body)
        siblings = [{"rfilename": path} for path in repo["files"]]
        about = {
            "id": name,
            "private": repo["private"],
            "sha": _commit_of(repo["files"]),
            "siblings": siblings,
        }
        return self._send(200, about | {"tags": [], "downloads": 0, "likes": 0})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.state.url}/{name}"}
        if name in self.state.repos:
            return self._send(409, {"error": "You already created this model repo", **url})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.state.add(name, private=bool(private))
        return self._send(200, url)

    def _preupload(self, files: list[dict[str, Any]]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self._send(200, {"files": modes})

    def _lfs(self, objects: list[dict[str, Any]]) -> None:
        made = [
            {**one, "actions": {"upload": {"href": f"{self.state.url}/lfs/{one['oid']}"}}}
            for one in objects
        ]
        self._send(200, {"objects": made, "transfer": "basic"})

    def _commit(self, name: str, files: dict[str, bytes], body: bytes) -> None:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commit = _commit_of(files)
        url = f"{self.state.url}/{name}/commit/{commit}"
        self._send(200, {"commitUrl": url, "commitOid": commit, "success": True})

    def _file(self, content: bytes | None, commit: str) -> None:
        if content is None:
            return self._send(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha1(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Content-Type": "text/plain"}
        return self._bytes(200, content, headers)

    def _send(self, code: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        content = {"Content-Type": "application/json"}
        self._bytes(code, json.dumps(answer).encode(), content | (headers or {}))

    def _bytes(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
