"""LocalSwarm's processes do as they are told, and none outlives the swarm or its owner."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from swarm import LocalSwarm
from swarm.cli import main
from swarm.client.network import SwarmNetwork
from swarm.client.session import RemoteSession
from swarm.errors import UsageError
from swarm.identity import SwarmKey
from swarm.models.demo import DEMO_MODEL
from tests.nursery import Program, QuickSwarm

KEY = SwarmKey.generate()


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Commands set logging up, with this test's stderr in it."""
    before = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers[:] = before


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    """Private, so that keys are passed everywhere; tests add what they end.

    Each process is one that others forked, here; below they start as they do for everybody.
    """
    with QuickSwarm(spans=["0:16", "16:24"], swarm_key=KEY) as swarm:
        yield swarm


def status(swarm: LocalSwarm, key: SwarmKey, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("SWARM_PEERS", f" , {swarm.peers[0]} ")
    monkeypatch.setenv("SWARM_KEY", key.text())
    return main(["status", "--json"])


def test_everybody_is_there(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(swarm, KEY, monkeypatch) == 0
    [model] = json.loads(capsys.readouterr().out)["models"]
    assert (model["name"], model["num_blocks"]) == ("swarm-demo", 24)
    assert model["health"] == "degraded"  # one server for each block
    assert model["missing"] == []
    seen = {(s["blocks"], s["address"], s["peer_id"]) for s in model["servers"]}
    assert {(str(s.blocks), s.address, s.peer_id) for s in swarm.servers[:2]} <= seen


def test_without_the_key_nobody_sees_anything(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(swarm, SwarmKey.generate(), monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "check the swarm key" in err


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }} "
    "{% else %}A {{ m.content | upper }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A{% endif %}"
)  # earlier answers are rewritten, as templates do that drop a model's thoughts


@dataclass
class Chat:
    """What is typed, how many positions each step sent, and where Ctrl-C is pressed."""

    lines: list[str]
    interrupt_after: int = 0  # tokens of the first answer
    sent: list[int] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        step, put = RemoteSession.step, TextStreamer.put
        shown: list[Any] = []

        async def spied(
            session: RemoteSession, hidden: torch.Tensor, *inputs: Any, **more: Any
        ) -> Any:
            self.sent.append(hidden.shape[1])
            return await step(session, hidden, *inputs, **more)

        def pressed(screen: TextStreamer, value: Any) -> None:
            put(screen, value)
            shown.append(value)
            if len(shown) == self.interrupt_after + 1:  # the prompt is shown to it first
                raise KeyboardInterrupt

        def typed(prompt: str) -> str:
            if not self.lines:
                raise EOFError
            return self.lines.pop(0)

        monkeypatch.setattr(RemoteSession, "step", spied)
        if self.interrupt_after:
            monkeypatch.setattr(TextStreamer, "put", pressed)
        monkeypatch.setattr("builtins.input", typed)


@pytest.mark.parametrize(("template", "interrupt_after"), [(False, 0), (False, 2), (True, 0)])
def test_chat_sends_only_what_is_new(
    swarm: LocalSwarm,
    template: bool,
    interrupt_after: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "swarm-demo"
    shutil.copytree(DEMO_MODEL, model, copy_function=os.symlink)
    if template:
        (model / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(model)
    local: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lines = ["And God said", "and it was"]
    messages: list[dict[str, str]] = []
    ids, sent, answers = torch.empty(1, 0, dtype=torch.long), [], []
    for number, line in enumerate(lines):
        count = interrupt_after if interrupt_after and not number else 6
        known = ids
        if template:
            messages.append({"role": "user", "content": line})
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
        else:
            ids = torch.cat(
                [
                    ids,
                    tokenizer(line, return_tensors="pt", add_special_tokens=not number).input_ids,
                ],
                1,
            )
        length = min(known.shape[1], ids.shape[1])
        same = int((known[0, :length] == ids[0, :length]).long().cumprod(0).sum())
        sent.append(ids.shape[1] - min(same, max(0, known.shape[1] - 1)))
        prompt = ids.shape[1]
        ids = local.generate(ids, do_sample=False, max_new_tokens=count)
        answers.append(tokenizer.decode(ids[0, prompt:], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})

    chat = Chat(lines, interrupt_after)
    chat.install(monkeypatch)
    monkeypatch.setenv("SWARM_PEERS", swarm.peers[0])
    monkeypatch.setenv("SWARM_KEY", KEY.text())
    assert main(["chat", str(model), "--tokens", "6", "--temperature", "0"]) == 0
    SwarmNetwork.leave_all()
    text = " ".join(capsys.readouterr().out.split())
    assert text.endswith(" ".join(" ".join(answers).split()))
    steps = [count for count in chat.sent if count > 1]
    if interrupt_after:  # what was said is in doubt, and so the whole text is sent once more
        assert len(steps) == 2
    else:
        assert steps == sent


def test_ctrl_c_at_the_prompt_of_a_chat_leaves_politely(swarm: LocalSwarm) -> None:
    env = os.environ | {"SWARM_PEERS": swarm.peers[0], "SWARM_KEY": KEY.text()}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with Program(["swarm", "chat"], env=env, **pipes) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "swarm-demo: say something (Ctrl-D ends)\n"
            assert process.stdout.read(2) == "> "
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, rest, errors) == (0, "\n", "")


def test_servers_come_freeze_and_go(swarm: LocalSwarm) -> None:
    index = swarm.add("20:24")
    server = swarm.servers[index]
    assert server.alive
    assert server.address.startswith("127.0.0.1:")
    swarm.freeze(index)
    assert psutil.Process(server.pid).status() == psutil.STATUS_STOPPED
    swarm.thaw(index)
    daemons = [p for p in psutil.Process(server.pid).children(recursive=True) if p.is_running()]
    assert daemons  # libp2p's, and who watches over it
    assert swarm.stop(index) == 0
    assert not server.alive
    assert psutil.wait_procs(daemons, timeout=30)[1] == []


def test_what_a_server_complains_about_is_shown() -> None:
    swarm = LocalSwarm(spans=["0:2"], server_args=["--bogus"])
    with pytest.raises(UsageError, match=r"unrecognized arguments: --bogus"):
        swarm.__enter__()
    assert not any(server.alive for server in swarm.servers)


OWNER = """
import sys, time
from swarm import LocalSwarm
with LocalSwarm(spans=["0:2"]) as swarm:
    swarm.freeze(0)
    print(swarm._folder, flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_an_owner_that_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    assert folder.parent == Path(tempfile.gettempdir())
    family = [p for p in psutil.process_iter() if _folder_of(p) == str(folder)]
    assert len(family) >= 4  # bootstrap node and server, each with its p2pd
    guardians = psutil.Process(owner.pid).children()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert psutil.wait_procs(family + guardians, timeout=30)[1] == []
    assert not folder.exists()


def _folder_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("TMPDIR")
    except psutil.Error:
        return None
