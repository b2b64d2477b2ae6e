"""The chat page in a real browser: it talks, survives, keeps, and lets nothing in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from swarm.api.keys import Grant
from swarm.dht.records import SignedRecord
from swarm.errors import NoRoute
from tests.api.site import KEY, DemoSwarm, Script, fake_api, serving
from tests.browser import SCHEMES, WIDTHS, Scheme, Visit, screenshots, violations

TEXT = "And it came to pass in those days, that"
NAMES = ("Ada in Turin", "a lab in Nairobi", "Grace's old tower", "bee-box-3")


@pytest.fixture(scope="module")
def fake() -> Iterator[tuple[Script, str]]:
    script = Script()
    with serving(lambda: fake_api(script)) as url:
        yield script, url


@pytest.fixture
def script(fake: tuple[Script, str]) -> Script:
    fake[0].__init__()
    return fake[0]


@pytest.fixture
def named(whole: DemoSwarm) -> DemoSwarm:
    """Servers of the demo have names."""
    for server, name in zip(whole.swarm.servers, NAMES, strict=True):
        record = server.record.record.model_copy(update={"public_name": name})
        whole.swarm.router.servers[server.peer_id] = SignedRecord(record, server.record.data)
    return whole


def ask(page: Page, text: str) -> None:
    page.get_by_label("Your message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answered(page: Page, count: int = 1) -> Any:
    """The last of so many complete answers."""
    expect(page.locator(".said.assistant:not(.writing)")).to_have_count(count, timeout=60_000)
    return page.locator(".said.assistant .body").last


def kept(page: Page) -> list[Any]:
    return page.evaluate("() => JSON.parse(localStorage.getItem('swarm.conversations') ?? '[]')")


def settle(page: Page, **numbers: float) -> None:
    """Through the dialog, as people do."""
    page.get_by_role("button", name="Parameters").click()
    for name, value in numbers.items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_role("button", name="Done").click()


# A swarm behind it -------------------------------------------------------------------------------


def test_words_stream_and_the_same_ones_come_when_a_server_is_killed(
    named: DemoSwarm, address: str, visit: Visit
) -> None:
    expected = named.reference(TEXT, max_new_tokens=48)
    page = visit(address)
    settle(page, temperature=0, max_tokens=48)
    ask(page, TEXT)
    expect(page.locator("#legs li")).to_have_count(3)
    expect(page.locator("#legs")).to_contain_text("Ada in Turin")
    page.locator(".said.assistant .body").filter(
        has_text=re.compile(r"\S+ \S+ \S+ \S+ ")
    ).wait_for()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    gone = named.busy_middle()
    named.swarm.cut(gone)
    expect(page.locator("#route-note")).to_contain_text("not a word lost", timeout=60_000)
    left, came = NAMES[1:3] if named.swarm.servers[1] is gone else NAMES[2:0:-1]
    expect(page.locator("#route-note")).to_contain_text(
        f"\u2068{left}\u2069 was lost: \u2068{came}\u2069 took over"
    )
    answered(page)
    [conversation] = kept(page)
    assert conversation["messages"][1]["content"] == expected
    expect(page.locator(".events li")).to_contain_text("not a word lost")
    expect(page.locator(".figures")).to_contain_text(re.compile(r"48 tokens, [\d.]+ tokens/s"))
    expect(page.locator("#spoken")).to_contain_text(re.compile(r"\w"))  # for screen readers
    assert violations(page) == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_pictures(
    named: DemoSwarm, address: str, visit: Visit, tmp_path: Path, width: int, scheme: Scheme
) -> None:
    """And in each of them no serious finding of axe's."""
    page = visit(address, width=width, scheme=scheme)
    expect(page.locator("#starters button").first).to_be_visible()
    assert violations(page) == []
    folder = screenshots(tmp_path)
    page.screenshot(path=folder / f"chat-welcome-{width}-{scheme}.png")
    settle(page, max_tokens=48, temperature=0)  # so long that somebody still computes then
    ask(page, TEXT)
    page.locator(".said.assistant .body").filter(has_text=re.compile(r"\S+ \S+ ")).wait_for()
    named.swarm.cut(named.busy_middle())
    answered(page)
    expect(page.locator("#route-note")).to_contain_text("not a word lost")
    page.screenshot(path=folder / f"chat-{width}-{scheme}.png")
    assert violations(page) == []
    wide = page.evaluate("() => document.documentElement.scrollWidth")
    assert wide <= width, "the page scrolls sideways"


# What people do ----------------------------------------------------------------------------------


def test_conversations_are_kept_in_the_browser_and_deleted(
    fake: tuple[Script, str], script: Script, visit: Visit
) -> None:
    page = visit(fake[1])
    ask(page, "First thing")
    expect(answered(page)).to_have_text("of the world")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".said")).to_have_count(0)
    ask(page, "Second thing")
    answered(page)
    page.reload()
    picks = page.locator("#conversations .pick")
    expect(picks).to_have_text(["Second thing", "First thing"])
    picks.last.click()
    expect(page.locator(".said.user .body")).to_have_text("First thing")
    expect(page.locator(".said.assistant .body")).to_have_text("of the world")
    page.get_by_role("button", name="Delete “First thing”").click()
    page.locator("#sure").get_by_role("button", name="Delete").click()
    expect(picks).to_have_text(["Second thing"])
    page.get_by_role("button", name="Delete all").click()
    page.locator("#sure").get_by_role("button", name="Delete").click()
    expect(picks).to_have_count(0)
    assert kept(page) == []


def test_stop_again_and_edit(fake: tuple[Script, str], script: Script, visit: Visit) -> None:
    page = visit(fake[1])
    script.allowed = 2
    ask(page, "Once")
    expect(page.locator(".said.assistant .body")).to_have_text("of the")
    page.keyboard.press("Escape")
    assert script.streams[0].cancelled.wait(60)
    expect(answered(page)).to_have_text("of the")
    expect(page.locator(".figures")).to_contain_text("you stopped it")
    script.allowed = 99
    page.get_by_role("button", name="Write it again").click()
    expect(answered(page)).to_have_text("of the world")
    expect(page.locator(".said")).to_have_count(2)
    page.get_by_label("Your message", exact=True).press("ArrowUp")
    page.get_by_label("Your message, to be changed").fill("Twice")
    page.keyboard.press("Enter")
    answered(page)
    expect(page.locator(".said.user .body")).to_have_text("Twice")
    [conversation] = kept(page)
    assert [message["content"] for message in conversation["messages"]] == [
        "Twice",
        " of the world",
    ]
    assert script.asked[-1]["ids"] != script.asked[0]["ids"]


def test_parameters_arrive_and_stay(fake: tuple[Script, str], script: Script, visit: Visit) -> None:
    page = visit(fake[1])
    settle(page, temperature=0.35, top_p=0.6, max_tokens=77, seed=5)
    page.reload()
    ask(page, "Hello")
    answered(page)
    [asked] = script.asked
    expected = {"temperature": 0.35, "top_p": 0.6, "max_new_tokens": 77, "seed": 5}
    assert asked.items() >= expected.items()


def test_it_says_plainly_who_sees_what_is_written(
    fake: tuple[Script, str], script: Script, visit: Visit
) -> None:
    page = visit(fake[1], width=390)
    expect(page.locator(".privacy")).to_contain_text("their servers can see what you write")
    page.get_by_role("button", name="What exactly?").click()
    expect(page.locator("#privacy")).to_contain_text("Each server sees the hidden states")
    assert violations(page) == []


def test_the_keyboard_reaches_everything(
    fake: tuple[Script, str], script: Script, visit: Visit
) -> None:
    page = visit(fake[1], width=390)
    expect(page.locator("#starters button").first).to_be_visible()
    page.get_by_role("button", name="Show conversations").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Close the list of conversations")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Show conversations")).to_be_focused()
    seen: set[str] = set()
    for _ in range(14):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("() => document.activeElement.id || document.activeElement.tagName"))
    assert seen >= {"model", "open-parameters", "talk", "ask", "send", "open-privacy"}


def test_a_key_is_asked_for_and_kept(visit: Visit) -> None:
    with serving(lambda: fake_api(Script(), Grant(key=KEY))) as url:
        page = visit(url, expected=("401",))
        page.locator("#key-value").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_value("fake")
        ask(page, "Hello")
        expect(answered(page)).to_have_text("of the world")
        page.reload()
        expect(page.locator("#model")).to_have_value("fake")


def test_what_goes_wrong_is_said_where_the_answer_would_be(
    fake: tuple[Script, str], script: Script, visit: Visit
) -> None:
    script.text, script.failure, script.missing = "", NoRoute("x"), ["8:16"]
    page = visit(fake[1], expected=("503",))
    expect(page.locator("#trouble")).to_contain_text("Nobody serves blocks 8:16")
    ask(page, "Hello")
    expect(page.locator(".said .error")).to_contain_text("nobody serves blocks 8:16 now")
    script.__init__()
    page.get_by_role("button", name="Write it again").click()
    expect(answered(page)).to_have_text("of the world")
    expect(page.locator(".said .error")).to_have_count(0)


# Hostile words -----------------------------------------------------------------------------------

HOSTILE: dict[str, str] = {
    "script": "<script>window.hacked=1</script> done",
    "handler": "<img src=x onerror=window.hacked=1> <svg onload=window.hacked=1> done",
    "link": "[a](javascript:window.hacked=1) [b](data:text/html) <a href=javascript:x()>c</a> done",
    "picture": "![a](https://evil.example/a.png) <iframe src=https://evil.example></iframe> done",
    "style": "<style>*{display:none}</style><form action=//evil.example><input></form> done",
    "code": "```html\n<script>window.hacked=1</script>\n```\n done",
    "marks": "abc \u202egnp.exe\u202c \u2066x\u2069 \u0000\u0007 done",
    "long": "W" * 9_000 + " done",
    "nested": "> " * 400 + "done",
}


def test_hostile_words_are_words(fake: tuple[Script, str], script: Script, visit: Visit) -> None:
    page = visit(fake[1], width=390)
    settle(page, max_tokens=1024)
    for kind, text in HOSTILE.items():
        script.text = f" {text}"
        page.locator("#open-drawer").click()
        page.get_by_role("button", name="New conversation").click()
        ask(page, "Hello <b>there</b>")
        expect(answered(page)).to_contain_text("WWW" if kind == "long" else "done")
        assert page.evaluate("() => window.hacked") is None, kind
        body = page.locator(".said.assistant .body")
        hostile = body.locator("script, img, svg, iframe, form, input, style, [onerror]")
        assert hostile.count() == 0, kind
        for link in body.locator("a").all():
            assert re.match(r"https?:|mailto:", link.get_attribute("href") or "https:"), kind
        expect(page.locator(".said.user .body")).to_have_text("Hello <b>there</b>")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390, kind


def test_markdown_is_drawn(fake: tuple[Script, str], script: Script, visit: Visit) -> None:
    script.text = (
        "# Title\n\n- one\n- **two**\n\n```python\nprint(1 < 2)\n```\n\n[link](https://a.example)"
    )
    page = visit(fake[1])
    ask(page, "Hello")
    body = answered(page)
    expect(body.locator("h1")).to_have_text("Title")
    expect(body.locator("li strong")).to_have_text("two")
    expect(body.locator("pre code")).to_have_text("print(1 < 2)\n")
    expect(body.get_by_role("button", name="Copy")).to_be_visible()
    link = body.locator("a")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert violations(page) == []


def test_what_is_asked_before_the_models_are_known_waits_for_them(
    fake: tuple[Script, str], visit: Visit
) -> None:
    page = visit(fake[1])
    held: list[Route] = []
    page.route("**/v1/models", lambda route: held.append(route))
    with page.expect_request("**/v1/models"):
        page.reload()
    with page.expect_request("**/v1/models"):
        ask(page, "Hello")
    page.keyboard.press("Enter")  # impatiently: it is asked once
    for route in held:
        route.continue_()
    answered(page)
    expect(page.locator(".said.user")).to_have_count(1)


def test_a_hostile_name_of_a_server_stays_in_its_place(
    fake: tuple[Script, str], script: Script, visit: Visit
) -> None:
    name = "<img src=x onerror=hacked=1>\u202e\u0000evil" + "W" * 10_000
    hop: Callable[..., Any] = SimpleNamespace
    script.hops = [hop(blocks="0:24", peer_id="QmX", name=name, failure=None)]
    page = visit(fake[1], width=390)
    ask(page, "Hello")
    answered(page)
    shown = page.locator("#legs bdi").text_content() or ""
    assert shown.startswith("<img src=x onerror=hacked=1>evil")
    assert page.locator("#legs img").count() == 0
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
