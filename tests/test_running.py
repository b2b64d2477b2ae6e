"""What docs/running has people type, and what deploy/ starts, fits the programs as they are."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from swarm.api.meters import Meters as ApiMeters
from swarm.cli import main
from swarm.cli.completion import parsers
from swarm.cli.demo import demo_parser
from swarm.cli.logs import JsonFormatter
from swarm.client.recoveries import Total
from swarm.dht.records import ServerRecord
from swarm.metrics import Family
from swarm.server.exposition import _cache, families
from swarm.server.meters import Meters
from swarm.types import BlockRange, ModelId

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs" / "running").glob("*.md")), ROOT / "docs" / "cli.md"]
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)


def check(words: list[str]) -> None:
    """Our own commands must parse; whatever stands for a secret or an address is let through."""
    program, *rest = words
    if program == "swarm":
        program, *rest = rest
    name = program.removeprefix("swarm-")
    if "--help" not in rest:
        parsers()[name]().parse_args(rest)


def ours(text: str) -> Iterator[list[str]]:
    """Commands of ours in a text for shells, without what is around them."""
    text = text.replace("\\\n", " ").replace("$$", "$")
    inner = re.findall(r"\$\(([^()]*)\)", text)
    text = re.sub(r"\$\{\w+:\+[^}]*\}|\$\{\w+:-\}", "", re.sub(r"\$\([^()]*\)", "x", text))
    for line in [*text.splitlines(), *inner]:
        for part in re.split(r"\|\||&&", line):
            part = re.split(r"\s(?:\||>)\s", part.strip())[0]
            found = re.match(r"(?:exec |caffeinate -s )?(?:\S*/bin/)?(swarm(?:-\w+)?)( .*|$)", part)
            if found:
                yield [found[1], *shlex.split(found[2], comments=True)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    for block in BLOCK.findall(page.read_text()):
        for words in ours(block):
            if len(words) > 1:
                check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        parts = urlsplit(link)
        if parts.scheme or not parts.path:
            continue
        target = page.parent / parts.path
        assert target.exists(), link
        if parts.fragment:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            plain = [re.sub(r"[^\w -]", "", title.lower()) for title in titles]
            assert parts.fragment in [title.replace(" ", "-") for title in plain]


def test_commands_are_really_found() -> None:
    """Else the tests above would prove nothing."""
    found = [words for page in PAGES for b in BLOCK.findall(page.read_text()) for words in ours(b)]
    assert {words[0] for words in found} == {
        *("swarm", "swarm-server", "swarm-dht", "swarm-api", "swarm-monitor")
    }
    assert ["swarm", "status", "--watch"] in found


def containers() -> list[Mapping[str, Any]]:
    documents = [d for path in MANIFESTS for d in yaml.safe_load_all(path.read_text())]
    pods = [d["spec"]["template"] for d in documents if d["kind"] in ("Deployment", "StatefulSet")]
    return [c for pod in pods for c in pod["spec"]["containers"]]


@pytest.mark.parametrize("version", ["1.30", "1.33", "1.37"])
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_pass_the_schemas_of_kubernetes(path: Path, version: str) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] != "Kustomization":  # kustomize's own; it has no schema there
            kubernetes_validate.validate(document, version, strict=True)


def test_a_wrong_manifest_would_be_seen() -> None:
    document = next(yaml.safe_load_all((ROOT / "deploy/kubernetes/monitor.yaml").read_text()))
    document["spec"]["prots"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="prots"):
        kubernetes_validate.validate(document, "1.37", strict=True)


def test_kustomize_names_every_manifest() -> None:
    listed = yaml.safe_load((ROOT / "deploy/kubernetes/kustomization.yaml").read_text())
    assert sorted(listed["resources"]) == sorted(
        path.name for path in MANIFESTS if path.name != "kustomization.yaml"
    )


def test_pods_start_with_commands_that_exist_are_probed_and_bounded() -> None:
    assert {c["name"] for c in containers()} == {"dht", "server", "monitor", "api"}
    for container in containers():
        check(re.sub(r"\$\(\w+\)", "x", "\0".join(container["args"])).split("\0"))
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        assert "memory" in container["resources"]["limits"]
        ports = {port["name"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            kind = container[probe].get("httpGet") or container[probe]["tcpSocket"]
            assert kind["port"] in ports


def test_compose_starts_commands_that_exist() -> None:
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    programs: set[str] = set()
    for service in services.values():
        command = service.get("command", [])
        lines = [command] if not command or command[0] != "sh" else list(ours(command[-1]))
        if lines and lines[0]:
            for words in lines:
                check(words)
                programs.add(words[0])
    assert programs == {"swarm", "swarm-dht", "swarm-server", "swarm-monitor", "swarm-api"}
    jobs = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())["scrape_configs"]
    targets = [t for job in jobs for config in job["static_configs"] for t in config["targets"]]
    assert {target.partition(":")[0] for target in targets} <= set(services)


@pytest.mark.parametrize("name", ["swarm-server", "swarm-dht"])
def test_units_start_commands_that_exist(name: str) -> None:
    text = (ROOT / f"deploy/systemd/{name}.service").read_text().replace("\\\n", " ")
    [line] = re.findall(r"^ExecStart=(.*)$", text, re.M)
    arguments = ["--port", "31331"]
    if name == "swarm-server":
        settings = (ROOT / "deploy/systemd/server.env").read_text()
        arguments = shlex.split(dict(re.findall(r"^(\w+)=(.*)$", settings, re.M))["SWARM_ARGS"])
    words = shlex.split(line.replace(" $SWARM_ARGS", ""))
    assert words[0].endswith(f"/bin/{name}")
    check([name, *words[1:], *arguments])


def test_the_image_has_what_the_project_is_built_from() -> None:
    """What is copied exists, and is let in; the commands that it names are installed."""
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    ignored = (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored


# Metrics ---------------------------------------------------------------------------------------


def shown() -> dict[str, set[str]]:
    """The metrics of servers and of clients, with their labels."""
    meters = Meters()
    meters.refused["busy"] += 1
    record = ServerRecord(
        peer_id="QmeL3fLd2dbKVM8wVZUdbHAugA6Co1NJf7nNMZ1AXidP5g",
        model=ModelId("m", "0" * 64),
        blocks=BlockRange(0, 2),
        num_blocks=2,
        host="h",
        port=1,
        certificate_digest=bytes(32),
    )
    store = SimpleNamespace(count_pages=lambda: (1, 2), budget=3, taken=2, used=1)
    load = SimpleNamespace(queue=0, free_tokens=0)
    handler = SimpleNamespace(
        counts=dict, load=lambda: load, sessions=0, store=store, meters=meters
    )
    total = Total()
    total.losses[next(iter(total.seconds)), ""] = 1
    found: list[Family] = [
        *families(meters, cast(Any, handler), record, {"others": (0, 0), "us": (0, 0)}),
        *_cache(cast(Any, store)),
        *total.families(),
    ]
    return {family.name: set(family.samples[0][0]) for family in found}


def documented() -> dict[str, set[str]]:
    rows = re.findall(
        r"^\| (`swarm_.*?) \| (.*?) \|", (ROOT / "docs/running/watching.md").read_text(), re.M
    )
    return {
        name: set(re.findall(r"`(\w+)`", labels))
        for names, labels in rows
        for name in re.findall(r"`(\w+)`", names)
    }


def test_every_metric_is_explained_with_its_labels() -> None:
    assert documented() == shown()


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/swarm.json").read_text())
    page = ApiMeters().page(cast(Any, SimpleNamespace(taken=0, waiting=0))).decode()
    api = set(re.findall(r"^# TYPE (\w+)", page, re.M))
    known = {re.sub("_total$", "", name) for name in {*shown(), *api}}
    known |= {"process_resident_memory_bytes"}
    texts = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    texts += [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]
    asked = {name for text in texts for name in re.findall(r"\b(?:swarm|process)_\w+", text)}
    assert asked
    plain = {re.sub("_(total|bucket|sum|count)$", "", name) for name in asked}
    assert plain <= known, plain - known
    unused = {name for name in shown() if re.sub("_total$", "", name) not in plain}
    assert not unused, "a dashboard shows everything"


def test_fields_of_logs_are_explained() -> None:
    text = (ROOT / "docs/running/watching.md").read_text()
    assert JsonFormatter.__doc__
    for field in ("time", "level", "logger", "message", "error", "traceback"):
        assert f"`{field}`" in text
        assert f"`{field}`" in JsonFormatter.__doc__


# JSON ------------------------------------------------------------------------------------------


def keys(command: str) -> set[str]:
    """All that docs/cli.md names under a command."""
    text = (ROOT / "docs/cli.md").read_text()
    section = text.split(f"### `{command} --json`\n")[1].split("\n### ")[0]
    rows = re.findall(r"^\| (`.*?) \|(.*?)\|$", section, re.M)
    return {name for row in rows for cell in row for name in re.findall(r"`(\w+)`", cell)}


def keys_of(value: object) -> set[str]:
    match value:
        case dict():
            found = cast(dict[str, object], value)
            return set(found).union(*map(keys_of, found.values()))
        case list():
            return set[str]().union(*map(keys_of, cast(list[object], value)))
        case _:
            return set()


def test_the_keys_of_status_and_chat_are_documented() -> None:
    from swarm.cli.chat import _Answer
    from swarm.cli.status import _as_object
    from tests.cli.test_status import view

    assert keys_of(_as_object([view("0:4")])) <= keys("swarm status") | {"models"}
    assert keys_of(_Answer("", 0, 1.0, (), ()).as_object()) == keys("swarm chat")


def test_the_keys_of_plan_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    del found["assumed"]
    assert keys_of(found) | {"assumed"} == keys("swarm plan")


def test_the_keys_of_demo_are_documented() -> None:
    assert keys("swarm demo") == {
        *("identical", "text", "tokens", "pause_ms", "token_ms", "route", "blocks", "address"),
        "start_seconds",
    }
    assert "--monitor" in demo_parser().format_help()
