"""The page that shows the state of a server."""

import json
import re
import shutil
import subprocess

import pytest
from starlette.testclient import TestClient

from tests.train.serve.fakes import FakeEngine
from tests.train.serve.scripted import TOKENIZER
from train.serve.app import make_app


def page_client():
    """Returns a client of a server without keys."""
    return TestClient(make_app(FakeEngine(held=True), TOKENIZER, []), "http://localhost")


def test_the_page_needs_no_network():
    with page_client() as client:
        page = client.get("/")
        policy = page.headers["content-security-policy"].split("; ")
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", page.text)
        assert links == []
        assert [one for one in re.findall(r"https?://[^\"'` ]+", page.text)] == [
            "http://www.w3.org/2000/svg"
        ]


# Runs the page's script: a session is to be ended, with several answers, each before a new status.
_PROGRAM = """
const elements = {}, shown = [];
const fakeElement = () => ({ append() {}, replaceChildren() {}, setAttribute() {}, dataset: {} });
globalThis.document = {
  getElementById: id => elements[id] ??= fakeElement(), createElement: fakeElement,
};
globalThis.sessionStorage = { getItem: () => "" };
globalThis.confirm = () => true;
globalThis.setTimeout = () => {};
let next = null;
globalThis.fetch = async path => {
  if (path === "status.json") return reply(200, { tenants: {} });
  if (next === null) throw new TypeError("Failed to fetch");
  return reply(...next);
};
const reply = (status, told) => ({ status, ok: status < 300, json: async () => told });
SCRIPT
(async () => {
  for (next of ANSWERS) {
    await end("mine", "one");
    await poll();
    shown.push(elements.refusal.textContent);
  }
  console.log(JSON.stringify(shown));
})();
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_the_page_shows_why_a_session_goes_on():
    page = page_client().get("/").text
    script = re.search("<script>(.*)</script>", page, re.DOTALL)[1]
    refusals = [
        (503, {"error": {"message": "the server is shutting down"}}),
        (404, {"detail": "there is no session one"}),
        (502, {}),
        None,
        (200, {}),
    ]
    program = _PROGRAM.replace("SCRIPT", script).replace("ANSWERS", json.dumps(refusals))
    ran = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    texts = ("the server is shutting down", "there is no session one", "status 502")
    assert json.loads(ran.stdout) == [
        *(f"the session of mine goes on: {text}" for text in (*texts, "Failed to fetch")),
        "",
    ]
