"""A server shows its numbers and its health while it serves, if it was asked to."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from swarm.errors import UsageError
from swarm.server.choice import ServerConfig
from swarm.server.node import ServerNode
from tests.server.nodes import play


async def fetch(port: int, path: str) -> str:
    def ask() -> str:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            return answer.read().decode()

    return await asyncio.to_thread(ask)


def test_a_node_shows_metrics_and_health(config: ServerConfig) -> None:
    async def body() -> None:
        async with ServerNode.running(replace(config, metrics_port=0)) as node:
            assert node.metrics_port
            page = await fetch(node.metrics_port, "/metrics")
            samples = {
                sample.name: sample
                for family in text_string_to_metric_families(page)
                for sample in family.samples
            }
            about = samples["swarm_server_info"].labels
            assert (about["blocks"], about["state"]) == ("0:4", "online")
            assert about["peer_id"] == node.record.peer_id
            assert samples["swarm_blocks"].value == 4
            assert samples["swarm_kv_free_tokens"].value > 0
            assert samples["swarm_sessions_open"].value == 0
            assert await fetch(node.metrics_port, "/healthz") == "online\n"

    play(body())


def test_a_port_that_is_taken_is_said_before_weights_are_read(config: ServerConfig) -> None:
    async def body() -> None:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        async with server:
            taken = server.sockets[0].getsockname()[1]
            with pytest.raises(UsageError, match="choose another --metrics-port"):
                async with ServerNode.running(replace(config, metrics_port=taken)):
                    pass

    play(body())
