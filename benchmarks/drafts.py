"""What drafts save where links are slow: an assistant's, and those looked up in the prompt.

The bundled model goes on with unseen text, through the relay that `links` uses. The assistant is
the same model in bfloat16, here: right almost always, so that what it brings is an upper bound.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from benchmarks.child import Child
from benchmarks.codec import held_out
from benchmarks.figures import ratios
from benchmarks.hop import tapped
from benchmarks.lab import Lab, connect, generate, timed
from benchmarks.links import LINKS, behind_relay
from swarm.messages import Step
from swarm.wire import decode

PROMPT = 128  # tokens
SPANS = ("0:8", "8:16", "16:24")
SLOW = ("100 Mbit/s, 4 ms", "100 Mbit/s, 100 ms")


def measure(lab: Lab) -> None:
    lab.clear()
    texts = torch.cat(held_out(lab.runs), dim=1)[0].split(1024)
    with behind_relay(None, SPANS) as (swarm, relay):
        remote = connect(None, swarm)
        generate(remote, texts[0][None, :8], 4)
        for link in SLOW:
            _over(lab, remote, relay, link, texts)


def _over(lab: Lab, remote: Any, relay: Child, link: str, texts: tuple[torch.Tensor, ...]) -> None:
    megabits, round_trip = LINKS[link]
    relay.ask(f"{megabits} {round_trip / 2}")
    assistant = copy.deepcopy(lab.local("demo")).bfloat16()
    ways: dict[str, dict[str, Any]] = {
        "plainly": {},
        "prompt lookup": {"prompt_lookup_num_tokens": 8},
        "an assistant": {"assistant_model": assistant},
    }
    took: dict[str, list[float]] = {way: [] for way in ways}
    steps: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(lab.runs):
        prompt = texts[run][None, :PROMPT]
        for way, more in ways.items():
            with tapped(remote) as tap:
                sequences, seconds = timed(remote, prompt, lab.tokens, **more)
                sent = [isinstance(decode(seen.frame), Step) for seen in tap.sent]
            lab.check("demo", sequences, PROMPT)
            took[way].append(1e3 * seconds / lab.tokens)
            steps[way].append(lab.tokens / sum(sent))
            lab.say(f"{link}, {way}, ms per token", run, took[way][-1])
    for way in ways:
        lab.note(f"demo model, {link}, {way}, token", "ms", took[way])
        if way != "plainly":
            lab.note(f"demo model, {link}, {way}, tokens per step", "", steps[way])
            quotient = ratios(took["plainly"], took[way])
            lab.note(f"demo model, {link}, {way}, faster", "x", quotient)
