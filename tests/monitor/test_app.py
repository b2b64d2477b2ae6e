"""What programs read from the monitor, and that nobody can do more than read."""

import gzip
import json
import re
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from swarm.monitor.picture import model_key
from swarm.types import ModelId
from tests.monitor.pages import Monitor, monitor
from tests.monitor.simulated import MODEL, record

TWIN = ModelId(MODEL.name, "1234abcd" * 8)
EVIL = "<img src=x onerror=alert(1)>\u202e"


@pytest.fixture(scope="module")
def it() -> Iterator[Monitor]:
    with monitor() as it:
        it.show([record(0, "0:16", public_name=EVIL), record(1, "12:24"), record(2, "0:24")])
        it.show([record(9, "0:3", 4, model=TWIN)], 4, model=TWIN)
        it.remember_a_day()
        yield it


@pytest.fixture(scope="module")
def client(it: Monitor) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=it.url, timeout=20) as client:
        yield client


def test_the_state_has_every_model_and_is_sent_once_while_it_stays_the_same(
    client: httpx.Client,
) -> None:
    answer = client.get("/api/v1/state")
    state = answer.json()
    assert set(state["models"]) == {model_key(MODEL), model_key(TWIN)}
    assert state["models"][model_key(TWIN)]["missing"] == ["3:4"]
    again = client.get("/api/v1/state", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    plain = client.get("/api/v1/state", headers={"accept-encoding": "identity"})
    assert plain.json() == state
    with client.stream("GET", "/api/v1/state", headers={"accept-encoding": "gzip"}) as raw:
        assert json.loads(gzip.decompress(b"".join(raw.iter_raw()))) == state


@pytest.mark.parametrize(
    "name", [MODEL.name, f"{MODEL.name}@{MODEL.fingerprint[:8]}", model_key(MODEL)]
)
def test_a_model_is_found_by_name_fingerprint_or_key(client: httpx.Client, name: str) -> None:
    told = client.get(f"/api/v1/models/{name}").json()
    assert told["fingerprint"] == MODEL.fingerprint
    assert len(told["servers"]) == 3
    assert 0 < len(told["history"]["steps"]) <= 288
    assert {event[1] for event in told["events"]} == {"lost", "joined", "moved"}
    assert sum(one["hours"] for one in told["contributors"]) > 100


def test_a_twin_by_name_is_found_by_its_fingerprint(client: httpx.Client) -> None:
    told = client.get(f"/api/v1/models/{MODEL.name}@1234").json()
    assert told["num_blocks"] == 4


def test_a_server_is_told_of_also_when_it_is_gone(it: Monitor, client: httpx.Client) -> None:
    told = client.get(f"/api/v1/servers/{record(1).peer_id}").json()
    assert told["server"]["blocks"] == [12, 24]
    assert told["model_name"] == MODEL.name
    assert told["block_hours"] > 0
    it.show([record(9, "0:4", 4, model=TWIN), record(10, "0:4", 4, model=TWIN)], 4, model=TWIN)
    it.show([record(9, "0:4", 4, model=TWIN)], 4, model=TWIN)
    gone = client.get(f"/api/v1/servers/{record(10).peer_id}").json()
    assert gone["server"] is None
    assert gone["events"][-1][1] == "left"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/v1/models/nothing", 404),
        ("/api/v1/models/", 404),
        ("/api/v1/models/%00%ff/../../etc/passwd", 404),
        ("/api/v1/servers/QmNobody", 404),
        ("/api/v1/changes", 400),
        ("/api/v1/changes?number=-1", 400),
        ("/api/v1/changes?number=" + "9" * 99, 400),
        ("/api/v1/nothing", 404),
        ("/../pyproject.toml", 404),
        ("/%2e%2e/app.py", 404),
    ],
)
def test_nonsense_is_answered_with_a_clear_error(
    client: httpx.Client, path: str, status: int
) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "path",
    [
        *("/", "/app.js", "/models/x", "/servers/x", "/healthz", "/metrics"),
        *("/api/v1/state", "/api/v1/changes", "/api/v1/models/x", "/api/v1/servers/x"),
    ],
)
def test_nothing_but_reading_is_possible(client: httpx.Client, path: str, method: str) -> None:
    assert client.request(method, path).status_code == 405


@pytest.mark.parametrize("path", ["/", "/models/x/y", "/servers/Qm1", "/style.css", "/app.js"])
def test_pages_come_with_strict_headers_and_name_no_other_host(
    client: httpx.Client, path: str
) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert client.head(path).headers["content-type"] == answer.headers["content-type"]
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", answer.text)


def test_changes_are_streamed(it: Monitor, client: httpx.Client) -> None:
    state = client.get("/api/v1/state").json()
    query = {"run": state["run"], "number": str(state["number"])}
    with client.stream("GET", "/api/v1/changes", params=query) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        it.show([record(0, "0:16", public_name=EVIL), record(1, "12:24"), record(2, "0:23")])
        lines = stream.iter_lines()
        assert next(lines) == "event: patch"
        patch = json.loads(next(lines).removeprefix("data: "))["patch"]
    changed = patch["models"][model_key(MODEL)]
    assert changed["servers"] == {record(2).peer_id: {"blocks": [0, 23]}}
    assert "name" not in changed
    it.show([record(0, "0:16", public_name=EVIL), record(1, "12:24"), record(2, "0:24")])


def test_metrics_are_what_prometheus_reads(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    values = {
        (sample.name, sample.labels.get("key")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["swarm_model_servers", model_key(MODEL)] == 3
    assert values["swarm_model_health", model_key(MODEL)] == 2
    assert values["swarm_model_blocks", model_key(TWIN)] == 4
    assert values["swarm_monitor_sees", None] == 1


def test_health_is_whether_it_sees(it: Monitor, client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    looked, it.watcher.looked = it.watcher.looked, None
    answer = client.get("/healthz")
    it.watcher.looked = looked
    assert answer.status_code == 503
    assert "DHT" in answer.json()["status"]


def test_names_of_strangers_are_data_and_carry_no_controls(client: httpx.Client) -> None:
    answer = client.get(f"/api/v1/servers/{record(0).peer_id}")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.json()["server"]["name"] == "<img src=x onerror=alert(1)>"
    assert "\u202e" not in answer.text
    assert "\\u202e" not in answer.text
