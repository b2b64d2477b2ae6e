"""`swarm chat` shows what a swarm says, whatever that is, and tells programs about it."""

from __future__ import annotations

import argparse
import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swarm.cli.chat import _Answer, _Conversation
from swarm.client.recoveries import Cause, Loss, Recovery
from swarm.types import BlockRange

SAID = ["Sure", "\x1b[2J", "<script>", "\u202e", " line\n", "\tnext 👩\u200d🔧"]


class Words:
    """A tokenizer without a template: token i is SAID[i]."""

    chat_template = None

    def __call__(self, line: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.tensor([[0]]))

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(SAID[int(i)] for i in ids)


class Model:
    """Says all of it, and loses a server."""

    def generate(self, ids: torch.Tensor, session: Any, streamer: Any, **_: Any) -> None:
        streamer.put(ids)
        for token in range(len(SAID)):
            streamer.put(torch.tensor([token]))
        loss = Loss(Cause.BROKE, BlockRange(0, 2), "QmPeer")
        session.log.append(Recovery((loss,), 3, 0.0, 0.1))
        streamer.end()


def talk(monkeypatch: pytest.MonkeyPatch, *, as_json: bool) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n"))
    session = SimpleNamespace(
        output_ids=None, log=[], hops=[SimpleNamespace(endpoint="127.0.0.1:1")] * 2
    )
    arguments = argparse.Namespace(tokens=9, temperature=0.0, json=as_json)
    conversation = _Conversation(Model(), Words(), arguments)
    while conversation.turn(session):
        pass


def test_what_a_model_says_cannot_drive_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, as_json=False)
    out = capsys.readouterr().out
    assert "Sure\ufffd[2J<script>\ufffd line\n\tnext 👩\u200d🔧\n" in out
    assert "\x1b" not in out


def test_programs_get_an_object_for_each_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, as_json=True)
    [line] = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["text"] == "".join(SAID)
    assert told["tokens"] == len(SAID)
    assert told["servers"] == ["127.0.0.1:1"] * 2
    assert told["lost"] == ["broke"]
    assert set(told) == {"text", "tokens", "seconds", "servers", "lost"}


def test_people_are_told_what_happened_meanwhile() -> None:
    answer = _Answer("x", 10, 4.0, ("a", "b"), ("deadline",))
    assert str(answer) == "(10 tokens, 2.5 a second, 2 servers, one was replaced (deadline))"
