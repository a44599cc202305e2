"""Defaults of sampling, as --generation-config has them, where a request gives none."""

import json
import urllib.request

import pytest

from tests.train.serve.scripted import ScriptedEngine, ids, serving

DEFAULTS = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
GIVEN = {"temperature": 0.0, "top_p": 0.5, "top_k": 3}


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_a_request_overrides_the_defaults(route):
    engine = ScriptedEngine(lambda sample, index: ids("well"))
    body = {"model": "tiny/base"}
    body |= {"messages": [{"role": "user", "content": "?"}]} if "chat" in route else {"prompt": "?"}

    def drawn(**fields):
        said = json.dumps(body | fields).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, said, headers), timeout=20):
            sample = engine.drawn[-1]
        return {name: getattr(sample, name) for name in DEFAULTS}

    with serving(engine, sampling=DEFAULTS) as address:
        url = f"{address}/v1/{route}"
        assert drawn() == drawn(temperature=None) == DEFAULTS
        assert drawn(**GIVEN) == GIVEN
        assert drawn(top_p=0.5) == DEFAULTS | {"top_p": 0.5}
    with serving(engine) as address:
        url = f"{address}/v1/{route}"
        assert drawn() == {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
