"""`swarm-api` as people start it: says where it listens, survives a SIGKILL of a server, ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

from swarm.cli.api import api
from swarm.errors import UsageError
from swarm.local import LocalSwarm
from tests.api.site import client, tokenizer
from tests.nursery import QuickSwarm

TEXT = "And it came to pass in those days, that"


@contextmanager
def api_of(swarm: LocalSwarm) -> Generator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "swarm", "api", "--port", "0", "--peers", *swarm.peers]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on http://127.0.0.1:"), line
            yield line.split()[-1], process
        finally:
            process.kill()


def reference(tokens: int) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    from swarm.models.demo import DEMO_MODEL

    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    ids = tokenizer()(TEXT, return_tensors="pt").input_ids
    whole = model.generate(ids, do_sample=False, max_new_tokens=tokens)
    return tokenizer().decode(whole[0, ids.shape[1] :])


def test_a_server_is_killed_while_it_streams_and_the_words_are_the_same() -> None:
    expected = reference(24)
    with QuickSwarm(spans=["0:24", "0:24"], dtype="float32") as swarm, api_of(swarm) as started:
        url, process = started
        ask = client(url)
        [model] = ask.models.list().data
        stream = ask.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": TEXT}],
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_route": True},  # type: ignore[typeddict-unknown-key]
        )
        text, killed, peer = "", False, ""
        for chunk in stream:
            if ours := (chunk.model_extra or {}).get("swarm"):
                peer = ours["route"][0]["peer"]
            elif chunk.choices:
                text += chunk.choices[0].delta.content or ""
            if len(text) > 20 and not killed:
                killed = True
                [server] = [one for one in swarm.servers if one.peer_id == peer]
                swarm.kill(server.index)
        assert text == expected
        assert killed
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "which swarm"),
        ("--peers x --keys /nowhere/keys.toml", "cannot read /nowhere/keys.toml"),
        ("--peers x --api-key short", "--api-key 1.key"),
        ("--port 70000", "whole number from 0 to 65535"),
    ],
)
def test_what_is_wrong_with_the_command_is_said_in_a_sentence(line: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        api(line.split())
