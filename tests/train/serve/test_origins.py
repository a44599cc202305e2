"""Web pages, and names of this machine: which of them may use a server."""

import pytest

from tests.train.serve.command import ask, command
from train.console.errors import UserError
from train.serve.options import check, parse

SESSION = "/api/v1/create_session"
PAGE = "https://chat.example.org"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Starts the command, and returns the answers to some requests."""

    def answers(line, requests):
        def work(port):
            return [ask(port, *given, **_at(port, headers)) for given, headers in requests]

        return command(monkeypatch, tmp_path, line, work)

    return answers


def _at(port, headers):
    return {name: value.replace("PORT", str(port)) for name, value in headers.items()}


def post(**headers):
    return ("POST", SESSION, "{}"), {"Content_Type": "text/plain", **headers}


def preflight(origin, method="POST"):
    wanted = {"Access_Control_Request_Method": method, "Origin": origin}
    more = {"Access_Control_Request_Headers": "content-type,x-api-key"}
    return ("OPTIONS", SESSION), wanted | more


HERE = ("localhost:PORT", "LOCALHOST", "127.0.0.1:PORT", "127.1.2.3", "[::1]:PORT", "a.localhost:1")
ELSEWHERE = (
    *("example.org", "example.org:PORT", "localhost.example.org", "127.0.0.1.nip.io:PORT"),
    *("0.0.0.0:PORT", "192.168.1.5:PORT", "[fe80::1]:PORT", "localhost:PORT:x", ""),
)
OWN = (("localhost:PORT",) * 2, ("[::1]:PORT",) * 2, ("LocalHost:9", "localhost:9"))
FOREIGN = (
    *(PAGE, "null", "http://localhost:3000", "http://localhost", "http://127.0.0.1:PORT"),
    *("http://localhost:PORT.example.org", "localhost:PORT", "", "file://", "http://", "http://["),
)


def test_without_keys_no_page_but_the_servers_own_may_ask(asked):
    accepted = [post(), *(post(Host=host) for host in HERE)]
    accepted += [post(Host=host, Origin=f"http://{origin}") for host, origin in OWN]
    refused = [post(Host=host) for host in ELSEWHERE]
    refused += [post(Host="localhost:PORT", Origin=origin) for origin in FOREIGN]
    refused += [(("GET", "/api/v1/sessions"), {"Host": "rebound.example.org"})]
    refused += [(("GET", path), {"Host": "rebound.example.org"}) for path in ("/", "/status.json")]
    refused += [preflight(PAGE)]
    answers = asked("", [*accepted, *refused])
    assert [status for status, *_ in answers] == [200] * len(accepted) + [403] * len(refused)
    for _, headers, body in answers[len(accepted) :]:
        assert "access-control-allow-origin" not in headers
        assert "--keys" in body["error"]["message"]
    assert "session_id" not in str(answers[len(accepted) :])


def test_allowed_origins_are_answered_as_browsers_need_it(asked):
    allowed = [
        preflight(PAGE),
        post(Origin=PAGE, Host="127.0.0.1:PORT"),
        post(Origin=PAGE, Host="chat.example.org"),  # a proxy passes the name on
        post(Origin="http://localhost:3000"),
    ]
    refused = [post(Origin=origin) for origin in (f"{PAGE}:8443", "http://chat.example.org")]
    refused += [post(Host="chat.example.org:8443"), post(Origin="null")]
    line = f"--allow-origin {PAGE}:443/ HTTP://localhost:3000"
    asking, *answers = asked(line, [*allowed, *refused, preflight("https://x.org"), post()])
    assert asking[0] == 200 and "POST" in asking[1]["access-control-allow-methods"]
    assert "x-api-key" in asking[1]["access-control-allow-headers"]
    assert [one[0] for one in answers] == [200] * 3 + [403] * 4 + [400, 200]
    told = [one[1].get("access-control-allow-origin") for one in (asking, *answers)]
    assert told == [PAGE] * 3 + ["http://localhost:3000"] + [None] * 6
    assert all("origin" in one[1]["vary"].lower() for one in answers[:3])


def test_any_page_may_ask_where_a_user_says_so(asked):
    found = asked("--allow-origin *", [post(Origin="null", Host="example.org"), preflight(PAGE)])
    assert [one[0] for one in found] == [200, 200]
    assert {one[1]["access-control-allow-origin"] for one in found} == {"*"}


def test_with_keys_names_and_pages_are_not_asked_for(asked, tmp_path):
    (tmp_path / "keys").write_text("anna tml-one\n")
    key = {"X_API_Key": "tml-one"}
    requests = [post(Host="example.org", Origin="https://x.org", **key), preflight(PAGE)]
    requests += [post(Origin=PAGE), post(Origin=PAGE, **key), preflight("https://x.org")]
    found = asked("--keys keys", requests)
    assert [one[0] for one in found] == [200, 401, 401, 200, 401]
    found = asked(f"--keys keys --allow-origin {PAGE}", requests)
    assert [one[0] for one in found] == [200, 200, 401, 200, 400]
    told = [one[1].get("access-control-allow-origin") for one in found]
    assert told == [None, PAGE, PAGE, PAGE, None]


@pytest.mark.parametrize(
    "given",
    ["null", "example.org", "localhost:3000", "ftp://x", "http://", "http://a/b", "http://a?b"]
    + ["http://a:99999", "http://a:b", "http://[::1", "http://u:p@a", "https://*.example.org", ""],
)
def test_what_is_no_origin_is_refused(given):
    with pytest.raises(UserError, match="--allow-origin"):
        check(parse(["--allow-origin", "http://localhost:3000", given]))
