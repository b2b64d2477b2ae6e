"""`python -m tests.odd CLOCK LIFETIME COMMAND ...`: a `swarm` command on an odd machine.

Its clock is CLOCK seconds ahead, its records live for LIFETIME seconds, and it looks for lost peers
each second. The command `client PEERS` is one of ours: a client that does what it is told, by line.
"""

from __future__ import annotations

import sys
import time
from typing import Any

true_time = time.time
CLOCK = float(sys.argv[1]) if len(sys.argv) > 3 else 0.0
time.time = lambda: true_time() + CLOCK  # before anybody keeps a reference to the other one


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


class Teller:
    """A streamer that says each token in a line."""

    def put(self, value: object) -> None:
        import torch

        assert isinstance(value, torch.Tensor)
        if value.numel() == 1:  # not the prompt
            say(int(value))

    def end(self) -> None:
        say("end")


def client(peers: list[str]) -> None:
    """The first line tells when to join. Then `tell N`: N tokens greedily, a line each, and `end`;
    `see`: who is there, in one line."""
    import torch

    from swarm import AutoDistributedModelForCausalLM
    from swarm.client.network import SwarmNetwork
    from swarm.config import ClientConfig, ClientTimeouts
    from tests.machines import PROMPT, see

    sys.stdin.readline()
    config = ClientConfig(timeouts=ClientTimeouts(refresh=0.2))
    model: Any = AutoDistributedModelForCausalLM.from_pretrained(
        None, initial_peers=peers, config=config
    )
    say("ready")
    for line in sys.stdin:
        match line.split():
            case ["tell", count]:
                length = {"max_new_tokens": int(count), "min_new_tokens": int(count)}
                ids = torch.tensor([PROMPT])
                model.generate(ids, do_sample=False, streamer=Teller(), **length)
            case _:
                say(*see(SwarmNetwork.connect(peers, None)))


def main() -> int:
    from functools import partial

    import swarm.config
    import swarm.dht.node
    from swarm.cli import main as swarm_main

    lifetime, command, *rest = sys.argv[2:]
    swarm.config.ServerLimits = partial(  # type: ignore[misc, assignment]
        swarm.config.ServerLimits, record_lifetime=int(lifetime)
    )
    swarm.dht.node._REJOIN_SECONDS = 1.0  # type: ignore[reportPrivateUsage]
    if command == "client":
        client(rest[0].split(","))
        return 0
    sys.argv[1:] = [command, *rest]
    return swarm_main()


if __name__ == "__main__":
    sys.exit(main())
