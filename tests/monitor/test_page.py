"""The monitor's page in a real browser: live, for everybody, at any size, whatever it is shown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest

from swarm.dht.records import Adapter
from swarm.monitor.feed import difference
from swarm.types import ModelId
from tests.browser import SCHEMES, WIDTHS, Scheme, Visit, screenshots, violations
from tests.monitor.pages import Monitor, monitor
from tests.monitor.simulated import record, records

ROOT = Path(__file__).resolve().parents[2]
EVIL = "<script>window.pwned = 1</script><img src=x onerror=window.pwned=1>"
TURNED = "\u202eevil\u2066" + "ש" * 40
ONLINE = '[role="option"].online'


@pytest.fixture(scope="module")
def it() -> Iterator[Monitor]:
    with monitor() as it:
        yield it


@pytest.fixture
def shown(it: Monitor) -> Monitor:
    """Four servers in four states, one of them with a name that would do harm."""
    it.show(
        [
            record(0, "0:9", public_name=EVIL),
            record(1, "0:12", public_name=TURNED, state="draining"),
            record(2, "9:20", public_name="lab 4090", adapters=(Adapter("poet", bytes(8)),)),
            record(3, "12:24", public_name="", state="joining"),
            record(4, "9:20", public_name="basement"),
        ],
        silent=frozenset({record(4).peer_id}),
    )
    it.remember_a_day()
    return it


class Processes:
    """Servers and a monitor, each a process of its own, that end with the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        # Short, as sockets are in it, and gone in the end with what killed processes left there.
        self.folder = Path(tempfile.mkdtemp(prefix="m-"))
        stack.callback(rmtree, self.folder, ignore_errors=True)

    def start(self, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(self.folder)},
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stack.enter_context(process)
        self._stack.callback(process.kill)
        return process

    def server(self, blocks: str, *peers: str) -> subprocess.Popen[str]:
        """A server without a model. For the same blocks it has the same identity again."""
        identity = str(self.folder / blocks.replace(":", "-"))
        words = ["tests.monitor.peer", "--blocks", blocks, "--identity", identity]
        return self.start(*words, *(["--peers", *peers] if peers else []))


def said(process: subprocess.Popen[str]) -> list[str]:
    """The words of the first line that it says."""
    assert process.stdout is not None
    return process.stdout.readline().split()


def test_a_server_is_killed_and_comes_back_before_the_readers_eyes(visit: Visit) -> None:
    with ExitStack() as stack:
        processes = Processes(stack)
        _, _, address = said(processes.server("0:12"))
        victim = processes.server("12:24", address)
        watching = processes.start(
            *("swarm", "monitor", "--peers", address, "--port", "0"),
            *("--history", str(processes.folder / "h.sqlite")),
        )
        _, peer_id, _ = said(victim)
        page = visit(said(watching)[-1])
        page.get_by_role("heading", name="Qwen/Qwen3-8B is degraded.").wait_for()
        page.evaluate("window.same = true")
        page.wait_for_selector(f"#c-{peer_id}.online")

        victim.kill()
        page.get_by_role("heading", name="Qwen/Qwen3-8B is broken.").wait_for()
        page.wait_for_selector(f"#c-{peer_id}.lost")
        assert "12:24" in page.inner_text(".lede")
        assert "fell silent" in page.inner_text(".events li")
        assert page.text_content("#said") == "Qwen/Qwen3-8B is broken now."
        assert page.title().startswith("broken")

        processes.server("12:24", address)
        page.get_by_role("heading", name="Qwen/Qwen3-8B is degraded.").wait_for()
        page.wait_for_selector(f"#c-{peer_id}.online")
        assert page.evaluate("window.same"), "it was never loaded again"

        page.goto("about:blank")
        watching.send_signal(signal.SIGTERM)
        assert watching.wait(60) == 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_every_screen_and_reader(
    shown: Monitor, visit: Visit, tmp_path: Path, width: int, scheme: Scheme
) -> None:
    page = visit(shown.url, width, scheme)
    page.wait_for_selector(".contributors li")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(page) == []
    folder = screenshots(tmp_path)
    page.screenshot(path=folder / f"monitor-{width}-{scheme}.png", full_page=True)


def test_a_servers_page_has_all_that_is_known(shown: Monitor, visit: Visit) -> None:
    page = visit(f"{shown.url}/servers/{record(2).peer_id}")
    page.get_by_role("heading", name="lab 4090").wait_for()
    facts = page.inner_text(".facts")
    assert "poet" in facts
    assert "192.0.2.7:4000" in facts
    page.wait_for_selector(".list")
    assert "block-hour" in page.inner_text("#main")
    assert violations(page) == []
    shown.show([])
    page.get_by_text("It is gone.").wait_for()


def test_it_needs_no_mouse(shown: Monitor, visit: Visit) -> None:
    page = visit(shown.url)
    page.wait_for_selector(ONLINE)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the page"
    page.focus(".coverage")
    page.keyboard.press("End")
    card = page.locator(".card")
    last = page.get_attribute(".coverage", "aria-activedescendant")
    page.keyboard.press("Home")
    assert page.get_attribute(".coverage", "aria-activedescendant") != last
    assert "0:9" in card.inner_text()
    assert page.locator('[aria-selected="true"]').count() == 1
    page.keyboard.press("Escape")
    assert card.is_hidden()

    page.focus('input[value="1"]')
    page.keyboard.press("ArrowRight")
    assert "--num-blocks 3 " in page.inner_text(".command code")

    page.focus(".register th:nth-child(4) button")
    page.keyboard.press("Enter")
    assert page.get_attribute(".register th:nth-child(4)", "aria-sort") == "ascending"
    page.fill('input[type="search"]', "lab")
    assert page.locator(".register tbody tr").count() == 1

    page.focus(".coverage")
    page.keyboard.press("Enter")
    page.wait_for_url("**/servers/*")


def test_what_strangers_call_themselves_is_text_and_stays_where_it_is(
    shown: Monitor, visit: Visit
) -> None:
    evil = ModelId(f"{EVIL}/{TURNED}", "ef" * 32)
    shown.show([record(20, "0:4", 4, model=evil, public_name=EVIL)], 4, model=evil)
    page = visit(f"{shown.url}/models/{'ef' * 32}", 390)
    page.get_by_text("does not serve that model").wait_for()
    page.click("#models a:last-child")
    page.wait_for_selector(".register tbody tr")
    page.wait_for_selector(".contributors li")
    assert "<script>" in page.inner_text("h1")
    assert "\u202e" not in page.content()
    assert page.locator("main script, main img").count() == 0
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    turned = page.locator("bdi").all()
    assert turned
    assert all(
        each.evaluate("e => getComputedStyle(e).unicodeBidi") == "isolate" for each in turned
    )
    shown.show([], 4, model=evil)


def test_of_a_thousand_servers_only_what_changed_is_touched(it: Monitor, visit: Visit) -> None:
    many = ModelId("many", "cd" * 32)
    thousand = [r.model_copy(update={"model": many}) for r in records(1000, 64)]
    it.show(thousand, 64, model=many)
    page = visit(f"{it.url}/models/many")
    page.wait_for_selector("[role=option]:nth-child(1000)", state="attached")
    assert page.locator(".register tbody tr").count() == 25
    assert page.text_content(".pager span") == "1\u201325 of 1,000"
    page.evaluate("""() => {
        window.touched = new Set();
        new MutationObserver((changes) => changes.forEach((change) => {
            const bar = change.target.closest?.("[role=option]");
            if (bar) window.touched.add(bar.dataset.peer);
        })).observe(document.querySelector(".coverage"), { subtree: true, attributes: true });
    }""")
    victim = thousand[500].peer_id
    it.show(thousand, 64, model=many, silent=frozenset({victim}))
    page.wait_for_selector(f"#c-{victim}.lost", state="attached")
    assert page.evaluate("[...window.touched]") == [victim]
    it.show([], 64, model=many)


def test_a_monitor_that_began_anew_or_is_blind_is_told_so(shown: Monitor, visit: Visit) -> None:
    page = visit(shown.url)
    page.wait_for_selector(ONLINE)
    feed = shown.watcher.feed
    looked, shown.watcher.looked = shown.watcher.looked, 0.0
    feed.run = "another run"  # as after a restart
    shown.watcher.feed._whole.clear()
    shown.on_loop(tell(shown))
    page.get_by_role("alert").wait_for()
    assert "does not answer" in page.inner_text("#alarm")
    shown.watcher.looked = looked
    shown.on_loop(tell(shown))
    page.get_by_role("alert").wait_for(state="hidden")


def tell(shown: Monitor) -> Any:
    async def tell() -> None:
        shown.watcher.tell()

    return tell


def test_scripts_merge_as_the_monitor_means_it_and_lanes_never_overlap(
    shown: Monitor, visit: Visit
) -> None:
    states: list[dict[str, Any]] = [
        {},
        {"a": 1},
        {"a": {"b": [1, 2], "c": ""}},
        {"a": {"b": [2]}, "d": {}},
        {"a": [], "d": {"e": {"f": 0}}},
    ]
    cases = [[a, difference(a, b), b] for a in states for b in states]
    page = visit(shown.url)
    assert (
        page.evaluate(
            """async (cases) => {
            const { merge } = await import("/live.js");
            const told = (value) => JSON.stringify(value, Object.keys(flat(value)).sort());
            const flat = (value) => Object.assign({}, ...[value, ...Object.values(value)
                .filter((v) => v && typeof v === "object").map(flat)]);
            const after = (a, patch) => told(merge(structuredClone(a), patch));
            return cases.filter(([a, patch, b]) => after(a, patch) !== told(b));
        }""",
            cases,
        )
        == []
    )
    overlaps = """async (spans) => {
        const { Lanes } = await import("/packing.js");
        const lanes = new Lanes();
        spans.forEach(([a, b], i) => lanes.put(`p${i % 60}`, a, b));
        const bad = lanes.lanes.flatMap((lane) => lane.filter(([a, b, p]) =>
            lane.some(([c, d, q]) => p !== q && a < d && c < b)));
        return [bad.length, lanes.order().length];
    }"""
    spans = [[r.blocks.start, r.blocks.end] for r in records(200, 32)]
    assert page.evaluate(overlaps, spans) == [0, 60]
